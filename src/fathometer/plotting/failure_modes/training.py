"""Losses of trained networks over the predicted diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import ALARM, CALM, CAUTION, INK, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.training import TrainingCheck

_EDGES = {"trainable": CALM, "rank collapse": CAUTION, "entropy collapse": ALARM}
_INSET = 0.06  # of a cell, between its border and the next


def draw_training_check(result: TrainingCheck) -> Figure:
    """Draw one panel per learning rate: mean final loss in every cell, framed in the colour of the prediction."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    rates = result.about["rates"]
    figure = new_figure(6.0 * len(rates) + 1.2, 4.7)
    axes = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    losses = np.minimum(result.losses.mean(axis=0), result.unigram_entropy)
    low = float(losses.min())
    image: Any = None
    for ax, rate, values in zip(axes, rates, losses, strict=True):
        framed(
            ax,
            f"Learning rate {rate:g}",
            xlabel=r"inverse temperature of attention, $\beta$",
            ylabel="skip strength of attention" if ax is axes[0] else "",
        )
        image = ax.imshow(
            values, origin="lower", cmap="Blues_r", vmin=low, vmax=result.unigram_entropy, aspect="auto", zorder=1
        )
        ax.grid(visible=False)
        for i, j in np.ndindex(values.shape):
            dark = values[i, j] < (low + result.unigram_entropy) / 2
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else INK)
            ax.add_patch(
                Rectangle(
                    (j - 0.5 + _INSET, i - 0.5 + _INSET),
                    1 - 2 * _INSET,
                    1 - 2 * _INSET,
                    fill=False,
                    edgecolor=_EDGES[str(result.predicted[i, j])],
                    linewidth=2.2,
                    zorder=3,
                )
            )
        ax.set_xticks(range(len(result.betas)), [f"{beta:g}" for beta in result.betas])
        ax.set_yticks(range(len(result.skips)), [f"{skip:g}" for skip in result.skips])
    bar = figure.colorbar(image, ax=axes[-1], pad=0.02)
    bar.set_label(f"test loss, nats (tokens told apart below {result.unigram_entropy:.2f})", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8.5, labelcolor=MUTED, color=MUTED)
    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=f"predicted: {mode}") for mode, colour in _EDGES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure
