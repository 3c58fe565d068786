"""Component by component inside one block: measured over predicted, and the gap in the logs of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.canvas import FIRST, INK, MUTED, PAPER, SECOND, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.results.moments import ModelMoments


def draw_components(measured: ModelMoments, predicted: ModelMoments, layer: int, title: str = "") -> Figure:
    """Draw the second moment, correlation and gradient of every component of one layer, measured beside predicted.

    Args:
        measured, predicted: Moments of the same blocks.
        layer: Which.
        title: Of the model.
    """
    seen, wanted = measured.rows(layer), predicted.rows(layer)
    names = [name for name in seen if name in wanted]
    height = np.arange(len(names))[::-1]
    figure = new_figure(13.0, 1.4 + 0.27 * len(names))
    left, middle, right = figure.subplots(1, 3, sharey=True)
    ratios = [seen[name]["q"] / wanted[name]["q"] if wanted[name]["q"] else np.nan for name in names]
    spread = [_error(measured, name, layer, "q") / wanted[name]["q"] for name in names]
    gaps = [seen[name]["gradient_log"] - wanted[name]["gradient_log"] for name in names]
    panels = (
        (left, "Second moment, measured over theory", ratios, spread, 1.0),
        (
            right,
            "Log gradient, measured minus theory",
            gaps,
            [_error(measured, n, layer, "gradient_log") for n in names],
            0.0,
        ),
    )
    for ax, heading, values, errors, reference in panels:
        dress(ax, heading, xlabel="")
        ax.axvline(reference, color=INK, linewidth=1.1)
        bars = np.nan_to_num(np.array(errors, dtype=np.float64))
        ax.errorbar(
            values, height, xerr=bars, fmt="o", color=FIRST, markersize=4.5, markerfacecolor=PAPER, elinewidth=1.0
        )
        known = np.abs(np.array(values, dtype=np.float64) - reference) + bars
        reach = max(1.25 * float(np.nanmax(known)), 0.02)
        ax.set_xlim(reference - reach, reference + reach)
    dress(middle, "Correlation of two tokens", xlabel="")
    middle.plot(
        [wanted[n]["correlation"] for n in names],
        height,
        "|",
        color=INK,
        markersize=11,
        markeredgewidth=1.8,
        label="theory",
    )
    middle.errorbar(
        [seen[n]["correlation"] for n in names],
        height,
        xerr=np.nan_to_num([_error(measured, n, layer, "correlation") for n in names]),
        fmt="o",
        color=SECOND,
        markersize=4.5,
        markerfacecolor=PAPER,
        elinewidth=1.0,
        label="measured ± SE",
    )
    middle.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    left.set_yticks(height, names)
    left.tick_params(axis="y", labelcolor=INK)
    figure.suptitle(f"{title}, layer {layer}".strip(", "), x=0.01, ha="left", fontsize=10, color=MUTED)
    return figure


def _error(moments: ModelMoments, name: str, layer: int, quantity: str) -> float:
    component = moments[name]
    if quantity not in component.errors:
        return float("nan")
    return float(component.errors[quantity][np.flatnonzero(component.layers == layer)[0]])
