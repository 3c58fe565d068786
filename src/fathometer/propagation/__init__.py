"""The Markov chain over layers, on two numbers or on the full Gram matrix."""

from fathometer.propagation.branch_maps import Attending, Moments
from fathometer.propagation.ends import Ends, Index, propagate_ends
from fathometer.propagation.exchangeable import BlockMap, check_moments, check_tokens, propagate
from fathometer.propagation.gram import GramTrajectory, check_attention, check_gram, propagate_gram
from fathometer.propagation.trajectory import Trajectory

__all__ = [
    "Attending",
    "BlockMap",
    "Ends",
    "GramTrajectory",
    "Index",
    "Moments",
    "Trajectory",
    "check_attention",
    "check_gram",
    "check_moments",
    "check_tokens",
    "propagate",
    "propagate_ends",
    "propagate_gram",
]
