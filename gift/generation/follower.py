"""Sampling from a policy in training: an engine that is given the newest weights, and checked, before it samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gift.distributed import gathered_from_ranks, rank
from gift.engine import TrainingEngine
from gift.generation import Engine, Request, Sample, SamplingParams
from gift.generation.hf import HFEngine
from gift.generation.probe import TOLERANCE, Probe, model_logps
from gift.generation.server import ServerEngine
from gift.recipe import Generation


class Follower:
    """Samples from the policy that `training` trains, as it is at that moment. All ranks call its methods together.

    The hf engine computes with the policy's own module, and needs no probe. vLLM has a copy of it in every rank; with
    `tensor_parallel` n, n ranks share one, and serve their requests together. A server is shared by all ranks, and
    given its weights by the first.
    """

    def __init__(self, training: TrainingEngine, engine: Engine, settings: Generation, probe: Probe | None) -> None:
        self.training = training
        self.engine = engine
        self.settings = settings
        self.probe = probe
        self.probe_gap: float | None = None
        """Engine against trainer on the probe at the last synchronization, in nats per token; None before it."""
        self.sync_seconds = 0.0
        """What synchronizations have taken since this was last set to 0."""
        self._version: int | None = None

    @property
    def in_place(self) -> bool:
        """Whether the engine samples from the module that is trained."""
        return isinstance(self.engine, HFEngine)

    @property
    def max_model_len(self) -> int:
        """The engine's window: tokens of prompt and response together."""
        return self.engine.max_model_len

    @property
    def model_window(self) -> int:
        """The engine's own window: evaluation during training makes do with that."""
        return self.engine.max_model_len

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """As Engine.stream, except that all samples come at the end."""
        yield from enumerate(self.generate(requests, params))

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request of this rank, in order. Raises as the engine does, and StaleWeightsError."""
        if self.in_place:
            with self.training.gathered():
                return self.engine.generate(requests, params)
        self._synchronize()
        size = self.settings.tensor_parallel
        if size == 1:
            samples = self.engine.generate(requests, params)
        else:  # the ranks of a group must ask for the same
            first = rank() // size * size
            group = gathered_from_ranks(list(requests))[first : first + size]
            before = sum(map(len, group[: rank() - first]))
            together = self.engine.generate([request for part in group for request in part], params)
            samples = together[before : before + len(requests)]
        if self.engine.sleep():
            self._version = None
        return samples

    def close(self) -> None:
        """Closes the engine."""
        self.engine.close()

    def _synchronize(self) -> None:
        """Hands the policy's weights to the engine if they have changed, and makes sure that they arrived."""
        if self._version == self.training.version:
            return
        started = time.perf_counter()
        assert self.probe is not None
        model = self.training.model
        with self.training.gathered():
            expected = model_logps(model, self.probe.sequences)
            if not isinstance(self.engine, ServerEngine) or rank() == 0:
                self.engine.update_weights(model)
        if isinstance(self.engine, ServerEngine):
            self.engine.version = gathered_from_ranks(self.engine.version)[0]
        self.probe_gap = self.probe.check(self.engine.score(self.probe.sequences), expected)
        self._version = self.training.version
        self.sync_seconds += time.perf_counter() - started


def follow_in_place(training: TrainingEngine, tokenizer: PreTrainedTokenizerBase) -> Follower:
    """The hf engine with its default settings, on the policy's own module."""
    return Follower(training, HFEngine(training.model, tokenizer), Generation(), None)


def follow(
    training: TrainingEngine,
    tokenizer: PreTrainedTokenizerBase,
    settings: Generation,
    checkpoint: Path,
    sequences: Sequence[Sequence[int]],
) -> Follower:
    """What RL samples from: an engine over `checkpoint`, the folder the policy began with, that follows `training`.

    A few of `sequences`, token ids of text like that the policy writes, serve to check the weights. Raises UserError
    where what the engine needs is not installed, or it cannot serve this model.
    """
    engine: Engine
    if settings.engine == "server":
        engine = ServerEngine(settings)  # whatever it serves now: it is given the policy's weights first
    elif settings.engine == "vllm":
        from gift.generation.vllm import VLLMEngine

        engine = VLLMEngine(checkpoint, settings, dtype=training.settings.dtype, in_training=True)
    else:
        engine = HFEngine(training.model, tokenizer, cache_gb=settings.cache_gb, max_rows=settings.max_rows)
    tolerance = settings.probe_tolerance or TOLERANCE[training.settings.dtype]
    room = engine.max_model_len - 1  # vLLM also wants to sample a token
    return Follower(training, engine, settings, Probe([sequence[:room] for sequence in sequences], tolerance))
