"""A report's tables as GitHub-flavoured Markdown, for a repository's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reports.page import RunView
from reports.tables import Cell, Table, visible

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|])")


def to_markdown(table: Table) -> str:
    """Title and caption, the table with 'value [low, high]' (best bold, second underlined), notes and reasons."""
    header = [table.corner, *(" ".join(filter(None, (column.group, column.label))) for column in table.columns)]
    lines, reasons, group = [row_of(header), row_of(["---"] * len(header))], [], ""
    for row in table.rows:
        if row.group not in ("", group):
            lines.append(row_of([f"*{escape(row.group)}*", *[""] * len(table.columns)]))
        group = row.group
        cells = [escape(row.label)]
        for column in table.columns:
            cell = row.cells.get(column.key, Cell())
            text = escape(column.show(cell))
            if "best" in cell.marks:
                text = f"**{text}**"
            elif "second" in cell.marks:
                text = f"<u>{text}</u>"
            text += "†" if "ns" in cell.marks else ""
            cells.append(" ".join(filter(None, (text, escape(column.interval(cell))))))
            if cell.reason:
                reasons.append(f"{row.label}, {column.label}: {cell.reason}")
        lines.append(row_of(cells))
    heading = ". ".join(filter(None, (table.title, table.caption)))
    notes = "\n".join(f"- {escape(note)}" for note in [*table.notes, *dict.fromkeys(reasons)])
    return "\n\n".join(filter(None, (escape(heading), "\n".join(lines), notes)))


def page(view: RunView) -> str:
    """A run's facts, summary and tables as a Markdown page; figures and examples stay in the HTML."""

    def parts() -> Iterator[str]:
        yield f"# {escape(view.data.name)}"
        yield "\n".join(f"- {escape(label)}: {escape(text)}" for label, text in view.facts)
        for gap in view.missing:
            yield f"- missing: {escape(gap.what)}: {escape(gap.why)}"
        yield to_markdown(view.summary)
        for section in view.sections:
            tables = [piece.content for piece in section.pieces if piece.kind == "table"]
            if tables:
                yield f"## {escape(section.title)}"
                yield from (to_markdown(table) for table in tables if isinstance(table, Table))

    return visible("\n\n".join(parts())) + "\n"


def row_of(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text in which nothing is markup, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
