"""Averages over the softmax: closures for exchangeable tokens, mixings for full Gram matrices."""

from fathometer.attention.closure import (
    CLOSURES,
    DEFAULT_CLOSURE,
    Annealed,
    AttentionStatistics,
    Closure,
    Uniform,
    UniformLargeN,
    ValuePath,
    as_closure,
)
from fathometer.attention.mixing import AnnealedMixing, FixedMixing, Mixing, UniformMixing, Visibility
from fathometer.attention.score_path import ScorePath

__all__ = [
    "CLOSURES",
    "DEFAULT_CLOSURE",
    "Annealed",
    "AnnealedMixing",
    "AttentionStatistics",
    "Closure",
    "FixedMixing",
    "Mixing",
    "ScorePath",
    "Uniform",
    "UniformLargeN",
    "UniformMixing",
    "ValuePath",
    "Visibility",
    "as_closure",
]
