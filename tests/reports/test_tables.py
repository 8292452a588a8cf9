from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.plots import spread
from reports.tables import Cell, Column, Row, Table, duration, mark_best, number, p_text, to_text, visible


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (61.25, 1, "61.2"),
        (-0.04, 1, "0.0"),
        (-0.06, 1, "−0.1"),
        (12.0, 0, "12"),
        (float("inf"), 1, "∞"),
        (-1e9, 0, "−1000000000"),
    ],
)
def test_number(value: float, decimals: int, text: str) -> None:
    assert number(value, decimals) == text


def test_p_text() -> None:
    assert p_text(0.0004) == "p < 0.001"
    assert p_text(0.0312) == "p = 0.031"


def test_duration() -> None:
    assert [duration(seconds) for seconds in (41.6, 725, 12_040)] == ["42 s", "12 min 5 s", "3 h 20 min"]


@given(st.text())
def test_visible_leaves_no_invisible_character(text: str) -> None:
    shown = visible(text)
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    assert not [c for c in shown if unicodedata.category(c) in hidden and c not in "\t\n"]
    shown.encode("utf-8")  # no lone surrogate is left


def test_visible_keeps_ordinary_text_and_names_the_rest() -> None:
    assert visible("x² ≤ π\n\tçok 数") == "x² ≤ π\n\tçok 数"
    assert visible("a\u202eb\x00\r\ud800") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+000D⟩⟨U+D800⟩"


def marks_of(values: list[Cell], better: str) -> list[set[str]]:
    column = Column("x", "x", better=better)  # type: ignore[arg-type]
    rows = mark_best([column], [Row(str(index), "", {"x": cell}) for index, cell in enumerate(values)])
    return [set(row.cells["x"].marks) for row in rows]


def test_best_and_second_tie_as_printed() -> None:
    cells = [Cell(50.04), Cell(49.96), Cell(48.0), Cell(47.97), Cell(10.0)]
    assert marks_of(cells, "high") == [{"best"}, {"best"}, {"second"}, {"second"}, set()]
    assert marks_of(cells, "low") == [set(), set(), {"second"}, {"second"}, {"best"}]


def test_partial_and_missing_cells_are_not_ranked() -> None:
    cells = [Cell(99.0, reason="partial: 3 of 9 items"), Cell(reason="not evaluated"), Cell(1.0), Cell(2.0), Cell(3.0)]
    assert marks_of(cells, "high") == [set(), set(), set(), {"second"}, {"best"}]


def test_a_second_of_two_and_a_best_of_one_are_not_marked() -> None:
    assert marks_of([Cell(1.0), Cell(2.0)], "high") == [set(), {"best"}]
    assert marks_of([Cell(1.0)], "high") == [set()]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=14))
def test_labels_are_spread_in_order_and_inside(places: list[float]) -> None:
    gap = 0.066
    placed = spread(places, gap)
    order = np.argsort(places, kind="stable")
    sorted_places = np.array(placed)[order]
    assert (np.diff(sorted_places) >= gap - 1e-9).all()
    assert sorted_places[0] >= -1e-9
    assert sorted_places[-1] <= 1 + 1e-9


def test_labels_far_apart_stay_where_they_are() -> None:
    assert spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]


def test_text_table_is_aligned_and_explains_its_gaps() -> None:
    columns = [Column("a", "pass@1 %", better="high"), Column("b", "KL", decimals=3)]
    rows = [
        Row("x", "Base", {"a": Cell(27.4, 23.3, 32.0), "b": Cell(text="–")}),
        Row("y", "GIFT + RL", {"a": Cell(75.41, 70.9, 79.4), "b": Cell(reason="not measured")}),
    ]
    text = to_text(Table("t", "Caption.", "Policy", columns, mark_best(columns, rows)))
    assert text.splitlines() == [
        "Caption.",
        "Policy     pass@1 %            KL",
        "---------------------------------",
        "Base       27.4  [23.3, 32.0]  –",
        "GIFT + RL  75.4* [70.9, 79.4]  –",
        "* best of its column",
        "GIFT + RL, KL: not measured",
    ]
