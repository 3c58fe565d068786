"""The trainability diagram: labels of two theories, final cosines with networks, and critical skips over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, PAPER, SECOND, new_figure
from fathometer.plotting.failure_modes.theories import THEORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.failure_modes.diagram import Trainability

_FILLS = ("#9ad9c2", "#a9cfe6", "#f4b98f")  # trainable, rank collapse, entropy collapse
_BETA, _SKIP = r"inverse temperature $\beta$", r"skip of attention $\alpha_{SA}$"
_LEVELS = (0.5, 0.7, 0.9, 0.99)


def draw_diagram(result: Trainability) -> Figure:
    """Draw four panels."""
    figure = new_figure(12.4, 10.2)
    figure.set_layout_engine("constrained", hspace=0.05, wspace=0.05, h_pad=0.1)
    axes = figure.subplots(2, 2)
    about = result.about
    _labels(axes[0, 0], result, "asymptotic", "Infinitely many tokens: b > 1", "random_energy")
    _labels(axes[0, 1], result, "participation", f"{about['n_tokens']} tokens: participation > 0.1", "exact")
    _cosines(axes[1, 0], result)
    _depth(axes[1, 1], result)
    _key(figure, result)
    return figure


def _labels(ax: Axes, result: Trainability, labelling: str, title: str, closure: str) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    framed(ax, title, xlabel=_BETA, ylabel=_SKIP)
    ax.grid(visible=False)
    ax.pcolormesh(
        result.betas,
        result.skip_scales,
        result.labels[labelling],
        cmap=ListedColormap(_FILLS),
        norm=BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3),
        shading="nearest",
        rasterized=True,
        zorder=1,
    )
    _contours(ax, result, closure, INK)
    ax.plot(result.line_betas, result.critical[closure], color=INK, linewidth=2.2, zorder=4)
    if labelling != "asymptotic":
        ax.axvline(result.crossovers["entropy"], color=INK, linewidth=1.4, linestyle=(0, (1, 1.6)), zorder=4)
        ax.axvline(result.crossovers["condensation"], color=INK, linewidth=1.2, linestyle=(0, (5, 2)), zorder=4)
    _frame(ax, result)


def _contours(ax: Axes, result: Trainability, closure: str, colour: str) -> None:
    lines = ax.contour(
        result.betas,
        result.skip_scales,
        result.cosine[closure],
        levels=_LEVELS[:-1],
        colors=colour,
        linewidths=0.8,
        alpha=0.75,
        zorder=3,
    )
    ax.clabel(lines, fmt="%g", fontsize=8)


def _cosines(ax: Axes, result: Trainability) -> None:
    from matplotlib.colors import Normalize

    framed(ax, "Final cosine: exact theory, and networks as points", xlabel=_BETA, ylabel=_SKIP)
    ax.grid(visible=False)
    norm = Normalize(0.0, 1.0)
    image = ax.pcolormesh(
        result.betas,
        result.skip_scales,
        result.cosine["exact"],
        cmap="viridis",
        norm=norm,
        shading="nearest",
        rasterized=True,
        zorder=1,
    )
    _contours(ax, result, "exact", PAPER)
    ax.plot(result.line_betas, result.critical["exact"], color=PAPER, linewidth=2.2, zorder=4)
    beta, skip, seen = result.points.T
    ax.scatter(beta, skip, c=seen, cmap="viridis", norm=norm, s=130, edgecolors=PAPER, linewidths=1.8, zorder=5)
    for x, y, value in result.points.tolist():
        ax.annotate(
            f"{value:.2f}", (x, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((0.06, 0.075, 0.42, 0.03)), orientation="horizontal")
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=INK, length=2)
    bar.outline.set_edgecolor(PAPER)
    _frame(ax, result)


def _depth(ax: Axes, result: Trainability) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    framed(ax, "Weakest skip without rank collapse", xlabel="blocks", ylabel=_SKIP)
    for i, (beta, colour) in enumerate(zip(result.depth_betas, (FIRST, SECOND), strict=True)):
        for closure in ("exact", "random_energy"):
            label, dash, width = THEORIES[closure]
            ax.plot(
                result.depths,
                result.critical_over_depth[closure][:, i],
                color=colour,
                linestyle=dash,
                linewidth=width,
                marker="o" if closure == "exact" else "",
                markersize=5,
                markerfacecolor=PAPER,
                markeredgewidth=1.3,
                label=rf"$\beta = {beta:g}$, {label}",
            )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(result.depths))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=INK)


def _frame(ax: Axes, result: Trainability) -> None:
    ax.set_xlim(float(result.betas[0]), float(result.betas[-1]))
    ax.set_ylim(float(result.skip_scales[0]), float(result.skip_scales[-1]))


def _key(figure: Figure, result: Trainability) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=fill, label=mode) for fill, mode in zip(_FILLS, result.modes, strict=True)]
    rank = result.about["rank"]
    handles += [
        Line2D([], [], color=INK, linewidth=2.2, label=f"weakest skip: final cosine {1 - rank:g}"),
        Line2D([], [], color=INK, linewidth=0.8, label="final cosine"),
        Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (5, 2)), label=r"$\beta_c$ of infinitely many tokens"),
        Line2D([], [], color=INK, linewidth=1.4, linestyle=(0, (1, 1.6)), label="half the entropy lost"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
