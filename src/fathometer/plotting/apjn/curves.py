"""Curves over depth for several norms: lines for theory, points with error bars for simulation."""

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

    from fathometer.papers.apjn.overlay import Overlay

_POINTS = 12
_STYLES: dict[str, tuple[str, str]] = {
    "q": ("Mean square of a token", "q"),
    "p": ("Overlap of two tokens", "p"),
    "cosine": ("Cosine between tokens", "p / q"),
    "apjn_log": ("Jacobian norm, block to output", r"$J^{L,\ell}$"),
    "gradient_log": ("Gradients of a mean-pooled loss", r"$|g^{\ell}|^2 / |g^{L}|^2$"),
}


def draw_forward(result: Overlay) -> Figure:
    """Draw q, p and p/q over depth."""
    figure = new_figure(15.5, 4.6)
    axes = figure.subplots(1, 3)
    colours = norm_colours(result)
    for ax, curve in zip(axes, ("q", "p", "cosine"), strict=True):
        _panel(ax, result, curve, colours)
    norm_key(figure, result, colours)
    return figure


def draw_backward(result: Overlay) -> Figure:
    """Draw the APJN from every block to the output."""
    figure = new_figure(8.4, 5.2)
    colours = norm_colours(result)
    _panel(figure.add_subplot(), result, "apjn_log", colours)
    norm_key(figure, result, colours)
    return figure


def draw_pooled(result: Overlay) -> Figure:
    """Draw the amplification of a pooled loss over depth, and its size at the input beside the APJN's."""
    figure = new_figure(13.2, 4.9)
    axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    colours = norm_colours(result)
    _panel(axes[0], result, "gradient_log", colours, keyed=True)
    _at_input(axes[1], result)
    norm_key(figure, result, colours)
    return figure


def draw_vit_large(result: Overlay) -> Figure:
    """Draw q, p/q and J of two norms."""
    figure = new_figure(15.5, 4.4)
    axes = figure.subplots(1, 3)
    colours = [SECOND if alpha is None else FIRST for alpha in result.alphas]
    for ax, curve in zip(axes, ("q", "cosine", "apjn_log"), strict=True):
        _panel(ax, result, curve, colours, points=24)
    norm_key(figure, result, colours)
    return figure


def norm_colours(result: Overlay) -> list[Any]:
    """Return ink for LayerNorm and a sequence from dark to light for growing alpha."""
    from matplotlib import colormaps

    slopes = [alpha for alpha in result.alphas if alpha is not None]
    low, high = min(slopes), max(slopes)
    spread = max(high - low, 1e-9)
    scale = colormaps["viridis"]
    return [INK if alpha is None else scale(0.05 + 0.83 * (alpha - low) / spread) for alpha in result.alphas]


def norm_key(figure: Figure, result: Overlay, colours: list[Any]) -> None:
    """Write the key at the right: norms by colour, then what lines and points mean."""
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=2.0, label=name)
        for name, colour in zip(result.norms, colours, strict=True)
    ]
    size = result.about["size"]
    seeds = size["seeds"]
    handles += [
        Line2D([], [], linewidth=0, label=""),
        Line2D([], [], color=MUTED, linewidth=1.6, label="theory"),
        Line2D(
            [],
            [],
            color=MUTED,
            linewidth=0,
            marker="o",
            markersize=4.5,
            markerfacecolor=PAPER,
            label=f"{seeds} networks,\nmean ± SE" if seeds > 1 else "one network",
        ),
    ]
    legend = figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=f"width {size['d_model']}\n{size['n_layers']} blocks\n{size['n_tokens']} tokens",
        title_fontsize=9,
    )
    legend.get_title().set_color(MUTED)
    legend.set_alignment("left")


def _panel(
    ax: Axes, result: Overlay, curve: str, colours: list[Any], *, points: int = _POINTS, keyed: bool = False
) -> None:
    title, symbol = _STYLES[curve]
    framed(ax, title, xlabel="block", ylabel=symbol, keyed=keyed)
    theory, seen, errors = result.theory[curve], result.simulated[curve], result.errors.get(curve)
    n_layers = theory.shape[1] - 1
    at = np.unique(np.linspace(0, n_layers, points + 1).round().astype(int))
    logarithmic = curve.endswith("_log")
    for i, colour in enumerate(colours):
        values = np.exp(theory[i]) if logarithmic else theory[i]
        ax.plot(values, color=colour, linewidth=1.5, zorder=3)
        centre = np.exp(seen[i, at]) if logarithmic else seen[i, at]
        bars = None
        if errors is not None:
            low, high = seen[i, at] - errors[i, at], seen[i, at] + errors[i, at]
            low, high = (np.exp(low), np.exp(high)) if logarithmic else (low, high)
            bars = np.stack([centre - low, high - centre])
        ax.errorbar(
            at,
            centre,
            yerr=bars,
            fmt="o",
            markersize=3.8,
            markerfacecolor=PAPER,
            color=colour,
            markeredgewidth=1.1,
            elinewidth=1.0,
            zorder=4,
        )
    finish(ax, Scale.LOG if logarithmic else Scale.LINEAR, n_layers, bounds=(0.0, 1.0) if curve == "cosine" else None)
    if logarithmic:
        log_ticks(ax)


def _at_input(ax: Axes, result: Overlay) -> None:
    from matplotlib.lines import Line2D

    ylabel = "mean square, relative to the output"
    framed(ax, "At the first block, over alpha", xlabel="alpha of Derf", ylabel=ylabel, keyed=True)
    which = [i for i, alpha in enumerate(result.alphas) if alpha is not None]
    alphas = [alpha for alpha in result.alphas if alpha is not None]
    for curve, label, colour in (("gradient_log", "pooled loss", SECOND), ("apjn_log", "APJN", FIRST)):
        ends = [result.end(curve, i) for i in which]
        ax.plot(alphas, [end[0] for end in ends], color=colour, linewidth=1.6, zorder=3)
        errors = [end[2] for end in ends if end[2] is not None]
        ax.errorbar(
            alphas,
            [end[1] for end in ends],
            yerr=errors or None,
            fmt="o",
            markersize=4.2,
            markerfacecolor=PAPER,
            color=colour,
            markeredgewidth=1.1,
            label=label,
            zorder=4,
        )
        for i, alpha in enumerate(result.alphas):
            if alpha is None:
                ax.axhline(result.end(curve, i)[0], color=colour, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2)
    ax.set_yscale("log")
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3))))
    ax.legend(
        handles,
        [*labels, "LayerNorm, theory"],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.2,
    )
