"""Loss after training over the learning rate, width by width, and where its optimum goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import ALARM, GRID, INK, MUTED, new_figure
from fathometer.plotting.effective.palette import (
    power_of_two,
    recipe_colour,
    recipe_marker,
    remark,
    width_axis,
    width_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.training.transfer import TransferCheck


def draw_transfer(result: TransferCheck | Any) -> Figure:
    """Draw one panel a recipe and one of all optima; also takes an item's result, which holds a ``check``.

    Bars are two standard errors over seeds.
    """
    check: TransferCheck = getattr(result, "check", result)
    count = len(check.schemes)
    figure = new_figure(3.4 * count + 4.4, 4.6)
    axes = figure.subplots(1, count + 1, width_ratios=(*[1.0] * count, 1.2))
    lowest = min(float(values.mean(axis=-1).min()) for values in check.losses.values())
    highest = _ceiling(check)
    for i, (ax, name) in enumerate(zip(axes, check.schemes, strict=False)):
        _losses(ax, check, name, first=i == 0)
        ax.set_ylim(lowest - 0.05 * (highest - lowest), highest)
        if i:
            ax.tick_params(labelleft=False)
    _optima(axes[-1], check)
    _key(axes[min(1, count - 1)], check)
    return figure


def _key(ax: Axes, check: TransferCheck) -> None:
    """Explain colours, stars and bars, below the curves of a panel."""
    from matplotlib.lines import Line2D

    colours = width_colours(len(check.widths))
    handles = [
        Line2D([], [], color=colour, linewidth=1.5, marker="o", markersize=2.8, label=f"width {width}")
        for colour, width in zip(colours, check.widths, strict=True)
    ]
    handles.append(Line2D([], [], color=colours[-1], marker="*", markersize=10, linewidth=0, label="optimum"))
    if any((status != "ok").any() for status in check.status.values()):
        handles.append(Line2D([], [], color=ALARM, marker="x", markersize=6, linewidth=0, label="a run diverged"))
    ax.legend(handles=handles, loc="lower left", fontsize=8.8, frameon=False, labelcolor=INK, handlelength=1.4)


def _ceiling(check: TransferCheck) -> float:
    """Return a height that shows every curve's valley; what rises beyond it is of no interest."""
    means = np.stack([values.mean(axis=-1) for values in check.losses.values()])
    finite = means[np.isfinite(means)]
    low, high = float(finite.min()), float(finite.max())
    worst = max(float(row.min()) for name in means for row in name if np.isfinite(row).any())
    return min(high, worst + 1.1 * (worst - low) + 0.02 * abs(low)) + 0.02 * (high - low)


def _losses(ax: Axes, check: TransferCheck, name: str, *, first: bool) -> None:
    framed(ax, name, xlabel=f"learning rate at width {check.protocol['base_width']}", ylabel="", keyed=True)
    if first:
        ax.set_ylabel("training loss, last fifth of steps, nats", fontsize=9, color=MUTED)
    losses = check.losses[name]
    x = np.log2(check.rates)
    for values, one, width, colour in zip(
        losses, check.optima(name), check.widths, width_colours(len(check.widths)), strict=True
    ):
        mean = np.where(np.isfinite(values).all(axis=-1), values.mean(axis=-1), np.nan)
        error = np.array([row.std(ddof=1) if np.isfinite(row).all() else 0.0 for row in values])
        error /= np.sqrt(values.shape[-1])
        ax.errorbar(
            x,
            mean,
            yerr=2 * error,
            color=colour,
            linewidth=1.5,
            elinewidth=0.9,
            marker="o",
            markersize=2.8,
            label=str(width),
            zorder=3,
        )
        if np.isfinite(one.loss):
            ax.plot(
                np.log2(one.rate),
                one.loss,
                marker="*",
                markersize=12,
                color=colour,
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=5,
            )
        for rate in x[np.isnan(mean)]:
            ax.plot(rate, 0.975, marker="x", markersize=6, color=ALARM, transform=ax.get_xaxis_transform(), zorder=4)
    shift = check.shift(name)
    ratio = f"{check.widths[-1] / check.widths[0]:g} x width"
    if shift.status == "diverged":
        remark(ax, "no optimum: runs diverged at every rate")
    elif shift.status == "edge":
        remark(ax, "an optimum lies at an end of the grid: its shift is not known")
    elif shift.status == "cliff":
        remark(ax, f"grid optimum $2^{{{shift.grid:+.0f}}}$ over {ratio}, beside rates that diverge")
    elif abs(shift.grid) < 0.5:
        remark(ax, f"grid optimum stays over {ratio}")
    else:
        remark(ax, f"grid optimum moves by $2^{{{shift.grid:+.0f}}}$ over {ratio}")
    _rate_axis(ax, x)


def _optima(ax: Axes, check: TransferCheck) -> None:
    framed(
        ax,
        "Best learning rate",
        xlabel="width",
        ylabel=f"learning rate at width {check.protocol['base_width']}",
        keyed=True,
    )
    width_axis(ax, [int(width) for width in check.widths])
    start = np.log2(check.optima(check.schemes[0])[0].rate)
    if np.isfinite(start):
        ax.axhspan(start - 1, start + 1, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    spread = np.linspace(-0.045, 0.045, len(check.schemes))
    for name, offset in zip(check.schemes, spread, strict=True):
        found = check.optima(name)
        ax.errorbar(
            check.widths * 2**offset,
            np.log2([one.rate for one in found]),
            yerr=[2 * one.error for one in found],
            color=recipe_colour(name),
            marker=recipe_marker(name),
            markersize=5.5,
            linewidth=1.5,
            elinewidth=1.0,
            label=name,
        )
    low, high = (int(value) for value in (np.floor(ax.get_ylim()[0]), np.ceil(ax.get_ylim()[1])))
    ax.set_yticks(range(low, high + 1), [power_of_two(power) for power in range(low, high + 1)])
    ax.legend(loc="best", fontsize=8.8, frameon=False, labelcolor=INK)
    remark(ax, "band: a factor of two; bars: 2 standard errors")


def _rate_axis(ax: Axes, x: Any) -> None:
    ticks = [power for power in range(int(np.ceil(x[0])), int(np.floor(x[-1])) + 1) if power % 2 == 0]
    ax.set_xticks(ticks, [power_of_two(power) for power in ticks])
