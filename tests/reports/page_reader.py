"""Reads a report the way a reader's program would: by ids, with the standard library's parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class TableCell:
    """A table cell: its text and the tags in it."""

    text: str = ""
    tags: set[str] = field(default_factory=set)

    @property
    def numbers(self) -> list[float]:
        """Its numbers in order: value, low, high."""
        return [float(number.replace("−", "-")) for number in re.findall(r"[−-]?\d+\.?\d*", self.text)]


class Page(HTMLParser):
    """The table cells, ids, references and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: dict[str, TableCell] = {}
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._cell: TableCell | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "td":
            self._cell = self.cells.setdefault(values.get("id", ""), TableCell())
        elif self._cell is not None:
            self._cell.tags.add(tag)
            self._cell.text += " "

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.text += data
