"""Generation engines: requests in, samples out, the same for rollouts and for evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import UserError, nearest

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; temperature 0 is greedy decoding. Raises UserError for values that mean nothing."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Request:
    """One sample wanted: the prompt's token ids, the sample's own seed, and its token limit if below the params'."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """One completion: its token ids with the end token if it was reached, why it ended, log-probability per token.

    Log-probabilities, in nats, are those of the distribution sampled from, after temperature and top-p; under greedy
    decoding those of the untempered softmax.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logps: list[float]


class Engine(Protocol):
    """What rollouts and evaluation ask of a generation engine."""

    max_model_len: int

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order, from the request's own stream: the same, up to rounding, in any batch."""

    def update_weights(self, model: PreTrainedModel) -> None:
        """Generates from these weights from now on."""

    def close(self) -> None:
        """Frees what the engine holds."""


def sample_seed(*parts: str | int) -> int:
    """A 63-bit seed from what identifies a sample, e.g. (run seed, task, item, run, sample).

    Hashing, unlike counting up, leaves no overlap between the streams of two runs.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def completion_text(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The text of a completion, without the end token it stopped at."""
    ids = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def build_engine(name: str, checkpoint: Path, *, dtype: str = "auto") -> Engine:
    """The engine `name` over a checkpoint folder, on the accelerator if there is one.

    Raises UserError for an unknown engine or an unusable checkpoint.
    """
    from gift.generation.hf import HFEngine
    from gift.models import device, load_model

    if name == "hf":
        return HFEngine(load_model(checkpoint, dtype=dtype).to(device()))
    raise UserError(f"unknown generation engine {name!r}{nearest(name, ['hf'])}; engines: hf")
