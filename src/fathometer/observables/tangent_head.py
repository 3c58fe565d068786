"""What a head makes of tangent kernels, and the learning-rate factors it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import DomainError, SpecError, nearest
from fathometer.propagation.gram_half_layer import norm_gram, norm_slope
from fathometer.spec import Head, PointwiseNorm, Stem, TokenStem

FloatArray = NDArray[np.float64]


def read_out(
    gram: FloatArray,
    kernels: Mapping[Any, FloatArray],
    head: Head,
    stem: Stem,
    *,
    d_model: int,
    place: Any,
    epsilon: float,
) -> tuple[FloatArray, dict[Any, FloatArray]]:
    """Return the second moments of every token's output, and its tangent kernels by group.

    Args:
        gram: Gram matrix of the last stream, shape ``(n, n)``.
        kernels: Tangent kernels of the last stream by group ``(role, place)``, same shape.
        head: What reads it.
        stem: Whose token table a tied head is.
        d_model: Width of the stream.
        place: Where the head's own groups are, the second entry of their keys.
        epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    """
    tokens, slope = gram, np.ones(gram.shape)
    if head.norm is not None:
        tokens = norm_gram(head.norm, gram, epsilon=epsilon)
        slope = norm_slope(head.norm, gram, epsilon=epsilon)
    weight = head.multiplier**2
    scale = weight * head.scale**2
    if head.tied and isinstance(stem, TokenStem):
        weight = weight * d_model
        scale = weight * stem.token**2
    groups = {group: np.asarray(scale * slope * kernel) for group, kernel in kernels.items()}
    if head.tied:
        groups["token_embedding", place] = np.asarray(groups["token_embedding", place] + weight * tokens)
    else:
        groups["head", place] = np.asarray(weight * tokens)
    groups["head_bias", place] = np.ones(tokens.shape)
    if head.norm is not None and not isinstance(head.norm, PointwiseNorm):
        groups["norm_gain", place] = np.asarray(scale * norm_gram(replace(head.norm, gain=1.0), gram, epsilon=epsilon))
        groups["norm_bias", place] = np.full(tokens.shape, scale)
    return np.asarray(scale * tokens), groups


def check_factors(rates: Mapping[str, float], known: tuple[str, ...]) -> None:
    """Refuse learning-rate factors of unknown roles, or that are negative or not finite."""
    for role, rate in rates.items():
        if role not in known:
            raise SpecError(f"there is no parameter role {role!r}{nearest(role, known)}")
        if not (np.isfinite(rate) and rate >= 0):
            raise DomainError(f"the learning-rate factor of {role!r} must be finite and >= 0; got {rate!r}", value=rate)


def check_epsilon(epsilon: float) -> None:
    """Refuse an epsilon of norms that is negative or not finite."""
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise DomainError(f"norm_epsilon must be finite and >= 0; got {epsilon!r}", value=epsilon)
