"""Transformers as data."""

from fathometer.spec.batch import array_fields, at_point, batch_shape, cut_aligned, refuse_arrays, sliced
from fathometer.spec.branches import (
    ACTIVATIONS,
    MLP,
    Activation,
    Branch,
    CrossAttention,
    GatedMLP,
    SelfAttention,
    hidden_width,
)
from fathometer.spec.encoder_decoder import EncoderDecoder, memory_width
from fathometer.spec.fields import FIELDS, scaled_field, with_field
from fathometer.spec.files import (
    dumps_json,
    dumps_toml,
    encoder_decoder_from_dict,
    from_dict,
    load,
    load_encoder_decoder,
    to_dict,
)
from fathometer.spec.network import Head, Network, PatchStem, Stem, TokenStem
from fathometer.spec.norms import Derf, DyT, LayerNorm, Norm, PointwiseNorm, RMSNorm
from fathometer.spec.pointwise import Pointwise
from fathometer.spec.presets import FAMILIES, preset
from fathometer.spec.transformer import Block, Placement, Scales, Sublayer, Transformer, branch_names

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "FIELDS",
    "MLP",
    "Activation",
    "Block",
    "Branch",
    "CrossAttention",
    "Derf",
    "DyT",
    "EncoderDecoder",
    "GatedMLP",
    "Head",
    "LayerNorm",
    "Network",
    "Norm",
    "PatchStem",
    "Placement",
    "Pointwise",
    "PointwiseNorm",
    "RMSNorm",
    "Scales",
    "SelfAttention",
    "Stem",
    "Sublayer",
    "TokenStem",
    "Transformer",
    "array_fields",
    "at_point",
    "batch_shape",
    "branch_names",
    "cut_aligned",
    "dumps_json",
    "dumps_toml",
    "encoder_decoder_from_dict",
    "from_dict",
    "hidden_width",
    "load",
    "load_encoder_decoder",
    "memory_width",
    "preset",
    "refuse_arrays",
    "scaled_field",
    "sliced",
    "to_dict",
    "with_field",
]
