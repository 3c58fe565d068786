r"""Averages over all pairs of softmax rows by drawing heads, with wide heads or narrow ones.

Scores of one head are drawn as :math:`\sigma_{QK} L Z L^T` with :math:`L L^T = C`; for narrow heads as products of
drawn queries and keys, whose own Gram matrices then fluctuate with the rows. Derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.joint_rows import (
    JointAverages,
    JointScorePath,
    PairContraction,
    each_query_pair,
    sample_layout,
)
from fathometer.attention.mixing import Visibility
from fathometer.errors import DomainError, NotCoveredError

FloatArray = NDArray[np.float64]

_DROPPED = 1e-14  # relative eigenvalue of scores that do not vary
_MOST_ENTRIES = 1 << 26  # of one operator, 512 MiB
_BATCH = 1 << 22  # sampled numbers held at a time


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Averages over randomly drawn heads; errors fall as ``1/sqrt(n_heads)``, about 1e-3 at ten thousand.

    Costs ``n_heads n^2 T^2`` multiplications for n tokens in samples of T, and memory ``n^2 T^2``.

    Args:
        n_heads: Number of heads drawn, split evenly over the replicates.
        seed: Of the draw. One layer with the same tokens always gets the same heads.
        d_head: Width of a head; ``None`` for infinitely wide ones, whose scores are exactly Gaussian.
        replicates: Number of independent parts from which errors are estimated.
    """

    n_heads: int
    seed: int = 0
    d_head: int | None = None
    replicates: int = 8
    name: str = "sampled"

    def __post_init__(self) -> None:
        for field, low in (("n_heads", 1), ("replicates", 1), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise DomainError(f"SampledRows.{field} must be an integer of at least {low}; got {value!r}")
        if self.n_heads < self.replicates:
            raise DomainError(f"SampledRows needs a head for each of {self.replicates} replicates; got {self.n_heads}")
        if self.d_head is not None and self.d_head < 1:
            raise DomainError(f"SampledRows.d_head must be positive, or None for wide heads; got {self.d_head!r}")

    def parts(self) -> list[SampledRows]:
        """Return independent samplers, one for each replicate, whose sizes differ by one head at most."""
        each, left = divmod(self.n_heads, self.replicates)
        seeds = np.random.SeedSequence(self.seed).generate_state(self.replicates)
        return [
            SampledRows(n_heads=each + (i < left), seed=int(seed), d_head=self.d_head, replicates=1)
            for i, seed in enumerate(seeds)
        ]

    def average(self, visible: Visibility, values: FloatArray, scores: FloatArray, coupling: float) -> JointAverages:
        """See :class:`JointRows`.

        Raises:
            NotCoveredError: if the operators would not fit into memory; use a closure.
        """
        samples, length = sample_layout(visible, scores)
        if scores.size * length**2 > _MOST_ENTRIES:
            raise NotCoveredError(
                f"sampled attention over {len(scores)} tokens in samples of {length} needs "
                f"{scores.size * length**2:.1g} numbers (at most {_MOST_ENTRIES:.1g}); give a closure in its place"
            )
        sums = _Sums(samples, length, values, scores)
        for heads in self._draw(visible, samples, length, scores, coupling):
            sums.add(*heads)
        return sums.averages(self.n_heads)

    def _draw(
        self, visible: Visibility, samples: int, length: int, scores: FloatArray, coupling: float
    ) -> Iterator[tuple[FloatArray, FloatArray | None, FloatArray | None]]:
        """Yield rows ``(heads, n, T)``, and where heads are narrow the Gram matrices of their queries and keys."""
        rng = np.random.default_rng(self.seed)
        factor = _root(scores)
        n, rank = factor.shape
        hidden = np.arange(length) >= visible.counts[:, None] if visible.causal else np.zeros((n, length), dtype=bool)
        own = np.arange(n)[:, None] // length * length + np.arange(length)  # the keys of every query's sample
        size = max(1, _BATCH // (n * n * length))
        for first in range(0, self.n_heads, size):
            heads = min(size, self.n_heads - first)
            queries = keys = None
            if self.d_head is None:
                full = factor @ rng.standard_normal((heads, rank, rank)) @ factor.T
            else:
                q, k = (factor @ rng.standard_normal((heads, rank, self.d_head)) for _ in range(2))
                full = q @ np.swapaxes(k, -1, -2) / sqrt(self.d_head)
                queries, keys = (x @ np.swapaxes(x, -1, -2) / self.d_head for x in (q, k))
            logits = sqrt(coupling) * np.take_along_axis(full, own[None], axis=-1)
            logits = np.where(hidden, -np.inf, logits)
            rows = np.exp(logits - logits.max(axis=-1, keepdims=True))
            yield rows / rows.sum(axis=-1, keepdims=True), queries, keys


class _Sums:
    """Running sums over heads of everything :class:`JointAverages` holds."""

    def __init__(self, samples: int, length: int, values: FloatArray, scores: FloatArray) -> None:
        self._shape = (samples, length)
        self._values, self._scores = values, scores
        n = samples * length
        self._weights, self._responses = np.zeros((2, n, length, n, length))  # a, c, b, d
        self._query = np.zeros((n, n))
        self._entropy, self._participation = np.zeros((2, n))
        self._narrow = False

    def add(self, rows: FloatArray, queries: FloatArray | None, keys: FloatArray | None) -> None:
        """Add heads: rows of shape ``(heads, n, T)``, Gram matrices ``(heads, n, n)`` of narrow queries and keys."""
        heads, n, length = rows.shape
        flat = rows.reshape(heads, n * length)
        self._weights += (flat.T @ flat).reshape(self._weights.shape)
        self._entropy -= np.einsum("sac,sac->a", rows, np.log(np.where(rows > 0, rows, 1.0)))
        self._participation += np.einsum("sac,sac->a", rows, rows)
        reach = self._over_keys(rows, self._values)  # (A_a H)_e for every query a and every token e
        both = self._over_keys(rows, np.swapaxes(reach, -1, -2))  # A_b H A_a
        left = rows.transpose(1, 2, 0)  # a, c, head
        per_query = reach.transpose(1, 0, 2).reshape(n, heads, *self._shape)  # a, head, sample and position of d
        tilt = np.repeat(per_query, length, axis=2).reshape(n, heads, n, length)  # the same at b's sample
        pair = both.transpose(1, 0, 2)[..., None]
        right = rows[None] * (0.5 * pair - tilt)  # a, head, b, d
        if queries is not None and keys is not None:
            self._narrow = True
            weight = queries.transpose(1, 0, 2)[..., None]
            right = right * weight
            plain = (left @ (rows[None] * weight).reshape(n, heads, -1)).reshape(self._weights.shape)
            self._responses += plain * self._value_blocks()
            self._query += self._four_terms(rows, reach, both, keys)
        crossed = (left @ right.reshape(n, heads, -1)).reshape(self._weights.shape)
        self._responses += crossed + crossed.transpose(2, 3, 0, 1)

    def averages(self, n_heads: int) -> JointAverages:
        """Return the averages over all heads added."""
        shape = (*self._shape, *self._shape, self._shape[1], self._shape[1])
        weights = self._weights.transpose(0, 2, 1, 3).reshape(shape) / n_heads
        responses = self._responses
        if not self._narrow:
            responses = responses + self._weights * self._value_blocks()
        keys = PairContraction(responses.transpose(0, 2, 1, 3).reshape(shape) / n_heads)
        query = self._query / n_heads
        if not self._narrow:
            query = keys.forward(self._scores)
            keys = PairContraction(each_query_pair(self._scores, keys.weights))
        path = JointScorePath(query, keys)
        return JointAverages(PairContraction(weights), path, self._entropy / n_heads, self._participation / n_heads)

    def _over_keys(self, rows: FloatArray, matrix: FloatArray) -> FloatArray:
        """Return ``sum_c A_ac matrix_ce`` over the keys of a's sample; shape ``(heads, n, n)``."""
        samples, length = self._shape
        split = matrix.reshape(*matrix.shape[:-2], samples, length, -1)
        return np.asarray((rows.reshape(-1, samples, length, length) @ split).reshape(len(rows), samples * length, -1))

    def _value_blocks(self) -> FloatArray:
        """Return H at the keys c and d of queries a and b, shaped to multiply ``(a, c, b, d)``."""
        samples, length = self._shape
        blocks = self._values.reshape(samples, 1, length, samples, 1, length)
        full = np.broadcast_to(blocks, (samples, length, length, samples, length, length))
        return full.reshape(self._weights.shape)

    def _four_terms(self, rows: FloatArray, reach: FloatArray, both: FloatArray, matrix: FloatArray) -> FloatArray:
        """Return the sum over heads of ``sum_cd (J_a H J_b)_cd matrix_cd`` for matrices that differ between heads."""
        direct = self._over_keys(rows, np.swapaxes(self._over_keys(rows, self._values * matrix), -1, -2))
        seen = self._over_keys(rows, matrix)
        crossed = self._over_keys(rows, np.swapaxes(reach * seen, -1, -2))
        total = direct - crossed - np.swapaxes(crossed, -1, -2)
        total = total + both * self._over_keys(rows, np.swapaxes(seen, -1, -2))
        return np.asarray(total.sum(axis=0))


def _root(gram: FloatArray) -> FloatArray:
    """Return L with ``L L^T = gram``, without the directions in which the tokens do not extend."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _DROPPED * values[-1]
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))
