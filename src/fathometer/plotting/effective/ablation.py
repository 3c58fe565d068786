"""Which group's learning rate explains what the neural-tangent rules gain on images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, GRID, INK, MUTED, SECOND, THIRD, new_figure
from fathometer.plotting.effective.palette import power_of_two, remark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.effective.ablation import Ablation

_STYLES = (
    (SECOND, "s", "-"),
    ("#e69f00", "^", "-"),
    (MUTED, "D", (0, (2, 1.5))),
    ("#56a5d8", "v", (0, (4, 2))),
    (FIRST, "o", "-"),
    (THIRD, "P", "-"),
)


def draw_ablation(result: Ablation) -> Figure:
    """Draw training loss over the rate for all recipes, then loss and accuracy at each one's best rate.

    Bars are two standard errors over seeds.
    """
    figure = new_figure(16.5, 4.8)
    axes = figure.subplots(1, 3, width_ratios=(1.35, 1.0, 1.0))
    _curves(axes[0], result)
    best = {name: result.best(name) for name in result.losses}
    _bars(axes[1], {name: result.losses[name][at] for name, at in best.items()}, "Loss at the best rate", "nats")
    _bars(
        axes[2],
        {name: 100 * result.accuracies[name][at] for name, at in best.items()},
        "Test accuracy at the best rate",
        "% of digits named rightly",
    )
    axes[2].tick_params(labelleft=False)
    return figure


def _curves(ax: Axes, result: Ablation) -> None:
    framed(
        ax,
        "Training loss",
        xlabel="learning rate of the block matrices",
        ylabel="last fifth of steps, nats",
        keyed=True,
    )
    x = np.log2(result.rates)
    for (name, losses), (colour, marker, line) in zip(result.losses.items(), _STYLES, strict=False):
        mean = np.where(np.isfinite(losses).all(axis=-1), losses.mean(axis=-1), np.nan)
        error = np.array([row.std(ddof=1) if np.isfinite(row).all() else 0.0 for row in losses])
        ax.errorbar(
            x,
            mean,
            yerr=2 * error / np.sqrt(losses.shape[-1]),
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            label=name,
            zorder=3,
        )
    ax.set_xticks(x[::2], [power_of_two(power) for power in x[::2]])
    ax.set_ylim(bottom=0)
    ax.legend(loc="best", fontsize=8.8, frameon=False, labelcolor=INK)
    width, steps = result.about["width"], result.about["steps"]
    remark(ax, f"digits, width {width}, {steps} steps; bars: 2 standard errors")


def _bars(ax: Axes, values: dict[str, np.ndarray], title: str, xlabel: str) -> None:
    framed(ax, title, xlabel=xlabel, ylabel="", keyed=True)
    rows = np.arange(len(values))
    for row, (name, found), (colour, marker, _) in zip(rows, values.items(), _STYLES, strict=False):
        if row % 2 == 0:
            ax.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        if np.isfinite(found).all():
            bar = 2 * found.std(ddof=1) / np.sqrt(len(found))
            ax.errorbar(
                found.mean(), row, xerr=bar, color=colour, marker=marker, markersize=7, elinewidth=1.6, zorder=4
            )
        ax.plot(found, np.full(len(found), row + 0.27), "|", color=colour, markersize=7, label=name)
    ax.set_yticks(rows, list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    for tick in ax.get_yticklabels():
        tick.set_color(INK)
    ax.grid(visible=False, axis="y")
    remark(ax, "strokes: single seeds")
