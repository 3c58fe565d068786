r"""The averages of finite softmax rows as a closure, from Chebyshev tables.

The score variance enters through ``b = sqrt(v / (2 ln n))``, which is one where a random energy model freezes; tables
run over ``X = arctan((b - 0.6)/0.35)``, in which the averages are smooth for all ``v`` from zero to infinity, with the
finest nodes where numerators freeze. The correlation ``c`` enters through the variance ``w = (1-c) v`` that each row
has of its own, in ``u = (sqrt(1 + w) - 1)/(sqrt(1 + w_max) - 1)``, where ``w_max = v n/(n-1)`` belongs to the most
negative correlation of exchangeable tokens, ``-1/(n-1)``. Logarithms are tabulated, so errors are relative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from scipy.special import expit

from fathometer.attention.closure import AttentionStatistics, ValuePath, exact_value_path
from fathometer.attention.softmax_rows import COARSE, FINE, PairQuadrature, Resolution, check_scores, row_averages
from fathometer.spec.arrays import FloatArray

_UNIFORM_BELOW = 1e-10  # in variance: the error of uniform attention is of that order
_CENTRE, _WIDTH = 0.6, 0.35  # of the map from b to X
_X_FIRST, _X_LAST = math.atan(-_CENTRE / _WIDTH), math.pi / 2
_MOST_KEYS = 1e12
_ROW_NODES, _COUNT_NODES = 64, 36
_ROUNDING = 1e-9  # by which a correlation may exceed one
_ANCHORS = np.array([1.0, 1.25, 1.6])  # deviations, from the edge of a pair table inwards, that extrapolate it
_DEGREES = np.arange(128.0)
_CHUNK = 1 << 13  # points evaluated at a time, to stay in cache


@dataclass(frozen=True)
class Exact:
    r"""True averages over softmax rows of a finite number of Gaussian scores; the limit of wide layers.

    Nothing is annealed: the averages are those of :func:`~fathometer.attention.softmax_rows.row_averages` and
    :func:`~fathometer.attention.softmax_rows.pair_averages`, read from tables with a relative error below 1e-5
    (entropy: ``1e-6 ln n``), typically 1e-7. Tables of row averages cover every variance, those of pairs reach to
    ``v = 8 ln n + 40``; beyond, ``Y12/Y2`` and its counterpart for the scores are extrapolated to second order in
    ``1/sqrt(v)``, with errors below 1e-3 and 3e-3 at 1.5 times that variance and of 2 % at four times. Below
    ``v = 1e-10`` attention is uniform, and rows of correlation zero are independent, ``Y12 = 1/n``, exactly. Derived
    here; finite width and few dimensions per head have corrections in :mod:`fathometer.attention.corrections`.

    Cost: the first use of a number of tokens builds its table, which takes 0.5 s at 64, 1 s at 1e6 and 4 s at 1e12;
    then 12 microseconds for a scalar and 0.4 s for a million points. Arrays of different numbers of tokens share one
    table of rows (1 s); where their correlation is not zero, each number needs its table of pairs.
    """

    name: str = "exact"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`~fathometer.attention.closure.Closure`.

        Correlations that exchangeable tokens cannot have, below ``-1/(n-1)``, count as that one.

        Raises:
            DomainError: if there is no token or more than 1e12, the variance is negative or not finite, or the
                correlation is not one.
        """
        check_scores(n_tokens, variance, correlation, most_keys=_MOST_KEYS, rounding=_ROUNDING)
        if isinstance(variance, float) and isinstance(correlation, float) and isinstance(n_tokens, int | float):
            point = AttentionStatistics(*_evaluate_point(float(n_tokens), float(variance), float(correlation)))
            return point if entropy else point._replace(entropy=None)
        n, v, c = (np.asarray(x, dtype=np.float64) for x in (n_tokens, variance, correlation))
        shape = np.broadcast(n, v, c).shape
        n, v, c = (
            x.reshape(-1) if x.shape in ((), shape) else np.broadcast_to(x, shape).reshape(-1) for x in (n, v, c)
        )
        counts = np.unique(n).tolist() if len(n) > 1 else n.tolist()
        rows = _row_table(counts[0]) if len(counts) == 1 else _row_tables(counts)
        out = np.empty((5 if entropy else 4, math.prod(shape)))
        for start in range(0, out.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            _evaluate(out[:, part], counts, rows, *(x[part] if len(x) > 1 else x for x in (n, v, c)))
        y2, y12, score, score_pair, *rest = (average.reshape(shape)[()] for average in out)
        return AttentionStatistics(y2, y12, score, score_pair, rest[0] if entropy else None)

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`~fathometer.attention.closure.Closure`."""
        return exact_value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        """See :class:`~fathometer.attention.closure.Closure`."""
        return max(n_tokens - 1, 1)


def _evaluate_point(n: float, v: float, c: float) -> tuple[float, ...]:
    """Return the five averages; :func:`_evaluate` in plain floats, several times faster."""
    level, others = 1 / n, n - 1
    if v <= _UNIFORM_BELOW or n == 1:
        return level, level, others / n**2, others / n**2, math.log(n)
    grown = 1 + math.sqrt(v)
    x = math.atan((math.sqrt(v / (2 * math.log(n))) - _CENTRE) / _WIDTH)
    odds, weight, spread = (_row_table(n) @ _chebyshev_point(_unit(x, _X_FIRST, _X_LAST), _ROW_NODES)).tolist()
    y2 = 1 / (1 + math.exp(-odds) * others / grown)
    score = math.exp(weight) * others / (n * n * grown)
    entropy = math.exp(spread) * math.log(n) / grown
    if c == 0:
        return y2, level, score, (1 - y2) ** 2 / others, entropy
    overlap, weight = _pair_table(n).ratios_at(x, v, c)
    return y2, y2 * overlap, score, score * weight, entropy


def _evaluate(
    out: FloatArray, counts: list[float], rows: FloatArray, n: FloatArray, v: FloatArray, c: FloatArray
) -> None:
    """Write the averages into the rows of ``out``, entropy last and only if there is a row for it.

    ``rows`` are the row tables of the counts, or that of the only one. Each of ``n``, ``v`` and ``c`` has one element
    or as many as ``out`` has columns.
    """
    grown, others = 1 + np.sqrt(v), np.maximum(n - 1, 1.0)
    x = _x_of(n, v)
    basis = _chebyshev(_unit(x, _X_FIRST, _X_LAST), _ROW_NODES)
    table = rows @ basis if rows.ndim == 2 else np.einsum("pqk,kp->qp", rows[np.searchsorted(counts, n)], basis)
    y2, y12, score, score_pair, *entropy = out
    y2[:] = expit(table[0] + np.log(grown / others))
    y12[:] = 1 / n
    score[:] = np.exp(table[1]) * others / (n * n * grown)
    score_pair[:] = (1 - y2) ** 2 / others
    for mean in entropy:
        mean[:] = np.exp(table[2]) * np.log(n) / grown
    varied = (v > _UNIFORM_BELOW) & (n > 1)
    if np.count_nonzero(varied) < len(varied):
        uniform = (1 / n, 1 / n, (n - 1) / n**2, (n - 1) / n**2, np.log(n))
        for average, value in zip(out, uniform, strict=False):
            np.copyto(average, value, where=~varied)
    related = varied & (c != 0)
    if np.count_nonzero(related):
        x, v, c, related = (a if len(a) == len(y2) else np.broadcast_to(a, y2.shape) for a in (x, v, c, related))
        for count in counts if len(counts) == 1 else np.unique(n[related]).tolist():
            which = related & (n == count)
            part = slice(None) if np.count_nonzero(which) == len(which) else which
            overlap, weight = _pair_table(count).ratios(x[part], v[part], c[part])
            y12[part] = y2[part] * overlap
            score_pair[part] = score[part] * weight


def _x_of(n: Any, v: Any) -> FloatArray:
    """Return the coordinate of the variance."""
    return np.asarray(np.arctan((np.sqrt(v / (2 * np.log(np.maximum(n, 2.0)))) - _CENTRE) / _WIDTH))


def _variance_of(n: Any, x: FloatArray) -> FloatArray:
    return np.asarray(2 * np.log(n) * np.maximum(_CENTRE + _WIDTH * np.tan(x), 0.0) ** 2)


def _row_values(n: Any, v: Any, resolution: Resolution) -> FloatArray:
    """Return what the row tables hold, smooth in both arguments: logarithms of y2/(1 - y2), score and entropy."""
    row, std = row_averages(n, v, resolution=resolution), np.sqrt(v)
    return np.log(
        [
            row.y2 / (1 - row.y2) * (n - 1) / (1 + std),
            row.score * n * n / (n - 1) * (1 + std),
            row.entropy / np.log(n) * (1 + std),
        ]
    )


@cache
def _row_table(n: float) -> FloatArray:
    """Return the coefficients in X, shape ``(3, nodes)``."""
    if n == 1:
        return np.zeros((3, _ROW_NODES))
    variance = _variance_of(n, _nodes(_X_FIRST, _X_LAST, _ROW_NODES))
    return _row_values(n, variance, FINE) @ _to_coefficients(_ROW_NODES)


def _row_tables(counts: list[float]) -> FloatArray:
    """Return the coefficients in X for many counts, shape ``(counts, 3, nodes)``."""
    log_n = _unit(np.log(np.maximum(counts, 2.0)), math.log(2.0), math.log(_MOST_KEYS))
    return np.asarray(np.einsum("tqk,tn->nqk", _row_table_of_all_counts(), _chebyshev(log_n, _COUNT_NODES)))


@lru_cache(maxsize=1)
def _row_table_of_all_counts() -> FloatArray:
    """Return the coefficients in log n and X, shape ``(count nodes, 3, nodes)``; takes a second."""
    n = np.exp(_nodes(math.log(2.0), math.log(_MOST_KEYS), _COUNT_NODES))[:, None]
    variance = _variance_of(n, _nodes(_X_FIRST, _X_LAST, _ROW_NODES))
    values = _row_values(n, variance, COARSE) @ _to_coefficients(_ROW_NODES)
    return np.asarray(np.einsum("qnk,nt->tqk", values, _to_coefficients(_COUNT_NODES)))


@dataclass(frozen=True)
class _PairTable:
    """Coefficients in u and X, shape ``(2, u nodes, X nodes)``, up to the variance ``v_last``."""

    n: float
    v_last: float
    x_last: float
    coefficients: FloatArray

    def ratios(self, x: FloatArray, v: FloatArray, c: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ``y12/y2`` and ``score_pair/score``."""
        n_u = self.coefficients.shape[1]
        lowest = 1 + 1 / (self.n - 1)  # of 1 - c, at its largest
        apart = np.minimum(np.maximum(1 - c, 0.0), lowest)
        root = np.sqrt(1 + apart * v)
        u = apart * (1 + np.sqrt(1 + lowest * v)) / (lowest * (1 + root))
        along_u = _chebyshev(_unit(u, 0.0, 1.0), n_u)
        overlap, weight = np.exp(np.einsum("qup,up->qp", self.coefficients @ self._along_x(x, v), along_u))
        return overlap, weight / root

    def ratios_at(self, x: float, v: float, c: float) -> tuple[float, float]:
        """Return the same at one point, in plain floats."""
        if v > self.v_last:
            overlaps, weights = self.ratios(*np.array([[x], [v], [c]]))
            return float(overlaps[0]), float(weights[0])
        _, n_u, n_x = self.coefficients.shape
        lowest = 1 + 1 / (self.n - 1)
        apart = min(max(1 - c, 0.0), lowest)
        root = math.sqrt(1 + apart * v)
        u = apart * (1 + math.sqrt(1 + lowest * v)) / (lowest * (1 + root))
        along_x = _chebyshev_point(_unit(x, _X_FIRST, self.x_last), n_x)
        overlap, weight = (self.coefficients @ along_x @ _chebyshev_point(_unit(u, 0.0, 1.0), n_u)).tolist()
        return math.exp(overlap), math.exp(weight) / root

    def _along_x(self, x: FloatArray, v: FloatArray) -> FloatArray:
        """Return the basis along X, beyond the edge extrapolated to second order in one over the deviation."""
        n_x = self.coefficients.shape[2]
        basis = _chebyshev(_unit(np.minimum(x, self.x_last), _X_FIRST, self.x_last), n_x)
        beyond = v > self.v_last
        if np.count_nonzero(beyond):
            anchors = _chebyshev(_unit(_x_of(self.n, self.v_last / _ANCHORS**2), _X_FIRST, self.x_last), n_x)
            ratio = np.sqrt(self.v_last / v[beyond])
            basis[:, beyond] = anchors @ np.linalg.solve(np.vander(_ANCHORS).T, np.stack([ratio**2, ratio, ratio**0]))
        return basis


@cache
def _pair_table(n: float) -> _PairTable:
    n_x = 30 + round(1.3 * math.log(n))
    n_u = 14 + round(0.4 * math.log(n)) if n > 8 else 24  # few tokens can be strongly anticorrelated
    v_last = 8 * math.log(n) + 40
    x_last = float(_x_of(n, v_last))
    variance = _variance_of(n, _nodes(_X_FIRST, x_last, n_x))
    rows = row_averages(n, variance)
    values = np.empty((2, n_u, n_x))
    for i, v in enumerate(variance.tolist()):
        widest = v * n / (n - 1)
        stretch = widest / (1 + math.sqrt(1 + widest))
        for j, u in enumerate(_nodes(0.0, 1.0, n_u).tolist()):
            own = u * stretch * (2 + u * stretch)
            y12, z12, y12_squared = PairQuadrature(n, v, 1 - own / v, COARSE).overlaps()
            values[:, j, i] = y12 / rows.y2[i], (y12 - 2 * z12 + y12_squared) / rows.score[i] * math.sqrt(1 + own)
    coefficients = np.einsum("qji,jk,il->qkl", np.log(values), _to_coefficients(n_u), _to_coefficients(n_x))
    return _PairTable(n, v_last, x_last, coefficients)


def _unit(x: Any, first: float, last: float) -> Any:
    """Map an interval to [-1, 1]."""
    return (2 * x - (first + last)) / (last - first)


def _nodes(first: float, last: float, count: int) -> FloatArray:
    """Return the Chebyshev nodes of an interval; its ends are none."""
    return first + (last - first) * (1 + np.cos(math.pi * (np.arange(count) + 0.5) / count)) / 2


def _to_coefficients(count: int) -> FloatArray:
    """Return the matrix from values at the nodes to Chebyshev coefficients, shape ``(values, coefficients)``."""
    matrix = np.cos(math.pi * np.outer(np.arange(count) + 0.5, np.arange(count)) / count) * (2 / count)
    matrix[:, 0] /= 2
    return matrix


def _chebyshev_point(x: float, count: int) -> FloatArray:
    """Return the polynomials of degree below ``count`` at one point."""
    return np.cos(math.acos(min(max(x, -1.0), 1.0)) * _DEGREES[:count])


def _chebyshev(x: FloatArray, count: int) -> FloatArray:
    """Return the polynomials of degree below ``count``, shape ``(count, len(x))``."""
    out = np.empty((count, len(x)))
    out[0], out[1] = 1.0, x
    for k in range(2, count):
        np.multiply(2 * x, out[k - 1], out=out[k])
        out[k] -= out[k - 2]
    return out
