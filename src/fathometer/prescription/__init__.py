"""Solvers that invert the theory."""

from fathometer.prescription.critical import EXPONENTS, CriticalLine, critical_line, edge_of_chaos
from fathometer.prescription.solving import TARGETS, NoRootError, Solution, solve_field

__all__ = [
    "EXPONENTS",
    "TARGETS",
    "CriticalLine",
    "NoRootError",
    "Solution",
    "critical_line",
    "edge_of_chaos",
    "solve_field",
]
