r"""What softmax averages of wide layers leave out: finite width, few dimensions per head, unequal token norms.

With ``\tilde q - \tilde p`` the part of a key that is its own, row ``a`` ranks keys along one direction ``u_a`` of the
``d_model`` available, so the selected keys are not typical along it. All functions broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import roots_genlaguerre

from fathometer.attention.softmax_rows import PairAverages, RowAverages
from fathometer.errors import DomainError
from fathometer.spec.arrays import FloatArray

_LAGUERRE_NODES = 32


def tilted(row: RowAverages, pair: PairAverages, variance: Any, correlation: Any, d_model: int) -> tuple[Any, Any]:
    r"""Return ``y2`` and ``y12`` as the second moments of the attention output see them at finite width.

    .. math::
        Y_2 \to Y_2 + \frac vd\, E\left[1 - Y_2 + 6 Y_2^2 - 6 Y_3\right], \qquad
        Y_{12} \to Y_{12} + \frac vd\, E\left[c\left((1-Y_2)(1-Y_2') + Y_{12} - 2 Z_{12} + Y_{12}^2\right)
        + 4 Y_2 Y_{12} - 4 Z_{12}\right]

    The first is exact at given score variance: keys average freely along ``d - 1`` directions and, along the one that
    the scores depend on, to ``E(\sum_b A_b a_b)^2/v``, which Gaussian integration by parts gives. The second follows
    likewise from the plane of two rows. The term matters as soon as ``n`` is of the order of ``d_model``, where it
    exceeds the ``e^v/n`` of ``Y_2``; it is meant for the update of the moments, not for entropies or participation.
    Derived here.

    Args:
        row: Averages over one row, from :func:`~fathometer.attention.softmax_rows.row_averages`.
        pair: Averages over two rows at the same arguments.
        variance: Variance of the scores.
        correlation: Of the scores of two rows at the same key.
        d_model: Width of the layer.
    """
    share = np.asarray(variance) / d_model
    own = 1 - row.y2 + 6 * row.y2_squared - 6 * row.y3
    both = correlation * (1 - 2 * row.y2 + pair.y2_y2 + pair.score_pair) + 4 * pair.y2_y12 - 4 * pair.z12
    return row.y2 + share * own, pair.y12 + share * both


def cosine_heterogeneity(row: RowAverages, gain: Any, spread: Any, level: Any, n_heads: int = 1) -> Any:
    r"""Return the factor on the mean cosine behind a norm layer that comes from unequal token norms.

    ``Y_2`` differs between rows, and so does the square norm ``m`` of a token behind attention. The norm layer then
    makes of the overlap ``p`` the mean cosine ``p (E m^{-1/2})^2``, which exceeds ``p/E m`` by

    .. math:: \left(1 + \frac38 \frac{\mathrm{Var}\,m}{(E m)^2}\right)^2, \qquad
              \mathrm{Var}\,m = \sigma_{OV}^4 (\tilde q - \tilde p)^2\, \frac{E Y_2^2 - (E Y_2)^2}{n_{heads}} .

    Second order in the fluctuation. Below one percent with a skip connection of the size of the branch or more; tens of
    percent for one head without skip in the condensed phase, where the order is no longer enough. Derived here.

    Args:
        row: Averages over one row.
        gain: ``sigma_OV^2``, the squared gain of values and output.
        spread: ``q - p`` of the normed tokens.
        level: Mean square norm ``E m`` per dimension of the residual stream behind attention.
        n_heads: Number of heads, each with an independent row.
    """
    variance = (gain * spread) ** 2 * (row.y2_squared - row.y2**2) / n_heads
    return (1 + 0.375 * variance / np.square(level)) ** 2


def few_head_average(statistic: Callable[[FloatArray], Any], variance: Any, d_head: int) -> Any:
    r"""Return the average of a row statistic over the score variance of a head with few dimensions.

    At given query the scores of one head are Gaussian with a variance proportional to ``|W_Q x|^2``, hence

    .. math:: E\, f\!\left(v\, \chi^2_{d_h}/d_h\right),

    by Gauss-Laguerre quadrature with 32 nodes. Matters up to ``d_head = 32``: 1 % of ``Y_2`` at 64 and 5 to 8 % at 16.
    Averages over two rows need the joint law of two queries and are not covered. Derived here.

    Args:
        statistic: From an array of variances to an array of averages of the same shape.
        variance: Mean variance of the scores.
        d_head: Dimensions of a head, at most 512.

    Raises:
        DomainError: if ``d_head`` is out of range.

    >>> few_head_average(lambda v: v, 3.0, d_head=8)  # the mean variance is kept
    np.float64(3.0...)
    """
    if not 1 <= d_head <= 512:
        raise DomainError(f"d_head must lie in [1, 512]; got {d_head}", value=d_head)
    nodes, weights = roots_genlaguerre(_LAGUERRE_NODES, d_head / 2 - 1)
    values = statistic(np.multiply.outer(2 * nodes / d_head, np.asarray(variance, dtype=np.float64)))
    return np.tensordot(weights / weights.sum(), values, axes=1)[()]
