"""How far each approximation of J lies from simulation, setting by setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, GRID, INK, MUTED, PAPER, SECOND, THIRD, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.papers.apjn.approximations import Approximations

_MARKS = {
    "full, sampled": ("D", INK, "full recursion, sampled softmax"),
    "full, annealed": ("o", FIRST, "full recursion, annealed softmax"),
    "many tokens": ("s", THIRD, "many tokens (no 1/n)"),
    "no score path": ("^", "#a0529c", "no score path"),
    "single factor": ("v", SECOND, "single factor (no K, no score path)"),
}


def draw_approximations(result: Approximations) -> Figure:
    """Draw predicted over simulated J, with two standard errors of the simulation as a bar."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = len(result.settings)
    figure = new_figure(11.5, 1.5 + 0.52 * rows)
    ax = figure.add_subplot()
    framed(ax, "Jacobian norm, predicted over simulated", xlabel="J predicted / J simulated", ylabel="")
    at = np.arange(rows)[::-1]
    noise = 2 * result.errors / result.simulated
    ax.barh(at, 2 * noise, left=1 - noise, height=0.62, color=GRID, zorder=1, label="simulation ± 2 SE")
    ax.axvline(1.0, color=MUTED, linewidth=1.0, zorder=2)
    for k, (method, (marker, colour, label)) in enumerate(_MARKS.items()):
        shift = 0.13 * (2 - k)
        ratio = result.predicted[method] / result.simulated
        ax.plot(
            ratio,
            at + shift,
            linewidth=0,
            marker=marker,
            markersize=6.5,
            color=colour,
            markerfacecolor=colour if k == 0 else PAPER,
            markeredgewidth=1.5,
            label=label,
            zorder=4,
        )
    ax.set_xscale("log")
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 2.0]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    names = [
        name.replace("σ²_QK", r"$\sigma_{QK}^2$") + f"\nJ = {value:.2f} ± {error:.2f}"
        for name, value, error in zip(result.settings, result.simulated, result.errors, strict=True)
    ]
    ax.set_yticks(at, names)
    ax.tick_params(axis="y", labelcolor=INK, length=0)
    ax.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure
