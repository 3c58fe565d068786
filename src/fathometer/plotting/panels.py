"""The panels of a report, as a table: what each needs, how it is drawn, how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fathometer.plotting import layers
from fathometer.plotting.canvas import PANEL_SIZE, new_figure
from fathometer.plotting.folds import draw_fold_errors
from fathometer.plotting.subject import Drawable, Subject, subject_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        name: File name without suffix.
        curves: Curves it shows; one of them must be there. Empty for the comparison.
        draw: ``draw(report_or_profiles, ax=None) -> ax``.
        title: What it shows.
        reading: How to read it.
    """

    name: str
    curves: tuple[str, ...]
    draw: Callable[..., Axes]
    title: str
    reading: str

    def shows(self, subject: Subject) -> bool:
        """Whether there is anything to draw."""
        if not self.curves:
            return subject.comparison is not None and bool(subject.comparison.folds)
        return subject.has(*self.curves)

    def figure(self, source: Drawable | Subject) -> Figure:
        """Return a new figure with this panel alone."""
        figure = new_figure(*PANEL_SIZE)
        self.draw(source, figure.add_subplot())
        return figure


PANELS: tuple[Panel, ...] = (
    Panel(
        name="stream",
        curves=("q", "p"),
        draw=layers.draw_stream,
        title="The signal on the residual stream",
        reading=(
            "q is the mean square of a token's coordinates, p the mean overlap of two different tokens. Residual "
            "branches of fixed size make q grow like the depth; growth by a constant factor per block, a straight "
            "line on a logarithmic axis, ends in overflow. Where p meets q, tokens have become copies of each "
            "other."
        ),
    ),
    Panel(
        name="cosine",
        curves=("cosine",),
        draw=layers.draw_cosine,
        title="The angle between tokens",
        reading=(
            "0 means that two tokens have nothing in common, 1 that they are parallel. A cosine that settles below "
            "1 is healthy. One that runs to 1 is rank collapse: deeper blocks can no longer tell tokens apart. Then "
            "the panel shows 1 - cosine on a logarithmic axis."
        ),
    ),
    Panel(
        name="gradients",
        curves=("apjn_log", "gradient_log"),
        draw=layers.draw_gradients,
        title="Gradients on the way back",
        reading=(
            "Read from right to left: how much the mean square of a gradient has grown from the output back to each "
            "block, for a gradient on single tokens (the averaged partial Jacobian norm, APJN) and for a loss on "
            "the mean of all tokens. Flat or gently rising towards the input is healthy. The limits also weigh the "
            "growth of the stream, because what counts is a relative change of it. Where gradients vanish, J - K is "
            "drawn too: the part that tells tokens apart."
        ),
    ),
    Panel(
        name="tokens",
        curves=("apjn_token_log",),
        draw=layers.draw_tokens,
        title="Gradients by token position",
        reading=(
            "How much the gradient of each token has grown by the time it reaches the first block. In a causal model "
            "early tokens are read by all later ones and collect more; without a mask positions differ as tokens do."
        ),
    ),
    Panel(
        name="forward",
        curves=("apjn_forward_log",),
        draw=layers.draw_forward,
        title="Perturbations on the way down",
        reading=(
            "How much a small random change of the first block's input has grown at each block. At the output it "
            "has the same mean as the backward curve at the input; the two measure the same product of Jacobians "
            "from its two ends."
        ),
    ),
    Panel(
        name="branches",
        curves=("attention_added_q", "mlp_added_q"),
        draw=layers.draw_branches,
        title="What each branch adds",
        reading=(
            "The mean square that attention and the MLP add to the stream in each block. Two orders of magnitude "
            "between them mean that the smaller one hardly takes part at the start of training."
        ),
    ),
    Panel(
        name="attention_entropy",
        curves=("attention_entropy_relative",),
        draw=layers.draw_attention_entropy,
        title="How widely attention looks",
        reading=(
            "Entropy of an attention row over that of uniform attention on the keys it sees. 1: every visible token "
            "counts alike, the usual start. Near 0: one token takes all, gradients through the softmax vanish and "
            "training tends to be unstable."
        ),
    ),
    Panel(
        name="score_variance",
        curves=("logit_variance",),
        draw=layers.draw_score_variance,
        title="Spread of attention scores",
        reading=(
            "Variance of the scores of one query over the keys it sees, before the softmax. Far below 1 attention "
            "is nearly uniform; beyond about 1 it picks favourites."
        ),
    ),
    Panel(
        name="fold_errors",
        curves=(),
        draw=draw_fold_errors,
        title="How well theory and measurement agree",
        reading=(
            "Mean factor between theory and measurement, by thirds of the depth: 1.05 means five percent apart on "
            "average. The short line is the factor that the scatter of weight draws alone would give; bars near it "
            "leave nothing to explain."
        ),
    ),
)


def panels_of(source: Drawable | Subject) -> tuple[Panel, ...]:
    """Return the panels that have something to show."""
    subject: Any = subject_of(source)
    return tuple(panel for panel in PANELS if panel.shows(subject))
