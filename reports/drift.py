"""How far the policies moved: Table 4, every other drift metric, and top-K overlap by K."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from evals.stats import Interval, clustered_mean
from reports.commands import drift_command
from reports.rundata import Policy, RunData, Sums
from reports.tables import Cell, Column, Missing, Row, Table, mark_best

HEADLINE: tuple[tuple[str, str, Literal["high", "low"], int], ...] = (
    ("cos", "cos ↑", "high", 3),
    ("l2", "L2 ↓", "low", 2),
    ("kl_new_old", "KL ↓", "low", 3),
)
OVERLAP = re.compile(r"topk_overlap_(\d+)")
Pair = tuple[Policy, Policy]
NAMES = {
    "cos": "cos",
    "l2": "L2",
    "l2_rel": "L2 relative to the earlier state",
    "kl_new_old": "KL(new‖old)",
    "kl_old_new": "KL(old‖new)",
    "js": "Jensen-Shannon",
    "tv": "Total variation",
    "nll_a": "Surprisal, earlier",
    "nll_b": "Surprisal, later",
    "entropy_a": "Entropy, earlier",
    "entropy_b": "Entropy, later",
}


def mean(sums: Sums) -> Interval:
    """Mean over tokens with its interval, clustered by sequence."""
    return clustered_mean(sums.n, sums.total)


def spans(run: RunData) -> dict[str, list[Pair]]:
    """The pairs (earlier, later) by the span of training they cover, in lineage order; no span without pairs.

    These are the pairs that diagnostics measures: parent and child, and the root and each RL policy.
    """
    ids = {policy.id: policy for policy in run.policies}
    pairs: dict[str, list[Pair]] = {"Base → init": [], "init → RL": [], "Base → RL": []}
    for policy in run.policies:
        parent = ids.get(policy.parent or "")
        if parent is None:
            continue
        if policy.stage == "init":
            pairs["Base → init"].append((parent, policy))
        elif parent.stage == "init":
            pairs["init → RL"].append((parent, policy))
        if policy.stage == "rl":
            pairs["Base → RL"].append((root(ids, policy), policy))
    return {span: found for span, found in pairs.items() if found}


def root(ids: Mapping[str, Policy], policy: Policy) -> Policy:
    """The policy that a lineage begins with."""
    seen = {policy.id}
    while (parent := ids.get(policy.parent or "")) and parent.id not in seen:
        policy = parent
        seen.add(policy.id)
    return policy


def origin(run: RunData, policy: Policy) -> Policy:
    """The initialization an RL policy came from; any other policy itself."""
    parent = next((one for one in run.policies if one.id == policy.parent), None)
    return parent if policy.stage == "rl" and parent is not None and parent.stage == "init" else policy


def drift_cell(run: RunData, pair: Pair, metric: str) -> Cell:
    """A metric of a pair, or the reason why it is not there."""
    measured = run.drift.get((pair[0].id, pair[1].id))
    if measured is None:
        return Cell(reason="not measured")
    if metric not in measured:
        return Cell(reason=f"{metric} is not in the drift file")
    return Cell.of(mean(measured[metric]))


def drift_table(run: RunData) -> Table:
    """Table 4: cosine, L2 and KL of every span of training, one row per initialization."""
    columns: list[Column] = []
    cells: dict[str, dict[str, Cell]] = {}
    stated = definitions(run)
    for span, pairs in spans(run).items():
        for metric, label, better, decimals in HEADLINE:
            columns.append(Column(f"{span} {metric}", label, span, "", better, decimals))
            for pair in pairs:
                cells.setdefault(origin(run, pair[1]).id, {})[f"{span} {metric}"] = drift_cell(run, pair, metric)
    rows = [
        Row(
            policy.id,
            policy.label,
            {column.key: cells[policy.id].get(column.key, Cell(reason="no such policy")) for column in columns},
            policy=policy.id,
        )
        for policy in run.policies
        if policy.id in cells
    ]
    return Table(
        id="table-4",
        title="Table 4",
        caption=f"Drift between checkpoints on {extent(run)}, mean over response tokens, with 95 % interval.",
        corner="Method",
        columns=columns,
        rows=mark_best(columns, rows),
        notes=(
            "Intervals are clustered by sequence (t quantile with sequences − 1 degrees of freedom). Bold: closest to "
            "where the span began; not tested.",
            *(f"{NAMES[metric]}: {stated[metric]}." for metric, *_ in HEADLINE if metric in stated),
            "KL is KL(new‖old), the direction of the paper's Eq. 2-3; its Table 4 states none. The other direction is "
            "in the table of all metrics.",
        ),
        files=tuple(sorted(name for name in run.files if name.startswith("drift/"))),
        command=drift_command(run),
    )


def definitions(run: RunData) -> dict[str, str]:
    """The metrics' definitions as the run recorded them."""
    stated: Any = run.manifest["drift"].get("definitions") or {}
    return {str(metric): str(text) for metric, text in stated.items()}


def extent(run: RunData) -> str:
    """'N held-out sequences, T tokens', from the drift files themselves."""
    sums = next((metrics["cos"] for metrics in run.drift.values() if "cos" in metrics), None)
    if sums is None:
        return "held-out sequences"
    return f"{len(sums.n):,} held-out sequences ({int(sums.n.sum()):,} tokens)"


def all_metrics_table(run: RunData) -> Table:
    """Every metric of every measured pair but the overlaps, with the definitions."""
    pairs = measured_pairs(run)
    columns = [Column(f"{a.id}..{b.id}", f"{a.label} → {b.label}", decimals=4) for a, b in pairs]
    present = dict.fromkeys(metric for a, b in pairs for metric in run.drift[a.id, b.id] if not OVERLAP.match(metric))
    order = sorted(present, key=lambda metric: (list(NAMES).index(metric) if metric in NAMES else len(NAMES), metric))
    stated = definitions(run)
    return Table(
        id="table-4-all",
        title="All drift metrics",
        caption=f"Mean over tokens with 95 % interval, on {extent(run)}.",
        corner="Metric",
        columns=columns,
        rows=[
            Row(
                metric,
                NAMES.get(metric, metric),
                {column.key: drift_cell(run, pair, metric) for column, pair in zip(columns, pairs, strict=True)},
            )
            for metric in order
        ],
        notes=[f"{NAMES.get(metric, metric)}: {stated[metric]}." for metric in order if metric in stated],
        files=tuple(sorted(name for name in run.files if name.startswith("drift/"))),
        command=drift_command(run),
    )


def measured_pairs(run: RunData) -> list[Pair]:
    """The pairs of `spans` that were measured."""
    return [pair for pairs in spans(run).values() for pair in pairs if (pair[0].id, pair[1].id) in run.drift]


def overlaps(run: RunData, pair: Pair) -> dict[int, Interval]:
    """Top-K overlap of a pair by K; {} where it was not measured."""
    metrics = run.drift.get((pair[0].id, pair[1].id), {})
    sizes = {int(match.group(1)): sums for metric, sums in metrics.items() if (match := OVERLAP.fullmatch(metric))}
    return {k: mean(sizes[k]) for k in sorted(sizes)}


def drift_gaps(run: RunData) -> list[Missing]:
    """What the drift measurement should have left and did not."""
    if not run.drift:
        return [Missing("Drift", "not measured", drift_command(run))]
    return [
        Missing(f"Drift {a.label} → {b.label}", "not measured", drift_command(run))
        for pairs in spans(run).values()
        for a, b in pairs
        if (a.id, b.id) not in run.drift
    ]
