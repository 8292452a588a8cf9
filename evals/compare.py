"""Prints how two evaluated checkpoints differ: task by task, over suites, and in pass@k.

python -m evals.run --compare sft gift --model runs/mine
python -m evals.run --compare runs/eval-one runs/mine:gift
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evals.comparisons import RATING_SPAN, Comparison, Side, comparisons, notes, side_of, tasks_of
from evals.stats import (
    PairedResult,
    holm,
    minimum_detectable_difference,
    paired_pass_at_k,
    pass_at_k,
    stratified_difference,
)
from evals.tables import print_table
from gift.cli import UserError

ALPHA = 0.05
KS = (2, 4, 8, 32)


@dataclass(frozen=True)
class Unit:
    """How a score is printed: times `points`, with so many digits; `most` is the largest difference there is."""

    name: str
    points: float
    digits: int
    most: float


PERCENT = Unit("%", 100.0, 1, 100.0)
RATING = Unit("rating", 1.0, 2, RATING_SPAN)


def compare_command(a: str, b: str, run: Path | None) -> int:
    """Prints how A and B differ. Returns 0 if they could be compared on a task, else 1.

    `a` and `b` are each a policy of `run`, RUN_DIR, or RUN_DIR:POLICY. Raises UserError where one means nothing that
    was evaluated, or both mean the same.
    """
    first, second = side_of("A", a, run), side_of("B", b, run)
    if first.run.path.resolve() == second.run.path.resolve() and first.policy == second.policy:
        raise UserError(f"{a} and {b} are the same policy of {first.run.path}; give two to compare")
    found, left_out = comparisons(first, second)
    for side in (first, second):
        print(f"{side.letter} = {side.policy} of {side.run.path}")
    if found:
        print_tasks(found)
        print_suites(found, first, second)
        print_pass_at_k(found)
    for task, reason in left_out.items():
        print(f"not compared: {task}: {reason}")
    for note in dict.fromkeys(notes(found, first, second)):
        print(f"note: {note}")
    return int(not found)


def print_tasks(found: Sequence[Comparison]) -> None:
    """Task by task, ratings in a table of their own; p-values are adjusted over both tables."""
    adjusted = list(zip(found, holm([one.p_value for one in found]), strict=True))
    single = any(one.flips for one in found)
    for unit, counted, flips in ((PERCENT, "items", single), (RATING, "questions", False)):
        rows = [task_cells(one, p, unit, flips) for one, p in adjusted if (one.pairs is None) == (unit is RATING)]
        header = ["task", counted, f"A {unit.name}", f"B {unit.name}", "A - B [95%]", "p", "p Holm", "detectable"]
        if rows:
            print()
            print_table([header + ["A only", "B only"] * flips, *rows], left=1)
    exact = ", exact McNemar test where an item has one sample" if single else ""
    print(f"p: sign-flip test{exact}; p Holm: adjusted for the {len(found)} tasks here, * below {ALPHA}")
    print(f"detectable: the true difference that a test on so many items, at {ALPHA}, finds with 80% power")
    if single:
        print("A only, B only: items that one alone got right")


def task_cells(one: Comparison, adjusted: float, unit: Unit, with_flips: bool) -> list[str]:
    """A task's row."""
    flips = ("-", "-") if one.flips is None else (str(one.flips.a_only), str(one.flips.b_only))
    return [
        one.task,
        str(one.result.items),
        *mean_cells(one.means, one.result, unit),
        p_text(one.p_value),
        p_text(adjusted) + ("*" if adjusted < ALPHA else " "),
        detectable(one.result, unit),
        *(flips if with_flips else ()),
    ]


def print_suites(found: Sequence[Comparison], a: Side, b: Side) -> None:
    """The mean over each suite whose tasks, those of either manifest, were all compared by accuracy."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for suite, task in tasks_of(a, b):
        tasks[suite].append(task)
    rows = []
    for suite, names in tasks.items():
        members = [one for one in found if one.suite == suite]
        strata = [one.pairs for one in members if one.pairs is not None]
        if len(names) < 2 or not members:
            continue
        if len(strata) < len(names):
            print(f"no mean of suite {suite}: {len(strata)} of its {len(names)} tasks are compared by accuracy")
            continue
        result = stratified_difference(strata)
        means = (fmean(one.means[0] for one in members), fmean(one.means[1] for one in members))
        cells = [*mean_cells(means, result, PERCENT), p_text(result.p_value), detectable(result, PERCENT)]
        rows.append([suite, str(len(members)), *cells])
    if rows:
        print()
        print_table([["suite", "tasks", "A %", "B %", "A - B [95%]", "p", "detectable"], *rows], left=1)
        print("mean of the tasks, each weighing the same; interval and sign-flip test stratified by task")


def print_pass_at_k(found: Sequence[Comparison]) -> None:
    """pass@k where items have several samples."""
    rows = []
    for one in found:
        for k in KS:
            if one.pairs is None or k > one.pairs[0][0][0]:
                continue
            first, second = (fmean(pass_at_k(n, c, k) for n, c in counts) for counts in one.pairs)
            result = paired_pass_at_k(*one.pairs, k, resamples=1999)
            cells = mean_cells((first, second), result, PERCENT)
            rows.append([one.task, str(k), *cells, p_text(result.p_value)])
    if rows:
        print()
        print_table([["pass@k of task", "k", "A %", "B %", "A - B [95%]", "p"], *rows], left=1)
        print("unbiased estimates from all samples of an item; bootstrap interval over items; p is not adjusted")


def mean_cells(means: tuple[float, float], result: PairedResult, unit: Unit) -> list[str]:
    """A, B, and the difference with its interval."""
    low, high = (f"{unit.points * end:+z.{unit.digits}f}" for end in (result.low, result.high))
    difference = f"{unit.points * result.difference:+z.{unit.digits}f} [{low}, {high}]"
    return [*(f"{unit.points * mean:.{unit.digits}f}" for mean in means), difference]


def detectable(result: PairedResult, unit: Unit) -> str:
    """The minimum detectable difference, '-' where not even the largest there is would be found."""
    least = unit.points * minimum_detectable_difference(result.standard_error, result.degrees, ALPHA)
    return f"{least:.{unit.digits}f}" if least <= unit.most else "-"


def p_text(p: float) -> str:
    """A p-value to three decimals, or that it is below what they can show."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
