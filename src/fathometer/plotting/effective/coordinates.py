"""How far features move in the first steps, against width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed, log_ticks
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRDS, new_figure
from fathometer.plotting.effective.palette import remark, width_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.training.coordinates import CoordinateCheck


def draw_coordinates(checks: CoordinateCheck | Sequence[CoordinateCheck], *, step: int | None = None) -> Figure:
    """Draw one panel a recipe: change against width with its slope, and the slope theory expects as a thin line.

    Args:
        checks: One or several, of the same widths and steps.
        step: After how many steps; by default the fewest.
    """
    many = [checks] if not isinstance(checks, Sequence) else list(checks)
    at = many[0].steps[0] if step is None else step
    figure = new_figure(4.3 * len(many) + 0.4, 5.2)
    axes = figure.subplots(1, len(many), sharey=True, squeeze=False)[0]
    for i, (ax, check) in enumerate(zip(axes, many, strict=True)):
        steps = f"{at} step" + ("s" if at > 1 else "")
        label = f"rms change after {steps}" if i == 0 else ""
        framed(ax, check.scheme, xlabel="width", ylabel=label, keyed=True)
        _panel(ax, check, at)
    for ax in axes:
        log_ticks(ax)
    return figure


def _panel(ax: Axes, check: CoordinateCheck, step: int) -> None:
    slopes, at, expected = check.slopes(step), check.steps.index(step), check.expected
    ax.set_yscale("log")
    width_axis(ax, [int(width) for width in check.widths])
    styles = _styles(list(check.changes))
    for place, values in check.changes.items():
        colour, marker = styles[place]
        mean = np.nanmean(values[:, at], axis=-1)
        error = np.nanstd(values[:, at], axis=-1, ddof=1) / np.sqrt(values.shape[-1])
        slope, slope_error = slopes[place]
        ax.errorbar(
            check.widths,
            mean,
            yerr=2 * error,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=0,
            elinewidth=1.0,
            label=f"{place}: slope {slope:+.2f} ± {slope_error:.2f}",
            zorder=4,
        )
        if place in expected:
            middle = np.exp(np.log(mean).mean())
            x = np.log(check.widths) - np.log(check.widths).mean()
            ax.plot(check.widths, middle * np.exp(expected[place] * x), color=colour, linewidth=1.3, zorder=3)
    if expected:
        remark(ax, _theory(expected))
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8.6, frameon=False, labelcolor=INK, handlelength=1.0
    )


def _theory(expected: Mapping[str, float]) -> str:
    """Return the slopes of theory in one line."""
    stem, output = expected["stem"], expected["output"]
    if "block 1" not in expected:
        inside = f"{stem:+.3g} at the stem, {expected['attention logits']:+.3g} of logits"
    elif stem == expected["block 1"]:
        inside = f"{stem:+.3g} inside"
    else:
        inside = f"{stem:+.3g} at the stem, {expected['block 1']:+.3g} inside"
    return f"lines: theory, slope {inside}, {output:+.3g} at output".replace("+0 ", "0 ").replace("-0 ", "0 ")


def _styles(places: Sequence[str]) -> dict[str, tuple[str, str]]:
    blocks = [place for place in places if place.startswith("block")]
    styles = {"stem": (MUTED, "v"), "attention logits": (SECOND, "D"), "output": (INK, "s")}
    for i, place in enumerate(blocks):
        styles[place] = (
            THIRDS[min(i * len(THIRDS) // max(len(blocks), 1), len(THIRDS) - 1)] if len(blocks) > 1 else FIRST,
            "o",
        )
    return styles
