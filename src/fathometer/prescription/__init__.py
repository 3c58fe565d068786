"""Solvers that invert the theory."""

from fathometer.prescription.solving import TARGETS, NoRootError, Solution, solve_field

__all__ = ["TARGETS", "NoRootError", "Solution", "solve_field"]
