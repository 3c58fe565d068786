"""Long runs on the axes that make each law a straight line, and how their slopes approach the closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import GRID, INK, MUTED, SECOND, THIRD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.apjn.growth import GrowthRuns, LongRun

_COLOURS = ("#9ecae1", "#4292c6", "#08519c", THIRD)
_GUIDE: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 3)), "zorder": 4}


def draw_growth(result: GrowthRuns) -> Figure:
    """Draw both laws; above the runs, below their local slopes."""
    figure = new_figure(13.2, 9.0)
    figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
    (power_ax, root_ax), (power_slope, root_slope) = figure.subplots(2, 2)
    power = [run for run in result.runs if run.law == "power"]
    roots = [run for run in result.runs if run.law == "stretched"]
    styles = {id(run): (SECOND, "-" if i == 0 else (0, (1.2, 1.2))) for i, run in enumerate(power)}
    styles |= {id(run): (colour, "-") for run, colour in zip(roots, _COLOURS, strict=True)}

    framed(power_ax, "A power law is straight over ln ℓ", xlabel="depth ℓ, blocks", ylabel=r"$\ln J^{\ell,0}$")
    for run in power:
        colour, dash = styles[id(run)]
        power_ax.plot(run.depths, run.log_apjn, color=colour, linewidth=2.0, linestyle=dash, label=_name(run), zorder=3)
    top = 2.2 * max(run.log_apjn[-1] for run in power)
    for run in roots[:1]:
        power_ax.plot(run.depths, run.log_apjn, color=MUTED, linewidth=1.2, label=f"{_name(run)}: bends up", zorder=2)
    _guide(power_ax, power[0], np.log, f"slope ζ = {power[0].limit:.4g}")
    power_ax.set_xscale("log")
    power_ax.set_ylim(0, top)
    _key(power_ax)

    framed(root_ax, "A stretched exponential is straight over √ℓ", xlabel="√ℓ", ylabel=r"$\ln J^{\ell,0}$")
    for run in roots:
        colour, dash = styles[id(run)]
        root_ax.plot(np.sqrt(run.depths), run.log_apjn, color=colour, linewidth=2.0, label=_name(run), zorder=3)
    for i, run in enumerate(roots):
        _guide(root_ax, run, np.sqrt, "slope 1/√λ" if i == 0 else "", colour=SECOND)
    root_ax.plot(
        np.sqrt(power[0].depths), power[0].log_apjn, color=MUTED, linewidth=1.2, label="LayerNorm: flat", zorder=2
    )
    root_ax.set_ylim(bottom=0)
    root_ax.set_xlim(left=0)
    _key(root_ax)

    framed(
        power_slope,
        "Local exponent, on its way to ζ",
        xlabel="1 − p/q",
        ylabel=r"$\mathrm{d}\ln J\,/\,\mathrm{d}\ln \ell$",
    )
    for run in power:
        colour, dash = styles[id(run)]
        kept = (run.depths >= 30) & (run.depths < run.depths[-1])
        power_slope.plot(run.gap[kept], run.slopes[kept], color=colour, linewidth=2.0, linestyle=dash, label=_name(run))
    power_slope.axhline(power[0].limit, **_GUIDE)
    power_slope.plot(
        [0],
        [power[0].extrapolated],
        marker="o",
        markersize=7,
        markerfacecolor="none",
        markeredgewidth=1.6,
        color=SECOND,
        linewidth=0,
        label=f"extrapolated: {power[0].extrapolated:.4f} (closed form {power[0].limit:.4f})",
        clip_on=False,
        zorder=6,
    )
    power_slope.set_xlim(left=0)
    low, high = power_slope.get_ylim()
    power_slope.set_ylim(low, high + 0.35 * (high - low))  # room for the key
    _key(power_slope, place="upper right")

    framed(
        root_slope,
        "Local slope over the closed form",
        xlabel="depth ℓ, blocks",
        ylabel=r"$\sqrt{\lambda}\; \mathrm{d}\ln J\,/\,\mathrm{d}\sqrt{\ell}$",
    )
    for run in roots:
        colour, _ = styles[id(run)]
        kept = (run.depths >= 3) & (run.depths < run.depths[-1])
        label = f"{_name(run)}: {run.extrapolated / run.limit:.4f}"
        root_slope.plot(run.depths[kept], run.slopes[kept] / run.limit, color=colour, linewidth=2.0, label=label)
    root_slope.axhline(1.0, **_GUIDE)
    root_slope.set_xscale("log")
    _key(root_slope, title="extrapolated over closed form")
    return figure


def _name(run: LongRun) -> str:
    from fathometer.papers.apjn.growth import MANY

    return f"{run.norm}, n → ∞" if run.n_tokens == MANY else f"{run.norm}, n = {run.n_tokens}"


def _guide(ax: Axes, run: LongRun, axis: Any, label: str, *, colour: str = INK) -> None:
    """Draw the closed-form slope through the last point of a run."""
    at = axis(run.depths)
    line = run.log_apjn[-1] + run.limit * (at - at[-1])
    kept = line >= 0
    places = run.depths if axis is np.log else at  # the axis itself is logarithmic
    ax.plot(places[kept], line[kept], label=label or None, **{**_GUIDE, "color": colour})


def _key(ax: Axes, title: str | None = None, place: str = "best") -> None:
    style: dict[str, Any] = {"framealpha": 0.9, "edgecolor": GRID, "fontsize": 8.5, "labelcolor": INK, "loc": place}
    legend = ax.legend(**style, title=title)
    legend.get_title().set_fontsize(8.5)
    legend.get_title().set_color(MUTED)
