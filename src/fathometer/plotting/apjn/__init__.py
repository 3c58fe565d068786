"""Pictures of the results of :mod:`fathometer.papers.apjn`. Each takes a result, returns a figure, computes nothing."""

from fathometer.plotting.apjn.approximations import draw_approximations
from fathometer.plotting.apjn.curves import draw_backward, draw_forward, draw_pooled, draw_vit_large
from fathometer.plotting.apjn.depth_alpha import draw_depth_alpha
from fathometer.plotting.apjn.growth import draw_growth
from fathometer.plotting.apjn.photographs import draw_photographs
from fathometer.plotting.apjn.sensitivity import draw_sensitivity

__all__ = [
    "draw_approximations",
    "draw_backward",
    "draw_depth_alpha",
    "draw_forward",
    "draw_growth",
    "draw_photographs",
    "draw_pooled",
    "draw_sensitivity",
    "draw_vit_large",
]
