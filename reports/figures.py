"""The report's figures: validation loss by epoch, RL curves, pass@k curves, top-K overlap; each with its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from reports.accuracy import PassAtK
from reports.drift import extent, overlaps, spans
from reports.plots import Line, Plot
from reports.rundata import Policy, RunData, Stage, Suite
from reports.style import Look, looks
from reports.tables import Cell, Column, Missing, Row, Table

Logs = dict[Policy, list[Mapping[str, Any]]]
MOST_ROWS = 100
"""Rows of a figure's data table; longer logs are thinned there, and said to be."""


@dataclass(frozen=True)
class Figure:
    """Plots side by side under one caption, and their data as a table."""

    id: str
    title: str
    caption: str
    plots: Sequence[Plot]
    data: Table

    def svgs(self, prefix: str) -> list[Markup]:
        """The plots as SVG elements whose ids begin with `prefix`."""
        return [replace(plot, id=f"{prefix}{plot.id}").svg() for plot in self.plots]


def data_table(
    id: str, caption: str, corner: str, curves: Mapping[str, Mapping[Any, Cell]], decimals: int, files: Sequence[str]
) -> Table:
    """Curves (name -> x -> cell) as a table with a column per curve and a row per x."""
    places = sorted({x for curve in curves.values() for x in curve})
    return Table(
        id=id,
        caption=caption,
        corner=corner,
        columns=[Column(name, name, decimals=decimals) for name in curves],
        rows=[Row(f"{x:g}", f"{x:g}", {name: curve.get(x, Cell()) for name, curve in curves.items()}) for x in places],
        files=files,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training


def validation_loss(run: RunData) -> Figure | None:
    """Figure 1, left: validation loss by epoch of every initialization; None where none was logged."""
    logs = logs_of(run, "init", "validation", "epoch", "val_nll")
    if not logs:
        return None
    lines = curves(run, logs, "epoch", "val_nll")
    words = describe(lines, "epoch", 3)
    return Figure(
        id="figure-1",
        title="Figure 1",
        caption=(
            "Validation loss of each initialization by epoch; 0 is before training. "
            f"n = {most(logs, 'val_tokens')} response tokens; one training seed."
        ),
        plots=[Plot("figure-1", "Validation loss", "epoch", "nats per response token", lines, words)],
        data=data_table(
            "figure-1-data",
            "Validation loss, nats per response token.",
            "Epoch",
            {line.label: dict(zip(line.x, map(Cell, line.y), strict=True)) for line in lines},
            4,
            ("metrics.jsonl",),
        ),
    )


def rl_curves(run: RunData) -> Figure | None:
    """Figure 3: mean reward of every rollout batch, and held-out accuracy where it was measured; None without RL."""
    rewards = logs_of(run, "rl", "train", "reward_mean")
    accuracies = logs_of(run, "rl", "validation", "val_accuracy")
    plots, captions = [], []
    columns: dict[str, dict[float, Cell]] = {}
    if rewards:
        window = max(3, max(len(rows) for rows in rewards.values()) // 10 | 1)
        lines = [
            replace(line, y=smooth(line.y, window), raw=line.y, marked=False)
            for line in curves(run, rewards, "step", "reward_mean")
        ]
        plots.append(Plot("figure-3-reward", "Reward", "RL step", "mean reward", lines, describe(lines, "step", 3)))
        captions.append(f"Reward: mean of each rollout batch (faint) and its moving mean over {window} steps.")
        columns |= {f"{line.label}, reward": dict(zip(line.x, map(Cell, line.raw), strict=True)) for line in lines}
    if accuracies:
        lines = curves(run, accuracies, "step", "val_accuracy", scale=100.0)
        words = describe(lines, "step", 1)
        plots.append(Plot("figure-3-accuracy", "Held-out accuracy", "RL step", "accuracy, %", lines, words))
        captions.append(f"Held-out accuracy: n = {most(accuracies, 'val_items')} items.")
        columns |= {f"{line.label}, accuracy %": dict(zip(line.x, map(Cell, line.y), strict=True)) for line in lines}
    if not plots:
        return None
    steps = sorted({x for curve in columns.values() for x in curve})
    stride = -(-len(steps) // MOST_ROWS)
    kept = set(steps[::stride])
    return Figure(
        id="figure-3",
        title="Figure 3",
        caption=" ".join(["RL, from each initialization or the base.", *captions, "One training seed."]),
        plots=plots,
        data=data_table(
            "figure-3-data",
            "RL curves." + (f" Every {stride}th step; metrics.jsonl has them all." if stride > 1 else ""),
            "Step",
            {name: {x: cell for x, cell in curve.items() if x in kept} for name, curve in columns.items()},
            3,
            ("metrics.jsonl",),
        ),
    )


def logs_of(run: RunData, stage: Stage, event: str, *needed: str) -> Logs:
    """An event's rows of every policy of a stage that has some with all `needed` numbers."""
    logs = {policy: run.log(policy.id, event, *needed) for policy in run.stage(stage)}
    return {policy: rows for policy, rows in logs.items() if rows}


def curves(run: RunData, logs: Logs, x: str, y: str, scale: float = 1.0) -> list[Line]:
    """A line per policy of logged values."""
    look = looks(run.policies)
    return [
        Line(policy.label, look[policy.id], [row[x] for row in rows], [scale * row[y] for row in rows])
        for policy, rows in logs.items()
    ]


def most(logs: Logs, key: str) -> str:
    """The largest value of a logged count, as text."""
    counts = [int(row[key]) for rows in logs.values() for row in rows if row.get(key)]
    return f"{max(counts):,}" if counts else "unrecorded"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Moving mean over an odd centred window, cut off at both ends of the values."""
    half = window // 2
    return [float(np.mean(values[max(0, index - half) : index + half + 1])) for index in range(len(values))]


def training_gaps(run: RunData, command: str) -> list[Missing]:
    """The learning curves that training should have left and did not."""
    gaps = []
    for policy in run.stage("init"):
        if not run.log(policy.id, "validation", "epoch", "val_nll"):
            gaps.append(Missing(f"Validation loss of {policy.label}", "metrics.jsonl has none", command))
    for policy in run.stage("rl"):
        if not run.log(policy.id, "train", "reward_mean"):
            gaps.append(Missing(f"RL curve of {policy.label}", "metrics.jsonl has none", command))
    return gaps


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and drift


def pass_at_k_figure(run: RunData, suite: Suite, cells: PassAtK) -> Figure | None:
    """pass@k against k, a plot per task; None where nothing was evaluated."""
    curves = {
        task.label: {policy: whole(cells[policy.id, task.name]) for policy in run.policies} for task in suite.tasks
    }
    return panels(
        run,
        curves,
        id=f"pass-at-k-{suite.name}",
        title="pass@k curves",
        caption=f"Bands: 95 % bootstrap intervals over items; {suite.samples} samples per item; axes differ by task.",
        axes=("k", "pass@k, %"),
        files=("items.parquet",),
    )


def overlap_figure(run: RunData) -> Figure | None:
    """Figure 2: top-K overlap against K, a plot per span of training; None where it was not measured."""
    curves = {
        span: {b: {k: Cell.of(interval, 100.0) for k, interval in overlaps(run, (a, b)).items()} for a, b in pairs}
        for span, pairs in spans(run).items()
    }
    return panels(
        run,
        curves,
        id="figure-2",
        title="Figure 2",
        caption=(
            "Share of the earlier model's K likeliest next tokens that are also among the later model's, on "
            f"{extent(run)}. Bands: 95 % intervals, clustered by sequence."
        ),
        axes=("K", "top-K overlap, %"),
        files=tuple(sorted(name for name in run.files if name.startswith("drift/"))),
    )


def whole(curve: Mapping[int, Cell]) -> dict[int, Cell]:
    """The complete cells of a curve."""
    return {x: cell for x, cell in curve.items() if cell.complete}


def panels(
    run: RunData,
    curves: Mapping[str, Mapping[Policy, Mapping[int, Cell]]],
    *,
    id: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    files: Sequence[str],
) -> Figure | None:
    """A plot per panel (panel -> policy -> x -> cell) with a logarithmic x axis; None where all curves are empty."""
    look = looks(run.policies)
    plots, rows = [], []
    for number, (panel, by_policy) in enumerate(curves.items()):
        lines = [banded_line(policy, look[policy.id], curve) for policy, curve in by_policy.items() if curve]
        if lines:
            ticks = sorted({int(x) for line in lines for x in line.x})
            words = describe(lines, axes[0], 1)
            plots.append(Plot(f"{id}-{number}", panel, *axes, lines, words, ticks))
        for policy, curve in by_policy.items():
            cells = {str(x): cell for x, cell in curve.items()}
            rows += [Row(f"{number}-{policy.id}", policy.label, cells, panel, policy.id)] if cells else []
    if not plots:
        return None
    places = sorted({int(x) for row in rows for x in row.cells})
    columns = [Column(str(x), f"{axes[0]} = {x}", decimals=2) for x in places]
    data = Table(f"{id}-data", f"{axes[1]}, with 95 % interval.", "Policy", columns, rows, files=files)
    return Figure(id, title, caption, plots, data)


def banded_line(policy: Policy, look: Look, curve: Mapping[int, Cell]) -> Line:
    """A line from cells by x, with a band where every interval is finite."""
    points = sorted(curve.items())
    bounds = [(cell.low, cell.high) for _, cell in points if cell.low is not None and cell.high is not None]
    low, high = (list(side) for side in zip(*bounds, strict=True)) if bounds else ([], [])
    band = (low, high) if len(bounds) == len(points) and np.isfinite(bounds).all() else ((), ())
    return Line(policy.label, look, [x for x, _ in points], [cell.value or 0.0 for _, cell in points], *band)


def describe(lines: Sequence[Line], axis: str, decimals: int) -> str:
    """The plot in words: where each line starts and ends."""
    words = []
    for line in lines:
        first, last = (f"{line.y[end]:.{decimals}f} at {axis} {line.x[end]:g}" for end in (0, -1))
        words.append(f"{line.label}: {first}, {last}.")
    return " ".join(words)
