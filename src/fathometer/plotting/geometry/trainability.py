"""Loss after training over the exponents at initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.papers.geometry.trainability import Trainability

_TITLES = {"fixed": "Equal residual strength", "random": "Random residual strengths"}


def draw_trainability(result: Trainability) -> Figure:
    """Draw every setting in the plane of the exponents, coloured by its loss, then the loss over their size."""
    figure = new_figure(15.5, 4.6)
    axes = figure.subplots(1, 3, width_ratios=(1, 1.14, 1.1))
    losses = {name: np.mean(values, axis=0) for name, values in result.losses.items()}
    finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses.values()])
    low, high = float(finite.min()), float(result.about["chance"])
    points: Any = None
    for ax, name in zip(axes, result.losses, strict=False):
        seen = result.exponents[name]
        framed(ax, _TITLES[name], xlabel="angle exponent, per block", ylabel="gradient exponent, per block")
        ax.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        shown = np.minimum(losses[name], high)
        points = ax.scatter(
            seen["angle"], seen["gradient"], c=shown, cmap="viridis", vmin=low, vmax=high, s=26, linewidths=0, zorder=3
        )
        ax.set_xscale("symlog", linthresh=0.05)
        ax.set_yscale("symlog", linthresh=0.05)
        ticks = [-0.5, -0.1, 0, 0.1, 0.5, 1]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_ticks([], minor=True)
    bar = figure.colorbar(points, ax=axes[1], pad=0.02)
    bar.set_label("test loss, nats", fontsize=9, color=MUTED)
    engine: Any = figure.get_layout_engine()
    engine.set(wspace=0.06)
    bar.ax.tick_params(labelsize=8.5, labelcolor=MUTED, color=MUTED)
    ax = axes[2]
    framed(ax, "Loss over the gradient exponent", xlabel="size of the gradient exponent, per block", ylabel="test loss")
    for name, colour in (("fixed", SECOND), ("random", FIRST)):
        values = result.losses[name]
        size = np.abs(result.exponents[name]["gradient"])
        mean, low_rho, high_rho = result.correlations[name].spearman["gradient"]
        label = f"{_TITLES[name].lower()}: rank correlation {mean:.2f} [{low_rho:.2f}, {high_rho:.2f}]"
        ax.errorbar(
            size,
            values.mean(axis=0),
            yerr=values.std(axis=0, ddof=1) / np.sqrt(len(values)),
            fmt="o",
            markersize=4,
            color=colour,
            alpha=0.75,
            elinewidth=0.7,
            label=label,
        )
    ax.set_xscale("log")
    ax.axhline(result.about["chance"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.text(
        0.02,
        result.about["chance"],
        "chance",
        transform=ax.get_yaxis_transform(),
        fontsize=8.5,
        color=MUTED,
        va="bottom",
    )
    ax.set_ylim(low - 0.25 * (high - low), None)
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    about = result.about
    figure.supxlabel(
        f"{about['n_layers']} blocks, width {about['d_model']}, {about['steps']} steps of {about['optimizer']}, "
        f"mean of {about['seeds']} seeds",
        fontsize=9,
        color=MUTED,
    )
    return figure
