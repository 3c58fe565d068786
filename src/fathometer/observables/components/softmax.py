r"""The softmax of a row of Gaussian logits.

Here the two tokens of a :class:`TokenState` are two entries of one row: logits of variance s and pairwise correlation
r enter through ``v = s (1 - r)`` only, as does a gradient through ``J - K``. With row averages ``Y_k = \sum A^k``,

.. math:: q' = \frac{E\,Y_2}{n}, \quad p' = \frac{1 - E\,Y_2}{n (n-1)}, \quad
          J_{in} = (J - K)\, \frac{E[Y_2 - 2 Y_3 + Y_2^2]}{n}, \quad K_{in} = -\frac{J_{in}}{n-1},

because a row sums to one and its gradients to zero.

Source: the approximate and the "full" form, A. Kedia et al., arXiv:2403.09635; true averages derived here. Both
published forms need ``e^{2v} << n``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fathometer.attention import row_averages
from fathometer.errors import SpecError
from fathometer.observables.components.state import GradientState, TokenState, check_form


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Softmax over ``n_keys`` logits.

    Args:
        n_keys: Length of a row, at least 2.
        form: ``"refined"``: true averages; ``"reference"``: the published approximate form; ``"full"``: the longer
            published form, which is no more accurate.
    """

    n_keys: int
    form: Literal["refined", "reference", "full"] = "refined"

    def __post_init__(self) -> None:
        check_form(self, self.form, ("refined", "reference", "full"))
        if self.n_keys < 2:
            raise SpecError(f"Softmax.n_keys must be at least 2; got {self.n_keys}")

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`; the state is that of two entries of a row."""
        n, v = self.n_keys, self._variance(x)
        q = row_averages(n, v).y2 / n if self.form == "refined" else self._published_variance(v) + 1 / n**2
        return TokenState(q=q, p=(1 - n * q) / (n * (n - 1)), mean=1 / n)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`; the states are those of two entries of a row."""
        n, v = self.n_keys, self._variance(x)
        if self.form == "refined":
            own = (g.J - g.K) * row_averages(n, v).score / n
            return GradientState(J=own, K=-own / (n - 1))
        gain = np.exp(v) / n**2 if self.form == "reference" else self._published_variance(v) + 1 / n**2
        return GradientState(J=g.J * gain, K=0.0 * g.K)

    def _variance(self, x: TokenState) -> Any:
        return np.maximum(x.q - x.p, 0.0)

    def _published_variance(self, v: Any) -> Any:
        n = self.n_keys
        if self.form == "reference":
            return np.expm1(v) / n**2
        wide = v * n / (n - 1)
        return np.expm1(wide) * np.exp(2 * wide) / ((n - 1) * np.exp(v) + 1) ** 2
