"""Fold errors of two theories by thirds of the depth, under the curves they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed, log_ticks
from fathometer.plotting.canvas import FIRST, INK, MUTED, PAPER, SECOND, new_figure
from fathometer.plotting.marks import finish
from fathometer.plotting.scales import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.apjn.photographs import Photographs

_SYMBOLS = {"q": "q", "p": "p", "apjn_log": "J"}
_COLOURS = {"equal tokens": SECOND, "Gram matrix": FIRST}
_DASHES: dict[str, Any] = {"equal tokens": (0, (4, 2)), "Gram matrix": "-"}
_TINTS = {"equal tokens": ("#f6c8a5", "#e68a4a", "#d55e00"), "Gram matrix": ("#a6cfe8", "#4b9fd0", "#0072b2")}


def draw_photographs(result: Photographs) -> Figure:
    """Draw J over depth for each norm, and below all fold errors."""
    n_norms = len(result.norms)
    figure = new_figure(5.0 * n_norms, 8.2)
    figure.set_layout_engine("constrained", hspace=0.05)
    axes = figure.subplots(2, n_norms, squeeze=False)
    for i, norm in enumerate(result.norms):
        _curves(axes[0, i], result, i, f"{norm}: Jacobian norm")
        _folds(axes[1, i], result, i, f"{norm}: fold error by thirds")
    top = max(ax.get_ylim()[1] for ax in axes[1])
    for ax in axes[1]:
        ax.set_ylim(1.0, top)
    _key(figure, result)
    return figure


def _curves(ax: Axes, result: Photographs, i: int, title: str) -> None:
    framed(ax, title, xlabel="block", ylabel=r"$J^{L,\ell}$" if i == 0 else "")
    measured = result.measured["apjn_log"][i]
    n_layers = len(measured) - 1
    for theory, curves in result.theory.items():
        ax.plot(
            np.exp(curves["apjn_log"][i]), color=_COLOURS[theory], linewidth=1.7, linestyle=_DASHES[theory], zorder=3
        )
    at = np.unique(np.concatenate([[0, 1], np.linspace(0, n_layers, 17).round().astype(int)]))
    bars = None
    if "apjn_log" in result.errors:
        error = result.errors["apjn_log"][i, at]
        centre = np.exp(measured[at])
        bars = np.stack([centre * -np.expm1(-error), centre * np.expm1(error)])
    ax.errorbar(
        at,
        np.exp(measured[at]),
        yerr=bars,
        fmt="o",
        markersize=4.2,
        markerfacecolor=PAPER,
        color=INK,
        markeredgewidth=1.1,
        elinewidth=1.0,
        zorder=4,
    )
    finish(ax, Scale.LOG, n_layers)
    log_ticks(ax)


def _folds(ax: Axes, result: Photographs, i: int, title: str) -> None:
    framed(ax, title, xlabel="", ylabel="fold error (1 is perfect)" if i == 0 else "")
    for k, theory in enumerate(result.folds):
        for c, curve in enumerate(_SYMBOLS):
            thirds = result.folds[theory][curve][i, 1:]
            at = c + 0.42 * (k - 0.5) + 0.125 * (np.arange(3) - 1)
            ax.bar(at, thirds - 1, width=0.12, bottom=1.0, color=_TINTS[theory], zorder=3)
            if curve in result.noise:
                ax.hlines(result.noise[curve][i], at - 0.06, at + 0.06, color=INK, linewidth=1.3, zorder=4)
    ax.set_xticks(range(len(_SYMBOLS)), list(_SYMBOLS.values()))
    ax.tick_params(axis="x", labelcolor=INK, length=0)
    ax.grid(visible=False, axis="x")
    ax.axhline(1.0, color=MUTED, linewidth=0.9, zorder=2)


def _key(figure: Figure, result: Photographs) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    size = result.about["size"]
    point: dict[str, Any] = {"linewidth": 0, "marker": "o", "markersize": 4.5, "markerfacecolor": PAPER}
    handles: list[Any] = [
        Line2D([], [], color=INK, label="ViT, mean ± SE", **point),
        *(
            Line2D([], [], color=_COLOURS[theory], linewidth=1.7, linestyle=_DASHES[theory], label=f"theory, {theory}")
            for theory in result.theory
        ),
        *(
            Patch(color=tint, label=label)
            for tint, label in zip(
                ("#d5d9dd", "#9aa3ab", "#5d6771"), ("first third", "middle", "last third"), strict=True
            )
        ),
        Line2D([], [], color=INK, linewidth=1.3, label="weight noise, 1 SE"),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        title=f"{result.about['batch']}; width {size['d_model']}, {size['n_layers']} blocks, {size['seeds']} networks",
        title_fontsize=9.5,
    ).get_title().set_color(MUTED)
