"""A run directory as reports read it: the manifest's parts typed, counts and drift sums ready for evals.stats.

Whatever is absent stays empty and is reported as missing; whatever is present but damaged is a UserError naming it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from gift.cli import UserError
from gift.records import MEND, RunDir, read_jsonl, read_table, sha256_file
from gift.samples import graded_samples, sample_path, verdict_path

Stage = Literal["base", "init", "rl"]
Counts = dict[str, tuple[int, int]]
STAGES: tuple[Stage, ...] = ("base", "init", "rl")
STAGE_LABELS: dict[Stage, str] = {"base": "", "init": "After initialization", "rl": "After RL"}
ITEM_COLUMNS = ("task", "item", "policy", "run", "n", "correct")
DRIFT_COLUMNS = ("metric", "sequence", "n", "sum")
NOT_EVALUATED = "not evaluated"
REPORT_STEP = "report"
SAMPLE_KEYS = ("item", "run", "sample", "prompt", "completion")


@dataclass(frozen=True)
class Policy:
    """One checkpoint of the lineage."""

    id: str
    label: str
    parent: str | None
    stage: Stage
    method: str | None
    checkpoint: str


@dataclass(frozen=True)
class Task:
    """One evaluated task: how many items a complete evaluation has, and its graders, the reported one first."""

    name: str
    label: str
    group: str
    items: int
    graders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Tasks that were evaluated under one protocol."""

    name: str
    runs: int
    samples_per_run: int
    protocol: Mapping[str, Any]
    tasks: tuple[Task, ...]

    @property
    def samples(self) -> int:
        """Samples per item, all runs together."""
        return self.runs * self.samples_per_run

    @property
    def groups(self) -> dict[str, list[Task]]:
        """The tasks by group, in the manifest's order."""
        groups: dict[str, list[Task]] = {}
        for task in self.tasks:
            groups.setdefault(task.group, []).append(task)
        return groups


@dataclass(frozen=True)
class Sums:
    """One drift metric of one pair: per sequence the number of tokens and the metric's sum over them."""

    n: np.ndarray
    total: np.ndarray


@dataclass(frozen=True)
class RunData:
    """Everything a report takes from a run directory except the samples, which are read where they are shown."""

    path: Path
    manifest: Mapping[str, Any]
    policies: tuple[Policy, ...]
    suites: tuple[Suite, ...]
    counts: Mapping[tuple[str, str], Counts]
    """(policy, task) -> item -> (samples, correct samples), all runs together."""
    metrics: Sequence[Mapping[str, Any]]
    drift: Mapping[tuple[str, str], Mapping[str, Sums]]
    """(earlier, later) -> metric -> sums."""
    files: dict[str, str] = field(default_factory=dict)
    """Relative name -> SHA-256 of every file read so far."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.manifest.get("name") or self.path.name)

    @property
    def kind(self) -> str:
        """'train', 'eval' or 'drift': what the run is expected to hold."""
        return str(self.manifest.get("kind"))

    @property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """The run's steps but the one that makes the report, which is at work whenever it reads this."""
        return {name: step for name, step in self.manifest["steps"].items() if name != REPORT_STEP}

    @property
    def status(self) -> str:
        """The manifest's status; where only the report is left to make, 'complete' or 'incomplete' as the steps are."""
        if self.manifest.get("status") == "running" and REPORT_STEP in self.manifest["steps"]:
            return "incomplete" if self.unfinished_steps else "complete"
        return str(self.manifest.get("status"))

    @property
    def unfinished_steps(self) -> dict[str, Mapping[str, Any]]:
        """The steps that began and are not done."""
        return {name: step for name, step in self.steps.items() if step.get("status") != "done"}

    def stage(self, stage: Stage) -> list[Policy]:
        """The policies of a stage, in lineage order."""
        return [policy for policy in self.policies if policy.stage == stage]

    def policy(self, stage: Stage, method: str) -> Policy | None:
        """The policy a method reached at a stage."""
        return next((policy for policy in self.stage(stage) if policy.method == method), None)

    def shortfall(self, suite: Suite, policy: Policy, task: Task) -> str:
        """'' if every item of a task has all its samples of a policy, else how much of the evaluation is there."""
        counts = self.counts.get((policy.id, task.name))
        if not counts:
            return NOT_EVALUATED
        if len(counts) != task.items:
            return f"partial: {len(counts)} of {task.items} items"
        samples, wanted = sum(n for n, _ in counts.values()), suite.samples * task.items
        return "" if samples == wanted else f"partial: {samples} of {wanted} samples"

    def log(self, policy: str, event: str, *needed: str) -> list[Mapping[str, Any]]:
        """The logged rows of an event of a policy that hold all `needed` numbers, by step."""
        rows = [row for row in self.metrics if row.get("policy") == policy and row.get("event") == event]
        rows = [row for row in rows if all(isinstance(row.get(key), int | float) for key in ("step", *needed))]
        return sorted(rows, key=lambda row: row["step"])

    def samples(self, policy: str, task: Task) -> list[dict[str, Any]]:
        """The graded samples of a policy on a task, each with the fields of the reported grader's verdict.

        Raises UserError for an incomplete row.
        """
        file, verdicts = sample_path(self.path, policy, task.name), verdict_path(self.path, policy, task.name)
        for read in (file, verdicts):
            if read.exists():
                self.files[read.relative_to(self.path).as_posix()] = sha256_file(read)
        for number, row in enumerate(read_jsonl(file), start=1):
            absent = [key for key in SAMPLE_KEYS if key not in row]
            if absent:
                raise UserError(f"{file}:{number}: a sample without {absent[0]!r}; evaluate this policy again")
        reported = next(iter(task.graders), "")
        rows = graded_samples(self.path, policy, task.name, task.graders)
        return [{**row, **row["verdicts"][reported]} for row in rows if reported in row["verdicts"]]


def load_run(path: Path) -> RunData:
    """Reads a run directory.

    Raises UserError naming the file where it is not a run directory or a file in it is damaged.
    """
    manifest = read_manifest(path)
    files = {"manifest.json": sha256_file(path / "manifest.json")}
    policies = tuple(read_policy(path, entry) for entry in manifest["lineage"])
    suites = [read_suite(path, name, entry) for name, entry in manifest["eval"].items()]
    run = RunData(
        path=path,
        manifest=manifest,
        policies=tuple(sorted(policies, key=lambda policy: STAGES.index(policy.stage))),
        suites=tuple(suite for suite in suites if suite.tasks),
        counts=read_counts(path / "items.parquet"),
        metrics=read_jsonl(path / "metrics.jsonl"),
        drift={pair: read_drift(file) for pair, file in drift_files(path).items()},
        files=files,
    )
    present = [path / "items.parquet", path / "metrics.jsonl", *drift_files(path).values()]
    files.update({file.relative_to(path).as_posix(): sha256_file(file) for file in present if file.exists()})
    return run


def damaged(path: Path, what: str) -> NoReturn:
    """Raises the UserError of a manifest that this module cannot read."""
    raise UserError(f"{path / 'manifest.json'}: {what}; {MEND}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest. Raises UserError if it is damaged."""
    manifest = RunDir.open(path).manifest
    for key in ("data", "steps"):
        for name, entry in manifest[key].items():
            if not isinstance(entry, dict):
                damaged(path, f"{name!r} of {key!r} is not a mapping")
    return manifest


def read_policy(path: Path, entry: Any) -> Policy:
    """A lineage entry. Raises UserError if it names no policy or an unknown stage."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        damaged(path, "an entry of 'lineage' has no id")
    if entry.get("stage") not in STAGES:
        damaged(path, f"policy {entry['id']!r} of 'lineage' has stage {entry.get('stage')!r}, not base, init or rl")
    return Policy(
        id=entry["id"],
        label=str(entry.get("label") or entry["id"]),
        parent=entry.get("parent"),
        stage=entry["stage"],
        method=entry.get("method"),
        checkpoint=str(entry.get("checkpoint") or ""),
    )


def read_suite(path: Path, name: str, entry: Any) -> Suite:
    """An evaluated suite. Raises UserError if the manifest's entry lacks its protocol or tasks."""
    try:
        protocol, tasks = entry["protocol"], entry["tasks"]
        return Suite(
            name=name,
            runs=int(protocol["runs"]),
            samples_per_run=int(protocol["samples_per_run"]),
            protocol=protocol,
            tasks=tuple(read_task(name, task, about) for task, about in tasks.items() if is_accuracy(about)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        damaged(path, f"suite {name!r} of 'eval' is incomplete ({type(error).__name__}: {error})")


def is_accuracy(about: Mapping[str, Any]) -> bool:
    """Whether a task's verdicts are right or wrong; marks are in ratings.parquet, which no report shows yet."""
    return about.get("metric", "accuracy") == "accuracy"


def read_task(suite: str, name: str, about: Mapping[str, Any]) -> Task:
    """A task of a suite."""
    label, group = str(about.get("label") or name), str(about.get("group") or suite)
    return Task(name, label, group, int(about["items"]), dict(about.get("graders", {})))


def read_columns(file: Path, names: Sequence[str]) -> list[list[Any]]:
    """These columns of a Parquet file. Raises UserError naming the file and the first column it lacks."""
    table = read_table(file)
    absent = [name for name in names if name not in table]
    if absent:
        raise UserError(f"{file}: no column {absent[0]!r}; delete this file and run the command that wrote it again")
    return [table[name] for name in names]


def read_counts(file: Path) -> dict[tuple[str, str], Counts]:
    """Samples and correct samples per policy, task and item; {} where there is no such file.

    Raises UserError for a row with impossible counts and for a (task, item, policy, run) that is there twice.
    """
    if not file.exists():
        return {}
    counts: dict[tuple[str, str], Counts] = {}
    seen: set[tuple[Any, ...]] = set()
    for number, row in enumerate(zip(*read_columns(file, ITEM_COLUMNS), strict=True)):
        task, item, policy, run, n, correct = row
        if not (isinstance(n, int) and isinstance(correct, int) and 0 <= correct <= n and n > 0):
            raise UserError(f"{file}: row {number} has correct = {correct} of n = {n}; evaluate task {task!r} again")
        if (task, item, policy, run) in seen:
            raise UserError(f"{file}: row {number} repeats task {task!r}, item {item!r}, policy {policy!r}, run {run}")
        seen.add((task, item, policy, run))
        items = counts.setdefault((policy, task), {})
        before = items.get(item, (0, 0))
        items[item] = (before[0] + n, before[1] + correct)
    return counts


def drift_files(path: Path) -> dict[tuple[str, str], Path]:
    """The drift files of a run by pair (earlier, later), in name order."""
    pairs = {}
    for file in sorted((path / "drift").glob("*.parquet")):
        earlier, dots, later = file.stem.partition("..")
        if dots:
            pairs[earlier, later] = file
    return pairs


def read_drift(file: Path) -> dict[str, Sums]:
    """The sums of every metric in a drift file. Raises UserError where a value is not a number or n is not positive."""
    metrics: dict[str, tuple[list[Any], list[Any]]] = {}
    for metric, _, n, total in zip(*read_columns(file, DRIFT_COLUMNS), strict=True):
        sizes, totals = metrics.setdefault(metric, ([], []))
        sizes.append(n)
        totals.append(total)
    sums = {}
    for metric, (sizes, totals) in metrics.items():
        try:
            sums[metric] = Sums(np.asarray(sizes, dtype=float), np.asarray(totals, dtype=float))
        except (TypeError, ValueError):
            raise UserError(
                f"{file}: metric {metric!r} has a value that is not a number; measure drift again"
            ) from None
        if not (sums[metric].n > 0).all() or np.isnan(sums[metric].total).any():
            raise UserError(f"{file}: metric {metric!r} has a sequence without tokens or a sum; measure drift again")
    return sums
