"""What is measured, and how: a suite is a set of tasks, a protocol is how to sample their items; both are data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from evals.tasks import Task, math, nano
from gift.cli import UserError, nearest
from gift.generation import RepetitionGuard, SamplingParams

Named = TypeVar("Named")


@dataclass(frozen=True)
class Protocol:
    """How every item is sampled: `runs` times `samples_per_run` completions of at most `max_tokens` tokens.

    temperature 0 is greedy decoding; gift.generation.SamplingParams explains the other settings. pass@1 is the mean
    accuracy of the runs; pass@k comes from all samples of an item.
    """

    name: str
    temperature: float
    top_p: float
    max_tokens: int
    runs: int
    samples_per_run: int
    # With defaults, which are what a manifest from before these settings existed means.
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    repetition_guard: RepetitionGuard | None = None

    @property
    def samples(self) -> int:
        """Completions of one item."""
        return self.runs * self.samples_per_run

    @property
    def sampling(self) -> SamplingParams:
        """What an engine needs to know of it. Raises UserError for a value that means nothing."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "repetition_guard")
        return SamplingParams(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Raises UserError naming a setting that makes no sense."""
        for name in ("runs", "samples_per_run"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.sampling.temperature == 0 and self.samples > 1:
            raise UserError(
                f"greedy decoding gives the same completion {self.samples} times;"
                " give --runs 1 --samples-per-run 1, or a temperature above 0"
            )

    def recorded(self) -> dict[str, Any]:
        """Every setting but the name, as a manifest holds it."""
        settings = {name: value for name, value in asdict(self).items() if name != "name"}
        return {**settings, "stop": list(self.stop)}

    def described(self) -> str:
        """How a completion is sampled, in words; what is left at its default is not mentioned."""
        words = [f"temperature {self.temperature:g}", f"top-p {self.top_p:g}", f"at most {self.max_tokens} tokens"]
        words += [f"top-k {self.top_k}"] * bool(self.top_k) + [f"min-p {self.min_p:g}"] * bool(self.min_p)
        words += [f"stop {text!r}" for text in self.stop]
        if (guard := self.repetition_guard) is not None:
            words.append(f"ended after {guard.count} copies of a pattern of up to {guard.max_pattern} tokens")
        return ", ".join(words)


UNRECORDED = {entry.name: entry.default for entry in fields(Protocol) if entry.default is not MISSING} | {"stop": []}
"""What a manifest that lacks these settings was sampled with."""

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Section 4.1 and Appendix E.3; top_p is not stated there
        Protocol("paper", temperature=0.6, top_p=1.0, max_tokens=8192, runs=4, samples_per_run=1),
        Protocol("greedy", temperature=0.0, top_p=1.0, max_tokens=8192, runs=1, samples_per_run=1),
        Protocol("nano", temperature=0.6, top_p=1.0, max_tokens=128, runs=4, samples_per_run=2),
    )
}


@dataclass(frozen=True)
class Suite:
    """Tasks that share a prompt template and, unless asked otherwise, a protocol and the hf engine's batch size."""

    name: str
    tasks: Mapping[str, Task]
    prompt: str
    protocol: Protocol
    batch_size: int

    def select(self, names: Iterable[str]) -> list[Task]:
        """The tasks so named, in the suite's order; all of them for no names. Raises UserError for an unknown one."""
        wanted = {find(self.tasks, name, f"task of suite {self.name!r}").name for name in names}
        return [task for task in self.tasks.values() if task.name in wanted or not wanted]


SUITES = {
    suite.name: suite
    for suite in (
        Suite("nano", nano.TASKS, "{problem}", PROTOCOLS["nano"], batch_size=512),
        Suite("math", math.TASKS, math.PROMPT, PROTOCOLS["paper"], batch_size=64),
    )
}


def find(known: Mapping[str, Named], name: str, what: str) -> Named:
    """The entry `name`. Raises UserError that names the nearest one and all of them."""
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return known[name]
