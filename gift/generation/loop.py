"""Continuous batching: which rows are in the batch, and what one step of theirs is."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.generation import FinishReason, GenerationError, Request, Sample, SamplingParams
from gift.generation.draw import draw
from gift.generation.ends import Repetitions, StopStrings
from gift.generation.store import Prefilled, RowStore, decode, prefill, prompt_batches
from gift.models import end_ids, logit_map
from gift.vocab.head import LogitMap

DRAWS = 64  # uniforms drawn per row at a time
PREFILL_TOKENS = 4096  # of a piece of prefill, padding included; a longer prompt is a piece of its own
PADDED_TOKENS = 512  # of these, how many may be padding
LOGITS = 2**25  # made at a time: 128 MiB
ADMISSION = 0.125  # waiting rows enter once they are this share of the batch they would enter


@dataclass
class Row:
    """A sample on its way: its request, its limit, and what it has so far."""

    number: int
    request: Request
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = np.random.Generator(np.random.Philox(key=self.request.seed))
        self.prompt = self.request.prompt_ids
        self.widest = len(self.prompt) + self.limit

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next token."""
        at = len(self.token_ids) % DRAWS
        if at == 0:
            self.draws = self.stream.random(DRAWS).tolist()
        return self.draws[at]


class Loop:
    """Rows on their way through a model, in a batch that they enter and leave."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Iterable[Row],
        params: SamplingParams,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        cache_bytes: float,
        max_rows: int,
    ) -> None:
        self.model = model
        self.params = params
        self.max_rows = max_rows
        self.max_tokens = int(cache_bytes / prefill(model, [(0,)]).nbytes)
        self.logit_map = LogitMap(**logit_map(model))
        self.ends = frozenset() if params.ignore_end else frozenset(end_ids(model))
        self.stop_ids = frozenset(params.stop_ids)
        self.stops = StopStrings(tokenizer, params.stop) if tokenizer and params.stop else None
        self.repetitions = Repetitions(params.repetition_guard) if params.repetition_guard else None
        # Equal prompts beside each other; little is padded where lengths are alike.
        self.waiting = deque(sorted(rows, key=lambda row: (len(row.prompt), row.prompt, row.number)))
        self.live: list[Row] = []
        self.store = RowStore()
        self.carried: Prefilled | None = None  # the last prompt that entered, if more rows of it wait

    @property
    def unfinished(self) -> bool:
        """Whether rows are left."""
        return bool(self.live or self.waiting)

    def step(self) -> list[tuple[int, Sample]]:
        """Lets rows enter with their first tokens, or draws one more token for every row; returns what has ended."""
        room = self._room()
        if room and (room == len(self.waiting) or room >= ADMISSION * (len(self.live) + room)):
            first = len(self.live)
            return self._advance(first, self._admit(room))
        tokens = [row.token_ids[-1] for row in self.live]
        lengths = [len(row.prompt) + len(row.token_ids) - 1 for row in self.live]
        self._reserve(max(lengths) + 1, used=len(self.live))
        return self._advance(0, decode(self.model, tokens, lengths, self.store))

    def _room(self) -> int:
        """How many of the waiting rows fit into the batch, as wide as its widest row may become."""
        if not self.waiting:
            return 0
        live = len(self.live)
        widest = max((row.widest for row in self.live), default=0)
        room = 0
        for row in itertools.islice(self.waiting, self.max_rows - live):
            widest = max(widest, row.widest)
            if (live + room + 1) * widest > self.max_tokens and live + room > 0:
                break
            room += 1
        return room

    def _reserve(self, columns: int, used: int) -> None:
        """Makes room in the store for all rows, of which the first `used` are there."""
        self.store.reserve(len(self.live), columns, widest=max(row.widest for row in self.live), used=used)

    def _admit(self, count: int) -> Tensor:
        """Moves the next `count` rows into the batch; returns the states [count, H] that their first tokens follow."""
        first = len(self.live)
        entering = [self.waiting.popleft() for _ in range(count)]
        self.live += entering
        self._reserve(len(entering[-1].prompt), used=first)
        if self.repetitions:
            self.repetitions.add(count)
        samples = Counter(row.prompt for row in entering)
        states = []
        for prompts in self._prefilled(list(samples)):
            owner = [number for number, prompt in enumerate(prompts.prompts) for _ in range(samples[prompt])]
            index = torch.tensor(owner, device=self.model.device)
            self.store.insert(first, prompts, index)
            states.append(prompts.states[index])
            first += len(owner)
        shared = bool(self.waiting) and self.waiting[0].prompt == entering[-1].prompt
        self.carried = prompts.last() if shared else None
        return torch.cat(states)

    def _prefilled(self, prompts: list[tuple[int, ...]]) -> Iterator[Prefilled]:
        """These prompts, in order; none that is still known is computed again."""
        if self.carried and self.carried.prompts[0] == prompts[0]:
            yield self.carried
            prompts = prompts[1:]
        for batch in prompt_batches(prompts, PREFILL_TOKENS, PADDED_TOKENS):
            yield prefill(self.model, batch)

    def _advance(self, first: int, states: Tensor) -> list[tuple[int, Sample]]:
        """Draws a token for each row from `first` on, at states [rows, H]; returns what has ended, which leaves."""
        rows = self.live[first:]
        tokens = self._draw(rows, states)
        strings = self.stops.find([row.token_ids for row in rows]) if self.stops else itertools.repeat(None)
        repeats = self.repetitions.step(first, tokens) if self.repetitions else itertools.repeat(False)
        ended: dict[int, tuple[int, Sample]] = {}
        for place, (row, string, repeated) in enumerate(zip(rows, strings, repeats), first):  # noqa: B905
            if end := self._end(row, string, repeated):
                finish_reason, stop_reason = end
                ended[place] = row.number, Sample(row.token_ids, finish_reason, row.logps, stop_reason)
        if ended:
            self._leave(ended)
        return list(ended.values())

    def _draw(self, rows: Sequence[Row], states: Tensor) -> list[int]:
        """Draws, and adds to the rows, their next tokens. Raises GenerationError if the logits are not finite."""
        greedy = self.params.temperature == 0
        uniform = torch.tensor([0.0 if greedy else row.uniform() for row in rows], dtype=torch.float64)
        head = self.model.get_output_embeddings()
        vocab = head.weight.shape[0]
        size = max(1, LOGITS // vocab)
        drawn = [
            draw(self.logit_map.apply(head(some).float()), numbers, self.params)
            for some, numbers in zip(states.split(size), uniform.to(states.device).split(size), strict=True)
        ]
        columns = [torch.stack([column.double() for column in pair if column is not None]) for pair in drawn]
        found = torch.cat(columns, dim=1).tolist()  # one transfer
        tokens = [int(token) for token in found[0]]
        if max(tokens) >= vocab:
            raise GenerationError("the model's logits are not finite: its weights are damaged, or training diverged")
        for row, token in zip(rows, tokens, strict=True):
            row.token_ids.append(token)
        for row, logp in zip(rows, found[1] if self.params.logps else (), strict=False):
            row.logps.append(logp)
        return tokens

    def _end(self, row: Row, string: str | None, repeated: bool) -> tuple[FinishReason, str | int | None] | None:
        """Why the row's last token ends it, if it does; which reason goes first is vLLM's (v1/core/sched/utils.py)."""
        token = row.token_ids[-1]
        if token in self.ends:
            return "stop", None
        if token in self.stop_ids:
            return "stop", token
        if string is not None:
            return "stop", string
        if len(row.token_ids) == row.limit:
            return "length", None
        return ("repetition", None) if repeated else None

    def _leave(self, places: Iterable[int]) -> None:
        """Takes these rows out of the batch; the last ones move into their places."""
        gone = set(places)
        left = len(self.live) - len(gone)
        targets = [place for place in gone if place < left]
        sources = [place for place in range(left, len(self.live)) if place not in gone]
        if targets:
            self.store.move(*torch.tensor([sources, targets], device=self.model.device))
        order = list(range(left))
        for source, target in zip(sources, targets, strict=True):
            order[target] = source
        self.live = [self.live[place] for place in order]
        if self.repetitions:
            self.repetitions.select(order)
