"""Cosine over depth for each place of LayerNorm, the same on a logarithmic axis, and the condensation of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRD, new_figure
from fathometer.plotting.failure_modes.theories import POINT, THEORIES, key_below, point_handle, theory_handles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.figure_12 import Placements
    from fathometer.papers.item import FloatArray

_COLOURS = (SECOND, FIRST, INK, "#e69f00", THIRD)  # by variant
_UNDERNEATH = "no LN"  # follows post-LN, which is drawn on top of its wider line
_SHOWN = ("exact", "random_energy")  # annealed averages are the true ones at so weak scores
_SMALLEST = 3e-7  # of 1 - p/q: below lies the rounding error of float32 networks
_SHOWN_B = (1e-4, 1e3)


def draw_figure_12(result: Placements) -> Figure:
    """Draw three panels over depth."""
    from matplotlib.lines import Line2D

    figure = new_figure(15.6, 5.6)
    figure.set_layout_engine("constrained", wspace=0.05, h_pad=0.1)
    cosine, distance, condensation = figure.subplots(1, 3)
    framed(cosine, "Cosine of two tokens", xlabel="block", ylabel="p / q")
    _curves(cosine, result, result.theory)
    _points(cosine, result, result.simulated)
    cosine.set_ylim(0.15, 1.03)
    framed(distance, "Distance from rank collapse", xlabel="block", ylabel="1 − p / q")
    _curves(distance, result, {name: 1 - curves for name, curves in result.theory.items()})
    _points(distance, result, np.where(1 - result.simulated > _SMALLEST, 1 - result.simulated, np.nan))
    distance.set_yscale("log")
    distance.set_ylim(_SMALLEST, 1.5)
    framed(condensation, "Condensation of attention", xlabel="block", ylabel=r"$b = \sqrt{v \,/\, 2 \ln n}$")
    _curves(condensation, result, result.condensation, first=1, widened=0.0)
    condensation.axhline(1.0, color=MUTED, linewidth=0.9, zorder=1)
    condensation.text(0.1, 1.25, "condensed above", fontsize=8.5, color=MUTED)
    condensation.set_yscale("log")
    condensation.set_ylim(*_SHOWN_B)
    for ax in (cosine, distance, condensation):
        _depth_axis(ax, result)
    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=variant)
        for variant, colour in zip(result.variants, _COLOURS, strict=False)
    ]
    about = result.about
    label = f"{about['weight_draws']} networks, width {about['d_model']}, {about['n_tokens']} tokens, mean ± SE"
    key_below(figure, [*handles, *theory_handles(_SHOWN), point_handle(label)], 3)
    return figure


def _curves(
    ax: Axes, result: Placements, curves: dict[str, FloatArray], *, first: int = 0, widened: float = 2.2
) -> None:
    """Draw the theories of every variant.

    Args:
        ax, result: Where, and what.
        curves: By closure.
        first: Block of the first value.
        widened: By how much the line of the variant underneath is wider.
    """
    for i, (variant, colour) in enumerate(zip(result.variants, _COLOURS, strict=False)):
        below = variant == _UNDERNEATH
        for name in _SHOWN:
            _, dash, width = THEORIES[name]
            values = curves[name][i]
            blocks = np.arange(first, first + len(values))
            extra = widened if below and name == "exact" else 0.0
            ax.plot(blocks, values, color=colour, linestyle=dash, linewidth=width + extra, zorder=3 - 0.5 * below)


def _points(ax: Axes, result: Placements, simulated: FloatArray) -> None:
    at = np.unique(np.concatenate([[0], np.geomspace(1, simulated.shape[1] - 1, 14).round().astype(int)]))
    for i, (variant, colour) in enumerate(zip(result.variants, _COLOURS, strict=False)):
        ax.errorbar(
            at,
            simulated[i, at],
            yerr=result.errors[i, at],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4 - 0.5 * (variant == _UNDERNEATH),
            **POINT,
        )


def _depth_axis(ax: Axes, result: Placements) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    last = result.simulated.shape[1] - 1
    ax.set_xscale("symlog", linthresh=1, linscale=0.35)
    ax.set_xlim(-0.1, 1.1 * last)
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick <= last]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
