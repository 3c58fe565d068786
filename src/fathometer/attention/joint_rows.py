r"""Averages over all pairs of softmax rows of arbitrary tokens: exact by quadrature, or sampled over heads.

Scores of one head are Gaussian with :math:`\mathrm{Cov}(s_{ac}, s_{bd}) = \sigma_{QK}^2 C_{ab} C_{cd}`. With the
softmax Jacobian :math:`J_a = \mathrm{diag}(A_a) - A_a A_a^T` and the tokens' Gram matrix H, attention acts by

.. math::
    S_1[M]_{ab} &= \sum_{cd} \mathbb E[A_{ac} A_{bd}]\, M_{cd}, \qquad
    S_2[M]_{ab} = \sum_{cd} \mathbb E[(J_a H J_b)_{cd}]\, M_{cd}, \\
    (J_a H J_b)_{cd} &= A_{ac} A_{bd} \bigl[H_{cd} - (A_a H)_d - (H A_b)_c + A_a H A_b\bigr],

c over the keys of a and d over those of b, each in the sample of its query. S1 carries tokens and values, S2 the
gradients through the scores. Both are kept as one small matrix for every pair of queries.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.64-1.65 and 1.153-1.163; the four terms, the
quadrature and the samplers are derived in the documentation.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.mixing import Mixing, Visibility
from fathometer.errors import NotCoveredError

FloatArray = NDArray[np.float64]


class PairContraction:
    """The linear map ``M -> sum_cd weights_abcd M_cd``, c a key of a's sample and d one of b's.

    Args:
        weights: Shape ``(n_samples, T, n_samples, T, T, T)``, indexed sample and position of a, of b, then c and d.
    """

    def __init__(self, weights: FloatArray) -> None:
        self.weights = weights

    def forward(self, gram: FloatArray) -> FloatArray:
        """Apply the map to matrices of shape ``(..., n, n)``."""
        return self._contract("struij,...sirj->...stru", gram)

    def backward(self, gram: FloatArray) -> FloatArray:
        """Apply the adjoint."""
        return self._contract("struij,...stru->...sirj", gram)

    def _contract(self, subscripts: str, gram: FloatArray) -> FloatArray:
        samples, length = self.weights.shape[:2]
        blocks = gram.reshape(*gram.shape[:-2], samples, length, samples, length)
        return np.asarray(np.einsum(subscripts, self.weights, blocks, optimize=True)).reshape(gram.shape)


class ScoreResponse(Protocol):
    """What a path through the scores offers, whoever averages the rows.

    Attributes:
        response: The factor of the query path, elementwise; shape ``(..., n, n)``.
    """

    response: FloatArray

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the tokens to that of the output."""
        ...

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Apply the adjoint: map gradients at the output to gradients at the tokens."""
        ...


class JointScorePath:
    """Gradients through the scores, per unit ``sigma_OV^2 sigma_QK^2``; the interface of :class:`ScorePath`.

    Attributes:
        response: The query path, ``S2[C]``; shape ``(n, n)``.
        keys: The key path, ``M -> C o S2[M]``.
    """

    def __init__(self, response: FloatArray, keys: PairContraction) -> None:
        self.response = response
        self.keys = keys

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the tokens to that of the output."""
        return np.asarray(tangent * self.response + self.keys.forward(tangent))

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Apply the adjoint: map gradients at the output to gradients at the tokens."""
        return np.asarray(gradient * self.response + self.keys.backward(gradient))


class JointAverages(NamedTuple):
    """What one attention layer does to Gram matrices.

    Attributes:
        mixing: S1.
        path: The gradient through the scores.
        entropy: Mean entropy of every query's row, nats; shape ``(n,)``.
        participation: ``E sum_c A_ac^2`` of every query; shape ``(n,)``.
    """

    mixing: Mixing
    path: ScoreResponse
    entropy: FloatArray
    participation: FloatArray


@runtime_checkable
class JointRows(Protocol):
    """A way of averaging over all pairs of rows at once, in place of a closure on full Gram matrices."""

    @property
    def name(self) -> str:
        """The name written into results."""
        ...

    def average(self, visible: Visibility, values: FloatArray, scores: FloatArray, coupling: float) -> JointAverages:
        """Return the averages of one layer.

        Args:
            visible: Which keys each query sees.
            values: Gram matrix H of the tokens, shape ``(n, n)``.
            scores: Gram matrix C of the tokens as they enter the scores, same shape.
            coupling: Score variance per unit of overlaps, ``sigma_QK^2``.
        """
        ...


def each_query_pair(matrix: FloatArray, weights: FloatArray) -> FloatArray:
    """Multiply the weights of every pair of queries by that pair's entry of a matrix."""
    return np.asarray(matrix.reshape(weights.shape[:4])[..., None, None] * weights)


def sample_layout(visible: Visibility, scores: FloatArray) -> tuple[int, int]:
    """Return the number of samples and of tokens in each."""
    if scores.ndim != 2:
        raise NotCoveredError(
            f"joint averages take one Gram matrix over all samples; got an array of shape {scores.shape}"
        )
    return visible.n_samples, len(scores) // visible.n_samples
