"""The Markov chain over layers, on two numbers or on the full Gram matrix."""

from fathometer.propagation.branch_maps import Attending, Moments
from fathometer.propagation.cross import Memory
from fathometer.propagation.cross_gram import (
    EncoderDecoderGramTrajectory,
    GramGradients,
    propagate_encoder_decoder_gram,
)
from fathometer.propagation.encoder_decoder import EncoderDecoderTrajectory, propagate_encoder_decoder
from fathometer.propagation.ends import Ends, Index, propagate_ends
from fathometer.propagation.exchangeable import BlockMap, check_moments, check_tokens, propagate
from fathometer.propagation.gram import GramTrajectory, check_attention, check_gram, propagate_gram
from fathometer.propagation.stem import StemGram, stem_gram
from fathometer.propagation.tangent import TangentTrajectory, propagate_tangent
from fathometer.propagation.tangent_cross import EncoderDecoderTangent, propagate_encoder_decoder_tangent
from fathometer.propagation.trajectory import StreamOverflowError, Trajectory

__all__ = [
    "Attending",
    "BlockMap",
    "EncoderDecoderGramTrajectory",
    "EncoderDecoderTangent",
    "EncoderDecoderTrajectory",
    "Ends",
    "GramGradients",
    "GramTrajectory",
    "Index",
    "Memory",
    "Moments",
    "StemGram",
    "StreamOverflowError",
    "TangentTrajectory",
    "Trajectory",
    "check_attention",
    "check_gram",
    "check_moments",
    "check_tokens",
    "propagate",
    "propagate_encoder_decoder",
    "propagate_encoder_decoder_gram",
    "propagate_encoder_decoder_tangent",
    "propagate_ends",
    "propagate_gram",
    "propagate_tangent",
    "stem_gram",
]
