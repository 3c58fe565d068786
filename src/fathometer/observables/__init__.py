"""What is read off a trajectory."""

from fathometer.observables.exponents import (
    READOUTS,
    Exponents,
    PowerLaws,
    equal_token_gradients,
    exponents,
    gradient_exponent,
    gradient_modes,
    power_laws,
)
from fathometer.observables.failure_modes import (
    MODES,
    Criteria,
    FailureModes,
    attention_beta,
    condensing_context,
    critical_skip_scale,
    failure_modes,
)
from fathometer.observables.fixed_points import (
    PHASES,
    FixedPoint,
    StableState,
    angle_rate,
    fixed_norm,
    fixed_points,
    last_block,
    stable_state,
    starting_norm,
)
from fathometer.observables.growth import Growth, growth
from fathometer.observables.jacobian import Gradients, backward, forward
from fathometer.observables.prediction import predict, profile_of
from fathometer.observables.weight_gradients import WeightGradients, weight_gradients

__all__ = [
    "MODES",
    "PHASES",
    "READOUTS",
    "Criteria",
    "Exponents",
    "FailureModes",
    "FixedPoint",
    "Gradients",
    "Growth",
    "PowerLaws",
    "StableState",
    "WeightGradients",
    "angle_rate",
    "attention_beta",
    "backward",
    "condensing_context",
    "critical_skip_scale",
    "equal_token_gradients",
    "exponents",
    "failure_modes",
    "fixed_norm",
    "fixed_points",
    "forward",
    "gradient_exponent",
    "gradient_modes",
    "growth",
    "last_block",
    "power_laws",
    "predict",
    "profile_of",
    "stable_state",
    "starting_norm",
    "weight_gradients",
]
