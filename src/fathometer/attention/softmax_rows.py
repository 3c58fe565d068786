r"""Averages over softmax rows of Gaussian scores at a finite number of keys, by quadrature.

A row is the softmax ``A_b = e^{a_b}/Z`` of ``n`` independent scores ``a_b ~ N(0, v)``; scores of two rows at the same
key have correlation ``c``. Denominators go by ``Z^{-k} = \int \lambda^{k-1} e^{-\lambda Z} d\lambda / \Gamma(k)``,
after which keys factorise. With ``\lambda = e^{-x}`` and ``y = x - a`` define, for one key,

.. math:: \chi(x) = E\left[1 - \exp(-e^{-y})\right], \qquad \eta_k(x) = E\left[e^{-ky} \exp(-e^{-y})\right] .

``1 - \chi`` is the distribution function of a score plus standard Gumbel noise; ``\chi`` its tail, ``\eta_1`` its
density. Then

.. math:: E\,Y_k = \frac{n}{\Gamma(k)} \int \eta_k (1-\chi)^{n-1} dx, \quad
    E\,Y_2^2 = \frac16 \int \left[n\,\eta_4 (1-\chi)^{n-1} + n(n-1)\,\eta_2^2 (1-\chi)^{n-2}\right] dx,

and ``E Y_1 = 1`` checks the quadrature. The entropy is ``-dE Y_k/dk`` at one, free of cancellation: the mean Gumbel
noise of the winning key less Euler's constant. For two rows the scores split into a part of variance ``(1-c) v`` of
their own and a shared part ``z``, so ``\chi`` and ``\eta_k`` are taken at the smaller variance and

.. math:: 1 - M(x, x') = E_z (1-\chi(x-z))(1-\chi(x'-z)), \quad N_{kl}(x, x') = E_z\,\eta_k(x-z)\,\eta_l(x'-z)

take the places of ``\chi`` and ``\eta_k`` in double integrals. For ``c < 0`` the shared part enters the second row with
the opposite sign.

The trapezoid rule in ``x`` is exact to ``2|\Gamma(k + 2\pi i/h)|/\Gamma(k)``, about ``e^{-\pi^2/h}``, for each draw of
the scores and hence for any ``n`` and ``v``. Derived here, for scores that are exactly Gaussian (wide layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import ndtr, ndtri_exp

from fathometer.errors import DomainError
from fathometer.spec.arrays import FloatArray

_GUMBEL_START = -4.5  # the noise lies below with probability e^-90
_MAX_POINTS = 1 << 24  # of the largest matrix of a pair: 128 MiB
_NARROW, _FEW_NODES = 0.2, 9  # a shared part of so small a deviation needs few nodes


class Resolution(NamedTuple):
    """How finely to integrate.

    Attributes:
        step: Of the trapezoid rule; the error is ``e^{-pi^2/step}`` times a power.
        digits: Events of probability below ``e^{-digits} n^{-order}`` are left out.
        order: Averages as small as ``n^{-order}`` are resolved.
    """

    step: float
    digits: float
    order: int


FINE = Resolution(step=0.2, digits=46.0, order=2)  # rounding error, also where E Y2^2 is near 1/n^2
COARSE = Resolution(step=0.36, digits=18.0, order=1)  # 1e-7, also where E Y12 is near 1/n


class RowAverages(NamedTuple):
    """Averages over one row; arrays of one shape.

    Attributes:
        y2: ``E Y2``, with ``Y_k = sum_b A_b^k``.
        y3: ``E Y3``.
        y2_squared: ``E Y2^2``.
        score: ``E[Y2 - 2 Y3 + Y2^2]``.
        entropy: ``-E sum_b A_b ln A_b``, nats.
        norm: ``E Y1``, computed like the others; one up to the error of the quadrature.
    """

    y2: Any
    y3: Any
    y2_squared: Any
    score: Any
    entropy: Any
    norm: Any


class PairAverages(NamedTuple):
    """Averages over two rows ``A`` and ``A'``; arrays of one shape.

    Attributes:
        y12: ``E Y12``, with ``Y12 = sum_b A_b A'_b``.
        z12: ``E sum_b A_b A'_b^2``.
        y12_squared: ``E Y12^2``.
        y2_y12: ``E Y2 Y12``.
        y2_y2: ``E Y2 Y2'``.
        score_pair: ``E[Y12 - 2 Z12 + Y12^2]``.
    """

    y12: Any
    z12: Any
    y12_squared: Any
    y2_y12: Any
    y2_y2: Any
    score_pair: Any


def row_averages(n_keys: Any, variance: Any, *, resolution: Resolution = FINE) -> RowAverages:
    """Return the averages over one softmax row. Costs about 1 ms a point.

    Args:
        n_keys: Number of keys, at least one; any size, as it enters only as a power.
        variance: Variance of the scores. Both broadcast.
        resolution: Of the quadrature; by default its error is that of rounding, relative to each result.

    Raises:
        DomainError: if there is no key, or the variance is negative or not finite.

    >>> round(float(row_averages(64, 4.0).y2), 4)
    0.1607
    """
    check_scores(n_keys, variance)
    return RowAverages(*_pointwise(partial(_row, resolution), len(RowAverages._fields), n_keys, variance))


def pair_averages(n_keys: Any, variance: Any, correlation: Any, *, resolution: Resolution = FINE) -> PairAverages:
    """Return the averages over two softmax rows. Costs about 10 ms a point, more at large variance.

    Args:
        n_keys: Number of keys, at least one.
        variance: Variance of the scores.
        correlation: Of the scores of the two rows at the same key, between -1 and 1. All three broadcast.
        resolution: Of the quadrature; by default its error is that of rounding, relative to each result.

    Raises:
        DomainError: if there is no key, the variance is negative or not finite, or the correlation is no correlation;
            and if the double integral would not fit into memory, at deviations of about 100 near ``c = 1``.

    >>> round(float(pair_averages(64, 4.0, 0.5).y12), 4)
    0.056
    """
    check_scores(n_keys, variance, correlation)
    function = partial(_pair, resolution)
    return PairAverages(*_pointwise(function, len(PairAverages._fields), n_keys, variance, correlation))


def check_scores(
    n_keys: Any, variance: Any, correlation: Any = 0.0, *, most_keys: float = 1e300, rounding: float = 0.0
) -> None:
    """Raise a DomainError unless all elements describe rows of Gaussian scores.

    Args:
        n_keys: Number of keys.
        variance: Variance of the scores.
        correlation: Of the scores of two rows at the same key.
        most_keys: Largest number of keys accepted.
        rounding: By which a correlation may exceed one.
    """
    for name, values, low, high in (
        ("number of keys", n_keys, 1.0, most_keys),
        ("variance of the scores", variance, 0.0, 1e300),
        ("correlation of the scores", correlation, -1.0 - rounding, 1.0 + rounding),
    ):
        if isinstance(values, float | int) and low <= values <= high:
            continue
        array = np.asarray(values, dtype=np.float64)
        good = (array >= low) & (array <= high)
        if not good.all():
            index = tuple(int(i) for i in np.argwhere(~good)[0])
            bound = f"lie in [{low:g}, {high:g}]" if high < 1e300 else f"be finite and at least {low:g}"
            worst = float(array[index])
            raise DomainError(f"the {name} must {bound}; got {worst:g}", value=worst, index=index or None)


def _pointwise(function: Callable[..., tuple[float, ...]], n_results: int, *arguments: Any) -> FloatArray:
    arrays = np.broadcast_arrays(*(np.asarray(argument, dtype=np.float64) for argument in arguments))
    points = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    results = np.array([function(*point) for point in points], dtype=np.float64)
    return np.moveaxis(results.reshape(*arrays[0].shape, n_results), -1, 0)


def _row(resolution: Resolution, n: float, variance: float) -> tuple[float, ...]:
    if n == 1:
        return 1.0, 1.0, 1.0, 0.0, 0.0, 1.0
    x, step = _grid(n, variance, variance, resolution)
    key = _key(x, variance, _reach(n, resolution), resolution)
    log_below = _log_complement(key.tail)
    alone = n * step * np.exp((n - 1) * log_below)
    eta1, eta2, eta3, eta4, noise = key.moments
    y2, y3 = float(alone @ eta2), float(alone @ eta3) / 2
    y2_squared = float(alone @ eta4 + n * (n - 1) * step * (np.exp((n - 2) * log_below) @ eta2**2)) / 6
    entropy = float(alone @ noise) - float(np.euler_gamma)
    return y2, y3, y2_squared, y2 - 2 * y3 + y2_squared, entropy, float(alone @ eta1)


def _pair(resolution: Resolution, n: float, variance: float, correlation: float) -> tuple[float, ...]:
    if n == 1:
        return 1.0, 1.0, 1.0, 1.0, 1.0, 0.0
    pair = PairQuadrature(n, variance, correlation, resolution)
    y12, z12, y12_squared = pair.overlaps()
    return y12, z12, y12_squared, *pair.participations(), y12 - 2 * z12 + y12_squared


class PairQuadrature:
    """The double integral over two rows, part by part.

    Args:
        n: Number of keys, at least two.
        variance: Variance of the scores.
        correlation: Of the two rows' scores at the same key.
        resolution: Of the quadrature.

    Raises:
        DomainError: if the matrices of the integrand would not fit into memory.
    """

    def __init__(self, n: float, variance: float, correlation: float, resolution: Resolution) -> None:
        own, reach = (1 - abs(correlation)) * variance, _reach(n, resolution)
        x, step = _grid(n, variance, own, resolution)
        _check_memory(len(x) * len(_gumbel(resolution.step, reach)[0]), variance)
        total = _key(x, variance, reach, resolution)
        x = x[(-n * _log_complement(total.tail) < resolution.digits) & (total.tail > math.exp(-reach))]
        root, (tail, *etas) = _given_shared(n, x, step, variance, correlation, resolution)
        flip = slice(None, None, -1 if correlation < 0 else 1)
        self._n, self._root, self._flip = n, root, flip
        self._tail, self._etas = tail, etas
        chi = tail @ root
        log_below = _log_complement(chi[:, None] + chi - tail @ tail[:, flip].T)
        self._rest = n * step * step * np.exp((n - 2) * log_below)  # the keys other than two
        self._others = self._rest * np.exp(log_below)

    def overlaps(self) -> tuple[float, float, float]:
        """Return ``E Y12``, ``E sum_b A_b A'_b^2`` and ``E Y12^2``."""
        n11 = self._eta(1, 1)
        return (
            self._sum(n11),
            self._sum(self._eta(1, 2)),
            self._sum(self._eta(2, 2), n11 * n11),
        )

    def participations(self) -> tuple[float, float]:
        """Return ``E Y2 Y12`` and ``E Y2 Y2'``."""
        n20 = self._etas[1] @ (self._root - self._tail)[:, self._flip].T
        return (
            self._sum(self._eta(3, 1), n20 * self._eta(1, 1)) / 2,
            self._sum(self._eta(2, 2), n20 * n20.T),
        )

    def _eta(self, k: int, l: int) -> FloatArray:
        return np.asarray(self._etas[k - 1] @ self._etas[l - 1][:, self._flip].T)

    def _sum(self, same_key: FloatArray, two_keys: FloatArray | None = None) -> float:
        value = np.vdot(same_key, self._others)
        if two_keys is not None:
            value += (self._n - 1) * np.vdot(two_keys, self._rest)
        return float(value)


def _given_shared(
    n: float, x: FloatArray, step: float, variance: float, correlation: float, resolution: Resolution
) -> tuple[FloatArray, list[FloatArray]]:
    """Return the roots of the weights of the shared part z and, times them, chi, eta_1, eta_2, eta_3 at ``x - z``."""
    own, std = (1 - abs(correlation)) * variance, math.sqrt(abs(correlation) * variance)
    reach = _reach(n, resolution)
    if std < _NARROW:
        nodes, weights = hermegauss(_FEW_NODES)
        key = _key((x[:, None] - std * nodes).ravel(), own, reach, resolution)
        tables = [f.reshape(len(x), _FEW_NODES) for f in (key.tail, *key.moments[:3])]
    else:  # z on the grid of x, or on one finer by a whole factor, so that chi and eta are tables of x - z
        fold = math.ceil(step / min(step, resolution.step * std))
        fine = step / fold
        half = math.ceil(math.sqrt(2 * reach) * std / fine)
        weights = np.exp(-0.5 * np.square(np.arange(-half, half + 1) * (fine / std)))
        nodes = x[0] + np.arange(-half, (len(x) - 1) * fold + half + 1) * fine
        key = _key(nodes, own, reach, resolution)
        tables = [sliding_window_view(f, len(weights))[::fold] for f in (key.tail, *key.moments[:3])]
    root = np.sqrt(weights / weights.sum())
    used = n * root**2 * tables[0][0] > math.exp(-reach) if correlation > 0 else np.full(len(root), True)
    _check_memory(len(x) * max(len(x), int(used.sum())), variance)
    return root[used], [table[:, used] * root[used] for table in tables]


def _check_memory(n_points: int, variance: float) -> None:
    if n_points > _MAX_POINTS:
        raise DomainError(
            f"the average over two rows does not fit into memory at a score variance of {variance:.3g}", value=variance
        )


def _reach(n: float, resolution: Resolution) -> float:
    """Return minus the logarithm of the rarest probability, for one key, that counts."""
    return (resolution.order + 1) * math.log(n) + resolution.digits


def _grid(n: float, variance: float, own: float, resolution: Resolution) -> tuple[FloatArray, float]:
    """Return the nodes in x and their step.

    The part of log Z that fluctuates in a row of its own damps the error of the trapezoid rule, so the step may grow.
    """
    step = resolution.step * (1 + 0.5 * math.sqrt(own / (2 * math.log(n))))
    reach = _reach(n, resolution)
    top = math.sqrt(2 * variance * reach) if reach < variance / 2 else reach + variance / 2  # Chernoff: chi < e^-reach
    bottom = _GUMBEL_START + math.sqrt(variance) * float(ndtri_exp(-resolution.digits / n))
    return _multiples(step, bottom, top), step


class _Key(NamedTuple):
    """One score plus Gumbel noise at every x: chi, and eta_1 to eta_4 and the mean noise, shape ``(5, len(x))``."""

    tail: FloatArray
    moments: FloatArray


def _key(x: FloatArray, variance: float, reach: float, resolution: Resolution) -> _Key:
    std = math.sqrt(variance)
    if std > 1:  # the noise is the narrower of the two: sum over it; otherwise over the score
        noise, weights = _gumbel(resolution.step, reach)
        t = (x[:, None] - noise) / std
        return _Key(ndtr(-t) @ weights[0], weights @ np.exp(-0.5 * t * t).T / (std * math.sqrt(2 * math.pi)))
    score, weights = _gaussian(resolution.step, math.sqrt(2 * reach))
    y = x[:, None] - std * score
    return _Key(-np.expm1(-np.exp(np.minimum(-y, 100.0))) @ weights, _gumbel_moments(y) @ weights)


@lru_cache(maxsize=64)
def _gumbel(step: float, top: float) -> tuple[FloatArray, FloatArray]:
    """Return nodes of the noise and the weights that sum :func:`_gumbel_moments` over it."""
    y = _multiples(step, _GUMBEL_START, top)
    return y, _gumbel_moments(y) * step


@lru_cache(maxsize=64)
def _gaussian(step: float, top: float) -> tuple[FloatArray, FloatArray]:
    nodes = _multiples(step, -top, top)
    weights = np.exp(-0.5 * np.square(nodes))
    return nodes, np.asarray(weights / weights.sum())


def _multiples(step: float, bottom: float, top: float) -> FloatArray:
    return np.asarray(np.arange(math.floor(bottom / step), math.ceil(top / step) + 1) * step)


def _gumbel_moments(y: FloatArray) -> FloatArray:
    """Return ``e^{-ky} exp(-e^{-y})`` for k = 1 to 4 and ``y e^{-y} exp(-e^{-y})``, along a new first axis."""
    u = np.exp(np.minimum(-y, 100.0))
    density = u * np.exp(-u)
    return np.stack([density, u * density, u**2 * density, u**3 * density, y * density])


def _log_complement(probability: FloatArray) -> FloatArray:
    return np.asarray(np.log1p(-np.minimum(probability, 1 - 1e-16)))
