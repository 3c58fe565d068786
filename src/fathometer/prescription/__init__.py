"""Solvers that invert the theory, and initialisation schemes as tables."""

from fathometer.prescription.critical import EXPONENTS, CriticalLine, critical_line, edge_of_chaos
from fathometer.prescription.plans import Row, SchemePlan
from fathometer.prescription.scheme_comparison import Comparison, ComparisonRow, compare_schemes
from fathometer.prescription.schemes import SCHEMES, apply_scheme, scheme_options
from fathometer.prescription.solving import TARGETS, NoRootError, Solution, solve_field

__all__ = [
    "EXPONENTS",
    "SCHEMES",
    "TARGETS",
    "Comparison",
    "ComparisonRow",
    "CriticalLine",
    "NoRootError",
    "Row",
    "SchemePlan",
    "Solution",
    "apply_scheme",
    "compare_schemes",
    "critical_line",
    "edge_of_chaos",
    "scheme_options",
    "solve_field",
]
