"""One small line plot as an SVG element: themed by the page's CSS, labelled at line ends, the same bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from reports.style import Look
from reports.tables import slug, visible

# Colours that the page's stylesheet replaces, so that one drawing serves light, dark and paper.
THEMED = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)", "#040404": "var(--card)"}
INK, MUTED, RULE, CARD = THEMED
WIDTH, HEIGHT = 4.6, 2.9
AXES = (0.125, 0.155, 0.62, 0.75)
LABEL_GAP = 0.066
"""Least distance between two line labels, as a share of the height of the axes."""
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 4}
ROUND = (1, 2, 2.5, 5, 10)
"""Digits that ticks may step by."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """A curve: points, an optional band, optional faint raw values behind it, and whether its points are marked."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    raw: Sequence[float] = ()
    marked: bool = True


@dataclass(frozen=True)
class Plot:
    """One set of axes; `ticks` fixes the x ticks and makes the axis logarithmic."""

    id: str
    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    description: str
    ticks: Sequence[int] = ()

    def svg(self) -> Markup:
        """The plot as an SVG element whose ids all begin with this plot's id."""
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.id}):
            canvas = Canvas(figsize=(WIDTH, HEIGHT))
            FigureCanvasSVG(canvas)
            axes = canvas.add_axes(AXES)
            for line in self.lines:
                draw_line(axes, line)
            axes.set_title(visible(self.title))
            axes.set_xlabel(self.xlabel)
            axes.set_ylabel(self.ylabel)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
            if self.ticks:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_locator(FixedLocator(self.ticks))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in self.ticks]))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(7, steps=ROUND, integer=True))
            label_lines(axes, self.lines)
            file = io.StringIO()
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            canvas.savefig(file, format="svg", metadata=no_metadata)
        return embed(file.getvalue(), slug(self.id), visible(self.title), visible(self.description))


def draw_line(axes: Any, line: Line) -> None:
    """Draws band, raw values, curve and markers of one line."""
    look = line.look
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=look.color, alpha=0.14, linewidth=0)
    if line.raw:
        axes.plot(line.x, line.raw, color=look.color, alpha=0.3, linewidth=0.9)
    axes.plot(
        line.x,
        line.y,
        color=look.color,
        linestyle=look.dash,
        linewidth=1.9,
        marker=look.marker if line.marked else None,
        markersize=5.2,
        markerfacecolor=look.color if look.filled else CARD,
        markeredgewidth=1.4,
    )


def label_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Writes each line's name right of its last point; names that would overlap are moved apart."""
    axes.autoscale_view()  # limits are lazy; without this the transform below is the empty plot's
    to_share = axes.transData + axes.transAxes.inverted()
    ends = [tuple(to_share.transform((line.x[-1], line.y[-1]))) for line in lines]
    for line, (x, y), place in zip(lines, ends, spread([y for _, y in ends]), strict=True):
        name = visible(line.label if len(line.label) <= 20 else line.label[:19] + "…")
        axes.annotate(
            name,
            (x, y),
            (1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=line.look.color,
            annotation_clip=False,
            arrowprops={**LEADER, "color": line.look.color},
        )


def spread(places: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """The places, moved in their order until neighbours are `gap` apart and, if they fit, all lie in [0, 1]."""
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    placed: list[float] = []
    for index in order:
        placed.append(max(places[index], placed[-1] + gap) if placed else max(places[index], 0.0))
    limit = 1.0
    for position in reversed(range(len(placed))):
        placed[position] = min(placed[position], limit)
        limit = placed[position] - gap
    found = [0.0] * len(places)
    for index, place in zip(order, placed, strict=True):
        found[index] = place
    return found


def embed(svg: str, prefix: str, title: str, description: str) -> Markup:
    """matplotlib's file as an element for an HTML page: no prolog, style sheet, fixed size, fonts or shared ids."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = body.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    for placeholder, variable in THEMED.items():
        body = body.replace(placeholder, variable)
    body = re.sub(r"(<text [^>]*?)fill: (#[0-9a-f]{6})", r"\1fill: color-mix(in srgb, \2 58%, var(--ink))", body)
    head = (
        f'<svg viewBox="0 0 {WIDTH * 72:g} {HEIGHT * 72:g}" role="img" aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(description)}</desc>'
    )
    return Markup(head + body[body.index(">") + 1 :])
