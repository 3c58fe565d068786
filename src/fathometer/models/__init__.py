"""Torch networks: built from a spec, or found inside a user's model."""

from fathometer.models.reference import ReferenceBlock, ReferenceTransformer, draw_weights, reference_network
from fathometer.models.synthetic import equiangular_tokens, tokens_with_gram

__all__ = [
    "ReferenceBlock",
    "ReferenceTransformer",
    "draw_weights",
    "equiangular_tokens",
    "reference_network",
    "tokens_with_gram",
]
