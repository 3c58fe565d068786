"""The flow of token geometry: above in the plane of norm and cosine, below over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, PAPER, SECOND, THIRD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.geometry.figure_2 import Flow, Flows

_COLOURS = (FIRST, THIRD, SECOND)  # by cosine at the start
_ARROWS = "#b9c1c9"
_POINT: dict[str, Any] = {"markersize": 4.4, "markerfacecolor": PAPER, "markeredgewidth": 1.2, "linewidth": 0}


def draw_flows(result: Flows) -> Figure:
    """Draw arrows for one block, lines for theory, points for networks, and the fixed points."""
    figure = new_figure(11.6, 9.2)
    figure.set_layout_engine("constrained", hspace=0.06, wspace=0.05)
    axes = figure.subplots(2, len(result.flows), squeeze=False, height_ratios=(1.35, 1))
    for k, flow in enumerate(result.flows):
        colours = _start_colours(flow)
        _plane(axes[0, k], flow, colours)
        _depth(axes[1, k], flow, colours)
    _key(figure, result)
    return figure


def _start_colours(flow: Flow) -> list[str]:
    cosines = np.unique(flow.theory_cosine[:, 0].round(6)).tolist()
    return [_COLOURS[cosines.index(c) % len(_COLOURS)] for c in flow.theory_cosine[:, 0].round(6)]


def _marker(flow: Flow, start: int) -> str:
    return "o" if flow.theory_q[start, 0] > 1 else "^"


def _plane(ax: Axes, flow: Flow, colours: list[str]) -> None:
    title = f"{flow.name.capitalize()} network, $\\sigma_w = {flow.sigma_w:g}$"
    framed(ax, title, xlabel="mean square of a token, q", ylabel="cosine of two tokens, p / q")
    ax.quiver(
        flow.field_q,
        flow.field_cosine,
        flow.step_q,
        flow.step_cosine,
        angles="xy",
        scale_units="xy",
        scale=2.0,  # half a block's step, so that arrows do not run into each other
        color=_ARROWS,
        width=0.003,
        headwidth=4.0,
        headlength=4.5,
        headaxislength=4.0,
        minlength=0.2,
        zorder=1.5,
    )
    for i, colour in enumerate(colours):
        ax.plot(flow.theory_q[i], flow.theory_cosine[i], color=colour, linewidth=1.6, zorder=3)
        ax.errorbar(
            flow.simulated_q[i],
            flow.simulated_cosine[i],
            xerr=flow.error_q[i],
            yerr=flow.error_cosine[i],
            fmt=_marker(flow, i),
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **_POINT,
        )
    for state in flow.rest_states:
        ax.plot(
            [state.q],
            [state.cosine],
            marker="*" if state.is_stable else "X",
            markersize=17 if state.is_stable else 10,
            color=INK,
            markeredgecolor=PAPER,
            markeredgewidth=1.2,
            linewidth=0,
            clip_on=False,
            zorder=6,
        )
    half = (flow.field_q[-1] - flow.field_q[0]) / (2 * len(flow.field_q))
    ax.set_xlim(flow.field_q[0] - half, flow.field_q[-1] + half)
    ax.set_ylim(-0.03, 1.03)
    ax.grid(visible=False)


def _depth(ax: Axes, flow: Flow, colours: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    framed(ax, "The same cosines over depth", xlabel="layer", ylabel="cosine of two tokens, p / q")
    layers = np.arange(flow.theory_cosine.shape[1])
    for state in flow.rest_states:
        dash = (0, (5, 3)) if state.is_stable else (0, (1, 2.5))
        ax.axhline(state.cosine, color=MUTED, linewidth=1.1, linestyle=dash, zorder=1.5)
    for i, colour in enumerate(colours):
        ax.plot(layers, flow.theory_cosine[i], color=colour, linewidth=1.6, zorder=3)
        ax.errorbar(
            layers,
            flow.simulated_cosine[i],
            yerr=flow.error_cosine[i],
            fmt=_marker(flow, i),
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **_POINT,
        )
    ax.set_ylim(-0.03, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 5, 10]))


def _key(figure: Figure, result: Flows) -> None:
    from matplotlib.lines import Line2D

    draws = result.about["weight_draws"]
    fixed: dict[str, Any] = {"color": INK, "markeredgecolor": PAPER, "linewidth": 0}
    handles = [
        Line2D([], [], color=MUTED, linewidth=1.6, label="theory"),
        Line2D([], [], color=MUTED, marker="o", label=f"{draws} networks, mean ± SE, from q > 1", **_POINT),
        Line2D([], [], color=MUTED, marker="^", label="the same from q < 1", **_POINT),
        Line2D([], [], marker="*", markersize=14, label="stable fixed point (below: dashed)", **fixed),
        Line2D([], [], marker="X", markersize=9, label="unstable one (below: dotted)", **fixed),
        Line2D([], [], color=_ARROWS, marker=">", markersize=5, linewidth=1.4, label="half the step of one block"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=2.5,
    )
