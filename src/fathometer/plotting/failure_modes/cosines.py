"""Cosines over depth, and how far each theory is from networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed, log_ticks
from fathometer.plotting.canvas import FIRST, GRID, INK, PAPER, SECOND, THIRD, new_figure
from fathometer.plotting.failure_modes.theories import POINT, THEORIES, key_below, point_handle, theory_handles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.figure_1 import CosineCurves

_COLOURS = (SECOND, FIRST, THIRD)  # by skip scale
_MARKS = {"exact": ("o", INK), "random_energy": ("s", FIRST), "annealed": ("^", SECOND)}


def draw_figure_1(result: CosineCurves) -> Figure:
    """Draw one panel of curves for each temperature, and the largest errors of all settings."""
    figure = new_figure(15.6, 5.2)
    figure.set_layout_engine("constrained", wspace=0.04, h_pad=0.1)
    n = len(result.betas)
    axes = figure.subplots(1, n + 1, width_ratios=(1.0,) * n + (0.95,))
    for i, ax in enumerate(axes[:n]):
        _curves(ax, result, i)
    _errors(axes[n], result)
    about = result.about
    label = f"{about['weight_draws']} networks, width {about['d_model']}, {about['n_tokens']} tokens, mean ± SE"
    key_below(figure, [*theory_handles(), point_handle(label)], 4)
    return figure


def _curves(ax: Axes, result: CosineCurves, i: int) -> None:
    from matplotlib.lines import Line2D

    phase = "spread" if result.betas[i] < 2**0.5 else "condensed"
    framed(
        ax,
        rf"$\beta = {result.betas[i]:g}$, attention starts {phase}",
        xlabel="block",
        ylabel="cosine of two tokens, p / q",
    )
    n_layers = result.simulated.shape[-1] - 1
    at = np.unique(np.linspace(0, n_layers, 15).round().astype(int))
    for j, colour in zip(range(len(result.skip_scales)), _COLOURS, strict=False):
        for name, (_, dash, width) in THEORIES.items():
            ax.plot(result.theory[name][i, j], color=colour, linestyle=dash, linewidth=width, zorder=3)
        ax.errorbar(
            at,
            result.simulated[i, j, at],
            yerr=result.errors[i, j, at],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **POINT,
        )
    ax.set_xlim(-1, n_layers + 1)
    ax.set_ylim(-0.02, 1.03)
    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=rf"$\alpha_{{SA}} = {skip:g}$")
        for skip, colour in zip(result.skip_scales, _COLOURS, strict=False)
    ]
    ax.legend(handles=handles, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def _errors(ax: Axes, result: CosineCurves) -> None:
    framed(ax, "Largest error over the depth", xlabel="", ylabel="|theory − networks|, cosine")
    settings = [(i, j) for i in range(len(result.betas)) for j in range(len(result.skip_scales))]
    noise = [2 * result.errors[i, j].max() for i, j in settings]
    lowest = 0.5 * min(*noise, *(result.largest_errors(name).min() for name in _MARKS))
    ax.bar(range(len(settings)), noise, width=0.72, color=GRID, zorder=1, label="2 SE of networks")
    for k, (name, (marker, colour)) in enumerate(_MARKS.items()):
        found = result.largest_errors(name)
        ax.plot(
            np.arange(len(settings)) + 0.2 * (k - 1),
            [found[i, j] for i, j in settings],
            linewidth=0,
            marker=marker,
            markersize=6.5,
            color=colour,
            markerfacecolor=colour if k == 0 else PAPER,
            markeredgewidth=1.5,
            label=THEORIES[name][0].partition(" (")[0],
            zorder=3,
        )
    ax.set_yscale("log")
    ax.set_ylim(max(lowest, 1e-4), 1.5)
    log_ticks(ax)
    names = [rf"$\alpha = {result.skip_scales[j]:g}$" for _, j in settings]
    ax.set_xticks(range(len(settings)), names)
    ax.tick_params(axis="x", labelcolor=INK, length=0)
    ax.grid(visible=False, axis="x")
    per = len(result.skip_scales)
    for i, beta in enumerate(result.betas):
        ax.text(
            (i + 0.5) * per - 0.5,
            -0.11,
            rf"$\beta = {beta:g}$",
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9.5,
            color=INK,
        )
        if i:
            ax.axvline(i * per - 0.5, color=GRID, linewidth=1.0, zorder=0.5)
    ax.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8.5, labelcolor=INK)
