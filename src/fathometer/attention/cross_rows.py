r"""Averaged attention of one set of tokens to another, on full Gram matrices.

With the Gram matrices F of the queries' tokens and M of the memory's, scores have covariance
:math:`\sigma_{QK}^2 F_{ab} M_{cd}`, and attention maps Gram matrices over the memory to Gram matrices over the queries,

.. math:: (\mathcal M H)_{ab} = \sum_{cd} \mathbb E[A_{ac} A_{bd}]\, H_{cd} .

Averages are annealed, at the inverse temperature that makes them those of the closure for a memory of exchangeable
tokens. Gradients through the scores are those of uniform weights times the closure's factor.

Source: E. Dinan, S. Yaida and S. Zhang, arXiv:2304.02034, for the covariance and the forward map; the rest is derived
in the documentation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.closure import Annealed, Closure, Uniform
from fathometer.attention.matched import matched_to_memory
from fathometer.attention.mixing import AnnealedMixing, WholeMemory, diagonal_part

FloatArray = NDArray[np.float64]

_SMALLEST = 1e-300  # in place of the size of tokens of zeros, whose scores are all zero


class CrossRows:
    """The maps of one layer, per unit ``sigma_OV^2``. Costs O(K n^2 + K N^2) for n queries and N keys.

    Args:
        queries: Gram matrix F of the tokens that ask, shape ``(..., n, n)``.
        memory: Gram matrix M of the tokens that are read, shape ``(..., N, N)``.
        coupling: sigma_QK^2.
        closure: How the softmax is averaged.

    Attributes:
        variance: Variance of each query's scores less the part all keys share, shape ``(..., n)``.
    """

    def __init__(self, queries: FloatArray, memory: FloatArray, coupling: float, closure: Closure) -> None:
        self._queries, self._memory, self._coupling = queries, memory, coupling
        self._n_keys = memory.shape[-1]
        size = np.diagonal(queries, axis1=-2, axis2=-1)
        self.variance: FloatArray = coupling * size * self._spread()[..., None]
        self._score: Any = 0.0
        beta_factor: Any = 0.0
        if not isinstance(closure, Uniform):
            root = np.sqrt(np.maximum(size, _SMALLEST))
            correlation = queries / (root[..., :, None] * root[..., None, :])
            factors = matched_to_memory(closure, self._n_keys, self.variance, correlation)
            beta_factor = 1.0 if isinstance(closure, Annealed) else factors.beta_factor
            self._score = 0.0 if isinstance(closure, Annealed) and not closure.score_path else factors.score
        self._mixing = AnnealedMixing(WholeMemory(), memory, coupling, beta_factor=beta_factor, query_gram=queries)

    def forward(self, gram: FloatArray, *, dropout_variance: Any = 0.0) -> FloatArray:
        """Return the Gram matrix over queries of averages of tokens with Gram matrix ``gram`` over the memory.

        Args:
            gram: Shape ``(..., N, N)``.
            dropout_variance: Variance ``p / (1 - p)`` that dropout gives attention weights, relative to their squares.
        """
        mixed = self._mixing.forward(gram)
        if np.any(dropout_variance):
            mixed = mixed + dropout_variance * diagonal_part(self._mixing.forward(diagonal_part(gram)))
        return mixed

    def to_queries(self, gradient: FloatArray, *, dropout_variance: Any = 0.0) -> FloatArray:
        """Map the gradient Gram matrix at the attention output to that at the tokens that ask, ``(..., n, n)``."""
        own = gradient * self._response(self._memory)
        if np.any(dropout_variance):
            own = own + dropout_variance * diagonal_part(gradient) * self._response(diagonal_part(self._memory))
        return np.asarray(self._coupling * self._score * own)

    def to_memory(self, gradient: FloatArray, *, dropout_variance: Any = 0.0) -> FloatArray:
        """Map the gradient Gram matrix at the attention output to that at the memory; shape ``(..., N, N)``."""
        total = self._to_keys(gradient, self._memory) + self._mixing.backward(gradient)
        if np.any(dropout_variance):
            noise = diagonal_part(gradient)
            keys = self._to_keys(noise, diagonal_part(self._memory))
            total = total + dropout_variance * (keys + diagonal_part(self._mixing.backward(noise)))
        return total

    def from_memory(self, tangent: FloatArray, *, dropout_variance: Any = 0.0) -> FloatArray:
        """Map the Gram matrix of a perturbation of the memory to that of the output: the adjoint of :meth:`to_memory`.

        Args:
            tangent: Shape ``(..., N, N)``.
            dropout_variance: As for :meth:`forward`.
        Returns:
            Shape ``(..., n, n)``: what goes through the values and, by the scores, through the keys.
        """
        total = self.forward(tangent, dropout_variance=dropout_variance)
        total = total + self._coupling * self._queries * self.score_response(tangent)
        if np.any(dropout_variance):
            noise = self._score_response(diagonal_part(self._memory), tangent)
            total = total + dropout_variance * diagonal_part(self._coupling * self._queries * noise)
        return np.asarray(total)

    def score_response(self, gram: FloatArray) -> FloatArray:
        """Return ``sum_cd E[(J_a M J_b)_cd] gram_cd`` with the softmax Jacobians J of two queries.

        Args:
            gram: Shape ``(..., N, N)``: the memory's Gram matrix where queries are perturbed, that of the perturbation
                where keys are.
        Returns:
            Shape ``(..., n, n)``; zeros where the closure has no path through the scores.
        """
        return self._score_response(self._memory, gram)

    def row_overlap(self) -> FloatArray:
        """Return, for every query, the mean of ``sum_c A_ac A_bc`` over the other queries; shape ``(..., n)``."""
        n = self._queries.shape[-1]
        if n == 1:
            return np.ones(self._queries.shape[:-1])
        overlap = self._mixing.forward(np.eye(self._n_keys))
        return np.asarray((overlap.sum(axis=-1) - np.diagonal(overlap, axis1=-2, axis2=-1)) / (n - 1))

    def _spread(self) -> FloatArray:
        """Return the unbiased spread ``mean M_cc - mean M_cd`` of the memory's tokens."""
        n = self._n_keys
        square = np.trace(self._memory, axis1=-2, axis2=-1) / n
        mean = self._memory.sum(axis=(-2, -1)) / n**2
        return np.asarray(np.maximum(square - mean, 0.0) * n / max(n - 1, 1))

    def _response(self, values: FloatArray) -> FloatArray:
        """Return ``sum_cd D_cd M_cd / N^2`` with D the doubly centred Gram matrix of the values."""
        return np.asarray(np.sum(_centred(values) * self._memory, axis=(-2, -1), keepdims=True) / self._n_keys**2)

    def _score_response(self, values: FloatArray, gram: FloatArray) -> FloatArray:
        seen = np.sum(_centred(values) * gram, axis=(-2, -1), keepdims=True) / self._n_keys**2
        return np.asarray(self._score * seen * np.ones(self._queries.shape))

    def _to_keys(self, gradient: FloatArray, values: FloatArray) -> FloatArray:
        seen = np.sum(self._score * gradient * self._queries, axis=(-2, -1), keepdims=True)
        return np.asarray(self._coupling * seen / self._n_keys**2 * _centred(values))


def _centred(gram: FloatArray) -> FloatArray:
    rows = gram - gram.mean(axis=-1, keepdims=True)
    return np.asarray(rows - rows.mean(axis=-2, keepdims=True))
