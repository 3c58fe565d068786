"""Torch networks: built from a spec, or found inside a user's model and read into one."""

from fathometer.models.finding import Stack, find_stacks, named_stack
from fathometer.models.loading import HF_NAMES, LoadedModel, load_model
from fathometer.models.reading import ModelReading, SublayerReading, check_weights, read_block
from fathometer.models.redraw import redrawn
from fathometer.models.reference import ReferenceBlock, ReferenceTransformer, draw_weights, reference_network
from fathometer.models.reference_encoder_decoder import ReferenceEncoderDecoder, reference_encoder_decoder
from fathometer.models.roles import PARAMETER_ROLES, ModelRoles, ParameterRole, parameter_roles, read_roles
from fathometer.models.stacked import StackedTransformer, stacked_network
from fathometer.models.synthetic import equiangular_tokens, tokens_with_gram
from fathometer.models.weights import ROLES, WeightSlice

__all__ = [
    "HF_NAMES",
    "PARAMETER_ROLES",
    "ROLES",
    "LoadedModel",
    "ModelReading",
    "ModelRoles",
    "ParameterRole",
    "ReferenceBlock",
    "ReferenceEncoderDecoder",
    "ReferenceTransformer",
    "Stack",
    "StackedTransformer",
    "SublayerReading",
    "WeightSlice",
    "check_weights",
    "draw_weights",
    "equiangular_tokens",
    "find_stacks",
    "load_model",
    "named_stack",
    "parameter_roles",
    "read_block",
    "read_roles",
    "redrawn",
    "reference_encoder_decoder",
    "reference_network",
    "stacked_network",
    "tokens_with_gram",
]
