"""A closure behind LayerNorm, where one number decides: tabulated over the cosine for grids of many points.

With tokens of fixed second moment and one coupling for the whole grid, score variance and row correlation are both
functions of the cosine, so a closure's four averages are four curves. Quintic splines with equal steps hold them to
``TOLERANCE`` of their size, checked halfway between the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention.closure import AttentionStatistics, Closure, ValuePath
from fathometer.kernels.tabulated import Place, SplineTable

TOLERANCE = 1e-8
_INTERVALS = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class AlongCosine:
    """A closure read off curves over the cosine; see :func:`along_cosine`.

    Args:
        closure: The closure.
        tables: Of the logarithms of y2, y12, score and score_pair.
        lowest: Cosine of the first node; the last is one.
        n_intervals: Steps between.
    """

    closure: Closure
    tables: tuple[SplineTable, ...]
    lowest: float
    n_intervals: int

    @property
    def name(self) -> str:
        """The name of the closure."""
        return self.closure.name

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`fathometer.attention.Closure`; the variance is the one that belongs to the correlation."""
        if entropy:
            return self.closure.statistics(n_tokens, variance, correlation)
        place = _place(correlation, self.lowest, self.n_intervals)
        y2, y12, score, score_pair = (np.exp(table(place)) for table in self.tables)
        return AttentionStatistics(y2=y2, y12=y12, score=score, score_pair=score_pair, entropy=None)

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`fathometer.attention.Closure`."""
        return self.closure.value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`fathometer.attention.Closure`."""
        return self.closure.others(n_tokens)


def along_cosine(closure: Closure, n_tokens: int, strength: float) -> Closure:
    """Return a closure tabulated for score variances ``strength * (1 - cosine)``, or itself where no table is as good.

    Args:
        closure: The closure.
        n_tokens: Number of tokens.
        strength: ``sigma_QK^2`` times the squared second moment of a token.
    Returns:
        The tabulated closure. Cost: a few hundred evaluations of the closure, once.
    """
    lowest = -1 / (n_tokens - 1) if n_tokens > 1 else -1.0

    def curves(cosine: Any) -> Any:
        found = closure.statistics(n_tokens, strength * (1 - cosine), cosine, entropy=False)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.stack(np.broadcast_arrays(*found[:4])))

    nodes = curves(np.linspace(lowest, 1.0, _INTERVALS[0] + 1))
    if not np.all(np.isfinite(nodes)):
        return closure
    for n in _INTERVALS:
        step = (1.0 - lowest) / n
        middles = lowest + (np.arange(n) + 0.5) * step
        between = curves(middles)
        tables = tuple(SplineTable.of(row[None, :]) for row in nodes)
        place = _place(middles, lowest, n)
        if np.max(np.abs(np.stack([table(place) for table in tables]) - between)) <= TOLERANCE:
            return AlongCosine(closure, tables, lowest, n)
        merged = np.empty((4, 2 * n + 1))
        merged[:, ::2], merged[:, 1::2] = nodes, between
        nodes = merged
    return closure


def _place(cosine: Any, lowest: float, n_intervals: int) -> Place:
    position = (np.asarray(cosine) - lowest) * (n_intervals / (1.0 - lowest))
    position = np.minimum(np.maximum(position, 0.0), float(n_intervals))  # rounding, and points that overflow
    piece = np.minimum(position.astype(np.intp), n_intervals - 1)
    return Place(piece, position - piece, np.ones(()))
