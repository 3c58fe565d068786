r"""Exact averages over all pairs of softmax rows of a few tokens.

A softmax sees its scores only relative to each other. Those of rows a and b, less the score of each row's first key,
are Gaussian with covariance :math:`\sigma_{QK}^2 C_{ab}(C_{cd} - C_{c0} - C_{0d} + C_{00})`. On the principal axes of
that matrix the trapezoid rule converges exponentially; its step follows from the distance of the softmax's poles, pi
over the spread of an axis. Derived in the documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, pi, prod, sqrt

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
from fathometer.errors import NotCoveredError

FloatArray = NDArray[np.float64]

_REACH = 8.0  # standard deviations
_STEP = 2 * pi / sqrt(78.0)  # where the Gaussian limits the trapezoid rule: e^-39 times the strength of the poles
_STRIP = 2 * pi * pi / 38.0  # where the softmax does, for a spread of one: e^-38
_DROPPED = 1e-14  # relative eigenvalue of scores that do not vary
_SLAB = 1 << 18  # grid points held at a time
_MOST_POINTS = 1 << 26  # of one pair of rows, about ten seconds


@dataclass(frozen=True)
class QuadratureRows:
    """Exact averages by the trapezoid rule over the score differences of two rows, to about 1e-11.

    A softmax does not see what its scores share, so a pair of rows with k and l keys has ``k + l - 2`` dimensions,
    less those along which the scores do not vary; a row with itself has ``k - 1``. About 30 points a dimension, more
    at large score variance: 10 ms a pair of queries for three bidirectional tokens, 0.1 s for four causal ones.
    """

    name: str = "quadrature"

    def average(self, visible: Visibility, values: FloatArray, scores: FloatArray, coupling: float) -> JointAverages:
        """See :class:`JointRows`. Every pair of queries has a grid of its own, of up to millions of points.

        Raises:
            NotCoveredError: if a grid would be too large; sample instead, or use a closure.
        """
        samples, length = sample_layout(visible, scores)
        n = samples * length
        weights, responses = np.zeros((2, n, n, length, length))
        entropy = np.zeros(n)
        keys = _keys(visible, samples, length)
        for a, b in itertools.combinations_with_replacement(range(n), 2):
            logits = _ScoreDifferences(scores, coupling, (a, keys[a]), (b, keys[b]))
            mean, response, rows_entropy = logits.averages(values[keys[a], keys[b]])
            seen = (slice(mean.shape[0]), slice(mean.shape[1]))
            weights[a, b][seen], responses[a, b][seen] = mean, response
            weights[b, a], responses[b, a] = weights[a, b].T, responses[a, b].T
            if a == b:
                entropy[a] = rows_entropy
        shape = (samples, length, samples, length, length, length)
        plain = PairContraction(responses.reshape(shape))
        path = JointScorePath(plain.forward(scores), PairContraction(each_query_pair(scores, plain.weights)))
        participation = np.einsum("aacc->a", weights)
        return JointAverages(PairContraction(weights.reshape(shape)), path, entropy, participation)


def _keys(visible: Visibility, samples: int, length: int) -> list[slice]:
    """Return the tokens every query sees."""
    starts = np.repeat(np.arange(samples) * length, length)
    return [slice(int(start), int(start + count)) for start, count in zip(starts, visible.counts, strict=True)]


class _ScoreDifferences:
    """Scores of one row, or of two, relative to those of their first keys, on a grid along their principal axes."""

    def __init__(self, scores: FloatArray, coupling: float, *rows: tuple[int, slice]) -> None:
        distinct = rows[:1] if rows[0] == rows[1] else rows
        covariance = np.block(
            [
                [coupling * scores[a, b] * _differences(scores[seen_a, seen_b]) for b, seen_b in distinct]
                for a, seen_a in distinct
            ]
        )
        values, vectors = np.linalg.eigh(covariance) if covariance.size else (np.zeros(0), covariance)
        kept = values > _DROPPED * max(float(values[-1]), 1e-300) if covariance.size else values > 0
        self._factor = vectors[:, kept] * np.sqrt(values[kept])
        sizes = [seen.stop - seen.start - 1 for _, seen in distinct]
        self._parts = np.split(self._factor, np.cumsum(sizes)[:-1])
        spreads = np.zeros(self._factor.shape[1])
        for part in self._parts:
            if len(part):
                spreads = np.maximum(spreads, np.maximum(part.max(axis=0), 0.0) - np.minimum(part.min(axis=0), 0.0))
        halves = [ceil(_REACH / min(_STEP, _STRIP / spread)) for spread in spreads]
        if prod(2 * half + 1 for half in halves) > _MOST_POINTS:
            raise NotCoveredError(
                f"exact averages of the attention rows of tokens {rows[0][0]} and {rows[1][0]} need a grid in "
                f"{len(halves)} dimensions, {prod(2 * half + 1 for half in halves):.1g} points (at most "
                f"{_MOST_POINTS:.1g}); give SampledRows(n_heads=...) or a closure in their place"
            )
        self._axes = [np.linspace(-_REACH, _REACH, 2 * half + 1) for half in halves]

    def averages(self, values: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """Return ``E[A_c A'_d]``, ``E[(J H J')_cd]`` and the mean entropy of the first row, for the block H."""
        mean, response = np.zeros((2, *values.shape))
        entropy = total = 0.0
        for point, density in self._slabs():
            weights = density / density.sum()
            share = float(density.sum())
            a, *others = (_softmax(part @ point, point.shape[1]) for part in self._parts)
            b = others[0] if others else a
            left, right = values @ b, values.T @ a  # (H A')_c and (A H)_d
            both = np.sum(a * left, axis=0)
            plain = (weights * a) @ b.T
            tilted = (weights * both * a) @ b.T - (weights * a) @ (b * right).T - (weights * a * left) @ b.T
            mean += share * plain
            response += share * (plain * values + tilted)
            entropy -= share * float(weights @ np.sum(a * np.log(np.maximum(a, 1e-300)), axis=0))
            total += share
        return mean / total, response / total, entropy / total

    def _slabs(self) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Yield grid points ``(dimensions, points)`` within reach of the origin, and their Gaussian densities."""
        inner = len(self._axes)
        while inner and prod(len(axis) for axis in self._axes[inner - 1 :]) <= _SLAB:
            inner -= 1
        block = np.stack([x.ravel() for x in np.meshgrid(*self._axes[inner:], indexing="ij")]) if self._axes else None
        if block is None:
            yield np.zeros((0, 1)), np.ones(1)
            return
        squares = np.sum(block**2, axis=0)
        for outer in itertools.product(*self._axes[:inner]):
            square = squares + sum(z * z for z in outer)
            near = square <= _REACH**2
            if np.any(near):
                fixed = np.broadcast_to(np.array(outer).reshape(-1, 1), (inner, int(near.sum())))
                yield np.concatenate([fixed, block[:, near]]), np.exp(-0.5 * square[near])


def _differences(block: FloatArray) -> FloatArray:
    """Return the Gram matrix of the rows and columns less the first row and column."""
    rows = block[1:] - block[:1]
    return np.asarray(rows[:, 1:] - rows[:, :1])


def _softmax(differences: FloatArray, points: int) -> FloatArray:
    """Return rows ``(keys, points)`` from scores relative to the first key."""
    scores = np.concatenate([np.zeros((1, points)), differences])
    rows = np.exp(scores - scores.max(axis=0))
    return np.asarray(rows / rows.sum(axis=0))
