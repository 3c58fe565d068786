"""True softmax averages with their correction at finite width, as a closure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import AttentionStatistics, Exact, pair_averages, row_averages, tilted
from fathometer.attention.softmax_rows import COARSE


@dataclass(frozen=True)
class FiniteWidth(Exact):
    """:class:`~fathometer.attention.Exact` with Y2 and Y12 as :func:`~fathometer.attention.tilted` corrects them.

    The correction is one of the moments of the attention output; participation and entropy are to be read from
    :class:`~fathometer.attention.Exact`. Costs 10 to 100 ms a layer: nothing is tabulated.

    Args:
        d_model: Width.
    """

    d_model: int = 512
    name: str = "finite_width"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`~fathometer.attention.Closure`."""
        known = super().statistics(n_tokens, variance, correlation, entropy=entropy)
        c = np.clip(correlation, -1.0, 1.0)
        row = row_averages(n_tokens, variance, resolution=COARSE)
        pair = pair_averages(n_tokens, variance, c, resolution=COARSE)
        y2, y12 = tilted(row, pair, variance, c, self.d_model)
        return known._replace(y2=y2, y12=y12)
