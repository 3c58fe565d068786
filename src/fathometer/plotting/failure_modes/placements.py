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

_COLOURS = (SECOND, FIRST, INK, "#e69f00", THIRD)  # by variant
_SMALLEST = 3e-7  # of 1 - p/q: below lies the rounding error of float32 networks
_SHOWN_B = (1e-4, 1e3)


def draw_figure_12(result: Placements) -> Figure:
    """Draw three panels over depth."""
    figure = new_figure(15.6, 5.4)
    figure.set_layout_engine("constrained", wspace=0.05)
    plain, distance, condensation = figure.subplots(1, 3)
    _cosine(plain, result)
    _distance(distance, result)
    _condensation(condensation, result)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=variant)
        for variant, colour in zip(result.variants, _COLOURS, strict=False)
    ]
    about = result.about
    label = f"{about['weight_draws']} networks, width {about['d_model']}, {about['n_tokens']} tokens"
    key_below(figure, [*handles, *theory_handles(), point_handle(label)], 3)
    return figure


def _cosine(ax: Axes, result: Placements) -> None:
    framed(ax, "Cosine of two tokens", xlabel="block", ylabel="p / q")
    at = _shown(result)
    for i, colour in zip(range(len(result.variants)), _COLOURS, strict=False):
        _lines(ax, {name: curves[i] for name, curves in result.theory.items()}, colour)
        ax.errorbar(
            at,
            result.simulated[i, at],
            yerr=result.errors[i, at],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **POINT,
        )
    ax.set_ylim(0.15, 1.03)
    ax.set_xscale("symlog", linthresh=1, linscale=0.35)
    _depth_ticks(ax, result)


def _distance(ax: Axes, result: Placements) -> None:
    framed(ax, "Distance from rank collapse", xlabel="block", ylabel="1 − p / q")
    at = _shown(result)
    for i, colour in zip(range(len(result.variants)), _COLOURS, strict=False):
        _lines(ax, {name: 1 - curves[i] for name, curves in result.theory.items()}, colour)
        seen = 1 - result.simulated[i, at]
        kept = seen > _SMALLEST
        ax.errorbar(
            at[kept],
            seen[kept],
            yerr=result.errors[i, at][kept],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **POINT,
        )
    ax.set_yscale("log")
    ax.set_ylim(_SMALLEST, 1.5)
    ax.set_xscale("symlog", linthresh=1, linscale=0.35)
    _depth_ticks(ax, result)


def _condensation(ax: Axes, result: Placements) -> None:
    framed(ax, "Condensation of attention", xlabel="block", ylabel=r"$b = \sqrt{v \,/\, 2 \ln n}$")
    blocks = np.arange(1, result.condensation["exact"].shape[1] + 1)
    for i, colour in zip(range(len(result.variants)), _COLOURS, strict=False):
        for name, (_, dash, width) in THEORIES.items():
            values = result.condensation[name][i]
            ax.plot(blocks, values, color=colour, linestyle=dash, linewidth=width, zorder=3)
    ax.axhline(1.0, color=MUTED, linewidth=0.9, zorder=1)
    ax.text(1.05, 1.25, "condensed above", fontsize=8.5, color=MUTED)
    ax.set_yscale("log")
    ax.set_ylim(*_SHOWN_B)
    ax.set_xscale("symlog", linthresh=1, linscale=0.35)
    _depth_ticks(ax, result)


def _lines(ax: Axes, curves: dict[str, object], colour: str) -> None:
    for name, (_, dash, width) in THEORIES.items():
        ax.plot(curves[name], color=colour, linestyle=dash, linewidth=width, zorder=3)


def _shown(result: Placements) -> np.ndarray:
    return np.unique(np.concatenate([[0], np.geomspace(1, result.simulated.shape[1] - 1, 14).round().astype(int)]))


def _depth_ticks(ax: Axes, result: Placements) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    last = result.simulated.shape[1] - 1
    ax.set_xlim(-0.1, 1.1 * last)
    ax.xaxis.set_major_locator(FixedLocator([t for t in (0, 1, 2, 5, 10, 20, 50, 100) if t <= last]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
