"""From a norm of the spec to its kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fathometer.errors import DomainError, SpecError
from fathometer.kernels.activations import activation_kernel
from fathometer.kernels.closed_forms import ErfKernel, IdentityKernel
from fathometer.kernels.logistic import TanhKernel
from fathometer.kernels.protocol import Moment, PairKernel
from fathometer.spec.arrays import FloatArray, Scale
from fathometer.spec.norms import Derf, DyT, LayerNorm, Norm, PointwiseNorm, RMSNorm


@dataclass(frozen=True, kw_only=True)
class ProjectionKernel:
    r"""Kernel of LayerNorm and RMSNorm, which divide a vector by the size it has.

    .. math:: \tilde p = \frac{p}{\sqrt{q_a q_b}}, \qquad \hat p = \frac1{\sqrt{q_a q_b}}

    These norms are not pointwise. ``slope_overlap`` stands for E (D_a^T w)(D_b^T w) / |w|^2 with the Jacobians D of
    the norm and a random vector w independent of the data; the directions D projects out are one or two in d_model.
    As for pointwise functions it is the derivative of ``overlap`` in p.

    Source: S. Alekseev, arXiv:2604.11890v3; unequal second moments derived here.
    Assumes: infinite width and zero epsilon. Finite width adds O(1/d_model). For LayerNorm, q and p are centred over
    features. Valid for q > 0.
    """

    gain: Scale = 1.0

    @property
    def second_moment(self) -> Scale:
        """What every token's second moment becomes."""
        return self.gain * self.gain

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return the cosine times ``gain^2``."""
        value: FloatArray = p / _root(q_a, q_b) * (self.gain * self.gain)
        return value

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return ``gain^2 / sqrt(q_a q_b)``."""
        value: FloatArray = self.gain * self.gain / _root(q_a, q_b)
        return np.asarray(value) if np.shape(p) == np.shape(value) and not isinstance(p, float) else value + 0.0 * p

    def mean(self, q: Moment) -> FloatArray:
        """Return zero."""
        return np.multiply(0.0 * self.gain, q)


def _root(q_a: Moment, q_b: Moment) -> FloatArray:
    for q in (q_a, q_b):
        # In an array NaN marks points whose stream has overflowed before; their status says so.
        if not q > 0.0 if isinstance(q, float) else np.min(np.asarray(q, dtype=np.float64), initial=np.inf) <= 0.0:
            _refuse(np.asarray(q, dtype=np.float64))
    if q_a is q_b:
        return q_a  # type: ignore[return-value]
    root: FloatArray = np.sqrt(q_a * q_b)
    return root


def _refuse(q: FloatArray) -> None:
    index = tuple(int(i) for i in np.argwhere(~(q > 0.0))[0])
    where = f" at index {index}" if index else ""
    raise DomainError(
        f"LayerNorm and RMSNorm need a second moment q > 0; got q={q[index]:g}{where}. "
        "A stream of zeros has no direction to normalise.",
        value=float(q[index]),
        index=index or None,
    )


def norm_kernel(norm: Norm | None) -> PairKernel:
    """Return the kernel of a norm; ``None`` is the identity.

    Raises:
        SpecError: if ``norm`` is something else, for example a name.

    >>> round(float(norm_kernel(LayerNorm()).overlap(4.0, 1.0, 1.0)), 4)
    0.5
    """
    match norm:
        case None:
            return IdentityKernel()
        case LayerNorm() | RMSNorm():
            return ProjectionKernel(gain=norm.gain)
        case DyT():
            return TanhKernel(alpha=norm.alpha, gain=norm.gain)
        case Derf():
            return ErfKernel(alpha=norm.alpha, shift=norm.shift, gain=norm.gain)
        case PointwiseNorm():
            return activation_kernel(norm.function)
    raise SpecError(f"{norm!r} is no norm; use one of the classes of the spec, or None for no norm")
