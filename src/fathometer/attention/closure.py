r"""How the softmax is averaged over its random scores.

One row of attention at initialisation is the softmax of Gaussian scores. The part common to all keys cancels, so for
``n`` exchangeable tokens two numbers are left: the variance ``v`` of the scores and their correlation ``c`` between two
rows at the same key,

.. math:: v = \sigma_{QK}^2\, \tilde q\,(\tilde q - \tilde p), \qquad c = \tilde p/\tilde q .

A closure turns them into the averages the recursion needs. Adding one means writing one class with one method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class AttentionStatistics(NamedTuple):
    """Averages over the random scores of one attention layer; arrays of one shape.

    Attributes:
        y2: ``E sum_b A_ab^2``, the inverse participation ratio of a row.
        y12: ``E sum_b A_ab A_cb`` for two different rows.
        score: ``E[Y2 - 2 Y3 + Y2^2]``, the weight of the gradient through the scores.
        score_pair: The same for two different rows.
        entropy: Mean entropy of a row, nats; ``None`` where it was not asked for.
    """

    y2: Any
    y12: Any
    score: Any
    score_pair: Any
    entropy: Any


class ValuePath(NamedTuple):
    """Weights of the gradient through the values: ``J' = jj J + jk K`` and ``K' = kj J + kk K``."""

    jj: Any
    jk: Any
    kj: Any
    kk: Any


class Closure(Protocol):
    """What the recursion asks of a closure."""

    @property
    def name(self) -> str:
        """The name written into results."""
        ...

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """Return the averages for ``n_tokens`` keys at score variance and row correlation (broadcast arrays).

        Without ``entropy``, which no recursion needs, that entry is ``None``.
        """
        ...

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """Return how the values carry gradients back."""
        ...

    def others(self, n_tokens: int) -> int:
        """Return the number of other tokens, as the closure counts them."""
        ...


def exact_value_path(n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
    """Return the value path that follows from row normalisation alone, whatever the closure."""
    if n_tokens == 1:
        one, zero = np.ones_like(statistics.y2), np.zeros_like(statistics.y2)
        return ValuePath(jj=one, jk=zero, kj=zero, kk=zero)
    others = n_tokens - 1
    return ValuePath(
        jj=statistics.y2,
        jk=others * statistics.y12,
        kj=(1 - statistics.y2) / others,
        kk=1 - statistics.y12,
    )


@dataclass(frozen=True)
class Uniform:
    """Attention is the plain average over visible tokens, and its scores carry no gradient. Valid for ``v << 1``."""

    name: str = "uniform"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`Closure`."""
        level = 0.0 * variance + 1 / n_tokens
        zero = 0.0 * variance
        return AttentionStatistics(
            y2=level, y12=level, score=zero, score_pair=zero, entropy=zero + np.log(n_tokens) if entropy else None
        )

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`Closure`."""
        return exact_value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`Closure`."""
        return max(n_tokens - 1, 1)


@dataclass(frozen=True)
class UniformLargeN:
    """The leading order of :class:`Uniform` for many tokens, as published with the APJN recursion.

    Forward it drops every term in ``1/n``; backward it replaces ``(n-1)/n`` by one. Its forward error is
    ``sigma_OV^2 (qt - pt)/n`` a layer. Kept to compare with arXiv:2604.11890v3; use :class:`Uniform` otherwise.
    """

    name: str = "uniform_large_n"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`Closure`."""
        zero = 0.0 * variance
        return AttentionStatistics(
            y2=zero, y12=zero, score=zero, score_pair=zero, entropy=zero + np.log(n_tokens) if entropy else None
        )

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`Closure`."""
        one = np.ones_like(statistics.y2)
        return ValuePath(jj=one / n_tokens, jk=one, kj=one / n_tokens, kk=one)

    def others(self, n_tokens: int) -> int:
        """See :class:`Closure`."""
        return n_tokens


@dataclass(frozen=True)
class Annealed:
    r"""Averages of numerators over averages of denominators.

    .. math:: Y_2 = \frac{1}{1 + (n-1) e^{-v}}, \qquad Y_{12} = \frac{1}{1 + (n-1) e^{-c v}}

    Source: Cowsik et al., arXiv:2403.02579, in the form of Alekseev, arXiv:2604.11890v3. Against true averages at
    c = 0.2 it errs by 0.6, 4, 16, 62 % at n = 16 and 0.01, 0.3, 2, 19 % at n = 196 for v = 0.2, 0.5, 1, 2.

    The score-path weights are ours: ``Y2 (1 - Y2)`` and ``Y12 (1 - Y12)``, exact for uniform attention. At small v they
    exceed the true averages by ``2 (e^{2v} - e^v)/n`` and ``2 e^{cv} (e^v - 1)/n`` relatively, since third moments are
    ``e^{3v}/n^2`` and ``e^{v + 2cv}/n^2``: 3 % at n = 16 and v = 0.2. Annealing third moments as well would cure that
    and turn the weights negative at large v. The published theory has no score path; ``score_path=False`` restores it.
    The entropy is the log-normal one, ``log n - (1 - 1/n) v / 2``, replaced by its lower bound ``-log Y2`` where that
    is larger.

    Args:
        score_path: Whether gradients also flow through the scores.
    """

    score_path: bool = True
    name: str = "annealed"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`Closure`."""
        others = np.maximum(n_tokens - 1, 1e-300)  # a single key has all the weight
        with np.errstate(over="ignore"):
            y2 = 1 / (1 + others * np.exp(-variance))
            y12 = 1 / (1 + others * np.exp(-variance * correlation))
        mean = None
        if entropy:
            mean = np.maximum(np.log(n_tokens) - (1 - 1 / n_tokens) * variance / 2, -np.log(y2))
        if not self.score_path:
            return AttentionStatistics(y2=y2, y12=y12, score=0.0, score_pair=0.0, entropy=mean)
        return AttentionStatistics(y2=y2, y12=y12, score=y2 * (1 - y2), score_pair=y12 * (1 - y12), entropy=mean)

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`Closure`."""
        return exact_value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`Closure`."""
        return max(n_tokens - 1, 1)
