"""Training curves of deep language models, and their loss over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fathometer.plotting.apjn.frame import framed
from fathometer.plotting.canvas import FIRST, INK, MUTED, SECOND, THIRD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fathometer.papers.moments.deep_vs_shallow import DeepVsShallow, Trained

_STYLES: dict[str, tuple[str, str, str, Any]] = {
    "deepscalelm": ("DeepScaleLM", FIRST, "o", "-"),
    "xavier": ("Xavier", SECOND, "s", (0, (5, 2))),
    "gpt2": ("GPT-2, std 0.02 at width 768", THIRD, "^", (0, (1, 1.4))),
}
#: Top of the curves, nats above the frequencies: the first steps, which say nothing, are cut off.
_TOP = 0.25
_SHAPE: Any = (0, (3, 1, 1, 1))


def draw_deep_vs_shallow(result: DeepVsShallow) -> Figure:
    """Draw a column per study: curves of its deepest networks, and the final held-out loss over depth."""
    columns = len(result.studies) + bool(result.shapes)
    figure = new_figure(3.9 * columns + 0.4, 8.2)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.06, h_pad=0.1, hspace=0.04)  # type: ignore[call-arg]
    axes = figure.subplots(2, columns, sharey="row", squeeze=False)
    for column, trained in enumerate(result.studies):
        _curves(axes[0, column], trained)
        _depths(axes[1, column], trained)
    if result.shapes:
        _shapes(axes[0, -1], axes[1, -1], result)
    for row, label in zip(axes, ("training", "held-out"), strict=True):
        row[0].set_ylabel(f"{label} loss less that of the frequencies, nats", fontsize=9, color=MUTED)
    axes[0, 0].set_ylim(None, _TOP)
    about = result.about
    figure.suptitle(
        f"{about['steps']} steps of {about['optimizer']} on {about['batch_size']} x {about['n_tokens']} bytes each, at "
        f"the best of the rates {', '.join(f'{rate:g}' for rate in about['rates'])}; mean and standard error of "
        f"{about['seeds']} seeds, single runs thin. "
        "At zero, dashed: the bytes' frequencies are known, no context",
        fontsize=9,
        color=MUTED,
        x=0.01,
        ha="left",
    )
    _key(figure, result)
    return figure


def _curves(ax: Axes, trained: Trained) -> None:
    runs = trained.runs
    depth = len(runs.depths) - 1
    title = f"{trained.name[:1].upper()}{trained.name[1:]}: {runs.depths[depth]} blocks"
    framed(ax, title, xlabel="step", ylabel="")
    for i, scheme in enumerate(runs.schemes):
        _, colour, _, dash = _STYLES[scheme]
        _curve(ax, runs.curves(i, depth), colour, dash)
    _mark(ax)


def _curve(ax: Axes, losses: NDArray[np.float64], colour: str, dash: Any) -> None:
    """Draw every seed thin and their mean thick, each over windows of a twentieth of the run."""
    width = max(1, losses.shape[-1] // 20)
    whole = losses.shape[-1] // width * width
    steps = np.arange(width, whole + 1, width)
    smooth = losses[:, :whole].reshape(len(losses), -1, width).mean(axis=-1)
    ax.plot(steps, smooth.T, color=colour, linewidth=0.7, alpha=0.45)
    ax.plot(steps, smooth.mean(axis=0), color=colour, linewidth=2.0, linestyle=dash)


def _depths(ax: Axes, trained: Trained) -> None:
    runs = trained.runs
    framed(ax, f"Width {trained.study.d_model}, over depth", xlabel="blocks", ylabel="")
    mean, error = runs.at_best_rate()
    for i, scheme in enumerate(runs.schemes):
        _, colour, symbol, dash = _STYLES[scheme]
        ax.errorbar(
            runs.depths,
            mean[i],
            yerr=np.nan_to_num(error[i]),
            color=colour,
            marker=symbol,
            markersize=6,
            linestyle=dash,
            linewidth=1.5,
            capsize=3,
        )
    _depth_axis(ax, runs.depths)
    _mark(ax)


def _shapes(above: Axes, below: Axes, result: DeepVsShallow) -> None:
    """Draw networks of equally many weights: curves above, final losses below."""
    framed(above, "Equally many weights: DeepScaleLM", xlabel="step", ylabel="")
    framed(below, "Blocks x width", xlabel="", ylabel="")
    labels = []
    for place, trained in enumerate(result.shapes):
        colour, dash = (FIRST, "-") if place % 2 == 0 else (INK, _SHAPE)
        runs = trained.runs
        _curve(above, runs.curves(0, 0), colour, dash)
        mean, error = runs.at_best_rate()
        below.errorbar(
            place, mean[0, 0], yerr=np.nan_to_num(error[0, 0]), color=colour, marker="o", markersize=7, capsize=4
        )
        labels.append(f"{runs.depths[0]} x {trained.study.d_model}\n{trained.name}".replace(", ", "\n"))
    below.set_xticks(range(len(labels)), labels)
    below.set_xlim(-0.6, len(labels) - 0.4)
    for ax in (above, below):
        _mark(ax)


def _mark(ax: Axes) -> None:
    """Draw the level of a network that knows nothing of context."""
    ax.axhline(0.0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def _depth_axis(ax: Axes, depths: tuple[int, ...]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_xscale("log")
    ax.set_xlim(depths[0] / 1.4, depths[-1] * 1.4)
    ax.xaxis.set_major_locator(FixedLocator(depths))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _key(figure: Figure, result: DeepVsShallow) -> None:
    from matplotlib.lines import Line2D

    used = [name for name in _STYLES if any(name in trained.runs.schemes for trained in result.studies)]
    handles = [
        Line2D([], [], color=colour, marker=symbol, linestyle=dash, linewidth=1.8, label=label)
        for label, colour, symbol, dash in (_STYLES[name] for name in used)
    ]
    if result.shapes:
        handles.append(
            Line2D([], [], color=INK, linestyle=_SHAPE, linewidth=1.8, label="DeepScaleLM, shallow and wide")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
