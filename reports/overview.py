"""A run on one screen: what was compared, the numbers that matter, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.accuracy import (
    average,
    cell_of,
    evaluation_gaps,
    pass_at_1,
    pass_at_k_cell,
)
from reports.commands import own_command
from reports.comparisons import Comparison
from reports.drift import drift_cell, drift_gaps
from reports.figures import training_gaps
from reports.rundata import Policy, RunData, Suite, Task
from reports.tables import Cell, Column, Missing, Row, Table, duration, mark_best, number, p_text

MOST_K = 8
MOST_DIFFERENCES = 3
FROM_BASE = (("cos", "cos", "cos"), ("kl", "KL, nats", "kl_new_old"))


@dataclass(frozen=True)
class Headline:
    """One finding: a title, the number and what qualifies it."""

    title: str
    value: str
    detail: str


# ---------------------------------------------------------------------------------------------------------------------
# What was compared


def facts(run: RunData) -> list[tuple[str, str]]:
    """What was compared, as (label, text), from the manifest alone."""
    manifest, recipe = run.manifest, run.manifest["recipe"]
    base = (
        (recipe.get("base") or {}).get("model")
        or recipe.get("model")
        or ", ".join(policy.checkpoint for policy in run.stage("base"))
    )
    methods = [method_text(policy, recipe.get("methods") or {}) for policy in first_of_methods(run)]
    rows = {subset: about.get("rows") for subset, about in manifest["data"].items()}
    found = {
        "Base": str(base),
        "Methods": ", ".join(methods),
        "Data": ", ".join(f"{subset} {count:,}" for subset, count in rows.items() if isinstance(count, int)),
        "Evaluation": "; ".join(protocol_text(suite) for suite in run.suites),
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in manifest["seeds"].items()),
        "Wall time": wall_time(run.steps),
        "Hardware": hardware_text(manifest["hardware"]),
        "Begun": time_text(manifest.get("created")),
    }
    return [(label, text or "not recorded") for label, text in found.items()]


def first_of_methods(run: RunData) -> list[Policy]:
    """The first policy of every method: its initialization, or what RL made of the base."""
    found: dict[str, Policy] = {}
    for policy in run.policies:
        if policy.method is not None:
            found.setdefault(policy.method, policy)
    return list(found.values())


def method_text(policy: Policy, methods: Mapping[str, Any]) -> str:
    """A method's label with its options."""
    options = (methods.get(str(policy.method)) or {}).get("options") or {}
    # An infinite option, which JSON cannot hold as a number, is the text 'inf' in the manifest.
    inside = ", ".join(f"{name} = {option_text(value)}" for name, value in options.items())
    return f"{policy.label} ({inside})" if inside else policy.label


def option_text(value: Any) -> str:
    """An option's value: a number in its shortest form, or a name as it is."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return str(value)


def protocol_text(suite: Suite) -> str:
    """How a suite was evaluated, in a line."""
    items = sum(task.items for task in suite.tasks)
    protocol = suite.protocol
    how = f"temperature {protocol.get('temperature')}, at most {protocol.get('max_tokens')} tokens"
    if protocol.get("engine") == "replay":
        how = "generated elsewhere"
    return f"{suite.name}: {len(suite.tasks)} tasks, {items:,} items × {suite.samples} samples, {how}"


def wall_time(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """The time all steps took together."""
    seconds = [step["seconds"] for step in steps.values() if isinstance(step.get("seconds"), int | float)]
    return f"{duration(sum(seconds))} in {len(seconds)} step{'s' if len(seconds) > 1 else ''}" if seconds else ""


def time_text(time: Any) -> str:
    """An ISO time as '2026-01-05 09:00 UTC'."""
    return f"{str(time)[:16].replace('T', ' ')} UTC" if time else ""


def hardware_text(hardware: Mapping[str, Any]) -> str:
    """Processor, cores and GPUs in a line."""
    processor = hardware.get("processor") or hardware.get("machine")
    parts = [f"{processor}, {hardware.get('cores')} cores" if processor else "", *(hardware.get("gpus") or [])]
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers that matter


def headlines(run: RunData, pass1: Sequence[Table], compared: Sequence[Comparison]) -> list[Headline]:
    """Best policy, paired differences over the widest scope at the latest stage, and drift.

    What the run does not have is a headline without a value where a training run should have it.
    """
    whole = run.kind == "train"
    found = [best_headline(table) for table in pass1[:1]]
    if not pass1 and whole:
        found.append(Headline("Best pass@1", "–", "no policy has been evaluated"))
    widest = [one for one in compared if (one.a.stage, one.scope) == (compared[0].a.stage, compared[0].scope)]
    if len(widest) > MOST_DIFFERENCES:  # of many methods only the one this suite is about; the table has all of them
        widest = [one for one in widest if one.a.method == "gift"] or widest[:MOST_DIFFERENCES]
    found += [difference_headline(one) for one in widest]
    if not widest and whole and "sft" in (run.manifest["recipe"].get("methods") or {}):
        found.append(Headline("Against SFT", "–", "no other method has been evaluated on the same items as SFT"))
    if run.drift or whole:
        found.append(drift_headline(run))
    return found


def best_headline(table: Table) -> Headline:
    """The best policy of the last column of Table 1: the average, or the only task."""
    column = table.columns[-1]
    where = "average over tasks" if column.key == "average" else column.label
    complete = [row for row in table.rows if row.cells[column.key].complete]
    best = [row for row in complete if len(complete) == 1 or "best" in row.cells[column.key].marks]
    if not best:
        return Headline(f"Best pass@1, {where}", "–", "no policy is completely evaluated")
    alike = [row.label for row in complete if "ns" in row.cells[column.key].marks]
    cell = best[0].cells[column.key]
    names = " = ".join(row.label for row in best)
    return Headline(
        f"{'Best pass@1' if len(complete) > 1 else 'pass@1'}, {where}",
        f"{names} {column.show(cell)} %",
        f"95 % interval {column.interval(cell)}"
        + (f"; not distinguishable: {', '.join(alike)}" if alike else "")
        + (f"; {len(complete)} of {len(table.rows)} policies complete" if len(complete) < len(table.rows) else ""),
    )


def difference_headline(one: Comparison) -> Headline:
    """A paired difference in points."""
    signed = ("+" if one.difference > 0 else "") + number(one.difference, 1)
    interval = f"95 % interval [{number(one.low, 1)}, {number(one.high, 1)}]"
    return Headline(
        f"{one.label}, {one.scope}",
        f"{signed} points",
        f"{interval}, {p_text(one.p_value)}: {one.verdict} ({one.items:,} paired items)",
    )


def drift_headline(run: RunData) -> Headline:
    """KL of the first policy of every method from the base."""
    title = "KL from the base, nats per token"
    parts, details = [], []
    column = Column("kl", "KL", decimals=3)
    measured = [(policy, cell) for policy, cell in drifts(run, "kl_new_old") if cell.value is not None]
    if len(measured) > MOST_DIFFERENCES:
        ordered = sorted(measured, key=lambda pair: pair[1].value or 0.0)
        gift = [pair for pair in ordered[1:-1] if pair[0].method == "gift"]
        measured = [ordered[0], *gift, ordered[-1]]
    for policy, cell in measured:
        parts.append(f"{policy.label} {column.show(cell)}")
        details.append(f"{policy.label} {column.interval(cell)}")
    if not parts:
        return Headline(title, "–", "drift has not been measured")
    return Headline(title, " · ".join(parts), f"KL(new‖old) on held-out solutions; {', '.join(details)}")


def drifts(run: RunData, metric: str) -> Iterator[tuple[Policy, Cell]]:
    """A drift metric, from the base, of the first policy of every method."""
    for base in run.stage("base")[:1]:
        for policy in first_of_methods(run):
            yield policy, drift_cell(run, (base, policy), metric)


def first_group(run: RunData) -> tuple[Suite, str, list[Task]] | None:
    """The first suite and its first group of tasks: what the policies were trained for."""
    for suite in run.suites[:1]:
        for group, tasks in suite.groups.items():
            return suite, group, tasks
    return None


def summary(run: RunData) -> Table:
    """Every policy's pass@1 and pass@k on the tasks it was trained for, and its distance from the base."""
    columns: list[Column] = []
    parts: list[str] = []
    cells: dict[str, dict[str, Cell]] = {policy.id: {} for policy in run.policies}
    for suite, group, tasks in [first] if (first := first_group(run)) else []:
        k = min(MOST_K, suite.samples)
        columns.append(Column("pass1", "pass@1 %", group, "", "high"))
        columns += [Column("passk", f"pass@{k} %", group, "", "high")] if k > 1 else []
        parts.append(f"accuracy on {group}")
        for policy in run.policies:
            ones = [cell_of(run, suite, policy, task, pass_at_1) for task in tasks]
            many = [pass_at_k_cell(run, suite, policy, task, k) for task in tasks]
            for key, found in (("pass1", ones), ("passk", many)):
                cells[policy.id][key] = found[0] if len(found) == 1 else average(found)
    if run.drift or run.kind != "eval":
        columns += [Column(key, label, "from the base", decimals=3) for key, label, _ in FROM_BASE]
        parts.append("drift from the base")
        for base in run.stage("base")[:1]:
            for policy in run.policies:
                for key, _, metric in FROM_BASE:
                    itself = policy.id == base.id
                    cells[policy.id][key] = Cell(text="–") if itself else drift_cell(run, (base, policy), metric)
    return Table(
        id="summary",
        title=run.name,
        caption=f"{' and '.join(parts).capitalize()}, with 95 % intervals.",
        corner="Policy",
        columns=columns,
        rows=mark_best(columns, [Row(p.id, p.label, cells[p.id], "", p.id) for p in run.policies]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


def gaps(run: RunData) -> list[Missing]:
    """Everything this kind of run should hold and does not, with the reason and the command that makes it."""
    command, kind = own_command(run), run.kind
    found = unfinished(run, command)
    if kind == "train":
        found += lineage_gaps(run, command) + training_gaps(run, command)
    if kind in {"train", "eval"}:
        found += evaluation_gaps(run)
    if kind in {"train", "drift"}:
        found += drift_gaps(run)
    return found


def unfinished(run: RunData, command: str) -> list[Missing]:
    """The run itself, and each of its steps, where it is not complete."""
    found = []
    if run.status == "running":
        found.append(Missing("The rest of the run", "still at work, or interrupted", command))
    elif run.status not in {"complete", "incomplete"}:
        found.append(Missing("The rest of the run", f"status {run.status!r}", command))
    for name, step in run.unfinished_steps.items():
        reason = step.get("error") or step.get("reason")
        found.append(Missing(f"Step {name}", f"{step.get('status')}{f': {reason}' if reason else ''}", command))
    return found


def lineage_gaps(run: RunData, command: str) -> list[Missing]:
    """Policies that the recipe asks for and the lineage does not have."""
    recipe = run.manifest["recipe"]
    found = []
    if not run.stage("base"):
        found.append(Missing("Base", "the lineage has no base model", command))
    methods: dict[str, Any] = recipe.get("methods") or {policy.method: {} for policy in run.policies if policy.method}
    for name, method in methods.items():
        label, direct = method.get("label") or name, method.get("objective", name) is None
        if not direct and run.policy("init", name) is None:
            found.append(Missing(str(label), "not trained yet", command))
        if run.policy("rl", name) is None and method.get("rl", {}) is not None:
            asked = recipe.get("rl", {}) is not None
            why = "RL has not been run" if asked else "the recipe has no RL (rl: null)"
            found.append(Missing(str(label) if direct else f"{label} + RL", why, command if asked else ""))
    if not methods:
        found.append(Missing("Initializations", "the lineage has none", command))
    return found
