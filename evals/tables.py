"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(table: Sequence[Sequence[str]], left: int = 2) -> None:
    """Prints rows of cells, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells in table:
        sized = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(sized).rstrip())
