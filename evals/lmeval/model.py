"""One of the suite's engines, as a model of lm-eval; every answer is kept in an append-only log as it comes.

Text becomes tokens as in lm-eval's own `hf` model (lm_eval/models/huggingface.py, lm_eval 0.4.13): context and
continuation are encoded together and split, a begin token that the text already has is not added again, and what does
not fit the window is dropped on the left. Two things differ:

* The window. A sequence to score has at most `max_model_len - 1` tokens, which every engine takes; lm-eval's `hf`
  takes two more, so that only texts beyond the window are scored with slightly less context.
* Settings that no engine has, such as beams, are refused instead of passed over.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TextIO

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from gift.cli import UserError, progress
from gift.data import DATE
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams, sample_seed
from gift.models import first_line
from gift.records import JsonlLog, sha256_json

KEY = ("made_by", "request", "copy")
SCORED_TOGETHER = 512  # log-likelihoods per call of the engine, and per write of the log
NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}
CERTAIN = math.log(0.5) + 1e-3  # nats: a token this probable is the most probable one

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation."""
Answer = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request of lm-eval's and which copy of it: of sampled ones each draws its own, others are answered once."""

    instance: Any
    request: str
    copy: int = 0

    @property
    def where(self) -> str:
        """The request's place, for people."""
        return f"lm_eval:{self.instance.task_name}, document {self.instance.doc_id}"


class EngineLM(TemplateLM):
    """Answers lm-eval's requests from the log, and by the engine what the log lacks.

    `engine` builds the engine when it is first needed. `settings` is what else the answers depend on (weights, dtype):
    answers made under other settings stay in the log and are not used. A log-likelihood's `is_greedy` takes another
    pass of the engine; it is found where `is_greedy` says that a metric reads it, and False elsewhere. `batch_size` is
    the number of samples that go to the engine in one call and into the log in one write, so that a continued run
    gives the engine the same batches; None is for engines that keep their rows full by themselves. Progress is shown on
    `terminal` under `name`, also where stderr is redirected.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        tokenizer: PreTrainedTokenizerBase,
        log: JsonlLog,
        *,
        settings: Mapping[str, Any],
        seed: int = 0,
        is_greedy: bool = True,
        batch_size: int | None = None,
        name: str = "lm_eval",
        terminal: TextIO | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.log = log
        self.name = name
        self.seed = seed
        self.is_greedy = is_greedy
        self.batch_size = batch_size
        self.asking = False
        """Whether an answer is being found: what is raised then is no fault of lm-eval's."""
        self._build = engine
        self._engine: Engine | None = None
        self._made_by = sha256_json({**settings, "seed": seed, "is_greedy": is_greedy})
        self._terminal = terminal or sys.stderr
        self._answers = {log.key_of(row): row for row in log.rows}

    @property
    def engine(self) -> Engine:
        """The engine, built on first use. Raises GenerationError where it cannot be: no task could go on."""
        if self._engine is None:
            try:
                self._engine = self._build()
            except UserError as error:
                raise GenerationError(str(error)) from error
        return self._engine

    # -----------------------------------------------------------------------------------------------------------------
    # What lm-eval asks of a tokenizer

    @property
    def max_length(self) -> int:
        """How many tokens the model reads to predict one: a sequence to score has one more."""
        return self.engine.max_model_len - 2

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin token, or the end token where there is none."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval calls a cache of rendered prompts by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; unless told otherwise with a begin token if the tokenizer adds one and the text has none yet."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises UserError where the template refuses it, e.g. a system prompt."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                date_string=DATE,
            )
        except (TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
            roles = ", ".join(turn["role"] for turn in chat_history)
            raise UserError(f"{self.name}: the chat template refuses {roles}: {first_line(error)}") from error
        return str(text)

    # -----------------------------------------------------------------------------------------------------------------
    # The three kinds of requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability, in nats, of each continuation after its context, and whether it is what greedy decoding
        says."""
        asked = [Asked(each, sha256_json([each.request_type, *each.args])) for each in requests]
        answers = self._answered(asked, self._scored)
        return [(answer["logp"], bool(answer["greedy"])) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability, in nats, of each text, every token predicted once and from as much context as fits."""
        asked = [Asked(each, sha256_json([each.request_type, *each.args])) for each in requests]
        return [answer["logp"] for answer in self._answered(asked, self._rolled)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A response to each context. Equal requests that sample draw apart."""
        asked = []
        copies: dict[str, int] = defaultdict(int)
        for instance in requests:
            request = sha256_json([instance.request_type, *instance.args])
            sampled = sampling_params(instance.args[1], f"lm_eval:{instance.task_name}").temperature > 0
            asked.append(Asked(instance, request, copies[request]))
            copies[request] += sampled
        return [answer["response"] for answer in self._answered(asked, self._generated)]

    def _answered(
        self, asked: Sequence[Asked], answer: Callable[[list[Asked]], Iterator[list[tuple[Asked, Answer]]]]
    ) -> list[Answer]:
        """The answers in order, those that the log lacks by `answer`, which yields what is to be written together."""
        keys = [(self._made_by, each.request, each.copy) for each in asked]
        missing = {key: each for key, each in zip(keys, asked, strict=True) if key not in self._answers}
        total = len(set(keys))
        self.asking = True
        with (
            contextlib.redirect_stderr(self._terminal),
            progress(total, self.name, unit="request", initial=total - len(missing)) as bar,
        ):
            for found in answer(list(missing.values())) if missing else ():
                rows = [self._row(each, content) for each, content in found]
                self.log.append(rows)
                self._answers.update((self.log.key_of(row), row) for row in rows)
                bar.update(len(rows))
        self.asking = False
        return [self._answers[key] for key in keys]

    def _row(self, asked: Asked, content: Answer) -> Answer:
        instance = asked.instance
        return {
            "made_by": self._made_by,
            "request": asked.request,
            "copy": asked.copy,
            "type": instance.request_type,
            "task": instance.task_name,
            "doc": instance.doc_id,
            **content,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Scoring

    def _scored(self, missing: list[Asked]) -> Iterator[list[tuple[Asked, Answer]]]:
        for batch in chunks(missing, SCORED_TOGETHER):
            scores = super().loglikelihood([each.instance for each in batch], disable_tqdm=True)
            yield [
                (each, {"continuation": each.instance.args[1], "logp": logp, "greedy": greedy})
                for each, (logp, greedy) in zip(batch, scores, strict=True)
            ]

    def _rolled(self, missing: list[Asked]) -> Iterator[list[tuple[Asked, Answer]]]:
        for batch in chunks(missing, SCORED_TOGETHER):
            windows = [self._windows(each.instance.args[0]) for each in batch]
            scores = iter(self._logps([pair for pairs in windows for pair in pairs]))
            yield [
                (each, {"logp": math.fsum(logp for _ in pairs for logp in next(scores))})
                for each, pairs in zip(batch, windows, strict=True)
            ]

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [(tuple(context), tuple(rest)) for context, rest in map(make_disjoint_window, windows)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool | None]]:
        """Log-probability of each continuation, and whether it is greedy decoding's: None where nobody asks."""
        pairs = [self._fitted(text, *ids) for text, *ids in requests]
        logps = self._logps(pairs)
        greedy = self._greedy(pairs, logps) if self.is_greedy else [None] * len(pairs)
        return list(zip(map(math.fsum, logps), greedy, strict=True))

    def _fitted(self, text: tuple[str, str], context: list[int], continuation: list[int]) -> Pair:
        """The pair without what does not fit the window, on the left."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"{self.name}: the continuation {text[1]!r:.60} has {len(continuation)} tokens; the model's window"
                f" has room for {self.max_length}"
            )
        return tuple((context or [self.prefix_token_id])[-room:]), tuple(continuation)

    def _logps(self, pairs: Sequence[Pair]) -> list[list[float]]:
        """The log-probability of each token of the continuations."""
        scores = self.engine.score([context + continuation for context, continuation in pairs])
        return [score[len(context) - 1 :] for score, (context, _) in zip(scores, pairs, strict=True)]

    def _greedy(self, pairs: Sequence[Pair], logps: Sequence[Sequence[float]]) -> list[bool]:
        """Whether each continuation is what greedy decoding says after its context.

        Which token is the most probable, log-probabilities of others do not tell; so one is decoded from each context,
        as long as its longest continuation, unless every token of a continuation has more than half the probability.
        """
        certain = [all(logp > CERTAIN for logp in tokens) for tokens in logps]
        longest: dict[tuple[int, ...], int] = defaultdict(int)
        for (context, continuation), sure in zip(pairs, certain, strict=True):
            if not sure:
                longest[context] = max(longest[context], len(continuation))
        if not longest:
            return certain
        params = SamplingParams(max_tokens=max(longest.values()), temperature=0, ignore_end=True)
        requests = [Request(context, seed=0, max_tokens=length) for context, length in longest.items()]
        samples = self.engine.generate(requests, params)
        decoded = {context: sample.token_ids for context, sample in zip(longest, samples, strict=True)}
        return [
            sure or tuple(decoded[context][: len(continuation)]) == continuation
            for (context, continuation), sure in zip(pairs, certain, strict=True)
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def _generated(self, missing: list[Asked]) -> Iterator[list[tuple[Asked, Answer]]]:
        groups: dict[SamplingParams, list[Asked]] = defaultdict(list)
        for each in missing:
            groups[sampling_params(each.instance.args[1], each.where)].append(each)
        for params, group in groups.items():
            for batch in chunks(group, self.batch_size or len(group)):
                prompts = [self._prompt(each, params) for each in batch]
                requests = [
                    Request(ids, sample_seed(self.seed, "lm_eval", each.request, each.copy))
                    for each, (ids, _) in zip(batch, prompts, strict=True)
                ]
                samples = self.engine.stream(requests, params)
                for found in [sorted(samples, key=itemgetter(0))] if self.batch_size else ([each] for each in samples):
                    yield [(batch[n], self._response(batch[n], sample, params, prompts[n][1])) for n, sample in found]

    def _prompt(self, asked: Asked, params: SamplingParams) -> tuple[tuple[int, ...], int]:
        """The context's token ids, without what leaves no room for the response, and how many of them that is."""
        room = self.engine.max_model_len - params.max_tokens
        if room < 1:
            raise UserError(
                f"{asked.where}: asks for responses of {params.max_tokens} tokens, the model's window is"
                f" {self.engine.max_model_len}; ask for fewer with --max-tokens"
            )
        ids = self.tok_encode(asked.instance.args[0]) or [self.prefix_token_id]
        return tuple(ids[-room:]), max(0, len(ids) - room)

    def _response(self, asked: Asked, sample: Sample, params: SamplingParams, cut: int) -> Answer:
        context, gen_kwargs = asked.instance.args
        text = sample.text
        if text is None:
            text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        for stop in params.stop:
            text = text.partition(stop)[0]
        return {
            "context": context,
            "gen_kwargs": gen_kwargs,
            "response": text,
            "finish_reason": sample.finish_reason,
            "tokens": len(sample.token_ids),
            "context_tokens_cut": cut,
        }


def sampling_params(gen_kwargs: Mapping[str, Any], where: str) -> SamplingParams:
    """An engine's parameters for what lm-eval calls generation kwargs.

    Greedy unless `do_sample` or a temperature says otherwise; `do_sample` alone means temperature 1. All tokens are
    kept unless top_k, top_p or min_p is given. Raises UserError, naming `where`, for a setting the engines lack.
    """
    given = dict(normalize_gen_kwargs(dict(gen_kwargs)))
    until, max_tokens, do_sample = (given.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    temperature = float(given.pop("temperature", 1.0))
    top_p, min_p = float(given.pop("top_p", 1.0)), float(given.pop("min_p", 0.0))
    top_k = max(0, int(given.pop("top_k", 0)))  # vLLM's -1 is no limit either
    refused = [f"{name}={value!r}" for name, value in given.items() if NO_EFFECT.get(name) != value]
    if refused:
        raise UserError(
            f"{where}: generation settings that the engines do not have: {', '.join(refused)}; leave them"
            " out in a copy of the task's YAML (--include-path)"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if do_sample else 0.0,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=tuple(text for text in until if text),
    )


def chunks(asked: list[Asked], size: int) -> Iterator[list[Asked]]:
    """The list in pieces of `size`."""
    return (asked[start : start + size] for start in range(0, len(asked), size))
