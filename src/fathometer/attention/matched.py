r"""Any closure on a full Gram matrix, by annealed weights at a matched inverse temperature.

Annealed weights :math:`e^{\beta_{ab} C_{cd}}` are right to first order in the scores, and know about unequal tokens; a
closure is right at any score variance, and knows exchangeable tokens only. Both hold at once if every pair of queries
gets the :math:`\beta'_{ab}` at which annealed weights on exchangeable keys have the overlap the closure states,

.. math:: \frac{\beta'_{ab}}{\beta_{ab}} = \frac1{x_{ab}} \ln \frac{(n-1)\, Y_{ab}}{1 - Y_{ab}}, \qquad
          x_{ab} = \beta_{ab} \times \text{spread of the keys seen by both},

with Y the closure's average at the variances and the correlation of the two rows' scores. On exchangeable tokens this
is the closure itself, for closures of a finite number of tokens. The gradient through the scores is that of uniform
weights times the closure's factor for the pair of queries. Under a causal mask n is the larger of the two numbers of
keys; closures are evaluated at powers of two and interpolated in ln n, which errs by up to 4 % of the score path at
variances above 6. Derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.closure import Closure
from fathometer.attention.mixing import Visibility

FloatArray = NDArray[np.float64]

_SMALL = 1e-3  # correlation below which the ratio of temperatures is taken there
_MARGIN = 1e-15


@dataclass(frozen=True)
class Matched:
    """What the mixing and the score path of one layer take from a closure.

    Attributes:
        beta_factor: ``beta' / beta`` for every pair of queries, shape ``(..., n, n)``.
        score: Factor on the score path of uniform weights, same shape.
    """

    beta_factor: FloatArray
    score: FloatArray


def matched(closure: Closure, visible: Visibility, scores: FloatArray, coupling: Any) -> Matched:
    """Compare a closure with annealed and uniform weights on one layer's tokens.

    Args:
        closure: The closure.
        visible: Which keys each query sees.
        scores: Gram matrix of the tokens as they enter the scores, shape ``(..., n, n)``.
        coupling: Score variance per unit of overlaps.
    Returns:
        The factors. Cost: one evaluation of the closure for every pair of queries; under a causal mask, at every power
        of two up to the number of tokens.
    """
    n = visible.counts
    diagonal = np.diagonal(scores, axis1=-2, axis2=-1)
    spread = _common_spread(visible, scores)
    own = np.maximum(coupling * diagonal * np.diagonal(spread, axis1=-2, axis2=-1), 0.0)
    variance = np.sqrt(own[..., :, None] * own[..., None, :])
    covariance = coupling * scores * spread
    correlation = np.clip(covariance / np.maximum(variance, 1e-300), -1.0, 1.0)
    correlation = np.where(np.abs(correlation) < _SMALL, _SMALL, correlation)
    if visible.causal:
        beta_factor, score = _between_counts(closure, n, variance, correlation)
    else:
        beta_factor, score = _factors(closure, float(n[0]), variance, correlation)
    rows = closure.statistics(n, own, 0.0 * own, entropy=False)
    index = np.arange(len(n))
    beta_factor[..., index, index] = _beta_factor(rows.y2, n, own)
    score[..., index, index] = np.where(n > 1, rows.score * n**2 / np.maximum(n - 1, 1.0), 1.0)
    # A row of one key is one whatever its score, and tilts no other row.
    beta_factor[..., (n[:, None] == 1) | (n[None, :] == 1)] = 0.0
    return Matched(beta_factor, score)


def matched_to_memory(closure: Closure, n_keys: int, own: FloatArray, correlation: FloatArray) -> Matched:
    """Compare a closure with annealed and uniform weights on a memory whose tokens every query sees.

    Args:
        closure: The closure.
        n_keys: Number of the memory's tokens.
        own: Score variance of every query, shape ``(..., n)``.
        correlation: Correlation of the scores of two queries at one key, shape ``(..., n, n)``.
    Returns:
        The factors. Cost: one evaluation of the closure for every pair of queries.
    """
    n = float(n_keys)
    variance = np.sqrt(own[..., :, None] * own[..., None, :])
    correlation = np.where(np.abs(correlation) < _SMALL, _SMALL, np.clip(correlation, -1.0, 1.0))
    beta_factor, score = _factors(closure, n, variance, correlation)
    rows = closure.statistics(n, own, 0.0 * own, entropy=False)
    index = np.arange(own.shape[-1])
    beta_factor[..., index, index] = _beta_factor(rows.y2, n, own)
    score[..., index, index] = rows.score * n**2 / (n - 1) if n_keys > 1 else 1.0
    return Matched(beta_factor, score)


def _between_counts(
    closure: Closure, n: FloatArray, variance: FloatArray, correlation: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the factors under a causal mask, interpolated in log n between powers of two."""
    later, earlier = np.tril_indices(len(n))  # the factors are symmetric in the two queries
    octave = np.log2(np.maximum(np.maximum(n[later], n[earlier]), 2.0))
    out = np.zeros((2, *variance.shape))
    for power in range(1, int(np.ceil(octave.max())) + 1):
        share = np.maximum(1 - np.abs(octave - power), 0.0)
        kept = share > 0
        a, b = later[kept], earlier[kept]
        found = _factors(closure, 2.0**power, variance[..., a, b], correlation[..., a, b])
        for total, factor in zip(out, found, strict=True):
            total[..., a, b] += share[kept] * factor
    for total in out:
        total[..., earlier, later] = total[..., later, earlier]
    return out[0], out[1]


def _factors(
    closure: Closure, n: float, variance: FloatArray, correlation: FloatArray
) -> tuple[FloatArray, FloatArray]:
    found = closure.statistics(n, variance, correlation, entropy=False)
    score = np.broadcast_to(found.score_pair * n**2 / max(n - 1, 1), variance.shape).copy()
    return _beta_factor(found.y12, n, variance * correlation), score


def _beta_factor(overlap: Any, n: Any, covariance: FloatArray) -> FloatArray:
    """Return the factor on the exponent at which annealed weights on n equal keys have an overlap."""
    uniform = 1 / np.maximum(n, 1)  # in place of the zero of a limit n -> infinity
    inside = np.clip(np.where(overlap > 0, overlap, uniform), _MARGIN, 1 - _MARGIN)
    exponent = np.log(np.maximum(n - 1, _MARGIN) * inside / (1 - inside))
    plain = (np.abs(covariance) < 1e-9) | (n == 1)
    return np.asarray(np.where(plain, 1.0, exponent / np.where(plain, 1.0, covariance)))


def _common_spread(visible: Visibility, scores: FloatArray) -> FloatArray:
    """Return, for every pair of queries, the unbiased spread ``mean C_cc - mean C_cd`` over the keys both see.

    Keys of different samples are paired by their positions.
    """
    samples = visible.n_samples
    n = visible.counts[: len(visible.counts) // samples]
    aligned = _same_position(scores, samples)  # of two samples and a position
    square = np.cumsum(aligned, axis=-1) if visible.causal else aligned.sum(axis=-1, keepdims=True)
    spread = square / n - _same_position(visible.key_pairs(scores), samples) / n**2
    own = np.eye(samples, dtype=bool)[..., None]
    spread = np.where(own, np.maximum(spread, 0.0), spread) * n / np.maximum(n - 1, 1)
    positions = np.arange(len(n))
    fewer = np.minimum(positions[:, None], positions[None, :])
    return np.asarray(np.swapaxes(spread[..., fewer], -3, -2).reshape(scores.shape))


def _same_position(matrix: FloatArray, samples: int) -> FloatArray:
    """Return the entries of tokens at equal positions of two samples; shape ``(..., samples, samples, length)``."""
    blocks = matrix.reshape(*matrix.shape[:-2], samples, matrix.shape[-1] // samples, samples, -1)
    return np.diagonal(blocks, axis1=-3, axis2=-1)
