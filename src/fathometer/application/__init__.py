"""Writing a prescription into a model, and into code."""

from fathometer.application.groups import parameter_groups, scaling_table
from fathometer.application.inside import EncoderDecoderInside, FirstTokens, read_encoder_decoder
from fathometer.application.multipliers import (
    ResidualMultiplier,
    insert_multipliers,
    multiplier_table,
    remove_multipliers,
)
from fathometer.application.named import DoubleScalingWarning, Initialized, initialize
from fathometer.application.source_code import STYLES, emit
from fathometer.application.widths import WidthsApplied, initialize_widths, role_stds
from fathometer.application.writing import Applied, AppliedEncoderDecoder, ResidualRow, WeightRow, write_spec

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
