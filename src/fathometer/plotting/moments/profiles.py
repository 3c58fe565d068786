"""Moments over depth: lines for theory, points with error bars for simulation, dashes for the law they tend to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.canvas import FIRST, INK, MUTED, PAPER, SECOND, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.moments.profiles import DepthProfiles

_TITLES = {
    "q": ("Second moment of the residual sum", r"$q_\ell$"),
    "cosine": ("Cosine of two tokens", r"$p_\ell / q_\ell$"),
    "gradient_log": ("Gradients of the stream, mean square", r"$g_\ell / g_L$"),
    "weight_log": ("Gradients of a layer's weights, norm", r"$\|\partial W_\ell\| / \|\partial W_L\|$"),
}
_POINTS = 24
_COLOURS = (FIRST, SECOND)


def draw_profiles(result: DepthProfiles) -> Figure:
    """Draw the panels of a result side by side."""
    figure = new_figure(5.3 * len(result.panels), 4.4)
    axes = np.atleast_1d(figure.subplots(1, len(result.panels)))
    for ax, curve in zip(axes, result.panels, strict=True):
        _panel(ax, result, curve)
    _key(figure, result)
    return figure


def _panel(ax: Axes, result: DepthProfiles, curve: str) -> None:
    title, symbol = _TITLES[curve]
    dress(ax, title, xlabel="layer", ylabel=symbol)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    depth, logarithmic = result.depths[curve], curve.endswith("_log")
    power = 0.5 if curve == "weight_log" else 1.0

    def shown(values: Any) -> Any:
        return np.exp(power * values) if logarithmic else values

    at = np.unique(np.linspace(0, len(depth) - 1, min(_POINTS, len(depth))).round().astype(int))
    for i in range(len(result.names)):
        colour = _COLOURS[i]
        width, opacity = (1.8, 1.0) if len(result.names) == 1 or i > 0 else (4.2, 0.45)  # so that equal lines show
        ax.plot(depth, shown(result.theory[curve][i]), color=colour, linewidth=width, alpha=opacity, zorder=3)
        seen, error = result.simulated[curve][i, at], result.errors[curve][i, at]
        if curve == "q":
            error = error * seen
        centre = shown(seen)
        bars = np.abs(np.stack([shown(seen - error), shown(seen + error)]) - centre)
        ax.errorbar(
            depth[at],
            centre,
            yerr=bars if np.all(np.isfinite(bars)) else None,
            fmt="o",
            markersize=4.0,
            markerfacecolor=PAPER,
            color=colour,
            markeredgewidth=1.1,
            elinewidth=1.0,
            zorder=4,
        )
    law = result.laws.get(curve)
    if law is not None:
        for row in law[np.any(np.isfinite(law), axis=1)]:
            ax.plot(depth, shown(row), color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=5)
        ax.annotate(
            result.law_labels[curve],
            xy=(0.97, 0.97) if logarithmic else (0.97, 0.06),
            xycoords="axes fraction",
            ha="right",
            va="top" if logarithmic else "bottom",
            fontsize=8.5,
            color=MUTED,
        )
    _scale(ax, result, curve, shown)


def _scale(ax: Axes, result: DepthProfiles, curve: str, shown: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 4, 5, 10]))
    curves = [result.theory[curve], result.simulated[curve]]
    if curve in result.laws and curve.endswith("_log"):
        curves.append(result.laws[curve][np.isfinite(result.laws[curve])])
    values = np.concatenate([shown(each).ravel() for each in curves])
    low, high = float(values.min()), float(values.max())
    if curve == "cosine":
        ax.set_ylim(0, 1)
    elif curve.endswith("_log"):
        ax.set_yscale("log")
        ax.set_ylim(low / 1.35, high * (high / low) ** 0.2 * 1.2)  # room for the words
        decades = math.log10(high / low)
        subs = (1, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2 else (1, 3)
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif high / low < 2:
        ax.set_ylim(0, 1.4 * high)
    else:
        ax.set_ylim(bottom=0)


def _key(figure: Figure, result: DepthProfiles) -> None:
    from matplotlib.lines import Line2D

    size = result.about["size"]
    point: dict[str, Any] = {"marker": "o", "markersize": 4.2, "markerfacecolor": PAPER}
    handles = [
        Line2D([], [], color=_COLOURS[i], linewidth=1.8, label=name, **point) for i, name in enumerate(result.names)
    ]
    handles += [
        Line2D([], [], color=MUTED, linewidth=1.8, label="theory"),
        Line2D([], [], color=MUTED, linewidth=0, label=f"{size['seeds']} networks, geometric mean ± SE", **point),
    ]
    if result.laws:
        handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label="law"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=f"{size['n_layers']} layers, width {size['d_model']}, {size['n_tokens']} tokens, "
        f"dropout {result.about['dropout']:g}",
        title_fontsize=9,
    ).get_title().set_color(MUTED)
