"""Tables as Markdown: every row has its cells, marks are marked, and nothing in a text is taken for markup."""

from __future__ import annotations

import re

from reports.markdown import to_markdown
from reports.tables import Cell, Column, Row, Table

TABLE = Table(
    id="t",
    title="Table 1",
    caption="pass@1 of a_b",
    corner="Policy",
    columns=[Column("x", "Chains", "in-distribution", decimals=1), Column("y", "KL", decimals=3)],
    rows=[
        Row("base", "Base", {"x": Cell(14.44, 12.2, 17.1), "y": Cell(text="–")}),
        Row("bad", "<script>|*x*", {"x": Cell(60.25, marks=frozenset({"best", "ns"}))}, group="After RL"),
        Row(
            "half", "Half", {"x": Cell(1.0, marks=frozenset({"second"})), "y": Cell(reason="not measured")}, "After RL"
        ),
    ],
    notes=("A note with | in it.",),
)


def cells(line: str) -> list[str]:
    """The cells of a Markdown table's line, as GitHub splits them: at bars without a backslash before them."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_rows_cells_and_marks():
    heading, table, notes = to_markdown(TABLE).split("\n\n")
    assert heading == r"Table 1. pass@1 of a\_b"
    rows = [cells(line) for line in table.splitlines()]
    assert rows == [
        ["Policy", "in-distribution Chains", "KL"],
        ["---", "---", "---"],
        ["Base", r"14.4 \[12.2, 17.1\]", "–"],
        ["*After RL*", "", ""],
        [r"\<script\>\|\*x\*", "**60.2**†", "–"],
        ["Half", "<u>1.0</u>", "–"],
    ]
    assert notes.splitlines() == [r"- A note with \| in it.", "- Half, KL: not measured"]
