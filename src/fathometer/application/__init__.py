"""Writing a prescription into a model, and into code."""

from fathometer.application.emit import STYLES, emit
from fathometer.application.initialize import Applied, ResidualRow, WeightRow, write_spec
from fathometer.application.multipliers import ResidualMultiplier, remove_multipliers

__all__ = [
    "STYLES",
    "Applied",
    "ResidualMultiplier",
    "ResidualRow",
    "WeightRow",
    "emit",
    "remove_multipliers",
    "write_spec",
]
