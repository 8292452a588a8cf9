"""What is measured, and how: a suite is a set of tasks, a protocol is how to sample their items; both are data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from evals.tasks import Item, Task, TaskData, chat, choice, code, math, nano
from gift.cli import UserError, nearest
from gift.generation import RepetitionGuard, SamplingParams
from gift.recipe import build

Named = TypeVar("Named")
PLACE = re.compile(r"\{\w+\}")
"""What a task puts something in place of in its template."""


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
    temperatures: dict[str, float] = field(default_factory=dict)
    """Other temperatures than `temperature`, by the item's category."""
    system: str | None = None
    """A system prompt, before the first turn."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Templates of the user turn in place of the tasks' own, by task or by group of tasks."""

    @property
    def samples(self) -> int:
        """Completions of one item."""
        return self.runs * self.samples_per_run

    @property
    def sampling(self) -> SamplingParams:
        """What an engine needs to know of it. Raises UserError for a value that means nothing."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "repetition_guard")
        return SamplingParams(**{name: getattr(self, name) for name in names})

    def temperature_of(self, item: Item) -> float:
        """At which temperature an item is sampled."""
        return self.temperatures.get(item.category, self.temperature)

    def check(self) -> None:
        """Raises UserError naming a setting that makes no sense."""
        for name in ("runs", "samples_per_run"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        for category, temperature in self.temperatures.items():
            if temperature < 0:
                raise UserError(f"temperatures.{category} is {temperature:g}; give 0 or more")
        if self.sampling.temperature == 0 and self.samples > 1:
            raise UserError(
                f"greedy decoding gives the same completion {self.samples} times;"
                " give --runs 1 --samples-per-run 1, or a temperature above 0"
            )

    def recorded(self) -> dict[str, Any]:
        """Every setting but its name, as a manifest holds it; the templates are recorded with the tasks."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("name", "prompts")}
        return {**settings, "stop": list(self.stop)}

    def described(self) -> str:
        """How a completion is sampled, in words; what is left at its default is not mentioned."""
        words = [f"temperature {self.temperature:g}", f"top-p {self.top_p:g}", f"at most {self.max_tokens} tokens"]
        words += [f"top-k {self.top_k}"] * bool(self.top_k) + [f"min-p {self.min_p:g}"] * bool(self.min_p)
        words += [f"stop {text!r}" for text in self.stop]
        words += [f"temperature {value:g} for {category}" for category, value in self.temperatures.items()]
        words += [f"system prompt {self.system!r}"] * bool(self.system)
        if (guard := self.repetition_guard) is not None:
            words.append(f"ended after {guard.count} copies of a pattern of up to {guard.max_pattern} tokens")
        return ", ".join(words)


UNRECORDED = {entry.name: entry.default for entry in fields(Protocol) if entry.default is not MISSING} | {
    "stop": [],
    "temperatures": {},
}
"""What a manifest that lacks these settings was sampled with."""

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Section 4.1 and Appendix E.3; top_p is not stated there
        Protocol("paper", temperature=0.6, top_p=1.0, max_tokens=8192, runs=4, samples_per_run=1),
        # Table 3 takes k up to 8, and AIME on Llama 32
        Protocol("passk", temperature=0.6, top_p=1.0, max_tokens=8192, runs=4, samples_per_run=8),
        Protocol("greedy", temperature=0.0, top_p=1.0, max_tokens=8192, runs=1, samples_per_run=1),
        # FastChat's own for MT-Bench (lm-sys/FastChat, fastchat/llm_judge): a temperature for each category
        Protocol(
            "fastchat",
            temperature=0.7,
            top_p=1.0,
            max_tokens=1024,
            runs=1,
            samples_per_run=1,
            temperatures=chat.TEMPERATURES,
        ),
        Protocol("nano", temperature=0.6, top_p=1.0, max_tokens=128, runs=4, samples_per_run=2),
    )
}


def read_protocol(path: Path) -> Protocol:
    """A protocol from a YAML file: those of its settings that differ from the `base` it names (default: paper).

    Raises UserError naming the file and the key that cannot be used.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a protocol is a mapping of settings to values, got {settings!r:.60}")
    base = find(PROTOCOLS, str(settings.pop("base", "paper")), f"base (in {path})")
    protocol = build(Protocol, {**asdict(base), "name": path.stem, **settings}, str(path))
    tasks = [task for suite in SUITES.values() for task in suite.tasks.values()]
    known = dict.fromkeys([*map(prompt_name, tasks), *(task.group for task in tasks)])
    for name in protocol.prompts:
        find(known, name, f"task or group of tasks in prompts (in {path})")
    for task in tasks:
        try:
            with_prompt(task, protocol.prompts)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return protocol


@dataclass(frozen=True)
class Suite:
    """Tasks that share, unless asked otherwise, a protocol and the hf engine's batch size."""

    name: str
    tasks: Mapping[str, Task]
    protocol: Protocol
    batch_size: int

    def select(self, names: Iterable[str]) -> list[Task]:
        """The tasks so named, with or without @SUITE, in the suite's order; all of them for no names.

        Raises UserError for an unknown one.
        """
        known = {**self.tasks, **{task.name: task for task in self.tasks.values()}}
        wanted = [find(known, name, f"task of suite {self.name!r}") for name in names]
        return [task for task in self.tasks.values() if task in wanted or not wanted]


def chosen(tasks: Mapping[str, Task], *names: str) -> dict[str, Task]:
    """Those of a family's tasks."""
    return {name: tasks[name] for name in names}


def in_suite(tasks: Mapping[str, Task], suite: str) -> dict[str, Task]:
    """The tasks under names of their own, TASK@SUITE: a run may hold samples of both protocols."""
    return {name: replace(task, name=f"{name}@{suite}") for name, task in tasks.items()}


SUITES = {
    suite.name: suite
    for suite in (
        Suite("nano", nano.TASKS, PROTOCOLS["nano"], batch_size=512),
        Suite("math", math.TASKS, PROTOCOLS["paper"], batch_size=64),
        Suite("code", code.TASKS, PROTOCOLS["paper"], batch_size=64),
        Suite(
            "ood",
            chosen(choice.TASKS, "gpqa_diamond", "mmlu_pro", "mmlu_redux", "mmlu_redux2", "arc_challenge"),
            PROTOCOLS["paper"],
            batch_size=64,
        ),
        Suite("mtbench", chat.TASKS, PROTOCOLS["paper"], batch_size=64),
        Suite("passk", in_suite(math.TASKS, "passk"), PROTOCOLS["passk"], batch_size=64),
    )
}


@dataclass(frozen=True)
class Plan:
    """What is asked of one suite: its tasks, how they are sampled, and from which data.

    `limit` takes the first items of each task.
    """

    suite: Suite
    protocol: Protocol
    tasks: tuple[Task, ...]
    seed: int = 0
    data_dir: Path | None = None
    limit: int | None = None

    def load(self) -> Loaded:
        """The plan with its tasks' data; a task whose data cannot be had is `missing`, with what to do."""
        data, missing = {}, {}
        for task in self.tasks:
            try:
                data[task.name] = task.load(self.data_dir)
            except UserError as error:
                missing[task.name] = str(error)
        return Loaded(self, tuple(task for task in self.tasks if task.name in data), data, missing)


@dataclass(frozen=True)
class Loaded:
    """A plan with those of its tasks whose data could be had, and why the others could not."""

    plan: Plan
    tasks: tuple[Task, ...]
    data: Mapping[str, TaskData]
    missing: Mapping[str, str]

    def items(self, task: Task) -> Sequence[Item]:
        """The items of a task to evaluate."""
        return self.data[task.name].items[: self.plan.limit]


def plan(
    suite: Suite,
    protocol: Protocol | None = None,
    *,
    tasks: Iterable[str] = (),
    seed: int = 0,
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Plan:
    """A suite's plan: all its tasks unless some are named, its own protocol unless another is given.

    Raises UserError for a task it has not, and for a protocol that makes no sense.
    """
    protocol = protocol or suite.protocol
    protocol.check()
    prompted = tuple(with_prompt(task, protocol.prompts) for task in suite.select(tasks))
    return Plan(suite, protocol, prompted, seed, data_dir, limit)


def with_prompt(task: Task, prompts: Mapping[str, str]) -> Task:
    """The task with the template that `prompts` has for it, or for its group; else as it is.

    Raises UserError where the template lacks a place that the task's own has, such as {problem}: no item could be told.
    """
    name = prompt_name(task) if prompt_name(task) in prompts else task.group
    if name not in prompts:
        return task
    lacking = [place for place in dict.fromkeys(PLACE.findall(task.prompt)) if place not in prompts[name]]
    if lacking:
        raise UserError(f"prompts.{name}: the template lacks {' and '.join(lacking)}; {task.label} needs it to ask")
    return replace(task, prompt=prompts[name])


def prompt_name(task: Task) -> str:
    """What a protocol's prompts call a task: its name, without that of the suite."""
    return task.name.partition("@")[0]


def find(known: Mapping[str, Named], name: str, what: str) -> Named:
    """The entry `name`. Raises UserError that names the nearest one and all of them."""
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return known[name]
