"""The table model every number of a report goes through, and what is decided on it: best, second, significance marks.

A table is data: columns under spanners, rows in groups, cells with value, interval, marks, or the reason there is none.
Renderers (HTML in templates/macros.html, plain text below) only lay it out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evals.stats import Interval

Mark = Literal["best", "second", "ns"]
LEVEL = 0.05
"""Adjusted p-values at or above this leave two policies indistinguishable."""
CONTROL = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
NEEDS_CARE = re.compile(r"[^\t\n\x20-\x7e]")


# ---------------------------------------------------------------------------------------------------------------------
# Text


def visible(text: str) -> str:
    """The text with every control, format, surrogate and private-use character but tab and newline as ⟨U+XXXX⟩.

    Bidirectional controls, zero-width characters and NUL in model output can then neither hide nor reorder anything.
    """

    def show(match: re.Match[str]) -> str:
        character = match.group()
        return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in CONTROL else character

    return NEEDS_CARE.sub(show, text)


def slug(text: str) -> str:
    """The text as an id: letters, digits, dot, dash and underscore; everything else becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)


def number(value: float, decimals: int) -> str:
    """A number with fixed decimals and a true minus sign; never '-0.0'."""
    if not np.isfinite(value):
        return "∞" if value > 0 else "−∞"
    text = f"{abs(value):.{decimals}f}"
    return f"−{text}" if value < 0 and float(text) else text


def p_text(p_value: float) -> str:
    """A p-value as 'p = 0.031', or as 'p < 0.001' where it is smaller than that."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: '42 s', '12 min 5 s', '3 h 20 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Cell:
    """A value with its interval, in the column's units; or text; or neither and the reason why."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    marks: frozenset[Mark] = frozenset()
    reason: str = ""
    """Why there is no value or, beside a value, why it is not comparable (a partial cell)."""
    text: str = ""

    @classmethod
    def of(cls, interval: Interval, scale: float = 1.0, reason: str = "") -> Cell:
        """The cell of an interval, times `scale`."""
        return cls(interval.estimate * scale, interval.low * scale, interval.high * scale, reason=reason)

    @property
    def complete(self) -> bool:
        """Whether the cell has a value that may be compared and averaged."""
        return self.value is not None and not self.reason


@dataclass(frozen=True)
class Column:
    """A column: its spanner `group`, a second header line `note`, and which way is better, if any."""

    key: str
    label: str
    group: str = ""
    note: str = ""
    better: Literal["high", "low"] | None = None
    decimals: int = 1
    kind: Literal["number", "text"] = "number"

    def show(self, cell: Cell) -> str:
        """The cell's value in this column's decimals, its text, or a dash."""
        return cell.text or ("–" if cell.value is None else number(cell.value, self.decimals))

    def interval(self, cell: Cell) -> str:
        """The cell's interval as '[low, high]', or ''."""
        if cell.low is None or cell.high is None:
            return ""
        return f"[{number(cell.low, self.decimals)}, {number(cell.high, self.decimals)}]"


@dataclass(frozen=True)
class Row:
    """A row: cells by column key, under the heading `group`, with the marker of `policy` where it belongs to one."""

    key: str
    label: str
    cells: Mapping[str, Cell]
    group: str = ""
    policy: str | None = None


@dataclass(frozen=True)
class Table:
    """A table with what a reader needs beside it: notes, the files it was made from, the command that makes those."""

    id: str
    caption: str
    corner: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    notes: Sequence[str] = ()
    files: Sequence[str] = ()
    command: str = ""

    @property
    def spanners(self) -> list[tuple[str, int]]:
        """Runs of columns under the same spanner as (spanner, width); [] where no column has one."""
        runs: list[tuple[str, int]] = []
        for column in self.columns:
            if runs and column.group and runs[-1][0] == column.group:
                runs[-1] = (column.group, runs[-1][1] + 1)
            else:
                runs.append((column.group, 1))
        return runs if any(group for group, _ in runs) else []

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """Runs of rows under the same group heading."""
        runs: list[tuple[str, list[Row]]] = []
        for row in self.rows:
            if not runs or runs[-1][0] != row.group:
                runs.append((row.group, []))
            runs[-1][1].append(row)
        return runs


@dataclass(frozen=True)
class Missing:
    """Something a report would show and cannot: what, why, and the command that makes it ('' where none does)."""

    what: str
    why: str
    command: str = ""


def by_command(missing: Sequence[Missing]) -> dict[str, list[Missing]]:
    """What is missing by the command that makes it, in order of appearance."""
    groups: dict[str, list[Missing]] = {}
    for gap in missing:
        groups.setdefault(gap.command, []).append(gap)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def mark_best(columns: Sequence[Column], rows: Sequence[Row]) -> list[Row]:
    """The rows with each column's best value marked, and the second of three or more; values equal as printed tie.

    Partial cells are not ranked, and a column with fewer than two values has no best.
    """
    cells = [dict(row.cells) for row in rows]
    for column in columns:
        if column.better is None:
            continue
        printed = {
            index: round(cell.value, column.decimals)
            for index, row in enumerate(cells)
            if (cell := row.get(column.key)) is not None and cell.complete and cell.value is not None
        }
        order = sorted(set(printed.values()), reverse=column.better == "high")
        marks: list[Mark] = ["best", "second"] if len(printed) > 2 else ["best"] if len(printed) == 2 else []
        for mark, value in zip(marks, order, strict=False):
            for index in (index for index, shown in printed.items() if shown == value):
                cell = cells[index][column.key]
                cells[index][column.key] = replace(cell, marks=cell.marks | {mark})
    return [replace(row, cells=marked) for row, marked in zip(rows, cells, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Plain text


def to_text(table: Table) -> str:
    """The table for a terminal: caption, aligned columns with 'value [low, high]', best marked *, reasons below."""
    best = any("best" in cell.marks for row in table.rows for cell in row.cells.values())
    header = [table.corner, *(column.label for column in table.columns)]
    lines, reasons = [header], []
    for row in table.rows:
        line = [row.label]
        for column in table.columns:
            cell = row.cells.get(column.key, Cell())
            star = "*" if "best" in cell.marks else " "
            line.append(f"{column.show(cell)}{star if best else ''} {column.interval(cell)}".rstrip())
            if cell.reason:
                reasons.append(f"{row.label}, {column.label}: {cell.reason}")
        lines.append(line)
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    laid = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(map(len, laid))
    notes = [*table.notes, *(["* best of its column"] if best else []), *dict.fromkeys(reasons)]
    heading = f"{table.title}. {table.caption}" if table.title else table.caption
    return visible("\n".join([heading, laid[0], rule, *laid[1:], *notes]))
