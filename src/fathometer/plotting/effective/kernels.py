"""Kernels and tangent kernels against width, theory as lines."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRD, new_figure
from fathometer.plotting.effective.palette import remark, width_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.effective.kernels import Kernels

_PANELS = {
    "Stem, norms and head": ("token_embedding", "position_embedding", "norm_gain", "head", "head_bias"),
    "Attention": ("value", "output", "query", "key"),
    "MLP": ("mlp_in", "mlp_out"),
}
_COLOURS = (FIRST, SECOND, THIRD, "#a3548f", MUTED)
_MARKERS = ("o", "s", "^", "D", "v")


def draw_kernels(result: Kernels) -> Figure:
    """Draw the kernel of pairs of tokens, then tangent kernels by group; bars are two standard errors over draws."""
    figure = new_figure(17.0, 4.9)
    axes = figure.subplots(1, 1 + len(_PANELS))
    widths = [int(width) for width in result.widths]
    _pairs(axes[0], result)
    for ax, (title, roles) in zip(axes[1:], _PANELS.items(), strict=True):
        framed(ax, title, xlabel="width", ylabel="tangent kernel of the group, mean over tokens", keyed=True)
        shown = [role for role in roles if role in result.measured]
        for i, role in enumerate(shown):
            _curve(
                ax,
                result,
                role.replace("_", " "),
                result.theory[role],
                result.measured[role],
                result.error[role],
                i,
                (i - (len(shown) - 1) / 2) * 0.09,
            )
        remark(ax, "learning-rate factors of the rules; lines: theory")
    for ax in axes:
        width_axis(ax, widths)
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), high * 1.02)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8.8, frameon=False, labelcolor=INK, ncols=2)
    return figure


def _pairs(ax: Axes, result: Kernels) -> None:
    framed(ax, "Kernel of the outputs", xlabel="width", ylabel="mean product of two tokens' outputs", keyed=True)
    n = len(result.tokens)
    pairs = [pair for pair in combinations_with_replacement(range(n), 2) if pair[0] != pair[1]]
    same = [(a, b) for a, b in pairs if result.tokens[a] == result.tokens[b]]
    shown = same + [pair for pair in ((0, 1), (0, n - 1), (n - 2, n - 1)) if pair not in same]
    for i, (a, b) in enumerate(shown):
        alike = ", same word" if result.tokens[a] == result.tokens[b] else ""
        _curve(
            ax,
            result,
            f"tokens {a + 1} and {b + 1}{alike}",
            float(result.output[a, b]),
            result.measured_output[:, a, b],
            result.output_error[:, a, b],
            i,
            (i - (len(shown) - 1) / 2) * 0.09,
        )
    remark(ax, "points: networks, ± 2 standard errors; lines: theory")


def _curve(
    ax: Axes, result: Kernels, label: str, theory: float, values: np.ndarray, errors: np.ndarray, at: int, offset: float
) -> None:
    colour = _COLOURS[at % len(_COLOURS)]
    ax.axhline(theory, color=colour, linewidth=1.4, zorder=2)
    ax.errorbar(
        result.widths * 2**offset,
        values,
        yerr=2 * errors,
        color=colour,
        marker=_MARKERS[at % len(_MARKERS)],
        markersize=5,
        linewidth=0,
        elinewidth=1.1,
        label=label,
        zorder=4,
    )
