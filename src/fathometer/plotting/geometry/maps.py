"""Maps of an exponent: theory on the left, networks on the right, the same colours and zero lines on both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, PAPER, SECOND, THIRD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.geometry.maps import Map, Maps

_LINES: tuple[tuple[str, Any], ...] = ((INK, "-"), ("#7b3f98", (0, (5, 2.5))), (INK, (0, (1, 1.6))))
_MEASURED = THIRD
_SYMBOLS = {
    "residual_strength": r"residual strength $\alpha_A = \alpha_M$",
    "mlp_in": r"MLP input scale $\sigma_w$",
    "attention.residual_strength": r"attention strength $\alpha_A$",
    "mlp.residual_strength": r"MLP strength $\alpha_M$",
}


def draw_maps(result: Maps) -> Figure:
    """Draw one row for each pair of fields: theory, and measurement with the zero line between its points."""
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap
    from matplotlib.ticker import FixedLocator, FuncFormatter

    figure = new_figure(11.4, 9.6)
    figure.set_layout_engine("constrained", hspace=0.05, wspace=0.04)
    about = result.about
    figure.suptitle(result.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    axes = figure.subplots(len(result.maps), 2, squeeze=False)
    colours = LinearSegmentedColormap.from_list("signs", (FIRST, PAPER, SECOND))
    limit = _limit(result.maps)
    style: dict[str, Any] = {
        "cmap": colours,
        "norm": FuncNorm((_root, _square), vmin=-limit, vmax=limit),
        "shading": "nearest",
        "rasterized": True,
    }
    image: Any = None
    for (left, right), found in zip(axes, result.maps, strict=True):
        second = "" if found.x == "residual_strength" else r" at $\sigma_w = 2$"
        networks = f"Measured, {about['weight_draws']} networks of width {about['d_model']} a point"
        for ax, title in ((left, "Theory" + second), (right, networks)):
            framed(ax, title, xlabel=_SYMBOLS[found.x], ylabel=_SYMBOLS[found.y])
            ax.grid(visible=False)
        image = left.pcolormesh(found.fine_x, found.fine_y, found.theory, **style)
        right.pcolormesh(found.coarse_x, found.coarse_y, found.measured, **style)
        if found.measured.min() < 0 < found.measured.max() and min(found.measured.shape) > 1:
            right.contour(
                found.coarse_x,
                found.coarse_y,
                found.measured,
                levels=[0.0],
                colors=_MEASURED,
                linewidths=2.0,
                zorder=5,
            )
        for ax in (left, right):
            _lines(ax, found)
            ax.set_xlim(found.fine_x[0], found.fine_x[-1])
            ax.set_ylim(found.fine_y[0], found.fine_y[-1])
    low, high = _extent(result.maps)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=32, pad=0.02, extend="both")
    ticks = [level for level in (0.02, 0.1, 0.2, 0.5, 1.0, 2.0) if level <= limit]
    bar.ax.yaxis.set_major_locator(FixedLocator([*(-level for level in ticks), 0.0, *ticks]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    reach = f"nats per block; values from {_plain(low)} to {_plain(high)}"
    bar.set_label(reach, fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8.5, labelcolor=MUTED, color=MUTED, length=3)
    bar.outline.set_visible(False)
    _key(figure, result)
    return figure


def _root(value: Any) -> Any:
    """Give small exponents of either sign more of the colours."""
    return np.sign(value) * np.sqrt(np.abs(value))


def _square(value: Any) -> Any:
    return np.sign(value) * np.square(value)


def _plain(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")


def _extent(maps: tuple[Map, ...]) -> tuple[float, float]:
    return min(float(found.theory.min()) for found in maps), max(float(found.theory.max()) for found in maps)


def _limit(maps: tuple[Map, ...]) -> float:
    """Return where colours end: between the largest exponents of either sign, so that the weaker one is seen."""
    low, high = _extent(maps)
    return float(np.sqrt(-low * high)) if low < 0 < high else max(abs(low), abs(high))


def _lines(ax: Axes, found: Map) -> None:
    for line, (colour, dash) in zip(found.lines, _LINES, strict=False):
        ax.plot(line.x, line.y, color=PAPER, linewidth=4.0, alpha=0.7, zorder=3)
        ax.plot(line.x, line.y, color=colour, linewidth=2.0, linestyle=dash, zorder=4)


def _key(figure: Figure, result: Maps) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=2.0, linestyle=dash, label=line.label + ", theory")
        for line, (colour, dash) in zip(result.maps[0].lines, _LINES, strict=False)
    ]
    name = result.observable.replace("_", " ")
    handles.append(Line2D([], [], color=_MEASURED, linewidth=2.0, label=f"{name} = 0, between measured points"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=2.5,
    )
