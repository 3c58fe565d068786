"""Solvers that invert the theory, and initialisation schemes as tables."""

from fathometer.prescription.critical import EXPONENTS, CriticalLine, critical_line, edge_of_chaos
from fathometer.prescription.plans import EncoderDecoderPlan, EndRow, Row, SchemePlan
from fathometer.prescription.scheme_comparison import Comparison, ComparisonRow, compare_schemes
from fathometer.prescription.schemes import SCHEMES, apply_scheme, scheme_options
from fathometer.prescription.solving import TARGETS, NoRootError, Solution, solve_field
from fathometer.prescription.unit_ends import unit_front_end, unit_head, unit_stem
from fathometer.prescription.width_scaling import SCALINGS, ScalingScheme, scaling_scheme, width_rule
from fathometer.prescription.width_table import WidthRow, WidthTable, standard_parameters, width_table

__all__ = [
    "EXPONENTS",
    "SCALINGS",
    "SCHEMES",
    "TARGETS",
    "Comparison",
    "ComparisonRow",
    "CriticalLine",
    "EncoderDecoderPlan",
    "EndRow",
    "NoRootError",
    "Row",
    "ScalingScheme",
    "SchemePlan",
    "Solution",
    "WidthRow",
    "WidthTable",
    "apply_scheme",
    "compare_schemes",
    "critical_line",
    "edge_of_chaos",
    "scaling_scheme",
    "scheme_options",
    "solve_field",
    "standard_parameters",
    "unit_front_end",
    "unit_head",
    "unit_stem",
    "width_rule",
    "width_table",
]
