"""Gradients of the query matrix against the inverse temperature, one panel for each number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, new_figure
from fathometer.plotting.failure_modes.theories import POINT, THEORIES, key_below, point_handle, theory_handles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.figure_3 import QueryGradients

_COLOURS = (SECOND, FIRST)  # by width
_UNIT = r"$|\partial L/\partial W_Q|^2 \,/\, n d^2 s\,\sigma_v^2 \sqrt{\ln n}$"


def draw_figure_3(result: QueryGradients) -> Figure:
    """Draw everything on linear axes above and logarithmic ones below, where the floor of finite width shows."""
    figure = new_figure(11.8, 8.4)
    figure.set_layout_engine("constrained", hspace=0.05, wspace=0.05, h_pad=0.1, w_pad=0.1)
    axes = figure.subplots(2, len(result.n_tokens), squeeze=False)
    top = 1.12 * max(float(result.theory["exact"].max()), float(result.simulated.max()))
    floor = 0.3 * float(result.simulated[..., 0].min())
    for i, n in enumerate(result.n_tokens):
        for ax in axes[:, i]:
            _panel(ax, result, i)
        framed(axes[0, i], f"{n} tokens", xlabel=r"inverse temperature $\beta$", ylabel=_UNIT if i == 0 else "")
        framed(
            axes[1, i], "The same, logarithmic", xlabel=r"inverse temperature $\beta$", ylabel=_UNIT if i == 0 else ""
        )
        axes[0, i].set_ylim(0, top)
        axes[1, i].set_yscale("log")
        axes[1, i].set_ylim(floor, 2 * top)
    _key(figure, result)
    return figure


def _panel(ax: Axes, result: QueryGradients, i: int) -> None:
    for name in ("random_energy", "annealed"):
        _, dash, width = THEORIES[name]
        ax.plot(result.betas, result.theory[name][i, 0], color=INK, linestyle=dash, linewidth=width, zorder=2)
    for j, colour in zip(range(len(result.d_model)), _COLOURS, strict=False):
        ax.plot(result.betas, result.theory["exact"][i, j], color=colour, linewidth=1.8, zorder=3)
        ax.errorbar(
            result.at,
            result.simulated[i, j],
            yerr=result.errors[i, j],
            fmt="o",
            color=colour,
            elinewidth=1.0,
            zorder=4,
            **POINT,
        )
    ax.axvline(2**0.5, color=MUTED, linewidth=0.9, zorder=1)
    ax.annotate(r" $\beta_c = \sqrt{2}$", (2**0.5, 0.94), xycoords=("data", "axes fraction"), fontsize=9, color=MUTED)
    ax.set_xlim(0, float(result.betas[-1]) * 1.02)


def _key(figure: Figure, result: QueryGradients) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=1.8, label=f"true averages, width {d}")
        for d, colour in zip(result.d_model, _COLOURS, strict=False)
    ]
    handles += [
        point_handle(f"{result.about['weight_draws']} layers, width {d}, mean ± SE", colour)
        for d, colour in zip(result.d_model, _COLOURS, strict=False)
    ]
    key_below(figure, [*handles, *theory_handles(("random_energy", "annealed"), INK)], 3)
