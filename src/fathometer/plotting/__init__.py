"""Pictures of results: theory as lines, measurement as points with error bars. Nothing here computes a result.

Every ``draw_*`` function takes a report, a profile, or a theory and a measured profile together, draws on the axes it
is given
(or on new ones) and returns them. No pyplot, no global style, no global state.
"""

from fathometer.plotting.canvas import to_png, to_svg
from fathometer.plotting.folds import draw_fold_errors
from fathometer.plotting.layers import (
    draw_attention_entropy,
    draw_branches,
    draw_cosine,
    draw_forward,
    draw_gradients,
    draw_score_variance,
    draw_stream,
    draw_tokens,
)
from fathometer.plotting.overview import draw_overview
from fathometer.plotting.panels import PANELS, Panel, panels_of

__all__ = [
    "PANELS",
    "Panel",
    "draw_attention_entropy",
    "draw_branches",
    "draw_cosine",
    "draw_fold_errors",
    "draw_forward",
    "draw_gradients",
    "draw_overview",
    "draw_score_variance",
    "draw_stream",
    "draw_tokens",
    "panels_of",
    "to_png",
    "to_svg",
]
