"""Kernels with an elementary closed form: identity, ReLU, GELU and the error function."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np
from scipy.special import erf, owens_t

from fathometer.kernels.pair import determinant
from fathometer.kernels.protocol import Moment
from fathometer.spec.arrays import FloatArray, Scale


@dataclass(frozen=True, kw_only=True)
class IdentityKernel:
    """Kernel of f(x) = x."""

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return ``p``."""
        return np.add(p, 0.0 * (q_a * q_b))

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return one."""
        return np.add(1.0, 0.0 * (q_a * q_b * p))

    def mean(self, q: Moment) -> FloatArray:
        """Return zero."""
        return np.multiply(0.0, q)


@dataclass(frozen=True, kw_only=True)
class ReLUKernel:
    r"""Kernel of f(x) = max(x, 0), the arc-cosine kernel of degree 1.

    .. math:: E f f = \frac{\sqrt{q_a q_b - p^2} + p\,\theta}{2\pi}, \quad E f' f' = \frac{\theta}{2\pi},
              \quad \theta = \pi - \arccos\frac{p}{\sqrt{q_a q_b}} = \operatorname{atan2}(\sqrt{q_a q_b - p^2}, -p)

    The angle in its atan2 form divides by nothing, hence needs no care at q = 0. There ``slope_overlap(0, 0, 0)`` is
    1/2, its limit along the diagonal.

    Source: Cho and Saul, NeurIPS 2009; quoted in S. Alekseev, arXiv:2604.11890v3.
    """

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E relu(u) relu(v)."""
        root = np.sqrt(determinant(q_a, q_b, p))
        value: FloatArray = (root + p * np.arctan2(root, np.negative(p))) * (0.5 / pi)
        return value

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return the probability that both u and v are positive."""
        angle: FloatArray = np.arctan2(np.sqrt(determinant(q_a, q_b, p)), np.negative(p))
        return angle * (0.5 / pi)

    def mean(self, q: Moment) -> FloatArray:
        """Return ``sqrt(q / (2 pi))``."""
        value: FloatArray = np.sqrt(q * (0.5 / pi))
        return value


@dataclass(frozen=True, kw_only=True)
class GELUKernel:
    r"""Kernel of f(x) = x Phi(x), GELU in its exact form with the Gaussian distribution function Phi.

    .. math:: 2\pi E f f = p\,\theta + \frac{q_a q_b \Delta + p^2}{M \sqrt\Delta}, \qquad
              2\pi E f' f' = \theta + \frac{p}{\sqrt\Delta}\left(\frac{2 + q_a + q_b}{M} + \frac1\Delta\right)

    with :math:`M = (1 + q_a)(1 + q_b)`, :math:`\Delta = M - p^2` and
    :math:`\theta = \operatorname{atan2}(\sqrt\Delta, -p)`.

    Source: derived here. Gaussian integration by parts, E u F = q_a E F_u + p E F_v, twice turns
    E u Phi(u) v Phi(v) into

    .. math:: p\,E\Phi\Phi + (q_a q_b + p^2)\,E\varphi\varphi
              - q_a p\,E u\varphi(u)\Phi(v) - q_b p\,E\Phi(u)\,v\varphi(v),

    and once more E u phi(u) Phi(v) = p/(1 + q_a) E phi phi. Here E Phi Phi = theta/(2 pi) is an orthant probability
    (u minus an independent unit Gaussian has second moment 1 + q_a) and E phi phi = 1/(2 pi sqrt(Delta)). The slope
    is the derivative in p. Every summand of the bracket is positive: there is nothing to cancel.
    """

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E gelu(u) gelu(v)."""
        delta = 1.0 + q_a + q_b + determinant(q_a, q_b, p)
        root = np.sqrt(delta)
        square = p * p
        value: FloatArray = p * np.arctan2(root, np.negative(p))
        return (value + (q_a * q_b * delta + square) / ((delta + square) * root)) * (0.5 / pi)

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E gelu'(u) gelu'(v)."""
        total = q_a + q_b
        delta = 1.0 + total + determinant(q_a, q_b, p)
        root = np.sqrt(delta)
        angle: FloatArray = np.arctan2(root, np.negative(p))
        return (angle + p / root * ((2.0 + total) / (delta + p * p) + 1.0 / delta)) * (0.5 / pi)

    def mean(self, q: Moment) -> FloatArray:
        """Return ``q / sqrt(2 pi (1 + q))``, which is q E phi(u)."""
        value: FloatArray = q / np.sqrt(2.0 * pi * (1.0 + q))
        return value


@dataclass(frozen=True, kw_only=True)
class ErfKernel:
    r"""Kernel of f(x) = gain erf(alpha x + shift).

    With :math:`x = 2\alpha^2 p`, :math:`M_a = 1 + 2\alpha^2 q_a` and :math:`\Delta = M_a M_b - x^2`,

    .. math:: E f f = \frac2\pi \arctan\frac{x}{\sqrt\Delta}, \qquad E f' f' = \frac{4\alpha^2}{\pi\sqrt\Delta}

    at zero shift and unit gain. The arctangent equals the more common arcsin of x / sqrt(M_a M_b) but keeps its
    digits when the function saturates. With a shift s, and Owen's T,

    .. math:: E f f = 1 - 4 T\left(h_a, \tfrac{M_a - x}{\sqrt\Delta}\right)
                        - 4 T\left(h_b, \tfrac{M_b - x}{\sqrt\Delta}\right), \quad h_a = s\sqrt{2 / M_a},

    .. math:: E f' f' = \frac{4\alpha^2}{\pi\sqrt\Delta} \exp\left(-s^2\,\frac{M_a + M_b - 2x}{\Delta}\right).

    Source: zero shift Williams, NeurIPS 1996, used for Derf in S. Alekseev, arXiv:2604.11890v3. Shift: derived here.
    erf(y) = 2 Phi(sqrt(2) y) - 1 makes E f f = 4 Phi_2(h_a, h_b) - 2 Phi(h_a) - 2 Phi(h_b) + 1; Owen's formula for
    the bivariate normal Phi_2 cancels the one-variable terms, since h_a and h_b have the same sign. The slope is the
    Gaussian integral of exp(-|alpha w + s 1|^2), whose exponent is s^2 times 1^T (I + 2 alpha^2 Sigma)^-1 1.
    Error: 1e-16 absolute with a shift, hence a few digits less where overlap itself is tiny.
    """

    alpha: Scale
    shift: Scale = 0.0
    gain: Scale = 1.0

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f(u) f(v)."""
        slope = 2.0 * self.alpha * self.alpha
        root = np.sqrt(1.0 + slope * (q_a + q_b + slope * determinant(q_a, q_b, p)))
        if isinstance(self.shift, float) and self.shift == 0.0:
            angle: FloatArray = np.arctan(slope * p / root)
            return angle * (2.0 / pi) * (self.gain * self.gain)
        tails = _tail(self.shift, slope, q_a, p, root) + _tail(self.shift, slope, q_b, p, root)
        return (1.0 - 4.0 * tails) * (self.gain * self.gain)

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f'(u) f'(v)."""
        slope = 2.0 * self.alpha * self.alpha
        delta = 1.0 + slope * (q_a + q_b + slope * determinant(q_a, q_b, p))
        value: FloatArray = (2.0 / pi) * slope / np.sqrt(delta) * (self.gain * self.gain)
        if isinstance(self.shift, float) and self.shift == 0.0:
            return value
        damping: FloatArray = np.exp(-self.shift * self.shift * (2.0 + slope * (q_a + q_b - 2.0 * p)) / delta)
        return value * damping

    def mean(self, q: Moment) -> FloatArray:
        """Return ``gain erf(shift / sqrt(1 + 2 alpha^2 q))``."""
        value: FloatArray = erf(self.shift / np.sqrt(1.0 + 2.0 * self.alpha * self.alpha * q))
        return value * self.gain


def _tail(shift: Scale, slope: Scale, q: Moment, p: Moment, root: FloatArray) -> FloatArray:
    value: FloatArray = owens_t(shift * np.sqrt(2.0 / (1.0 + slope * q)), (1.0 + slope * (q - p)) / root)
    return value
