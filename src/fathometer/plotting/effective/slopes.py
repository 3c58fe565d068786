"""Slopes of the tangent kernel against width, group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, GRID, INK, SECOND, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.papers.effective.kernels import Slopes

_ORDER = (
    "token_embedding", "position_embedding", "query", "key", "value", "output", "mlp_in", "mlp_out", "norm_gain",
    "head", "head_bias",
)  # fmt: skip


def draw_slopes(result: Slopes) -> Figure:
    """Draw one row a group: slopes under the rules and under one rate for all, two standard errors, theory as bars."""
    roles = [role for role in _ORDER if role in result.rules] + [role for role in result.rules if role not in _ORDER]
    figure = new_figure(9.6, 1.9 + 0.36 * len(roles))
    ax = figure.add_subplot()
    title = f"How each group's tangent kernel grows with width, {result.widths[0]:.0f} to {result.widths[-1]:.0f}"
    framed(ax, title, xlabel="slope of ln(tangent kernel) against ln(width)", ylabel="")
    rows = np.arange(len(roles))
    for row in rows[::2]:
        ax.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
    styles: tuple[tuple[dict[str, tuple[float, float]], dict[str, float], str, str, str, float], ...] = (
        (result.uniform, result.expected, SECOND, "s", "one learning rate for all groups", 0.16),
        (result.rules, dict.fromkeys(roles, 0.0), FIRST, "o", "learning rates of the rules", -0.16),
    )
    for slopes, theory, colour, marker, label, offset in styles:
        ax.vlines([theory[role] for role in roles], rows + offset - 0.15, rows + offset + 0.15, color=INK, linewidth=2)
        ax.errorbar(
            [slopes[role][0] for role in roles],
            rows + offset,
            xerr=[2 * slopes[role][1] for role in roles],
            color=colour,
            marker=marker,
            markersize=5.5,
            linewidth=0,
            elinewidth=1.3,
            label=label,
            zorder=4,
        )
    ax.set_yticks(rows, [role.replace("_", " ") for role in roles])
    ax.set_ylim(len(roles) - 0.5, -0.5)
    for tick in ax.get_yticklabels():
        tick.set_color(INK)
        tick.set_fontsize(9.2)
    ax.grid(visible=False, axis="y")
    handles, labels = ax.get_legend_handles_labels()
    mark: Any = ax.plot([], [], color=INK, marker="|", markersize=9, markeredgewidth=2, linewidth=0)[0]
    figure.legend(
        handles=[*handles, mark],
        labels=[*labels, "theory"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9.2,
        labelcolor=INK,
    )
    return figure
