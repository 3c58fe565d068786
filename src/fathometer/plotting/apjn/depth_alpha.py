"""The picture of depth and alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import INK, MUTED, PAPER, SECOND, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.apjn.depth_alpha import DepthAlpha
    from fathometer.papers.item import FloatArray


def draw_depth_alpha(result: DepthAlpha) -> Figure:
    """Draw log10 of the APJN over depth and alpha, and where it equals pre-LayerNorm's."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = new_figure(8.6, 5.6)
    ax = figure.add_subplot()
    title = "Jacobian norm of a Derf transformer"
    framed(ax, title, xlabel="depth, blocks", ylabel="alpha", keyed=True)
    log10 = result.log_apjn.T / np.log(10)
    # Most of the plane has moderate J: the square root gives it more of the colours.
    image = ax.pcolormesh(
        result.depths,
        result.alphas,
        log10,
        shading="nearest",
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0.0),
        rasterized=True,
    )
    levels = [level for level in (0.1, 0.3, 1, 2, 3, 5, 7, 10, 15, 20) if level < log10.max()]
    lines = ax.contour(result.depths, result.alphas, log10, levels=levels, colors=PAPER, linewidths=0.7, alpha=0.85)
    _label(ax, lines, result, log10)
    ax.plot(result.depths, result.contour, color=PAPER, linewidth=4.2, zorder=4)
    ax.plot(result.depths, result.contour, color=SECOND, linewidth=2.2, zorder=5, label="same J as pre-LayerNorm")
    ax.plot(
        result.solved_depths,
        result.solved,
        linewidth=0,
        marker="o",
        markersize=6,
        color=INK,
        markerfacecolor=PAPER,
        markeredgewidth=1.4,
        zorder=6,
        clip_on=False,
        label="solved for alpha",
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    last = int(result.depths[-1])
    ax.set_xlim(1, last)
    ax.set_ylim(result.alphas[0], result.alphas[-1])
    ax.xaxis.set_major_locator(FixedLocator([d for d in (1, 3, 6, 12, 24, 48, 96, 128, 192, 256) if d <= last]))
    ax.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 4]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(visible=False)
    bar = figure.colorbar(image, ax=ax, pad=0.03, ticks=[0, *levels[2:]])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(r"$\log_{10} J$, input to output", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8.5, labelcolor=MUTED, color=MUTED, length=3)
    bar.outline.set_visible(False)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.2,
    )
    return figure


def _label(ax: Axes, lines: Any, result: DepthAlpha, log10: FloatArray) -> None:
    """Write each level onto its contour: at two thirds of the axis where the contour gets there, else further right."""
    places = []
    for level in lines.levels:
        for fraction in (0.66, 0.8, 0.9):
            column = int(len(result.depths) ** fraction) - 1
            if log10[0, column] < level < log10[-1, column]:
                places.append((result.depths[column], np.interp(level, log10[:, column], result.alphas)))
                break
    ax.clabel(lines, fmt="%g", fontsize=7.5, manual=places)
