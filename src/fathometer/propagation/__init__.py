"""The Markov chain over layers, on two numbers or on the full Gram matrix."""

from fathometer.propagation.exchangeable import check_moments, propagate
from fathometer.propagation.gram import GramTrajectory, check_attention, check_gram, propagate_gram
from fathometer.propagation.trajectory import Trajectory

__all__ = [
    "GramTrajectory",
    "Trajectory",
    "check_attention",
    "check_gram",
    "check_moments",
    "propagate",
    "propagate_gram",
]
