"""What is read off a trajectory."""

from fathometer.observables.adamw_tangent import AdamWTangentKernel, adamw_tangent_kernel
from fathometer.observables.embeddings import corpus_overlap, count_overlap, stem_state, zipf_overlap
from fathometer.observables.encoder_decoder import (
    EncoderDecoderGradients,
    backward_encoder_decoder,
    predict_encoder_decoder,
)
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
from fathometer.observables.model_moments import moments
from fathometer.observables.moment_laws import exponential_gradients, linear_growth, sharp_scores
from fathometer.observables.prediction import predict, profile_of
from fathometer.observables.tangent import TANGENT_ROLES, TangentKernel, tangent_kernel
from fathometer.observables.tangent_encoder_decoder import encoder_decoder_tangent_kernel
from fathometer.observables.weight_gradients import WeightGradients, weight_gradients

__all__ = [
    "MODES",
    "PHASES",
    "READOUTS",
    "TANGENT_ROLES",
    "AdamWTangentKernel",
    "Criteria",
    "EncoderDecoderGradients",
    "Exponents",
    "FailureModes",
    "FixedPoint",
    "Gradients",
    "Growth",
    "PowerLaws",
    "StableState",
    "TangentKernel",
    "WeightGradients",
    "adamw_tangent_kernel",
    "angle_rate",
    "attention_beta",
    "backward",
    "backward_encoder_decoder",
    "condensing_context",
    "corpus_overlap",
    "count_overlap",
    "critical_skip_scale",
    "encoder_decoder_tangent_kernel",
    "equal_token_gradients",
    "exponential_gradients",
    "exponents",
    "failure_modes",
    "fixed_norm",
    "fixed_points",
    "forward",
    "gradient_exponent",
    "gradient_modes",
    "growth",
    "last_block",
    "linear_growth",
    "moments",
    "power_laws",
    "predict",
    "predict_encoder_decoder",
    "profile_of",
    "sharp_scores",
    "stable_state",
    "starting_norm",
    "stem_state",
    "tangent_kernel",
    "weight_gradients",
    "zipf_overlap",
]
