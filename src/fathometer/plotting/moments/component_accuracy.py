"""Theory over simulation for every component, quantity by quantity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, GRID, INK, MUTED, PAPER, SECOND, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.moments.component_accuracy import Comparison, ComponentAccuracy

_PANELS = (
    ("q", "q, mean square behind"),
    ("p", "p, two tokens, behind"),
    ("J", "J, gradient in front"),
    ("K", "K, two tokens' gradients"),
)
_REACH = 0.12  # of the axes around one; what lies beyond is an arrow with its number
_REFINED: dict[str, Any] = {"marker": "o", "markersize": 4.6, "color": FIRST}
_PUBLISHED: dict[str, Any] = {"marker": "s", "markersize": 5.4, "markeredgewidth": 1.3, "color": SECOND}


def draw_component_accuracy(result: ComponentAccuracy) -> Figure:
    """Draw one row a component and setting, one panel a quantity; bars are two standard errors of the simulation."""
    rows = _rows(result)
    figure = new_figure(17.0, 2.0 + 0.25 * len(rows))
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for ax, (quantity, title) in zip(axes, _PANELS, strict=True):
        framed(ax, title, xlabel="theory / simulation", ylabel="")
        _panel(ax, rows, quantity)
    axes[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for label, (name, _) in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(INK)
        label.set_fontsize(8.2)
        label.set_fontweight("bold" if not name.startswith(" ") else "normal")
    _key(figure)
    return figure


def _rows(result: ComponentAccuracy) -> list[tuple[str, list[Comparison]]]:
    """Return labelled rows: a component's name above its settings, cross-attention's memory on rows of its own."""
    rows: list[tuple[str, list[Comparison]]] = []
    for name in result.components():
        rows.append((name, []))
        settings: dict[str, list[Comparison]] = {}
        for one in result.comparisons:
            if one.component == name:
                memory = one.quantity.endswith("_memory")
                label = f"{one.setting}, at memory" if memory else one.setting
                settings.setdefault(label, []).append(one)
        rows += [(f"  {label}", found) for label, found in settings.items()]
    return rows


def _panel(ax: Axes, rows: Sequence[tuple[str, list[Comparison]]], quantity: str) -> None:
    ax.axvline(1.0, color=MUTED, linewidth=1.0, zorder=1)
    for at, (_, found) in enumerate(rows):
        if not found:
            ax.axhspan(at - 0.5, at + 0.5, color=GRID, alpha=0.55, linewidth=0, zorder=0)
        for one in found:
            if one.quantity.removesuffix("_memory") != quantity or not one.resolved:
                continue
            noise = 2 * one.error / abs(one.simulated)
            if one.reference != one.refined:
                _point(ax, at, one.deviation(published=True), noise, _PUBLISHED)
            _point(ax, at, one.deviation(), noise, _REFINED)
    ax.set_xlim(1 - 1.12 * _REACH, 1 + 1.12 * _REACH)
    ax.set_xticks([0.9, 0.95, 1.0, 1.05, 1.1])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _point(ax: Axes, at: float, deviation: float | None, noise: float, style: dict[str, Any]) -> None:
    if deviation is None:
        return
    published = style is _PUBLISHED
    if abs(deviation) > _REACH:
        edge = 1 + _REACH * (1 if deviation > 0 else -1)
        arrow = ">" if deviation > 0 else "<"
        ax.plot(edge, at, marker=arrow, markersize=6.5, color=style["color"], zorder=4)
        ax.annotate(
            f"{1 + deviation:.2f}" if abs(1 + deviation) < 10 else f"{1 + deviation:.0f}",
            (edge, at),
            xytext=(7 if deviation < 0 else -7, 0),
            textcoords="offset points",
            ha="left" if deviation < 0 else "right",
            va="center",
            fontsize=8,
            color=style["color"],
        )
        return
    if not published:
        ax.hlines(at, 1 + deviation - noise, 1 + deviation + noise, color=FIRST, linewidth=1.3, zorder=3)
    ax.plot(1 + deviation, at, markerfacecolor=PAPER if published else FIRST, zorder=3.5 if published else 4, **style)


def _key(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=1.3, label="refined, ± 2 SE of the simulation", **_REFINED),
        Line2D([], [], linewidth=0, markerfacecolor=PAPER, label="published, where it differs", **_PUBLISHED),
        Line2D([], [], linewidth=0, marker="<", markersize=6.5, color=SECOND, label="beyond the axis"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK)
