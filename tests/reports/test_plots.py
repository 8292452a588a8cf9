from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from reports.plots import Line, Plot
from reports.rundata import Policy
from reports.style import looks

LOOK = looks([Policy("gift", "GIFT", None, "init", "gift", "")])["gift"]


def plot(id: str = "p", title: str = "Title", label: str = "GIFT", ticks: tuple[int, ...] = ()) -> Plot:
    line = Line(label, LOOK, [1, 2, 4], [0.1, 0.5, 0.7], [0.0, 0.4, 0.6], [0.2, 0.6, 0.8])
    return Plot(id, title, "step", "loss", [line], "In words.", ticks)


def test_svg_is_well_formed_and_says_what_it_shows() -> None:
    root = ET.fromstring(str(plot(ticks=(1, 2, 4)).svg()))
    assert root.tag == "svg"
    assert root.attrib["viewBox"] == "0 0 331.2 208.8"
    texts = [element.text for element in root.iter("text")]
    assert {"Title", "step", "loss", "GIFT", "1", "2", "4"} <= set(texts)
    assert [root.find("title").text, root.find("desc").text] == ["Title", "In words."]  # type: ignore[union-attr]


def test_points_lie_where_the_axes_say() -> None:
    root = ET.fromstring(str(plot().svg()))
    ticks = {t.text: float(t.attrib["x"]) for t in root.iter("text") if re.fullmatch(r"\d", t.text or "")}
    per_step = ticks["4"] - ticks["3"]
    markers = [float(use.attrib["x"]) for use in root.iter("use") if "stroke: #e42536" in use.attrib["style"]]
    assert [round((x - ticks["1"]) / per_step, 3) for x in markers] == [0, 1, 3]


def test_ids_begin_with_the_plots_own_and_colours_follow_the_theme() -> None:
    first, second = str(plot("r1-a").svg()), str(plot("r2-a").svg())
    ids = [re.findall(r'id="([^"]+)"', svg) for svg in (first, second)]
    assert not set(ids[0]) & set(ids[1])
    assert all(id.startswith("r1-a-") for id in ids[0])
    assert "var(--ink)" in first
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]|#000000|#ffffff|font-family", first)


def test_the_same_plot_gives_the_same_bytes() -> None:
    assert plot().svg() == plot().svg()


def test_hostile_labels_stay_text() -> None:
    svg = str(plot('"><script>', "$x & <b>\x00\ud800", "$\\frac{</svg>\u202e").svg())
    root = ET.fromstring(svg)
    assert "$\\frac{</svg>⟨U+202E⟩" in [element.text for element in root.iter("text")]
    assert root.find("title").text == "$x & <b>⟨U+0000⟩⟨U+D800⟩"  # type: ignore[union-attr]
    assert "<script" not in svg


def test_looks_are_fixed_for_known_methods_and_distinct_for_others() -> None:
    stages = [("base", "base", None)] + [
        (f"{m}{s}", s, m) for m in ("gift", "sft", "dft", "kd", "x", "y") for s in ("init", "rl")
    ]
    found = looks([Policy(id, id, None, stage, method, "") for id, stage, method in stages])  # type: ignore[arg-type]
    assert (found["giftrl"].color, found["giftrl"].dash, found["giftrl"].marker) == ("#e42536", "solid", "o")
    assert (found["sftinit"].color, found["sftinit"].dash, found["sftinit"].marker) == ("#5790fc", "dashed", "s")
    assert [found[f"gift{stage}"].filled for stage in ("init", "rl")] == [False, True]
    assert len({(look.marker, look.filled) for look in found.values()}) == len(found)
    assert len({look.glyph for look in found.values()}) == len(found)
