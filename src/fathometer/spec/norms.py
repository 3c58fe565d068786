"""Norms as data: what stands between the residual stream and a branch.

A slot without a norm holds ``None``. ``gain`` and ``offset`` are the affine part shared by all features; when read
off a model, ``gain`` is the root mean square over features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fathometer.spec.arrays import Scale, checked
from fathometer.spec.pointwise import Pointwise


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Subtract the feature mean and divide by the feature standard deviation."""

    gain: Scale = 1.0
    kind: Literal["layer_norm"] = "layer_norm"

    def __post_init__(self) -> None:
        checked(self, "gain")


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Divide by the root mean square over features."""

    gain: Scale = 1.0
    kind: Literal["rms_norm"] = "rms_norm"

    def __post_init__(self) -> None:
        checked(self, "gain")


@dataclass(frozen=True, kw_only=True)
class DyT:
    """Dynamic tanh, ``gain * tanh(alpha * x)``."""

    alpha: Scale
    gain: Scale = 1.0
    kind: Literal["dyt"] = "dyt"

    def __post_init__(self) -> None:
        checked(self, "alpha", strict=True)
        checked(self, "gain")


@dataclass(frozen=True, kw_only=True)
class Derf:
    """Dynamic error function, ``gain * erf(alpha * x + shift)``."""

    alpha: Scale
    shift: Scale = 0.0
    gain: Scale = 1.0
    kind: Literal["derf"] = "derf"

    def __post_init__(self) -> None:
        checked(self, "alpha", strict=True)
        checked(self, "shift", low=None)
        checked(self, "gain")


@dataclass(frozen=True, kw_only=True)
class PointwiseNorm:
    """A user's pointwise function in place of a norm. Lives in Python only: it has no file form."""

    function: Pointwise
    kind: Literal["pointwise"] = "pointwise"


Norm: TypeAlias = LayerNorm | RMSNorm | DyT | Derf | PointwiseNorm
