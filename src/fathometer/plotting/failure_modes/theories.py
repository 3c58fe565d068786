"""The look of the theories and of networks, the same in every picture of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathometer.plotting.canvas import INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOLID: Any = "-"
#: Name of a closure to what it is called, its dashes and its width.
THEORIES: dict[str, tuple[str, Any, float]] = {
    "exact": ("true averages (exact)", SOLID, 1.8),
    "random_energy": ("infinitely many tokens (asymptotic)", (0, (5, 2)), 1.5),
    "annealed": ("annealed averages", (0, (1, 1.6)), 1.6),
}
POINT: dict[str, Any] = {"markersize": 4.4, "markerfacecolor": PAPER, "markeredgewidth": 1.2}


def theory_handles(names: tuple[str, ...] = tuple(THEORIES), colour: str = MUTED) -> list[Any]:
    """Return the entries of a key."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, linestyle=dash, linewidth=width, label=label)
        for label, dash, width in (THEORIES[name] for name in names)
    ]


def point_handle(label: str, colour: str = MUTED) -> Any:
    """Return the entry of simulated points."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=0, marker="o", label=label, **POINT)


def key_below(figure: Figure, handles: list[Any], columns: int) -> None:
    """Write a key below all axes."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=2.2,
    )
