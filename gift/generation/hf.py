"""The transformers engine: a compact sampling loop over any decoder with full attention; needs nothing beside torch.

Against `generate`: a prompt is prefilled once for all its samples, keys and values are written in place instead of
being copied every step, finished rows leave the batch, and each sample draws from its own stream, so that neither batch
size nor order changes what is sampled (up to rounding in the matrix products).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from gift.cli import UserError
from gift.generation import Request, Sample, SamplingParams
from gift.models import backbone, end_ids, logit_map
from gift.vocab.head import LogitMap

DRAWS = 64  # uniforms drawn per row at a time
GROWTH = 64  # smallest number of positions by which the key/value store grows
COMPACT = 0.75  # ended rows leave the batch once no more than this share of it is still going


class SlabLayer(CacheLayerMixin):
    """One layer's keys and values [rows, heads, capacity, width], filled up to `length` and returned as views."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self.length == 0:
            self.keys, self.values = key_states, value_states
        else:
            if end > self.keys.shape[-2]:
                extra = max(GROWTH, self.length // 2)
                self.keys, self.values = self._grown(self.keys, extra), self._grown(self.values, extra)
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, slab: Tensor, extra: int) -> Tensor:
        rows, heads, _, width = slab.shape
        grown = slab.new_empty(rows, heads, self.length + extra, width)
        grown[:, :, : self.length] = slab[:, :, : self.length]
        return grown

    def select_rows(self, index: Tensor) -> None:
        """Keeps the rows `index` [rows'], which may repeat a row."""
        self.keys = self.keys[:, :, : self.length].index_select(0, index)
        self.values = self.values[:, :, : self.length].index_select(0, index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


@dataclass
class Row:
    """A sample on its way: its request, its limit, and what it has so far."""

    index: int
    request: Request
    max_tokens: int
    stream: np.random.Generator
    token_ids: list[int]
    logps: list[float]


class HFEngine:
    """Samples from a transformers model in this process.

    The model is used as it is, not copied: a trainer's module that changes in place needs no `update_weights`. Raises
    UserError for an architecture whose attention this engine would get wrong.
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int = 512) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_model_len: int = model.config.max_position_embeddings
        check_attention(model)
        self.end_ids = torch.tensor(end_ids(model))

    def update_weights(self, model: PreTrainedModel) -> None:
        """Copies the weights of `model`, unless it is the very model this engine samples from."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Nothing to free: the model belongs to the caller."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order. Raises UserError for a prompt that leaves no room in the model's window."""
        samples: list[Sample | None] = [None] * len(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(requests, params):
                for index, sample in self._generate_batch(batch, params):
                    samples[index] = sample
        finally:
            self.model.train(was_training)
        return [sample for sample in samples if sample is not None]

    def _batches(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Row]]:
        """Rows with equal prompts beside each other, sorted by prompt length so that little is padded."""
        rows = [self._row(index, request, params) for index, request in enumerate(requests)]
        rows.sort(key=lambda row: (len(row.request.prompt_ids), row.request.prompt_ids, row.index))
        return [rows[start : start + self.max_rows] for start in range(0, len(rows), self.max_rows)]

    def _row(self, index: int, request: Request, params: SamplingParams) -> Row:
        room = self.max_model_len - len(request.prompt_ids)
        if room < 1 or not request.prompt_ids:
            raise UserError(
                f"request {index}: a prompt of {len(request.prompt_ids)} tokens; it must have at least 1 and leave room"
                f" in the model's window of {self.max_model_len}"
            )
        limit = params.max_tokens if request.max_tokens is None else min(request.max_tokens, params.max_tokens)
        if limit < 1:
            raise UserError(f"request {index}: max_tokens is {limit}; it must be at least 1")
        stream = np.random.Generator(np.random.Philox(key=request.seed))
        return Row(index, request, min(limit, room), stream, [], [])

    def _generate_batch(self, rows: list[Row], params: SamplingParams) -> list[tuple[int, Sample]]:
        device = self.model.device
        logits, cache, mask, positions = self._prefill(rows)
        ends = self.end_ids.to(device)
        done: dict[int, Sample] = {}
        step = 0
        while True:
            if step % DRAWS == 0:
                draws = torch.from_numpy(np.stack([row.stream.random(DRAWS) for row in rows])).to(device)
            tokens, logps = draw(logits, draws[:, step % DRAWS], params)
            ended = torch.isin(tokens, ends)
            step += 1
            for row, token, logp, at_end in zip(rows, tokens.tolist(), logps.tolist(), ended.tolist(), strict=True):
                if row.index not in done:
                    row.token_ids.append(token)
                    row.logps.append(logp)
                    if at_end or step == row.max_tokens:
                        done[row.index] = Sample(row.token_ids, "stop" if at_end else "length", row.logps)
            live = [number for number, row in enumerate(rows) if row.index not in done]
            if not live:
                return list(done.items())
            if len(live) <= COMPACT * len(rows):  # a copy of the whole store: worth it only for many rows at once
                rows = [rows[number] for number in live]
                index = torch.tensor(live, device=device)
                tokens, positions, draws = tokens[index], positions[index], draws[index]
                mask = None if mask is None else mask[index]
                for layer in cache.layers:
                    layer.select_rows(index)
            # Ended rows still in the batch run on; their positions must not leave the model's table.
            positions = (positions + 1).clamp(max=self.max_model_len - 1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, positions[:, None], cache)

    def _prefill(self, rows: list[Row]) -> tuple[Tensor, Cache, Tensor | None, Tensor]:
        """Runs each distinct prompt once, left-padded to the longest, and repeats its state for each of its samples.

        Returns logits [rows, V], the cache, a mask [rows, T] of real positions (None if nothing is padded) and each
        row's last position [rows].
        """
        device = self.model.device
        prompts: list[tuple[int, ...]] = []
        owner = []
        for row in rows:
            if not prompts or prompts[-1] != row.request.prompt_ids:
                prompts.append(row.request.prompt_ids)
            owner.append(len(prompts) - 1)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(lengths.max())
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.arange(width, device=device) >= (width - lengths)[:, None]
        positions = (torch.arange(width, device=device) - (width - lengths)[:, None]).clamp(min=0)
        cache = Cache(layers=[SlabLayer() for _ in range(self.model.config.num_hidden_layers)])
        padded = not bool(mask.all())
        logits = self._forward(ids, mask if padded else None, positions, cache)
        index = torch.tensor(owner, device=device)
        for layer in cache.layers:
            layer.select_rows(index)
        return logits[index], cache, mask[index] if padded else None, lengths[index] - 1

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """fp32 logits [rows, V] at the last of `ids` [rows, T]; `mask` [rows, past + T] tells real from padded."""
        attention = None if mask is None else attention_mask(mask, ids.shape[1])
        hidden = backbone(self.model)(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        return LogitMap(**logit_map(self.model)).apply(head(hidden[:, -1]).float())


def check_attention(model: PreTrainedModel) -> None:
    """Raises UserError unless every layer attends to all earlier positions, through torch's own kernels.

    Masks here are boolean, which `eager` would add to the scores, and know no sliding windows.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) or math.inf
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or window < config.max_position_embeddings:
        raise UserError(
            f"{config.model_type}: the hf engine handles full attention only, not sliding windows or states"
        )
    if config._attn_implementation != "sdpa":
        raise UserError(
            f"the hf engine needs attention 'sdpa', this model is loaded with {config._attn_implementation!r}"
        )


def attention_mask(mask: Tensor, queries: int) -> Tensor:
    """Boolean [rows, 1, queries, T]: causal and not padded; a padded query sees itself, or its softmax would be NaN."""
    total = mask.shape[1]
    query = torch.arange(total - queries, total, device=mask.device)
    key = torch.arange(total, device=mask.device)
    causal = key[None, :] <= query[:, None]
    itself = key[None, :] == query[:, None]
    return ((causal & mask[:, None, :]) | itself)[:, None]


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens [rows], and their log-probabilities, from logits [rows, V] by inverse CDF at `uniform` [rows] in [0, 1).

    Sums run in float64, so that a large vocabulary loses none of its tail. The log-probability is that of the
    distribution drawn from, after temperature and top-p; under greedy decoding that of the untempered softmax.
    """
    if params.temperature == 0:
        logp = logits.log_softmax(-1)
        tokens = logp.argmax(-1)
        return tokens, logp.gather(-1, tokens[:, None])[:, 0]
    logp = (logits / params.temperature).log_softmax(-1)
    if params.top_p < 1:
        logp = nucleus(logp, params.top_p)
    cumulative = logp.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logp.gather(-1, tokens)[:, 0]


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities [rows, V] renormalised over the fewest tokens whose mass reaches top_p, -inf elsewhere."""
    ordered, order = logp.sort(-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, mass_before < top_p)
    return logp.masked_fill(~kept, float("-inf")).log_softmax(-1)
