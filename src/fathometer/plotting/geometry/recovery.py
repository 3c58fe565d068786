"""How groups of tokens become exchangeable over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed, log_ticks
from fathometer.plotting.canvas import FIRST, INK, PAPER, SECOND, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.geometry.figure_3 import Recovery

_COLOURS = (FIRST, SECOND)
_RATIO = r"$\langle p_1 \rangle \,/\, \langle p_2 \rangle$"


def draw_recovery(result: Recovery) -> Figure:
    """Draw the ratio of mean overlaps, and on a logarithmic axis its distance from one with the predicted decay."""
    figure = new_figure(12.6, 4.9)
    figure.set_layout_engine("constrained", wspace=0.05)
    ratio_ax, decay_ax = figure.subplots(1, 2)
    framed(ratio_ax, "Overlap inside over overlap across groups", xlabel="layer", ylabel=_RATIO)
    framed(decay_ax, "Its approach to one", xlabel="layer", ylabel=_RATIO + r"$\,-\,1$")
    layers, seen = np.arange(result.theory.shape[1]), np.arange(result.simulated.shape[1])
    for i, colour in enumerate(_COLOURS[: len(result.names)]):
        for ax, below in ((ratio_ax, 0.0), (decay_ax, 1.0)):
            ax.plot(layers, result.theory[i] - below, color=colour, linewidth=1.8, zorder=3)
            _points(ax, seen, result.simulated[i] - below, result.errors[i], colour)
        rate = result.exponents[i]
        guide = (result.theory[i, -1] - 1) * np.exp(rate * (layers - layers[-1]))
        decay_ax.plot(layers, guide, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    ratio_ax.axhline(1.0, color=INK, linewidth=0.9, zorder=1.5)
    decay_ax.set_yscale("log")
    decay_ax.set_ylim(0.6 * (result.theory[:, -1] - 1).min(), 1.4 * (result.theory[:, 0] - 1).max())
    log_ticks(decay_ax)
    for ax, last in ((ratio_ax, seen[-1]), (decay_ax, layers[-1])):
        ax.set_xlim(-0.02 * last, 1.02 * last)
        ax.set_xticks(np.arange(0, last + 1, max(1, last // 6)))
    _key(figure, result)
    return figure


def _points(ax: Axes, layers: Any, values: Any, errors: Any, colour: str) -> None:
    ax.errorbar(
        layers,
        values,
        yerr=errors,
        fmt="o",
        color=colour,
        markersize=4.4,
        markerfacecolor=PAPER,
        markeredgewidth=1.2,
        elinewidth=1.0,
        zorder=4,
    )


def _key(figure: Figure, result: Recovery) -> None:
    from matplotlib.lines import Line2D

    draws = result.about["weight_draws"]
    point: dict[str, Any] = {"linewidth": 0, "marker": "o", "markersize": 4.4, "markerfacecolor": PAPER}
    handles = []
    for i, colour in enumerate(_COLOURS[: len(result.names)]):
        name = f"{result.names[i]}, $\\sigma_w = {result.sigma_w[i]:g}$"
        decay = f"predicted decay, exponent −{-result.exponents[i]:.3f}"
        handles += [
            Line2D([], [], color=colour, linewidth=1.8, label=f"theory, {name}"),
            Line2D([], [], color=colour, label=f"{draws} networks, {name}", **point),
            Line2D([], [], color=colour, linewidth=1.2, linestyle=(0, (5, 3)), label=decay),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
