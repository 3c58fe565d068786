r"""Gradients that flow through the attention scores of a full Gram matrix.

With ``y_ac = g_a . W_OV h_c`` the gradient at the normalised tokens through the scores ``s_ac = h_a^T M h_c`` is

.. math:: \text{key: } \sum_a A_{ac}(y_{ac} - \bar y_a)\, M^T h_a, \qquad
          \text{query: } \sum_c A_{ac}(y_{ac} - \bar y_a)\, M h_c .

Averaging over ``W_OV`` and ``M`` gives products of the gradient Gram matrix and the token Gram matrix; value, key and
query paths do not mix at leading order. The attention weights are replaced by their uniform values, which is right to
leading order in the score variance (the whole path is itself of that order). Derived in the documentation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.mixing import Visibility

FloatArray = NDArray[np.float64]


class ScorePath:
    """The linear map of one layer, per unit ``sigma_OV^2 sigma_QK^2``. Costs O(n^2).

    Args:
        visible: Which keys each query sees.
        values: Gram matrix of the tokens as values, shape ``(..., n, n)``.
        scores: Gram matrix of the tokens as they enter the scores, same shape.

    Attributes:
        response: The factor of the query path, elementwise; same shape.
    """

    def __init__(self, visible: Visibility, values: FloatArray, scores: FloatArray) -> None:
        counts = visible.counts[:, None]
        self._visible = visible
        self._values = values
        self._scores = scores
        self._weight = scores / visible.pairs
        row_mean = visible.over_keys(values, -2) / counts  # [a, d]: mean over the keys c of a of values[c, d]
        self._key_mean = np.swapaxes(row_mean, -1, -2)  # [c, b]
        self._pair_mean = visible.over_keys(row_mean, -1) / visible.counts
        score_mean = visible.over_keys(scores, -2) / counts
        both = visible.key_pairs(scores * values) / visible.pairs
        tilted = visible.over_keys(score_mean * row_mean, -1) / visible.counts
        score_pair = visible.over_keys(score_mean, -1) / visible.counts
        self.response = both - tilted - np.swapaxes(tilted, -1, -2) + score_pair * self._pair_mean

    def of_noise(self) -> ScorePath:
        """Return the map for values that are independent between keys, as dropout on attention weights makes them."""
        return ScorePath(self._visible, self._values * np.eye(self._values.shape[-1]), self._scores)

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Map the gradient Gram matrix at the attention output to that at the normalised tokens."""
        visible = self._visible
        seen = gradient * self._weight
        cross = visible.over_queries(visible.over_queries(seen, -2) * self._key_mean, -1)
        keys = self._values * visible.query_pairs(seen) + visible.query_pairs(seen * self._pair_mean)
        return np.asarray(keys - cross - np.swapaxes(cross, -1, -2) + gradient * self.response)

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Apply the adjoint: map the Gram matrix of a perturbation of the tokens to that of the output."""
        visible = self._visible
        cross = visible.over_keys(self._key_mean * visible.over_keys(tangent, -1), -2)
        keys = visible.key_pairs(self._values * tangent) + self._pair_mean * visible.key_pairs(tangent)
        return np.asarray(self._weight * (keys - cross - np.swapaxes(cross, -1, -2)) + tangent * self.response)
