"""Averages of softmax rows over the score variance, and a map of where closed forms suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRD, new_figure
from fathometer.plotting.failure_modes.theories import POINT, THEORIES, key_below, point_handle, theory_handles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.figure_4 import RowStatistics
    from fathometer.papers.item import FloatArray

_COLOURS = (SECOND, "#b8860b", THIRD, FIRST)  # by number of keys
_PANELS = (
    ("y2", "Participation", r"$E\,Y_2 = E \sum A^2$", True),
    ("entropy", "Entropy", r"$H / \ln n$", False),
    ("y12", "Overlap of two rows", r"$E\,Y_{12} = E \sum A A'$", True),
    ("score", "Weight of score gradients", r"$G = E[Y_2 - 2 Y_3 + Y_2^2]$", True),
)
_B = r"$b = \sqrt{v \,/\, 2 \ln n}$"
_FILLS = {"annealed": SECOND, "random_energy": FIRST}
_BOTH = "#5f6b6b"  # one fill on top of the other


def draw_figure_4(result: RowStatistics) -> Figure:
    """Draw four statistics and two maps."""
    figure = new_figure(15.4, 8.8)
    figure.set_layout_engine("constrained", hspace=0.05, wspace=0.05, h_pad=0.1)
    axes = figure.subplots(2, 3)
    for ax, panel in zip((axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]), _PANELS, strict=True):
        _statistic(ax, result, *panel)
    about = result.about
    _map(axes[0, 2], result, result.mean_square, "Mean square of the attention output")
    _map(axes[1, 2], result, result.cosine, "Cosine of two attention outputs")
    axes[1, 2].set_xlabel(_B + f", tokens of cosine {about['correlation']:g}", fontsize=9, color=MUTED)
    _key(figure, result)
    return figure


def _statistic(ax: Axes, result: RowStatistics, name: str, title: str, symbol: str, logarithmic: bool) -> None:
    framed(ax, title, xlabel=_B, ylabel=symbol)
    for i, colour in zip(range(len(result.counts)), _COLOURS, strict=False):
        for closure, (_, dash, width) in THEORIES.items():
            values = result.theory[closure][name][i]
            if logarithmic:
                values = np.where(values > 0, values, np.nan)
            shared = closure == "random_energy"  # the same for all numbers of keys
            ax.plot(
                result.b, values, color=INK if shared else colour, linestyle=dash, linewidth=width, zorder=3 - shared
            )
        ax.errorbar(
            result.at,
            result.sampled[name][i],
            yerr=result.errors[name][i],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **POINT,
        )
    ax.axvline(1.0, color=MUTED, linewidth=0.9, zorder=1)
    ax.set_xlim(0, float(result.b[-1]) * 1.02)
    if logarithmic:
        ax.set_yscale("log")
        low = min(float(np.min(result.theory["exact"][name])), float(np.min(result.sampled[name])))
        ax.set_ylim(0.5 * low, 1.5 * max(1.0 if name != "score" else 0.3, float(result.theory["exact"][name].max())))
    else:
        ax.set_ylim(0, 1.03)
    if name == "y12":
        ax.text(
            0.98, 0.04, "asymptotic: zero", transform=ax.transAxes, ha="right", va="bottom", fontsize=9, color=MUTED
        )


def _map(ax: Axes, result: RowStatistics, ratios: dict[str, FloatArray], title: str) -> None:
    framed(ax, title + ": within 5 %", xlabel=_B, ylabel="keys n")
    exponents = np.log2(result.map_counts)  # contours interpolate along the axis they are drawn on
    for name, colour in _FILLS.items():
        off = ratios[name] - 1
        ax.contourf(result.map_b, exponents, off, levels=[-0.05, 0.05], colors=[colour], alpha=0.28, zorder=1)
        ax.contour(
            result.map_b, exponents, off, levels=[-0.05, 0.05], colors=colour, linewidths=1.8, linestyles="-", zorder=3
        )
    ax.axvline(1.0, color=MUTED, linewidth=0.9, zorder=2)
    ax.set_xlim(float(result.map_b[0]), float(result.map_b[-1]))
    ticks = np.arange(4, exponents[-1] + 1, 4)
    ax.set_yticks(ticks, [f"{2**tick:,.0f}".replace(",", "\u2009") for tick in ticks])


def _key(figure: Figure, result: RowStatistics) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=2.2, label=f"n = {n}")
        for n, colour in zip(result.counts, _COLOURS, strict=False)
    ]
    handles += [*theory_handles(), point_handle("sampled rows, mean ± SE")]
    handles += [
        Patch(facecolor=colour, alpha=0.4, label=f"{label}: within 5 %")
        for label, colour in (("annealed", SECOND), ("asymptotic", FIRST), ("both", _BOTH))
    ]
    key_below(figure, handles, 6)
