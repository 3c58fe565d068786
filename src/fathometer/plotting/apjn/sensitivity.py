"""Largest stable learning rates against predicted amplification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.papers.apjn.sensitivity import Sensitivity

_MARKERS = {"L": ("s", "#D55E00"), "E": ("o", "#0072B2"), "Y": ("^", "#009E73")}


def draw_sensitivity(result: Sensitivity) -> Figure:
    """Draw one panel per warm-up: log2 of the largest stable rate against ln of the predicted amplification."""
    figure = new_figure(4.6 * len(result.warmups) + 0.8, 4.2)
    logs = result.log_rates()
    axes = figure.subplots(1, len(result.warmups), sharey=True, squeeze=False)[0]
    for k, (ax, warmup) in enumerate(zip(axes, result.warmups, strict=True)):
        rho, low, high = result.correlation[k]
        title = f"Warm-up of {warmup} steps" if warmup else "No warm-up"
        ax.text(0.03, 0.04, f"rank correlation {rho:.2f} [{low:.2f}, {high:.2f}]", transform=ax.transAxes, fontsize=9)
        framed(ax, title, xlabel="predicted ln amplification", ylabel="log2 largest stable rate" if k == 0 else "")
        for i, norm in enumerate(result.norms):
            family = "L" if norm.startswith("Layer") else "E" if norm.startswith("Derf") else "Y"
            marker, colour = _MARKERS[family]
            mean = logs[i, :, k].mean(axis=-1)
            count = logs.shape[-1]
            error = logs[i, :, k].std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else None
            ax.errorbar(
                result.amplification[i],
                mean,
                yerr=error,
                marker=marker,
                color=colour,
                linestyle="none",
                elinewidth=0.8,
                markersize=5.5,
                alpha=0.85,
                label={"L": "LayerNorm", "E": "Derf", "Y": "DyT"}[family]
                if all(not other.startswith(norm[:3]) for other in result.norms[:i])
                else None,
            )
        ax.legend(frameon=False, fontsize=8.5)
    return figure
