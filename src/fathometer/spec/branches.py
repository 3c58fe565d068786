"""Branches as data: self-attention, cross attention, MLP and gated MLP with their weight scales.

Every scale is ``std * sqrt(fan_in)`` of a weight matrix, dimensionless; a bias scale is the plain standard deviation
of its entries (zero-mean over features and shared by all tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from fathometer.errors import SpecError, nearest
from fathometer.spec.arrays import Scale, checked, checked_count, checked_flag, checked_rate
from fathometer.spec.pointwise import Pointwise

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "erf", "identity")
Activation: TypeAlias = str | Pointwise


def check_activation(owner: object, activation: Activation) -> None:
    """Refuse an activation name that has no kernel, naming the closest one."""
    if isinstance(activation, Pointwise):
        return
    if activation not in ACTIVATIONS:
        raise SpecError(
            f"{type(owner).__name__}.activation {activation!r} is unknown{nearest(str(activation), ACTIVATIONS)}"
        )


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Softmax self-attention, ``W_O sum_b softmax_b(score_multiplier * q_a.k_b / sqrt(d_head)) W_V x_b``.

    Args:
        query, key, value, output: Weight scales.
        value_bias, output_bias: Bias standard deviations.
        n_heads: Query heads.
        n_kv_heads: Key and value heads (grouped-query attention); ``None`` means ``n_heads``.
        causal: Whether position a sees only b <= a.
        score_multiplier: Extra factor on the scores beyond ``1/sqrt(d_head)``.
        qk_norm: Whether queries and keys are normalised per head before the product.
        centred: Whether the mean over tokens is subtracted from the output, biases included (gain-controlled
            attention, Giorlandino and Goldt, arXiv:2505.24333). Refused with ``causal``.
        attention_dropout: Rate of the dropout on attention weights, after the softmax. Refused with ``centred``.
    """

    query: Scale
    key: Scale
    value: Scale
    output: Scale
    value_bias: Scale = 0.0
    output_bias: Scale = 0.0
    n_heads: int = 1
    n_kv_heads: int | None = None
    causal: bool = False
    score_multiplier: Scale = 1.0
    qk_norm: bool = False
    centred: bool = False
    attention_dropout: Scale = 0.0
    kind: Literal["self_attention"] = "self_attention"
    scale_names: ClassVar[tuple[str, ...]] = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        for name in (*self.scale_names, "value_bias", "output_bias", "score_multiplier"):
            checked(self, name)
        for name in ("causal", "qk_norm", "centred"):
            checked_flag(self, name)
        if self.causal and self.centred:
            raise SpecError(
                "SelfAttention.centred subtracts a mean over all tokens, later ones included; "
                "a causal model would need a running mean"
            )
        checked_rate(self, "attention_dropout")
        if self.centred and np.any(np.asarray(self.attention_dropout) > 0):
            raise SpecError("SelfAttention.attention_dropout is not covered with centred attention")
        check_heads(self)


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Softmax attention to a memory m, ``W_O sum_b softmax_b(s q_a.k_b / sqrt(d_head)) W_V m_b``.

    Queries are read from the decoder's tokens, keys and values from the encoder's output, which every decoder layer
    sees alike; there is no mask.

    Args:
        query, key, value, output: Weight scales; the fan-in of keys and values is the width of the memory.
        value_bias, output_bias: Bias standard deviations.
        n_heads: Query heads.
        n_kv_heads: Key and value heads (grouped-query attention); ``None`` means ``n_heads``.
        score_multiplier: Extra factor s on the scores beyond ``1/sqrt(d_head)``.
        attention_dropout: Rate of the dropout on attention weights, after the softmax.
        d_memory: Width of the memory; ``None`` means that of the decoder.
    """

    query: Scale
    key: Scale
    value: Scale
    output: Scale
    value_bias: Scale = 0.0
    output_bias: Scale = 0.0
    n_heads: int = 1
    n_kv_heads: int | None = None
    score_multiplier: Scale = 1.0
    attention_dropout: Scale = 0.0
    d_memory: int | None = None
    kind: Literal["cross_attention"] = "cross_attention"
    scale_names: ClassVar[tuple[str, ...]] = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        for name in (*self.scale_names, "value_bias", "output_bias", "score_multiplier"):
            checked(self, name)
        checked_rate(self, "attention_dropout")
        check_heads(self)
        if self.d_memory is not None:
            checked_count(self, "d_memory")


def check_heads(attention: SelfAttention | CrossAttention) -> None:
    """Refuse numbers of heads that are no counts, or query heads that key and value heads do not divide."""
    checked_count(attention, "n_heads")
    if attention.n_kv_heads is None:
        return
    checked_count(attention, "n_kv_heads")
    if attention.n_heads % attention.n_kv_heads:
        raise SpecError(
            f"{type(attention).__name__}.n_heads must be a multiple of n_kv_heads; got {attention.n_heads} and "
            f"{attention.n_kv_heads}"
        )


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Two-layer perceptron, ``W_out f(W_in x)``."""

    mlp_in: Scale
    mlp_out: Scale
    activation: Activation = "gelu"
    in_bias: Scale = 0.0
    out_bias: Scale = 0.0
    ratio: float = 4.0
    kind: Literal["mlp"] = "mlp"
    scale_names: ClassVar[tuple[str, ...]] = ("mlp_in", "mlp_out")

    def __post_init__(self) -> None:
        for name in (*self.scale_names, "in_bias", "out_bias"):
            checked(self, name)
        checked(self, "ratio", strict=True)
        check_activation(self, self.activation)


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """Gated perceptron, ``W_out (f(W_gate x) * (W_in x))``; SwiGLU for ``f`` = SiLU."""

    gate: Scale
    mlp_in: Scale
    mlp_out: Scale
    activation: Activation = "silu"
    ratio: float = 8 / 3
    kind: Literal["gated_mlp"] = "gated_mlp"
    scale_names: ClassVar[tuple[str, ...]] = ("gate", "mlp_in", "mlp_out")

    def __post_init__(self) -> None:
        for name in self.scale_names:
            checked(self, name)
        checked(self, "ratio", strict=True)
        check_activation(self, self.activation)


Branch: TypeAlias = SelfAttention | CrossAttention | MLP | GatedMLP


def hidden_width(branch: MLP | GatedMLP, d_model: int) -> int:
    """Return the number of hidden units of an MLP."""
    return max(1, round(branch.ratio * d_model))
