"""Generation engines: requests in, samples out, the same for rollouts and for evaluation.

Four engines speak one protocol: `hf` (transformers, in this process), `vllm` (vLLM, in this process or in worker
processes), `server` (a vLLM server on some machine) and `replay` (stored generations). What a request draws depends on
its prompt, its seed and the sampling parameters alone, so that a sample is the same, up to rounding, in any batch, in
any order and after any interruption.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gift.cli import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length", "repetition"]


class GenerationError(UserError):
    """Generation cannot go on: memory ran out, a worker or server died. What was yielded before is whole."""


class StaleWeightsError(GenerationError):
    """The engine samples from other weights than those it was last given."""


@dataclass(frozen=True)
class RepetitionGuard:
    """Ends a response whose last tokens are `count` copies of one pattern of at most `max_pattern` tokens."""

    max_pattern: int = 32
    count: int = 8

    def __post_init__(self) -> None:
        if self.max_pattern < 1 or self.count < 2:
            raise UserError("a repetition guard needs max_pattern of at least 1 and count of at least 2")

    def fires(self, token_ids: Sequence[int]) -> bool:
        """Whether the response so far ends in such copies."""
        for size in range(1, min(self.max_pattern, len(token_ids) // self.count) + 1):
            tail = token_ids[len(token_ids) - size * self.count :]
            if tail[size:] == tail[:-size]:
                return True
        return False


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; temperature 0 is greedy decoding. Raises UserError for values that mean nothing.

    Applied in this order: temperature, min_p, top_k, top_p. top_k 0, top_p 1 and min_p 0 keep all tokens; min_p drops
    tokens less probable than that share of the most probable one. A response ends at the model's end tokens (unless
    `ignore_end`), at a token of `stop_ids`, or once its text contains one of the strings `stop`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    repetition_guard: RepetitionGuard | None = None
    logps: bool = False
    """Whether samples carry log-probabilities."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be a positive number, or 0 to keep all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must lie between 0 and 1")
        if "" in self.stop:
            raise UserError("stop holds an empty string, which every text contains")


@dataclass(frozen=True)
class Request:
    """One sample wanted: the prompt's token ids, the sample's own seed, and its token limit if below the params'.

    `key` says which sample it is, e.g. (task, item, run, sample): stored generations are found by it.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int | None = None
    key: tuple[str | int, ...] = ()

    def limit(self, params: SamplingParams) -> int:
        """How many tokens the response may have, the window aside."""
        return params.max_tokens if self.max_tokens is None else min(self.max_tokens, params.max_tokens)


@dataclass(frozen=True)
class Sample:
    """One completion: its token ids with the end token if it was reached, why it ended, log-probability per token.

    `logps`, in nats, are those of the distribution sampled from, after temperature and truncation; under greedy
    decoding those of the untempered softmax. They are [] unless asked for. `stop_reason` is the string or the token of
    `stop_ids` that ended the response; None for the model's own end tokens. `text` is given where the completion came
    as text: its tokens are then what a tokenizer makes of it, if anything.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logps: list[float]
    stop_reason: str | int | None = None
    text: str | None = None


class Engine(ABC):
    """What rollouts and evaluation ask of a generation engine."""

    max_model_len: int
    """The window: tokens of prompt and response together."""

    @property
    def model_window(self) -> int:
        """The model's own window, which `max_model_len` falls short of where the engine has no memory for it."""
        return self.max_model_len

    @abstractmethod
    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """The requests' numbers and samples, as they finish.

        Raises UserError before the first sample for a request that cannot be served, GenerationError where generation
        breaks down.
        """

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order. Raises as `stream` does."""
        found = dict(self.stream(requests, params))
        return [found[number] for number in range(len(requests))]

    @abstractmethod
    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probabilities, in nats and untempered, of each sequence's tokens from the second on, given those before.

        Raises UserError where the engine has no model.
        """

    @abstractmethod
    def update_weights(self, model: PreTrainedModel) -> None:
        """Samples from these weights from now on. The model is whole: under ZeRO stage 3 gathered, adapters and all."""

    def sleep(self) -> bool:
        """Gives back the accelerator's memory until `update_weights`, where the engine can; tells whether it did."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds. May be called again."""


def check_request(
    number: int,
    request: Request,
    params: SamplingParams,
    window: int,
    *,
    model_window: int | None = None,
    remedy: str = "",
) -> int:
    """How many tokens the response to this request may have: its limit, cut by the window.

    Raises UserError, naming the request, for an empty prompt, one that fills the window, and a limit below 1; with the
    remedy, where an engine's window would cut a response that the model's own leaves room for.
    """
    name = f"request {number}" + (f" ({', '.join(map(str, request.key))})" if request.key else "")
    room = window - len(request.prompt_ids)
    if room < 1 or not request.prompt_ids:
        raise UserError(
            f"{name}: a prompt of {len(request.prompt_ids)} tokens; it must have at least 1 and leave room in the"
            f" model's window of {window}"
        )
    limit = request.limit(params)
    if limit < 1:
        raise UserError(f"{name}: max_tokens is {limit}; it must be at least 1")
    whole = min(limit, (model_window or window) - len(request.prompt_ids))
    if room < whole:
        raise UserError(
            f"{name}: the engine's window of {window} would cut the response at {room} tokens, the model's of"
            f" {model_window} allows {whole}; {remedy}"
        )
    return min(limit, room)


def sample_seed(*parts: str | int) -> int:
    """A 63-bit seed from what identifies a sample, e.g. (run seed, task, item, run, sample).

    Hashing, unlike counting up, leaves no overlap between the streams of two runs.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def completion_text(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The text of a completion, without the end token, stop token or stop string it ended at."""
    if sample.text is not None:
        return sample.text
    at_token = sample.finish_reason == "stop" and not isinstance(sample.stop_reason, str)
    ids = sample.token_ids[:-1] if at_token else sample.token_ids
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.partition(sample.stop_reason)[0] if isinstance(sample.stop_reason, str) else text
