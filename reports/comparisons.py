"""Two policies on the same items: paired differences with interval, test and power."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from scipy import special

from evals.stats import PairedResult, paired_difference
from reports.commands import evaluate_command
from reports.rundata import STAGE_LABELS, Counts, Policy, RunData, Stage, Suite, Task
from reports.tables import LEVEL, Cell, Column, Row, Table, p_text

POWER = special.ndtri(0.975) + special.ndtri(0.8)
"""Standard errors that a two-sided 5 % test finds with 80 % power."""


@dataclass(frozen=True)
class Comparison:
    """A policy against another on the same items: difference and interval in percentage points."""

    a: Policy
    b: Policy
    scope: str
    difference: float
    low: float
    high: float
    p_value: float
    items: int

    @property
    def label(self) -> str:
        """'A vs B': the difference is A's number minus B's."""
        return f"{self.a.label} vs {self.b.label}"

    @property
    def distinct(self) -> bool:
        """Whether the test tells the two apart at the 5 % level."""
        return self.p_value < LEVEL

    @property
    def verdict(self) -> str:
        """The test's outcome in words."""
        if not self.distinct:
            return "not distinguishable"
        return f"{(self.a if self.difference > 0 else self.b).label} better"

    @property
    def detectable(self) -> float:
        """The smallest difference, in points, that this many items would show with 80 % power."""
        return float(POWER * (self.high - self.low) / 2 / special.stdtrit(max(self.items - 1, 1), 0.975))


def paired(run: RunData, a: str, b: str, tasks: Sequence[Task]) -> PairedResult | None:
    """paired_difference(a, b) over the items of these tasks, each task weighing the same; None unless both have them.

    An item of a task of n items weighs fewest / n, where `fewest` is the size of the smallest task. That weight goes
    into the item's counts, (samples * n, correct * fewest), and the mean over items is scaled back at the end.
    """
    first, second = ([run.counts.get((policy, task.name), {}) for task in tasks] for policy in (a, b))
    if any(not one or one.keys() != two.keys() for one, two in zip(first, second, strict=True)):
        return None
    sizes = [len(items) for items in first]
    fewest = min(sizes)

    def weighted(side: Sequence[Counts]) -> list[tuple[int, int]]:
        return [(n * len(items), right * fewest) for items in side for _, (n, right) in sorted(items.items())]

    result = paired_difference(weighted(first), weighted(second))
    scale = sum(sizes) / (len(sizes) * fewest)
    return replace(result, difference=result.difference * scale, low=result.low * scale, high=result.high * scale)


def scopes(suite: Suite) -> Iterator[tuple[str, list[Task]]]:
    """What comparisons are made over: all tasks, then each group of tasks."""
    if len(suite.groups) > 1:
        yield "all tasks", list(suite.tasks)
    yield from suite.groups.items()


def comparisons(run: RunData, suite: Suite, reference: str = "sft") -> list[Comparison]:
    """Every other method against the reference method, after RL and before it, over every scope."""
    found = []
    stages: tuple[Stage, ...] = ("rl", "init")
    for stage in stages:
        other = run.policy(stage, reference)
        for policy in run.stage(stage):
            if other is None or policy.id == other.id:
                continue
            for scope, tasks in scopes(suite):
                result = paired(run, policy.id, other.id, tasks)
                if result is not None:
                    whole = not any(run.shortfall(suite, one, task) for one in (policy, other) for task in tasks)
                    points = (100 * result.difference, 100 * result.low, 100 * result.high)
                    label = scope if whole else f"{scope} (partial)"
                    found.append(Comparison(policy, other, label, *points, result.p_value, result.items))
    return found


def comparison_table(run: RunData, suite: Suite, found: Sequence[Comparison]) -> Table:
    """The paired comparisons with their power."""
    rows = [
        Row(
            f"{one.a.id}-{one.b.id}-{one.scope}",
            one.scope,
            {
                "difference": Cell(one.difference, one.low, one.high),
                "p": Cell(text=p_text(one.p_value)),
                "verdict": Cell(text=one.verdict),
                "detectable": Cell(one.detectable),
                "items": Cell(float(one.items)),
            },
            f"{STAGE_LABELS[one.a.stage]}: {one.label}",
        )
        for one in found
    ]
    return Table(
        id=f"paired-{suite.name}",
        title="Paired differences",
        caption="pass@1 of two policies on the same items, in percentage points, with 95 % interval.",
        corner="Tasks",
        columns=(
            Column("difference", "Difference"),
            Column("p", "Test", kind="text"),
            Column("verdict", "Outcome at 5 %", kind="text"),
            Column("detectable", "Detectable"),
            Column("items", "Items", decimals=0),
        ),
        rows=rows,
        notes=(
            "Each task counts the same, whatever its size. Two-sided sign-flip permutation test and t interval on "
            "per-item differences; p-values of the rows are not adjusted for each other.",
            "Detectable: the true difference that a test on this many items finds with 80 % power; smaller ones are "
            "usually missed.",
        ),
        files=("items.parquet", "manifest.json"),
        command=evaluate_command(run, suite.name),
    )
