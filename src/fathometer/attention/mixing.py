r"""Averaged attention acting on a full Gram matrix of tokens.

For weights drawn independently of the values, attention maps the tokens' Gram matrix H to

.. math:: \bigl(\mathcal M H\bigr)_{ab} = \sum_{cd} \mathbb E[A_{ac} A_{bd}]\, H_{cd}

and gradients back by the adjoint. A mixing is that linear map for one layer. Visible keys are all tokens, or the
prefix b <= a; then sums over visible keys are cumulative sums and every mixing costs O(n^2) memory and O(K n^2) time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import NotCoveredError

FloatArray = NDArray[np.float64]

_DIGITS = 22.0  # the interpolation errs by less than e^-22, 3e-10


def diagonal_part(gram: FloatArray) -> FloatArray:
    """Return the matrix with everything off the diagonal set to zero; shape ``(..., n, n)``."""
    return np.asarray(gram * np.eye(gram.shape[-1]))


class Mixing(Protocol):
    """The pair (map, adjoint); arrays of shape ``(..., n_tokens, n_tokens)``."""

    def forward(self, gram: FloatArray) -> FloatArray:
        """Return the Gram matrix of the attention-averaged tokens."""
        ...

    def backward(self, gram: FloatArray) -> FloatArray:
        """Return the adjoint of :meth:`forward` applied to a gradient Gram matrix."""
        ...


class Visibility:
    """Sums over visible keys and over the queries that see a key, for full or causal attention.

    Args:
        n_tokens: Number of tokens, of all samples together.
        causal: Whether a token sees only itself and those before it.
        n_samples: Number of samples of equal length, one after the other; a token sees its own sample only.
    """

    def __init__(self, n_tokens: int, *, causal: bool, n_samples: int = 1) -> None:
        self.causal, self.n_samples = causal, n_samples
        length = n_tokens // n_samples
        self.counts: FloatArray = np.tile(
            np.arange(1.0, length + 1) if causal else np.full(length, float(length)), n_samples
        )
        self.pairs: FloatArray = np.outer(self.counts, self.counts)

    def over_keys(self, x: FloatArray, axis: int) -> FloatArray:
        """Replace the key index on ``axis`` by the query index, summing over the keys that query sees."""
        return self._in_samples(x, axis, self._key_sums)

    def over_queries(self, x: FloatArray, axis: int) -> FloatArray:
        """Replace the query index on ``axis`` by the key index, summing over the queries that see that key."""
        return self._in_samples(x, axis, self._query_sums)

    def _key_sums(self, x: FloatArray, axis: int) -> FloatArray:
        if self.causal:
            return np.cumsum(x, axis=axis)
        return np.broadcast_to(x.sum(axis=axis, keepdims=True), x.shape)

    def _query_sums(self, x: FloatArray, axis: int) -> FloatArray:
        if self.causal:
            return np.flip(np.cumsum(np.flip(x, axis), axis=axis), axis)
        return np.broadcast_to(x.sum(axis=axis, keepdims=True), x.shape)

    def _in_samples(self, x: FloatArray, axis: int, sums: Callable[[FloatArray, int], FloatArray]) -> FloatArray:
        if self.n_samples == 1:
            return sums(x, axis)
        last = np.moveaxis(x, axis, -1)
        split = last.reshape(*last.shape[:-1], self.n_samples, -1)
        return np.moveaxis(sums(split, -1).reshape(last.shape), -1, axis)

    def key_pairs(self, x: FloatArray) -> FloatArray:
        """Sum over the pairs of keys visible to each pair of queries."""
        return self.over_keys(self.over_keys(x, -2), -1)

    def query_pairs(self, x: FloatArray) -> FloatArray:
        """Sum over the pairs of queries that see each pair of keys."""
        return self.over_queries(self.over_queries(x, -2), -1)


class WholeMemory:
    """Sums over the tokens of a memory that every query sees: one number for all pairs of queries, and back."""

    def key_pairs(self, x: FloatArray) -> FloatArray:
        """Sum over pairs of the memory's tokens; shape ``(..., 1, 1)``."""
        return np.asarray(x.sum(axis=(-2, -1), keepdims=True))

    def query_pairs(self, x: FloatArray) -> FloatArray:
        """Sum over pairs of queries; shape ``(..., 1, 1)``."""
        return np.asarray(x.sum(axis=(-2, -1), keepdims=True))


class FixedMixing:
    """A given row-stochastic attention matrix, independent of the tokens. Costs two n x n products."""

    def __init__(self, attention: FloatArray) -> None:
        self.attention = attention

    def row_statistics(self, shape: tuple[int, ...]) -> dict[str, FloatArray]:
        """Return entropy (nats), inverse participation and number of keys of every row, broadcast to ``shape``."""
        weights = self.attention
        rows = {
            "attention_entropy": -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=-1),
            "inverse_participation": np.sum(weights**2, axis=-1),
            "visible_keys": np.count_nonzero(weights, axis=-1).astype(np.float64),
        }
        return {name: np.broadcast_to(row, shape) for name, row in rows.items()}

    def forward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        return np.asarray(self.attention @ gram @ self.attention.T)

    def backward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        return np.asarray(self.attention.T @ gram @ self.attention)


class UniformMixing:
    """Plain averages over visible tokens: ``A_ab = 1/n``, or ``1/a`` for b <= a when causal."""

    def __init__(self, visible: Visibility) -> None:
        self.visible = visible

    def forward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        return self.visible.key_pairs(gram) / self.visible.pairs

    def backward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        return self.visible.query_pairs(gram / self.visible.pairs)


class AnnealedMixing:
    r"""Softmax attention with numerators and denominators averaged separately.

    .. math:: \mathbb E[A_{ac}A_{bd}] \approx \frac{e^{\beta_{ab} C_{cd}}}{\sum_{c'd'} e^{\beta_{ab} C_{c'd'}}},
              \qquad \beta_{ab} = \sigma_{QK}^2 C_{ab}

    with C the Gram matrix entering the scores, because the scores have covariance ``sigma_QK^2 C_ab C_cd``. Taken
    literally this costs n^4. It is smooth in the scalar ``beta``, so it is evaluated at K Chebyshev nodes of the
    range of beta, where it is a ratio of cumulative sums, and interpolated to ``beta_ab``: O(K n^2). The
    denominator, a sum of exponentials whose exponents differ by at most ``Delta C``, has no zero with ``|Im beta| <
    pi / Delta C``; that fixes the ellipse of convergence, hence the K that brings the error below 1e-9 (tested
    against the literal sum).

    Source: the compact form of Cowsik et al., arXiv:2403.02579; the interpolation is derived here.

    Args:
        visible: Which keys each query sees.
        score_gram: The matrix C, shape ``(..., n, n)``.
        coupling: sigma_QK^2.
        beta_factor: Factor on beta, a number or one for each pair of queries.
        query_gram: The matrix that takes the place of C in beta, where queries are other tokens than keys; shape
            ``(..., m, m)`` for m queries that all see the :class:`WholeMemory`.
    Raises:
        NotCoveredError: if the exponents spread by more than 60, far outside the range where annealing is valid.
    """

    def __init__(
        self,
        visible: Visibility | WholeMemory,
        score_gram: FloatArray,
        coupling: Any,
        *,
        beta_factor: Any = 1.0,
        query_gram: FloatArray | None = None,
    ) -> None:
        self.visible = visible
        top = np.max(score_gram, axis=(-2, -1), keepdims=True)
        beta = coupling * (score_gram if query_gram is None else query_gram) * beta_factor
        low, high = float(np.min(beta)), float(np.max(beta))
        width = float(np.max(top - np.min(score_gram, axis=(-2, -1), keepdims=True)))
        spread = max(high, -low) * width
        if spread > 60:
            raise NotCoveredError(
                f"attention scores spread over {spread:.0f} nats; the annealed average means nothing there (limit 60)"
            )
        reach = (high - low) / 2 * width / np.pi
        n_nodes = 2 + int(np.ceil(_DIGITS / np.arcsinh(1 / max(reach, 1e-9))))
        nodes = (low + high) / 2 + (high - low) / 2 * np.cos((np.arange(n_nodes) + 0.5) * np.pi / n_nodes)
        shape = (n_nodes,) + (1,) * score_gram.ndim
        self._kernel = np.exp(nodes.reshape(shape) * (score_gram - top))
        self._total = visible.key_pairs(self._kernel)
        self._cardinal = _cardinal_functions(beta, low, high, n_nodes)

    def forward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        ratio = self.visible.key_pairs(self._kernel * gram) / self._total
        return np.asarray(np.sum(self._cardinal * ratio, axis=0))

    def backward(self, gram: FloatArray) -> FloatArray:
        """See :class:`Mixing`."""
        weighted = self.visible.query_pairs(self._cardinal * gram / self._total)
        return np.asarray(np.sum(self._kernel * weighted, axis=0))


def _cardinal_functions(x: FloatArray, low: float, high: float, n_nodes: int) -> FloatArray:
    """Return the Lagrange polynomials of the Chebyshev nodes of [low, high] at ``x``; shape ``(n_nodes, *x.shape)``."""
    if high <= low:
        return np.full((n_nodes, *x.shape), 1 / n_nodes)
    angle = np.arccos(np.clip((2 * x - low - high) / (high - low), -1.0, 1.0))
    orders = np.arange(n_nodes)
    at_nodes = np.cos(np.outer((orders + 0.5) * np.pi / n_nodes, orders))
    at_nodes[:, 0] = 0.5
    at_x = np.cos(orders.reshape((-1,) + (1,) * x.ndim) * angle)
    return np.asarray(np.tensordot(at_nodes * (2 / n_nodes), at_x, axes=1))
