"""How far theory and measurement part, curve by curve and third by third."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fathometer.plotting.canvas import INK, MUTED, THIRDS, axes_or_new, dress
from fathometer.plotting.marks import nothing
from fathometer.plotting.scales import LOG_RANGE
from fathometer.plotting.subject import Drawable, Subject, subject_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Short names of the compared curves, to stand under bars.
SHORT = {
    "q": "q",
    "p": "p",
    "apjn_log": "J back",
    "apjn_forward_log": "J forward",
    "gradient_log": "pooled",
    "attention_entropy": "entropy",
    "logit_variance": "scores",
}


def draw_fold_errors(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the fold error of every compared curve in the first, middle and last third of the depth.

    The number under each name is the fold error over the whole depth. A short line marks the fold that the scatter of
    weight draws alone would give; 1 is perfect agreement.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Theory against measurement", xlabel="", ylabel="fold error (1 is perfect)")
    folds = {} if subject.comparison is None else subject.comparison.folds
    if not folds:
        nothing(ax, "nothing to compare: the theory does not cover this model")
        return ax
    at = np.arange(len(folds))
    thirds = np.array([fold.thirds for fold in folds.values()])
    labels = ("first third", "middle", "last third")
    for i, (colour, label) in enumerate(zip(THIRDS, labels, strict=True)):
        ax.bar(at + 0.25 * (i - 1), thirds[:, i] - 1, width=0.23, bottom=1.0, color=colour, label=label, zorder=3)
    noise = np.array([fold.noise for fold in folds.values()])
    ax.hlines(noise, at - 0.4, at + 0.4, color=INK, linewidth=1.3, label="weight noise", zorder=4)
    known = thirds[np.isfinite(thirds)]
    top = max(float(known.max(initial=1.0)), float(noise[np.isfinite(noise)].max(initial=1.0)))
    if top > LOG_RANGE:
        ax.set_yscale("log")
        ax.set_ylim(0.9, top * 3)
    else:
        ax.set_ylim(1.0, 1 + 1.08 * max(top - 1, 0.05))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    names = [f"{SHORT.get(name, name)}\n{fold.whole:.2f}" for name, fold in folds.items()]
    ax.set_xticks(at, names)
    ax.tick_params(axis="x", labelcolor=INK, length=0)
    ax.grid(visible=False, axis="x")
    ax.axhline(1.0, color=MUTED, linewidth=0.9, zorder=2)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )
    return ax
