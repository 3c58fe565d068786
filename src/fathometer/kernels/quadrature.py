r"""Any analytic function of one variable, by the trapezoid rule.

Gauss-Hermite rules fail here: the function varies on its own scale while q grows with depth, and their nodes spread
with q. The plain trapezoid rule converges exponentially for analytic integrands damped by a Gaussian,

.. math:: \text{error} \sim \exp\left(-\frac{2\pi d}{h} + \frac{d^2}{2}\right)

for a step h and any d up to the distance of the nearest singularity from the real axis, both in standard deviations
(Trefethen and Weideman, SIAM Review 56 (2014) 385; the second term is the growth of the Gaussian off the axis). The
best d, at most sqrt(2 D) for an error exp(-D), gives the step used here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, pi, sqrt

import numpy as np

from fathometer.errors import DomainError, QuadratureError, SpecError
from fathometer.kernels.hermite import HermiteSeries, Worth
from fathometer.kernels.protocol import Moment, ScalarFunction
from fathometer.spec.arrays import FloatArray
from fathometer.spec.pointwise import Pointwise

_RANGE = 9.0  # in standard deviations: the density there is 1e-18
_DIGITS = 40.0  # D: exp(-40) = 4e-18; f'^2 has poles of fourth order, whose strength costs five digits of it
_TILE_POINTS = 1 << 17  # function values held at a time
_MAX_POINTS = 1 << 24  # per pair: about a second
_STRIPS = (2.0, 1.0, 0.5, 0.25, 0.125)
_AGREEMENT = 1e-10
_WORTH = Worth(n_pairs=32, sharing=1, n_terms=1000, reach=0.0)  # a pair costs 0.1 ms here, and more the larger q
_TINY = np.finfo(np.float64).tiny


@lru_cache(maxsize=256)
def standard_normal_grid(half: int) -> tuple[FloatArray, FloatArray]:
    """Return ``2 half + 1`` equidistant nodes within nine standard deviations and weights that sum to one."""
    nodes: FloatArray = np.arange(-half, half + 1, dtype=np.float64) * (_RANGE / max(half, 1))
    weights: FloatArray = np.exp(-0.5 * np.square(nodes))
    return nodes, weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class QuadratureKernel:
    r"""Kernel of an analytic function with given derivative.

    The pair is written with two independent standard Gaussians s and t,

    .. math:: u, v = \sqrt{q_{a,b}}\left(\sqrt{\tfrac{1+c}2}\,s \pm \sqrt{\tfrac{1-c}2}\,t\right),
              \quad c = \frac{p}{\sqrt{q_a q_b}},

    and summed on a grid whose steps follow the largest standard deviation of a batch along s and along t. On the
    diagonal the second direction collapses to one node and the sum is one-dimensional. Large arrays of pairs take the
    Hermite series instead, wherever it is known to converge.

    Args:
        name: For error messages.
        value: The function, on float64 arrays of any shape.
        derivative: Its derivative.
        strip: Half width of the strip around the real axis where the function is analytic; smaller is safer
            and slower. The points per pair grow like q / strip^2.
    """

    name: str
    value: ScalarFunction
    derivative: ScalarFunction
    strip: float

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f(u) f(v)."""
        return self._expect_many(self.value, q_a, q_b, p)

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f'(u) f'(v)."""
        return self._expect_many(self.derivative, q_a, q_b, p)

    def mean(self, q: Moment) -> FloatArray:
        """Return E f(u)."""
        return self.mean_of(self.value, q)

    def mean_of(self, function: ScalarFunction, q: Moment) -> FloatArray:
        """Return E g(u) for a function g analytic in the same strip."""
        std = np.sqrt(q)
        nodes, weights = standard_normal_grid(self._half(float(np.max(std, initial=0.0))))
        value: FloatArray = function(np.multiply.outer(std, nodes)) @ weights
        return value

    def _half(self, std: float) -> int:
        if std == 0.0:
            return 0
        distance = min(self.strip / std, sqrt(2.0 * _DIGITS))
        return ceil(_RANGE * (_DIGITS + 0.5 * distance * distance) / (2.0 * pi * distance))

    def _expect_many(self, function: ScalarFunction, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        series = HermiteSeries(function=function, strip=self.strip, worth=_WORTH)
        return series.expectation(q_a, q_b, p, otherwise=partial(self._expect, function))

    def _expect(self, function: ScalarFunction, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        std_a, std_b = np.sqrt(q_a), np.sqrt(q_b)
        cosine = np.minimum(np.maximum(p / np.maximum(np.sqrt(q_a * q_b), _TINY), -1.0), 1.0)
        along, across = np.sqrt(0.5 + 0.5 * cosine), np.sqrt(0.5 - 0.5 * cosine)
        if isinstance(cosine, float):
            widest = max(std_a, std_b)
            s, w_s, t, w_t = self._grids(widest * along, widest * across)
            if len(s) * len(t) <= _TILE_POINTS:
                s, t = along * s[:, None], across * t
                product = function(std_a * (s + t)) * function(std_b * (s - t))
                total: FloatArray = w_s @ (product @ w_t)
                return total
        return self._expect_batch(function, *np.broadcast_arrays(std_a, std_b, along, across))

    def _grids(self, along: float, across: float) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        half_s, half_t = self._half(along), self._half(across)
        if (2 * half_s + 1) * (2 * half_t + 1) > _MAX_POINTS:
            q = along * along + across * across
            raise DomainError(
                f"the quadrature of {self.name!r} would need {(2 * half_s + 1) * (2 * half_t + 1):.1g} points per pair "
                f"at a second moment of q={q:.3g}. Is the network meant to grow that large? "
                "A saturating norm keeps q small; relu and gelu have closed forms at any q.",
                value=q,
            )
        return (*standard_normal_grid(half_s), *standard_normal_grid(half_t))

    def _expect_batch(
        self, function: ScalarFunction, std_a: FloatArray, std_b: FloatArray, along: FloatArray, across: FloatArray
    ) -> FloatArray:
        widest = np.maximum(std_a, std_b)
        s, w_s, t, w_t = self._grids(
            float(np.max(widest * along, initial=0.0)), float(np.max(widest * across, initial=0.0))
        )
        columns = [x.reshape(-1, 1, 1) for x in (std_a, std_b, along, across)]
        out = np.zeros(std_a.size)
        rows = max(1, min(len(s), _TILE_POINTS // len(t)))
        pairs = max(1, _TILE_POINTS // (rows * len(t)))
        for first in range(0, len(out), pairs):
            batch = slice(first, first + pairs)
            a, b, x, y = (column[batch] for column in columns)
            for row in range(0, len(s), rows):
                shared, apart = x * s[row : row + rows, None], y * t
                product = function(a * (shared + apart)) * function(b * (shared - apart))
                out[batch] += (product @ w_t) @ w_s[row : row + rows]
        return out.reshape(std_a.shape)


def pointwise_kernel(function: Pointwise) -> QuadratureKernel:
    """Return the kernel of a user's function with the widest strip for which the quadrature has converged.

    Convergence is judged by halving the step, on E f, E f^2, E f' and E f'^2 at q = 1 and q = 16; the kernel keeps
    the resolution per unit of u, so it then holds at any q.

    Raises:
        QuadratureError: if the finest step still changes a result; carries the last estimate and its change.
        SpecError: if ``derivative`` is not the derivative of ``value``.
    """
    kernel = QuadratureKernel(
        name=function.name, value=function.value, derivative=function.derivative, strip=_STRIPS[0]
    )
    for strip in _STRIPS:
        kernel, finer = replace(kernel, strip=strip), replace(kernel, strip=strip / 2.0)
        estimate, error = _largest_change(kernel, finer)
        if error <= _AGREEMENT:
            _check_derivative(function)
            return kernel
    raise QuadratureError(
        f"the Gaussian expectation of {function.name!r} does not converge: halving the finest step changes it by "
        f"{error:.1e} relative (at most {_AGREEMENT:g} is accepted), last estimate {estimate:.6g}. The function "
        "probably has a kink or a jump, or overflows; write kinks as a combination of relu and identity.",
        estimate=estimate,
        error=error,
    )


def _largest_change(kernel: QuadratureKernel, finer: QuadratureKernel) -> tuple[float, float]:
    """Return the least converged probe and its change relative to the root mean square; NaN counts as infinite."""
    worst = (float("nan"), 0.0)
    q = np.array([1.0, 16.0])
    with np.errstate(all="ignore"):
        for function in (kernel.value, kernel.derivative):
            mean, mean_finer = kernel.mean_of(function, q), finer.mean_of(function, q)
            square, square_finer = kernel._expect(function, q, q, q), finer._expect(function, q, q, q)
            scale = np.maximum(square_finer, _TINY)
            for old, new, unit in ((mean, mean_finer, np.sqrt(scale)), (square, square_finer, scale)):
                change = np.nan_to_num(np.abs(new - old) / unit, nan=np.inf)
                at = int(np.argmax(change))
                if change[at] >= worst[1]:
                    worst = (float(new[at]), float(change[at]))
    return worst


def _check_derivative(function: Pointwise) -> None:
    x = np.linspace(-3.0, 3.0, 41) + 0.01
    numeric = (function.value(x + 1e-5) - function.value(x - 1e-5)) / 2e-5
    stated = function.derivative(x)
    error = np.abs(stated - numeric)
    if not np.max(error) <= 1e-5 * max(1.0, float(np.max(np.abs(numeric)))):
        at = int(np.argmax(error))
        raise SpecError(
            f"Pointwise {function.name!r}: `derivative` is not the derivative of `value`; at x={x[at]:.3g} it gives "
            f"{stated[at]:.6g}, finite differences give {numeric[at]:.6g}"
        )
