"""Writing a prescription into a model, and into code."""

from fathometer.application.emit import STYLES, emit
from fathometer.application.initialize import Applied, AppliedEncoderDecoder, ResidualRow, WeightRow, write_spec
from fathometer.application.initialize_widths import WidthsApplied, initialize_widths, role_stds
from fathometer.application.inside import EncoderDecoderInside, FirstTokens, read_encoder_decoder
from fathometer.application.multipliers import (
    ResidualMultiplier,
    insert_multipliers,
    multiplier_table,
    remove_multipliers,
)
from fathometer.application.named import DoubleScalingWarning, Initialized, initialize
from fathometer.application.parameter_groups import parameter_groups, scaling_table

__all__ = [
    "STYLES",
    "Applied",
    "AppliedEncoderDecoder",
    "DoubleScalingWarning",
    "EncoderDecoderInside",
    "FirstTokens",
    "Initialized",
    "ResidualMultiplier",
    "ResidualRow",
    "WeightRow",
    "WidthsApplied",
    "emit",
    "initialize",
    "initialize_widths",
    "insert_multipliers",
    "multiplier_table",
    "parameter_groups",
    "read_encoder_decoder",
    "remove_multipliers",
    "role_stds",
    "scaling_table",
    "write_spec",
]
