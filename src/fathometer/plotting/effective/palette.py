"""Colours of widths and recipes, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Narrow to wide.
_WIDTHS = ("#c6b3dd", "#9e83c4", "#7a55ab", "#54308c", "#2f1160")
_RECIPES = {"uniform": SECOND, "neural-tangent": FIRST, "hybrid": THIRD, "maximal-update": "#a3548f"}
_MARKERS = {"uniform": "s", "neural-tangent": "o", "hybrid": "D", "maximal-update": "^"}


def width_colours(count: int) -> list[str]:
    """Return one colour for each width, light to dark."""
    return [_WIDTHS[round(i * (len(_WIDTHS) - 1) / max(count - 1, 1))] for i in range(count)]


def recipe_colour(name: str) -> str:
    """Return the colour of a recipe."""
    return _RECIPES.get(name, MUTED)


def recipe_marker(name: str) -> str:
    """Return the marker of a recipe."""
    return _MARKERS.get(name, "v")


def width_axis(ax: Axes, widths: Sequence[int]) -> None:
    """Label a logarithmic x axis with the widths themselves."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(widths), [str(width) for width in widths])
    ax.set_xticks([], minor=True)
    ax.set_xlim(min(widths) / 1.25, max(widths) * 1.25)


def power_of_two(power: float) -> str:
    """Return a power of two as a label."""
    return f"$2^{{{power:g}}}$"


def remark(ax: Axes, text: str) -> None:
    """Put one line above the axes, under the title."""
    ax.text(0, 1.015, text, transform=ax.transAxes, fontsize=8.8, color=INK, ha="left", va="bottom")
