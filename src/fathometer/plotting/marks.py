"""The marks panels are made of: theory lines, measured points, limits, and where a finding bites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fathometer.plotting.canvas import ALARM, GRID, INK, MUTED, PAPER
from fathometer.plotting.scales import Scale, Series
from fathometer.plotting.subject import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fathometer.diagnosis import Finding

FloatArray = NDArray[np.float64]

_POINTS = 36
#: Findings that begin at the output and reach back towards the input.
FROM_OUTPUT = ("exploding_gradients", "vanishing_gradients")


def theory_line(ax: Axes, curve: Series, colour: str, label: str) -> None:
    """Draw a predicted curve."""
    ax.plot(curve.layers, curve.values[curve.layers], color=colour, linewidth=1.8, label=f"{label} theory", zorder=3)


def measured_points(ax: Axes, curve: Series, colour: str, label: str) -> None:
    """Draw a measured curve: points with error bars, and a band of one standard error.

    In a deep model every k-th layer gets a point; a thin line and the band still go through all of them.
    """
    layers = curve.layers
    values, low, high = (part[layers] for part in (curve.values, curve.low, curve.high))
    every = math.ceil(len(layers) / _POINTS)
    if np.any(high > low):
        ax.fill_between(layers, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        ax.vlines(layers[::every], low[::every], high[::every], color=colour, linewidth=1.1, zorder=4)
    ax.plot(
        layers,
        values,
        color=colour,
        linewidth=0.6 if every > 1 else 0.0,
        marker="o",
        markevery=every,
        markersize=4.2,
        markerfacecolor=PAPER,
        markeredgecolor=colour,
        markeredgewidth=1.2,
        label=f"{label} measured",
        zorder=5,
    )


def finish(ax: Axes, scale: Scale, n_layers: int, *, bounds: tuple[float, float] | None = None) -> None:
    """Set the axes: logarithmic where asked, else from zero (or over ``bounds``), and whole blocks along x."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    ax.set_xlim(-0.02 * n_layers - 0.1, 1.02 * n_layers + 0.1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 4, 5, 10]))
    if scale is Scale.LOG:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if high / low > 10.0:
            ax.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
            ax.yaxis.set_minor_formatter(NullFormatter())
        return
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if bounds is not None:
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, bounds[0]), max(high if high > bounds[1] * 1.05 else bounds[1], bounds[1]))
    elif scale is Scale.LINEAR:
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.0), max(high, 0.0))


def limit_line(ax: Axes, values: FloatArray | float, label: str = "limit") -> bool:
    """Draw a threshold as a thin dashed line if it lies near the curves; return whether it was drawn.

    A limit far away would squeeze the curves; then it is left out, which says the same.
    """
    line = np.atleast_1d(np.asarray(values, dtype=np.float64))
    transform = ax.yaxis.get_transform()
    low, high = (float(v) for v in transform.transform(np.array(ax.get_ylim())))
    at = transform.transform(line)
    at = at[np.isfinite(at)]
    reach = 0.6 * (high - low)
    if at.size == 0 or at.min() > high + reach or at.max() < low - reach:
        return False
    if ax.get_yscale() == "linear" and abs(at.max()) < 0.03 * (high - low):
        return False  # it would look like the axis itself
    if line.size == 1:
        ax.axhline(float(line[0]), color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5, label=label)
    else:
        layers = np.arange(line.size)
        ax.plot(layers, line, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5, label=label)
    return True


def bitten(ax: Axes, findings: Sequence[Finding], n_layers: int) -> None:
    """Shade the blocks where findings bite and say from where on."""
    if findings:  # room for the words
        transform = ax.yaxis.get_transform()
        low, high = (float(v) for v in transform.transform(np.array(ax.get_ylim())))
        room = high + 0.09 * len(findings) * (high - low)
        ax.set_ylim(top=float(transform.inverted().transform(np.array([room]))[0]))
    for row, finding in enumerate(findings):
        start, stop = bitten_span(finding, n_layers)
        ax.axvspan(start, stop, color=ALARM, alpha=0.07, linewidth=0, zorder=0.5)
        edge = stop if finding.name in FROM_OUTPUT else start
        if 0 < edge < n_layers:
            ax.axvline(edge, color=ALARM, linewidth=0.9, linestyle=":", zorder=1)
        left = edge < n_layers / 2
        text = ax.annotate(
            finding.title.lower() + bitten_where(finding, n_layers),
            xy=(edge, 1.0 - 0.075 * row),
            xycoords=("data", "axes fraction"),
            xytext=(4 if left else -4, -3),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top",
            fontsize=8,
            color=ALARM,
            zorder=6,
        )
        text.set_in_layout(False)


def bitten_span(finding: Finding, n_layers: int) -> tuple[float, float]:
    """Return the first and last border between which a finding bites."""
    if finding.name in FROM_OUTPUT:
        return 0.0, float(n_layers - finding.evidence.depth)
    return float(finding.evidence.depth), float(n_layers)


def bitten_where(finding: Finding, n_layers: int) -> str:
    """Return `` from block 7 on`` or the like; nothing where the whole depth is meant."""
    start, stop = bitten_span(finding, n_layers)
    if finding.name in FROM_OUTPUT:
        return f" up to block {stop:.0f}" if stop > 0 else " at the first block"
    return f" from block {start:.0f} on" if start > 0 else ""


def left_out(ax: Axes, curves: Sequence[FloatArray], scale: Scale) -> None:
    """Say which values cannot be shown: not finite ones, and on a logarithmic axis those that are not positive."""
    words = []
    for curve in curves:
        bad = np.flatnonzero(~np.isfinite(curve))
        if bad.size:
            words.append(f"not finite from block {bad[0]} on" if bad[0] > 0 else f"not finite up to block {bad[-1]}")
            break
    if scale is Scale.LOG and any(np.any(curve <= 0) for curve in curves):
        words.append("values ≤ 0 not shown")
    if words:
        style: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 8, "color": MUTED}
        ax.text(0.985, 0.02, "; ".join(words), transform=ax.transAxes, **style).set_in_layout(False)


def key(ax: Axes, quantities: Sequence[tuple[str, str]], subject: Subject, *, sources: bool) -> None:
    """Write the key in one row above the axes: quantities by colour, then what lines and points mean.

    Args:
        ax: Axes with everything drawn.
        quantities: (label, colour); shown where there are several.
        subject: What was drawn.
        sources: Whether to say what lines, points and dashes mean; a figure with its own key for that says no.
    """
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    if len(quantities) > 1:
        handles += [
            Line2D([], [], color=colour, linewidth=1.8, marker="o", markersize=4.2, markerfacecolor=PAPER, label=label)
            for label, colour in quantities
        ]
    if sources:
        colour = quantities[0][1] if len(quantities) == 1 else INK
        limited = any(line.get_label() == "limit" for line in ax.lines)
        handles += source_handles(subject, colour, limited=limited)
    if handles:
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
            borderaxespad=0.2,
            handlelength=1.8,
            columnspacing=1.3,
            handletextpad=0.5,
        )


def source_handles(subject: Subject, colour: str, *, limited: bool) -> list[Any]:
    """Return key entries for measurement, theory and limits."""
    from matplotlib.lines import Line2D

    out = []
    if subject.measured is not None:
        point: dict[str, Any] = {"marker": "o", "markersize": 4.2, "markerfacecolor": PAPER, "markeredgecolor": colour}
        label = "measured ± SE" if subject.measured.errors else "measured"
        out.append(Line2D([], [], color=colour, linewidth=0, label=label, **point))
    if subject.predicted is not None:
        out.append(Line2D([], [], color=colour, linewidth=1.8, label="theory"))
    if limited:
        out.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="limit"))
    return out


def nothing(ax: Axes, text: str) -> None:
    """Say that there is nothing to draw."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=9.5, color=MUTED)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(GRID)
