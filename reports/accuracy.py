"""What the policies solve: pass@1 with significance marks (Table 1) and pass@k (Table 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from evals.stats import Interval, accuracy_interval, holm, pass_at_k_interval
from reports.commands import evaluate_command
from reports.comparisons import paired
from reports.rundata import NOT_EVALUATED, STAGE_LABELS, Counts, Policy, RunData, Suite, Task
from reports.tables import LEVEL, Cell, Column, Missing, Row, Table, mark_best

TABLE_KS = (1, 2, 4, 8)
PassAtK = dict[tuple[str, str], dict[int, Cell]]


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def cell_of(run: RunData, suite: Suite, policy: Policy, task: Task, estimate: Callable[[Counts], Interval]) -> Cell:
    """An estimate over a policy's items of a task in percent; without a value where it was not evaluated."""
    counts = run.counts.get((policy.id, task.name))
    reason = run.shortfall(suite, policy, task)
    return Cell.of(estimate(counts), 100.0, reason) if counts else Cell(reason=reason)


def pass_at_1(counts: Counts) -> Interval:
    """Mean over items and runs with its interval, clustered by item."""
    return accuracy_interval(list(counts.values()))


def average(cells: Sequence[Cell]) -> Cell:
    """The unweighted mean of a row's cells; only a complete row has one.

    Its interval recovers each cell's variance from that cell's limits (MOVER; Zou and Donner 2008).
    """
    incomplete = [cell for cell in cells if not cell.complete]
    if incomplete:
        return Cell(reason="no average: not every task is complete")
    values = [cell.value or 0.0 for cell in cells]
    mean = sum(values) / len(values)
    below = math.hypot(*(value - (cell.low or 0.0) for value, cell in zip(values, cells, strict=True)))
    above = math.hypot(*((cell.high or 0.0) - value for value, cell in zip(values, cells, strict=True)))
    return Cell(mean, mean - below / len(cells), mean + above / len(cells))


# ---------------------------------------------------------------------------------------------------------------------
# Table 1


def pass_at_1_table(run: RunData, suite: Suite) -> Table:
    """Table 1: policies by tasks, pass@1 in percent."""
    columns = [
        Column(task.name, task.label, task.group, f"{task.items} × {suite.runs} × {suite.samples_per_run}", "high")
        for task in suite.tasks
    ]
    tested = {task.name: [task] for task in suite.tasks}
    if len(suite.tasks) > 1:
        columns.append(Column("average", "Average", "", f"{len(suite.tasks)} tasks", "high"))
        tested["average"] = list(suite.tasks)
    rows = []
    for policy in run.policies:
        cells = {task.name: cell_of(run, suite, policy, task, pass_at_1) for task in suite.tasks}
        if len(suite.tasks) > 1:
            cells["average"] = average(list(cells.values()))
        rows.append(Row(policy.id, policy.label, cells, STAGE_LABELS[policy.stage], policy.id))
    rows = mark_best(columns, rows)
    for key, tasks in tested.items():
        rows = mark_indistinct(run, rows, key, tasks)
    return Table(
        id=f"table-1-{suite.name}",
        title="Table 1",
        caption="pass@1 in %, mean over runs, with 95 % interval below it.",
        corner="Policy",
        columns=columns,
        rows=rows,
        notes=(
            "Under each task: items × runs × samples per run. Intervals are Wilson's at the effective number of "
            "samples, clustered by item: they say what other items of the same kind would give, not another seed.",
            "Bold: best of its column; underlined: second; values equal as printed tie.",
            "† not distinguishable from the best of its column: two-sided paired sign-flip test on the same items, "
            f"Holm-adjusted within the column, p ≥ {LEVEL}.",
            "Average: unweighted mean over all tasks, only where every task is complete.",
        ),
        files=("items.parquet", "manifest.json"),
        command=evaluate_command(run, suite.name),
    )


def mark_indistinct(run: RunData, rows: Sequence[Row], key: str, tasks: Sequence[Task]) -> list[Row]:
    """The rows with 'ns' on each cell of a column that a paired test does not tell from the column's best."""
    ranked = [row for row in rows if row.cells[key].complete]
    if len(ranked) < 2:
        return list(rows)
    best = max(ranked, key=lambda row: row.cells[key].value or 0.0)
    results = {row.key: paired(run, best.key, row.key, tasks) for row in ranked if row is not best}
    found = {policy: result.p_value for policy, result in results.items() if result is not None}
    alike = {policy for policy, p in zip(found, holm(list(found.values())), strict=True) if p >= LEVEL}
    marked = []
    for row in rows:
        cell = row.cells[key]
        if row.key in alike and "best" not in cell.marks:
            row = replace(row, cells={**row.cells, key: replace(cell, marks=cell.marks | {"ns"})})
        marked.append(row)
    return marked


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


def pass_at_k_cells(run: RunData, suite: Suite) -> PassAtK:
    """pass@k in percent by (policy, task) for every power of two up to the samples per item."""
    powers = [2**exponent for exponent in range(suite.samples.bit_length())]
    return {
        (policy.id, task.name): {k: pass_at_k_cell(run, suite, policy, task, k) for k in powers}
        for policy in run.policies
        for task in suite.tasks
    }


def pass_at_k_cell(run: RunData, suite: Suite, policy: Policy, task: Task, k: int) -> Cell:
    """pass@k with its interval, or the reason why these samples do not give it."""
    fewest = min((n for n, _ in run.counts.get((policy.id, task.name), {}).values()), default=k)
    if fewest < k:
        return Cell(reason=f"pass@{k} needs {k} samples per item, there are {fewest}")
    return cell_of(run, suite, policy, task, lambda counts: pass_at_k_interval(list(counts.values()), k))


def pass_at_k_table(run: RunData, suite: Suite, cells: PassAtK) -> Table:
    """Table 3: pass@k for k = 1, 2, 4, 8, by task."""
    ks = [k for k in TABLE_KS if k <= suite.samples]
    out_of_reach = [k for k in TABLE_KS if k > suite.samples]
    columns = [Column(str(k), f"k = {k}", "", "", "high") for k in ks]
    rows: list[Row] = []
    for task in suite.tasks:
        heading = task.label if task.group == task.label else f"{task.label} ({task.group})"
        group = [
            Row(
                f"{policy.id}-{task.name}",
                policy.label,
                {str(k): cells[policy.id, task.name][k] for k in ks},
                heading,
                policy.id,
            )
            for policy in run.policies
        ]
        rows += mark_best(columns, group)
    return Table(
        id=f"table-3-{suite.name}",
        title="Table 3",
        caption=f"pass@k in % from {suite.samples} samples per item, with 95 % interval.",
        corner="Policy",
        columns=columns,
        rows=rows,
        notes=(
            "Unbiased estimator (Chen et al. 2021) over one set of samples, so that all k agree with each other; "
            "intervals by bootstrap over items. Bold: best of its task; underlined: second; not tested."
            + (f" k = {', '.join(map(str, out_of_reach))} would take as many samples." if out_of_reach else ""),
        ),
        files=("items.parquet", "manifest.json"),
        command=evaluate_command(run, suite.name),
    )


def evaluation_gaps(run: RunData) -> list[Missing]:
    """What evaluation should have left and did not."""
    if not run.suites:
        return [Missing("Evaluation", "no policy has been evaluated", evaluate_command(run))]
    gaps = []
    for suite in run.suites:
        command = evaluate_command(run, suite.name)
        if not run.counts:
            gaps.append(Missing(f"Evaluation, suite {suite.name}", "items.parquet is not there or empty", command))
            continue
        if suite.samples == 1:
            gaps.append(Missing(f"pass@k, suite {suite.name}", "the protocol takes one sample per item"))
        for policy in run.policies:
            reasons = {task.label: run.shortfall(suite, policy, task) for task in suite.tasks}
            if set(reasons.values()) == {NOT_EVALUATED}:
                gaps.append(Missing(f"{policy.label} on suite {suite.name}", NOT_EVALUATED, command))
            else:
                gaps += [Missing(f"{policy.label} on {task}", why, command) for task, why in reasons.items() if why]
    described = {task.name for suite in run.suites for task in suite.tasks}
    for name in sorted({task for _, task in run.counts} - described):
        gaps.append(Missing(f"Task {name}", "items.parquet has it, manifest.json does not describe it"))
    return gaps
