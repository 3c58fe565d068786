r"""What finite width adds to the averages of attention.

A score is a sum over the dimensions of a head, and its variance is proportional to the sizes of a query and of the
tokens, so it fluctuates with a relative variance ``2/\nu``, ``1/\nu = 1/d_h + 2/d``:

.. math:: F \to F(v) + \frac{v^2}{\nu} F''(v) \quad (F = Y_2, S), \qquad
          (Y_{12}, S') \to (Y_{12}, S')\, e^{v^2 (1 + c^2) / 2\nu} \le (Y_2, S) .

Besides, the keys a row selects share the direction of its query, one of the d there are: with the spread
``\tilde q - \tilde p`` of the tokens and ``t = (1 - Y_2)^2``,

.. math:: \Delta q = (\tilde q - \tilde p)\,\frac{v t}{d}, \quad \Delta p = c\,\Delta q, \qquad
          \Delta T_{JJ} = \Delta T_{KK} = \sigma_{QK}^2 (\tilde q - \tilde p)^2\, \frac td .

Overlaps themselves fluctuate: those of Gaussian tokens a, b are entries of a Wishart matrix, with

.. math:: \mathrm{Var}\,\hat q = \frac{2 q^2}d, \quad \mathrm{Cov}(\hat q_a, \hat q_b) = \frac{2 p^2}d, \quad
          \mathrm{Cov}(\hat q_a, \hat p) = \frac{2 q p}d, \quad \mathrm{Var}\,\hat p = \frac{q^2 + p^2}d .

Derived here to first order in ``1/d``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import AttentionStatistics, Closure

_STEP = 0.25  # of the second derivative, relative to the variance


@dataclass(frozen=True)
class HeadWidth:
    """A closure corrected for the fluctuation of the score variance; meant for heads of 16 dimensions or more.

    Args:
        closure: The averages at a given variance of the scores.
        d_head, d_model: Widths of a head and of the stream.
    """

    closure: Closure
    d_head: int
    d_model: int

    @property
    def name(self) -> str:
        """See :class:`~fathometer.attention.Closure`."""
        return f"{self.closure.name}_head_width"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`~fathometer.attention.Closure`; three evaluations of the closure."""
        v, c = np.asarray(variance, dtype=np.float64), np.asarray(correlation, dtype=np.float64)
        known = self.closure.statistics(n_tokens, v, c, entropy=entropy)
        below, above = (self.closure.statistics(n_tokens, v * (1 + s), c, entropy=False) for s in (-_STEP, _STEP))
        spread = 1 / self.d_head + 2 / self.d_model
        y2, score = (
            here + spread * (low - 2 * here + high) / _STEP**2
            for here, low, high in (
                (known.y2, below.y2, above.y2),
                (known.score, below.score, above.score),
            )
        )
        y2, score = np.clip(y2, 1 / np.asarray(n_tokens), 1.0), np.maximum(score, 0.0)  # matters for few dimensions
        shared = np.exp(v * v * (1 + c * c) * spread / 2)
        return known._replace(
            y2=y2,
            score=score,
            y12=np.minimum(known.y12 * shared, y2),
            score_pair=np.minimum(known.score_pair * shared, score),
        )

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> Any:
        """See :class:`~fathometer.attention.Closure`."""
        return self.closure.value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`~fathometer.attention.Closure`."""
        return self.closure.others(n_tokens)


def selected_direction(y2: Any, d_model: int) -> Any:
    """Return ``(1 - Y2)^2 / d_model``, the weight of the direction that the keys of one row share."""
    return (1 - y2) ** 2 / d_model


def over_tokens(function: Callable[[Any, Any, Any], Any], q: Any, p: Any, d_model: int | None) -> Any:
    """Return the mean of ``f(q_a, q_b, p)`` over the overlaps of two Gaussian tokens of ``d_model`` entries.

    Second differences over one standard deviation along the three independent directions of fluctuation: the sum and
    the difference of the sizes, and the overlap at given sizes. Seven evaluations, one at infinite width (``None``).
    """
    centre = function(q, q, p)
    if d_model is None:
        return centre
    square = q * q + p * p
    along, across = np.sqrt(square / d_model), np.sqrt(np.maximum(q * q - p * p, 0.0) / d_model)
    change = -6.0 * centre
    for sign in (1.0, -1.0):
        both = q + sign * along
        change = change + function(both, both, p + sign * 2 * q * p / np.sqrt(square * d_model))
        change = change + function(q + sign * across, q - sign * across, p)
        change = change + function(q, q, p + sign * (q * q - p * p) / np.sqrt(square * d_model))
    return centre + change / 2
