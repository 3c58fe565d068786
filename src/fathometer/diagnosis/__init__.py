"""From curves to a verdict and what to change."""

from fathometer.diagnosis.comparison import Comparison, FoldError, compare, fold_error
from fathometer.diagnosis.criteria import CRITERIA, Criterion, Evidence
from fathometer.diagnosis.diagnose import diagnose
from fathometer.diagnosis.report import Finding, Remedy, Report, UnhealthyError
from fathometer.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds

__all__ = [
    "CRITERIA",
    "DEFAULT_THRESHOLDS",
    "Comparison",
    "Criterion",
    "Evidence",
    "Finding",
    "FoldError",
    "Remedy",
    "Report",
    "Thresholds",
    "UnhealthyError",
    "compare",
    "diagnose",
    "fold_error",
]
