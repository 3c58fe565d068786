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
from fathometer.observables.fixed_points import (
    PHASES,
    FixedPoint,
    StableState,
    angle_rate,
    fixed_norm,
    fixed_points,
    last_block,
    stable_state,
)
from fathometer.observables.growth import Growth, growth
from fathometer.observables.jacobian import Gradients, backward, forward
from fathometer.observables.prediction import predict, profile_of

__all__ = [
    "PHASES",
    "READOUTS",
    "Exponents",
    "FixedPoint",
    "Gradients",
    "Growth",
    "PowerLaws",
    "StableState",
    "angle_rate",
    "backward",
    "equal_token_gradients",
    "exponents",
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
]
