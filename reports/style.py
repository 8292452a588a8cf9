"""How a policy looks in every figure and table: one fixed map from method and stage to colour, dash and marker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports.rundata import Policy

# petroff10 (Petroff 2021) for the methods, petroff6 for GIFT and SFT: told apart under protanopia, deuteranopia and
# tritanopia. Dash and marker repeat what colour says, because some of these hues are faint on white.
Dash = str | tuple[int, tuple[int, ...]]
FIXED: dict[str, tuple[str, Dash, str]] = {"gift": ("#e42536", "solid", "o"), "sft": ("#5790fc", "dashed", "s")}
OTHERS: tuple[tuple[str, Dash, str], ...] = (
    ("#f89c20", "dashdot", "^"),
    ("#964a8b", (0, (5, 1)), "v"),
    ("#7a21dd", (0, (3, 1, 1, 1, 1, 1)), "P"),
    ("#94a4a2", (0, (1, 1)), "h"),
    ("#a96b59", (0, (3, 1, 1, 1)), "<"),
    ("#717581", (0, (7, 2)), ">"),
    ("#b9ac70", (0, (4, 2, 1, 2)), "p"),
    ("#92dadd", (0, (2, 2)), "*"),
    ("#832db6", (0, (6, 1, 1, 1)), "d"),
    ("#bd1f01", (0, (1, 2)), "H"),
)
BASE: tuple[str, Dash, str] = ("#9c9ca1", "dotted", "D")
REST: tuple[str, Dash, str] = ("#9c9ca1", "dashdot", "X")
FILLED_AND_HOLLOW = ("●○", "■□", "▲△", "▼▽", "◆◇", "✚✛", "✖✕", "⬢⬡", "◀◁", "▶▷", "⬟⬠", "★☆", "♦♢", "⬣⎔")
GLYPHS = dict(zip("os^vDPXh<>p*dH", FILLED_AND_HOLLOW, strict=True))


@dataclass(frozen=True)
class Look:
    """Line colour and dash, marker, and whether the marker is filled (after RL) or hollow (before)."""

    color: str
    dash: Dash
    marker: str
    filled: bool

    @property
    def glyph(self) -> str:
        """The marker as a character, for tables."""
        return GLYPHS[self.marker][0 if self.filled else 1]


def looks(policies: Iterable[Policy]) -> dict[str, Look]:
    """The look of each policy by id. Methods beyond the fixed ones take the remaining hues in order, then grey."""
    found: dict[str, Look] = {}
    free = list(OTHERS)
    taken = dict(FIXED)
    for policy in policies:
        name = policy.method or policy.id
        if name not in taken:
            first_base = policy.stage == "base" and not found
            taken[name] = BASE if first_base else free.pop(0) if free else REST
        color, dash, marker = taken[name]
        found[policy.id] = Look(color, dash, marker, filled=policy.stage == "rl")
    return found
