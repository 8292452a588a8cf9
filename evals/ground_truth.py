"""What the canonical programs of HumanEval+ and MBPP+ return: computed in the sandbox when first needed, then cached.

A cached file belongs to one problem, one version of Python and one kind of processor: the times in it set the limits
that programs run under (the longer of 1 s and four times the canonical program's time, as in evalplus), and those of a
faster machine would fail right programs.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import platform
import sys
import threading
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from evals.oracles import Dataset, Expected, NotDataError, decode, tolerances
from evals.sandbox import Limits, Program, Sandbox, StoppedError
from gift.caches import cache_root
from gift.records import atomic_path, sha256_json

FORMAT = 1  # of the cached files, and of what is asked of the sandbox
LEAST_SECONDS, TIMES_CANONICAL = 1.0, 4.0  # evalplus/config.py
CANONICAL_SECONDS = 900.0  # for all inputs of a problem, on a busy machine


@dataclass(frozen=True)
class Problem:
    """A function to write, and how it is tested. `groups` are the argument lists, the benchmark's own then the plus.

    `preamble` is what a program may take for granted: imports and helpers that the prompt shows. `key` names the
    problem's content.
    """

    dataset: Dataset
    id: str
    entry_point: str
    preamble: str
    canonical: str
    groups: tuple[Sequence[Sequence[Any]], Sequence[Sequence[Any]]]
    atol: float
    key: str


@dataclass(frozen=True)
class Truth:
    """The expected outputs of a problem's groups of inputs."""

    expected: tuple[tuple[Expected, ...], ...]
    atol: float

    @functools.cached_property
    def tolerances(self) -> list[list[float]]:
        """The absolute tolerance at every input of every group."""
        return [tolerances(group, self.atol) for group in self.expected]

    @functools.cached_property
    def limits(self) -> list[list[float]]:
        """How long a program may take over every input of every group (seconds)."""
        return [[max(LEAST_SECONDS, TIMES_CANONICAL * each.seconds) for each in group] for group in self.expected]

    def total_s(self, limits: Limits) -> float:
        """How long a program may take over all inputs (seconds): what the sandbox allows, or more if they take long."""
        return max(limits.total_s, TIMES_CANONICAL * sum(each.seconds for group in self.expected for each in group))


class NoTruthError(Exception):
    """A canonical program that does not answer its inputs."""


class Truths:
    """The truths of the problems that are asked for. Any thread may ask; one at a time computes a given one."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.known: dict[str, Truth] = {}
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def of(self, problem: Problem) -> Truth:
        """The problem's truth. Raises NoTruthError."""
        with self.locks[problem.key]:
            if problem.key not in self.known:
                path = self.path(problem)
                truth = _read(path, problem)
                if truth is None:
                    truth = self._compute(problem)
                    _write(path, truth)
                self.known[problem.key] = truth
            return self.known[problem.key]

    def path(self, problem: Problem) -> Path:
        """The problem's file in the cache."""
        machine = [FORMAT, sys.version_info[:2], platform.machine(), _processor()]
        return cache_root() / "evalplus" / f"{sha256_json([problem.key, machine])}.truth"

    def _compute(self, problem: Problem) -> Truth:
        program = Program([problem.canonical], problem.entry_point, problem.groups)
        replies = []
        try:
            for reply in self.sandbox.run(program, CANONICAL_SECONDS):
                if reply.kind == "raised":
                    raise NoTruthError(f"the canonical program raised {reply.payload.decode()}")
                replies.append(Expected.of(reply))
        except StoppedError as stopped:
            raise NoTruthError(f"the canonical program {stopped}") from stopped
        base = len(problem.groups[0])
        return Truth((tuple(replies[:base]), tuple(replies[base:])), problem.atol)


@functools.cache
def _processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def _read(path: Path, problem: Problem) -> Truth | None:
    """A truth from its file; None if there is none, or it is damaged."""
    try:
        rows = decode(zlib.decompress(path.read_bytes()))
        expected = tuple(tuple(Expected(*row) for row in group) for group in rows)
    except (OSError, zlib.error, NotDataError, TypeError):
        return None
    if [len(group) for group in expected] != [len(group) for group in problem.groups]:
        return None
    return Truth(expected, problem.atol)


def _write(path: Path, truth: Truth) -> None:
    rows = [[list(astuple(each)) for each in group] for group in truth.expected]
    with atomic_path(path) as scratch:
        scratch.write_bytes(zlib.compress(marshal.dumps(rows, 2), 1))
