r"""Linear maps, dropout, and activations of tokens whose entries are Gaussian.

Source: A. Kedia et al., arXiv:2403.09635; activations with a mean in front of them and gated units derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, owens_t

from fathometer.kernels import activation_kernel
from fathometer.kernels.activations import activation_functions, normal_density
from fathometer.observables.components.finite_width import over_tokens
from fathometer.observables.components.state import Form, GradientState, TokenState, check_form
from fathometer.spec import Activation
from fathometer.spec.arrays import Scale, checked, checked_rate

_NODES, _REACH = 801, 9.0  # of the trapezoid rule for activations of a mean; per axis, in standard deviations
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class Linear:
    r"""``y = W x + b`` with fresh zero-mean weights.

    .. math:: q' = \sigma^2 q + \sigma_b^2, \quad p' = \sigma^2 p + \sigma_b^2, \qquad
              (J, K)_{in} = \rho\,\sigma^2\,(J, K)_{out}

    Args:
        scale: ``std * sqrt(fan_in)`` of the weights.
        bias: Standard deviation of the bias.
        ratio: ``fan_out / fan_in``, the rho above.
    """

    scale: Scale
    bias: Scale = 0.0
    ratio: float = 1.0

    def __post_init__(self) -> None:
        checked(self, "scale")
        checked(self, "bias")
        checked(self, "ratio", strict=True)

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        gain, bias = self.scale**2, self.bias**2
        return TokenState(q=gain * x.q + bias, p=gain * x.p + bias)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        gain = self.ratio * self.scale**2
        return GradientState(J=gain * g.J, K=gain * g.K)

    def weight_gradient(self, g: GradientState, x: TokenState, n_tokens: int) -> Any:
        """Return the mean square of an entry of the weights' gradient, for a loss summed over one sequence."""
        return n_tokens * x.q * g.J + n_tokens * (n_tokens - 1) * x.p * g.K


@dataclass(frozen=True, kw_only=True)
class Dropout:
    r"""Independent masks on every entry, kept ones divided by ``1 - rate``: mean squares grow by ``1/(1 - rate)``."""

    rate: Scale

    def __post_init__(self) -> None:
        checked_rate(self, "rate")

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        return TokenState(q=x.q / (1 - self.rate), p=x.p, mean=x.mean)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        return GradientState(J=g.J / (1 - self.rate), K=g.K)


@dataclass(frozen=True, kw_only=True)
class ActivationMap:
    r"""An activation of Gaussian entries.

    Without a mean, the closed forms or the quadrature of :mod:`fathometer.kernels`. With a mean ``\mu``, ReLU in
    closed form (:func:`relu_of_mean`) and all others by the trapezoid rule for

    .. math:: E f f = E_z\bigl[F(z)\,F(\pm z)\bigr], \qquad
              F(z) = E_u f\bigl(\mu + \sqrt{v}\,(\sqrt{|r|}\,z + \sqrt{1 - |r|}\,u)\bigr)

    with the sign of r: 801 points an axis, 5 MB and 10 ms a point.

    Args:
        activation: A name an MLP accepts, or a smooth function.
        form: ``"reference"`` takes the published polynomial ``0.7 r + 0.3 r^2`` for the correlation behind a ReLU of
            zero mean; everything else has one form.
    """

    activation: Activation
    form: Form = "refined"

    def __post_init__(self) -> None:
        check_form(self, self.form)
        activation_kernel(self.activation)  # refuses unknown names

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        if np.any(x.mean):
            return TokenState(**self._of_mean(x)[0])
        kernel = activation_kernel(self.activation)
        q, mean = kernel.overlap(x.q, x.q, x.q), kernel.mean(x.q)
        if self.form == "reference" and self.activation == "relu":
            r = x.cosine
            return TokenState.from_correlation(variance=q - mean**2, correlation=0.7 * r + 0.3 * r**2, mean=mean)
        return TokenState(q=q, p=kernel.overlap(x.q, x.q, x.p), mean=mean)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        if np.any(x.mean):
            own, shared = self._of_mean(x)[1]
        else:
            kernel = activation_kernel(self.activation)
            own, shared = kernel.slope_overlap(x.q, x.q, x.q), kernel.slope_overlap(x.q, x.q, x.p)
        return GradientState(J=own * g.J, K=shared * g.K)

    def _of_mean(self, x: TokenState) -> tuple[dict[str, Any], tuple[Any, Any]]:
        if self.activation == "relu":
            return relu_of_mean(x)
        value, slope = activation_functions(self.activation)
        mean, q, p = _trapezoid(value, x)
        _, own, shared = _trapezoid(slope, x)
        return {"q": q, "p": p, "mean": mean}, (own, shared)


def relu_of_mean(x: TokenState) -> tuple[dict[str, Any], tuple[Any, Any]]:
    r"""Return the moments behind a ReLU of entries with a mean, and those of its slope (same and two tokens).

    With ``a = \mu/\sqrt v``, ``w = \sqrt{(1-r)/(1+r)}`` and Owen's T,

    .. math::
        E f' f' &= \Phi(a) - 2\,T(a, w), \\
        E f f / v &= (a^2 + r)\,E f' f' + 2 a\,\varphi(a)\,\Phi(a w)
                     + \sqrt{\tfrac{1-r^2}{2\pi}}\;\varphi\!\left(a\sqrt{\tfrac{2}{1+r}}\right) .

    Source: moments of a truncated pair of Gaussians, S. Rosenbaum, J. R. Stat. Soc. B 23 (1961) 405.
    """
    v, r = x.variance, x.correlation
    std = np.sqrt(v)
    a = x.mean / std
    density, below = normal_density(a), ndtr(a)
    outside = np.maximum(1 + r, _TINY)
    w = np.sqrt((1 - r) / outside)
    both = below - 2 * owens_t(a, w)
    tail = np.sqrt((1 - r * r) / (2 * np.pi)) * np.exp(-a * a / outside) / np.sqrt(2 * np.pi)
    p = v * ((a * a + r) * both + 2 * a * density * ndtr(a * w) + tail)
    moments = {
        "q": v * ((a * a + 1) * below + a * density),
        "p": p,
        "mean": std * (a * below + density),
    }
    return moments, (below, both)


@dataclass(frozen=True, kw_only=True)
class GatedUnit:
    r"""``f(W_g x) * (W_1 x)``, the hidden units of a gated MLP, from the tokens in front of both matrices.

    .. math:: q' = \sigma_1^2\, E f f(\hat q)\, \hat q, \quad p' = \sigma_1^2\, E f f(\hat p)\, \hat p, \qquad
              J_{in} = \rho \sigma_1^2 \left[\sigma_g^2\, E f' f'(\hat q)\, \hat q + E f f(\hat q)\right] J

    and likewise for K. Both factors see the same tokens, whose overlaps fluctuate at finite width.

    Args:
        gate, mlp_in: Weight scales.
        activation: The f.
        ratio: Hidden units per dimension of the tokens, the rho above.
        d_model: Width of Gaussian tokens, over whose overlaps to average; ``None`` for wide or normalised tokens.
    """

    gate: Scale
    mlp_in: Scale
    activation: Activation = "silu"
    ratio: float = 8 / 3
    d_model: int | None = None

    def __post_init__(self) -> None:
        checked(self, "gate")
        checked(self, "mlp_in")
        checked(self, "ratio", strict=True)
        activation_kernel(self.activation)

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        return TokenState(q=self._mean(self._product, x.q, x.q), p=self._mean(self._product, x.q, x.p))

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        own, shared = (self.ratio * self._mean(self._slope, x.q, overlap) for overlap in (x.q, x.p))
        return GradientState(J=own * g.J, K=shared * g.K)

    def _mean(self, function: Callable[[Any, Any, Any], Any], q: Any, p: Any) -> Any:
        return self.mlp_in**2 * over_tokens(function, q, p, self.d_model)

    def _product(self, q_a: Any, q_b: Any, p: Any) -> Any:
        return activation_kernel(self.activation).overlap(*self._gated(q_a, q_b, p)) * p

    def _slope(self, q_a: Any, q_b: Any, p: Any) -> Any:
        kernel, gated = activation_kernel(self.activation), self._gated(q_a, q_b, p)
        return self.gate**2 * kernel.slope_overlap(*gated) * p + kernel.overlap(*gated)

    def _gated(self, q_a: Any, q_b: Any, p: Any) -> tuple[Any, Any, Any]:
        gain = self.gate**2
        return gain * q_a, gain * q_b, gain * p


def _trapezoid(function: Callable[[Any], Any], x: TokenState) -> tuple[Any, Any, Any]:
    """Return E f, E f(a)^2 and E f(a) f(b)."""
    mean, v, r = np.broadcast_arrays(*(np.asarray(y, dtype=np.float64) for y in (x.mean, x.variance, x.correlation)))
    z = np.linspace(-_REACH, _REACH, _NODES)
    weights = np.exp(-0.5 * z * z)
    weights /= weights.sum()
    single = function(mean[..., None] + np.sqrt(v)[..., None] * z)
    shared, own = np.sqrt(np.abs(r)), np.sqrt(1 - np.minimum(np.abs(r), 1.0))
    inner = shared[..., None, None] * z[:, None] + own[..., None, None] * z
    given = function(mean[..., None, None] + np.sqrt(v)[..., None, None] * inner) @ weights
    other = np.where((r < 0)[..., None], given[..., ::-1], given)
    return (single @ weights)[()], (single**2 @ weights)[()], ((given * other) @ weights)[()]
