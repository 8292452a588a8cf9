"""Engines for test_workers.py: what a worker's process builds, by name, in place of a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gift.cli import UserError
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams
from gift.recipe import Generation


class Echo(Engine):
    """Answers with the prompt and the seed, after `seconds`; text is what the process is like."""

    max_model_len = 64

    def __init__(self, settings: Generation, checkpoint: Path, *, dtype: str, seconds: float = 0.0) -> None:
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        known = {"pid": os.getpid(), "data_parallel": settings.data_parallel, "dtype": dtype, "folder": str(checkpoint)}
        self.known = json.dumps({**known, **{name: os.environ.get(name) for name in names}})
        self.folder = checkpoint
        self.seconds = seconds

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        for number, request in reversed(list(enumerate(requests))):
            time.sleep(self.seconds)
            yield number, self.sample(request)

    def sample(self, request: Request) -> Sample:
        return Sample([*request.prompt_ids, request.seed], "stop", [], text=self.known)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return [[float(token) for token in sequence[1:]] for sequence in sequences]

    def update_weights(self, model: Any) -> None:
        raise AssertionError

    def close(self) -> None:
        if self.folder.is_dir():
            (self.folder / str(os.getpid())).write_text("closed")


class OfSeed(Echo):
    """Some seeds are special."""

    def sample(self, request: Request) -> Sample:
        match request.seed:
            case 10_001:
                raise UserError("seed 10001 is not to be had")
            case 10_002:
                raise GenerationError("out of memory")
            case 10_003:
                raise RuntimeError("a bug")
            case 10_004:
                os._exit(3)
        return super().sample(request)


def fast(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    return OfSeed(settings, checkpoint, dtype=dtype)


def slow(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    return OfSeed(settings, checkpoint, dtype=dtype, seconds=0.03)


def uneven(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    """The first worker to start is five times as fast as others."""
    try:
        (checkpoint / "first").mkdir()
    except FileExistsError:
        return OfSeed(settings, checkpoint, dtype=dtype, seconds=0.05)
    return OfSeed(settings, checkpoint, dtype=dtype, seconds=0.01)


def stuck(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    return OfSeed(settings, checkpoint, dtype=dtype, seconds=1000)


def unbuildable(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    raise UserError(f"{checkpoint}: no such checkpoint folder")


def exiting(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    os._exit(4)


def with_child(settings: Generation, checkpoint: Path, *, dtype: str) -> Engine:
    """Has a process of its own, which inherits the worker's sockets and outlives it, as vLLM's may."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    (checkpoint / f"child-{os.getpid()}").write_text(str(child.pid))
    return slow(settings, checkpoint, dtype=dtype)
