"""Figures of the effective theory: kernels, tangent kernels, and what they say of training at any width."""

from fathometer.plotting.effective.ablation import draw_ablation
from fathometer.plotting.effective.coordinates import draw_coordinates
from fathometer.plotting.effective.kernels import draw_kernels
from fathometer.plotting.effective.slopes import draw_slopes
from fathometer.plotting.effective.transfer import draw_transfer

__all__ = ["draw_ablation", "draw_coordinates", "draw_kernels", "draw_slopes", "draw_transfer"]
