"""The softmax averaged over sampled scores: true averages at any score variance, to Monte Carlo error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from fathometer.attention import AttentionStatistics, ValuePath, exact_value_path
from fathometer.papers.item import FloatArray


@dataclass(frozen=True)
class Sampled:
    """Averages over ``draws`` pairs of rows of Gaussian scores, the same random numbers in every layer.

    Costs O(draws * n_tokens) for each element, far more than a closed form; relative error about ``1/sqrt(draws *
    n_tokens)``.

    Args:
        draws: Pairs of rows.
        seed: Of the scores.
    """

    draws: int = 4000
    seed: int = 0
    name: str = "sampled"

    def statistics(
        self, n_tokens: int, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`fathometer.attention.Closure`."""
        generator = np.random.default_rng(self.seed)
        first, other = generator.standard_normal((2, self.draws, n_tokens))
        v, c = np.broadcast_arrays(np.asarray(variance, dtype=np.float64), np.asarray(correlation, dtype=np.float64))
        rows = [_averages(first, other, float(a), float(b)) for a, b in zip(v.ravel(), c.ravel(), strict=True)]
        columns = np.array(rows).T.reshape(5, *v.shape)
        return AttentionStatistics(*(column[()] for column in columns))

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`fathometer.attention.Closure`."""
        return exact_value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`fathometer.attention.Closure`."""
        return max(n_tokens - 1, 1)


def _averages(first: FloatArray, other: FloatArray, variance: float, correlation: float) -> list[float]:
    scale, c = np.sqrt(variance), min(max(correlation, -1.0), 1.0)
    a = softmax(scale * first, axis=-1)
    b = softmax(scale * (c * first + np.sqrt(1 - c * c) * other), axis=-1)
    y2, y12 = (a * a).sum(-1), (a * b).sum(-1)
    score = y2 - 2 * (a**3).sum(-1) + y2**2
    score_pair = y12 - (a * a * b).sum(-1) - (a * b * b).sum(-1) + y12**2
    entropy = -(a * np.log(a)).sum(-1)
    return [float(x.mean()) for x in (y2, y12, score, score_pair, entropy)]
