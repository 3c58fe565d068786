r"""LayerNorm and RMSNorm at finite width, exactly; norms that act on each entry through their kernels.

The cross moment behind LayerNorm is the mean of the sample correlation coefficient of d Gaussian pairs,

.. math:: \rho(r, d) = \frac{2}{d-1} \left[\frac{\Gamma(d/2)}{\Gamma((d-1)/2)}\right]^2
          r\; {}_2F_1\!\left(\tfrac12, \tfrac12; \tfrac{d+1}2; r^2\right) \simeq
          r \left[1 - \frac{1 - r^2}{2(d-1)}\right],

Gradients, independent of the tokens, are projected and divided by the tokens' sample deviations. With the sample
correlation R,

.. math:: J_{in} = \frac Jv\,\frac{d-2}{d-3}, \qquad
          K_{in} \simeq \frac Kv\,(d - 3 + E R^2)\,\frac12 \left[\frac{\Gamma(d/2 - 1)}{\Gamma((d-1)/2)}\right]^2
          {}_2F_1\!\left(\tfrac12, \tfrac12; \tfrac{d-1}2; r^2\right) .

The first is exact; the second neglects the covariance of R with the deviations, ``O(1/d^2)``, and is exact at r = 1.
RMSNorm of tokens without a mean is the same with ``d + 1`` for d. Published: ``r (1 - 1/d)``, ``J/v``, ``K/v``.

Source: the reference forms, A. Kedia et al., arXiv:2403.09635; moments of the correlation coefficient, H. Hotelling, J.
R. Stat. Soc. B 15 (1953) 193; the gradients derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln, hyp2f1

from fathometer.errors import DomainError, SpecError
from fathometer.kernels import norm_kernel
from fathometer.observables.components.state import Form, GradientState, TokenState, check_form
from fathometer.spec import LayerNorm, Norm, RMSNorm


def sample_correlation(correlation: Any, d_model: int) -> Any:
    """Return the mean sample correlation coefficient of ``d_model`` Gaussian pairs, the rho above.

    >>> round(float(sample_correlation(0.3, 48)), 10)
    0.2970993498
    """
    r = np.asarray(correlation, dtype=np.float64)
    ratio = np.exp(2 * (gammaln(d_model / 2) - gammaln((d_model - 1) / 2)))
    return 2 / (d_model - 1) * ratio * r * hyp2f1(0.5, 0.5, (d_model + 1) / 2, r * r)


def inverse_deviations(correlation: Any, d_model: int) -> Any:
    r"""Return the factor on K above.

    .. math:: E R^2 = 1 - \frac{d-2}{d-1}\,(1 - r^2)\; {}_2F_1\!\left(1, 1; \tfrac{d+1}2; r^2\right)
    """
    square = np.square(np.asarray(correlation, dtype=np.float64))
    ratio = np.exp(2 * (gammaln(d_model / 2 - 1) - gammaln((d_model - 1) / 2)))
    sampled = 1 - (d_model - 2) / (d_model - 1) * (1 - square) * hyp2f1(1.0, 1.0, (d_model + 1) / 2, square)
    return (d_model - 3 + sampled) * ratio / 2 * hyp2f1(0.5, 0.5, (d_model - 1) / 2, square)


@dataclass(frozen=True, kw_only=True)
class NormMap:
    """A norm acting on tokens of ``d_model`` Gaussian entries.

    LayerNorm subtracts the mean, which has to be the same for all features. For RMSNorm the factors at finite width
    hold without a mean; with one it acts at leading order.

    Args:
        norm: The norm; its gain multiplies outputs and gradients.
        d_model: Width, at least 5.
        form: ``"reference"`` is the published leading order.
    """

    norm: Norm
    d_model: int
    form: Form = "refined"

    def __post_init__(self) -> None:
        check_form(self, self.form)
        norm_kernel(self.norm)  # refuses what is no norm
        if self.d_model < 5:
            raise SpecError(f"NormMap.d_model must be at least 5: gradients have no variance below; got {self.d_model}")

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`.

        Raises:
            DomainError: for tokens without a direction to normalise.
        """
        if not isinstance(self.norm, LayerNorm | RMSNorm):
            kernel = norm_kernel(self.norm)
            return TokenState(q=kernel.overlap(x.q, x.q, x.q), p=kernel.overlap(x.q, x.q, x.p), mean=kernel.mean(x.q))
        gain = self.norm.gain
        self._size(x)
        if isinstance(self.norm, RMSNorm) and np.any(x.mean):
            return TokenState(q=gain**2, p=gain**2 * x.cosine, mean=gain * x.mean / np.sqrt(x.q))
        r = x.correlation
        if self.form == "refined":
            r = sample_correlation(r, self.d_model + isinstance(self.norm, RMSNorm))
        elif isinstance(self.norm, LayerNorm):
            r = r * (1 - 1 / self.d_model)
        return TokenState(q=gain**2, p=gain**2 * r)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        if not isinstance(self.norm, LayerNorm | RMSNorm):
            kernel = norm_kernel(self.norm)
            return GradientState(
                J=kernel.slope_overlap(x.q, x.q, x.q) * g.J, K=kernel.slope_overlap(x.q, x.q, x.p) * g.K
            )
        removed, size = isinstance(self.norm, LayerNorm), self._size(x)
        own, shared = self.norm.gain**2 / size, self.norm.gain**2 / size
        if self.form == "refined" and (removed or not np.any(x.mean)):
            d = self.d_model + (not removed)
            own, shared = own * (d - 2) / (d - 3), shared * inverse_deviations(x.correlation, d)
        return GradientState(J=own * g.J, K=shared * g.K)

    def _size(self, x: TokenState) -> Any:
        """Return the mean square that LayerNorm and RMSNorm divide by."""
        size = x.variance if isinstance(self.norm, LayerNorm) else x.q
        if not np.all(np.asarray(size) > 0):
            raise DomainError(
                f"{type(self.norm).__name__} has nothing to divide by: the tokens are zeros or all their mean; got {x}",
                value=size,
            )
        return size
