r"""An activation at second moments that stay the same: behind LayerNorm, at every layer and point of a grid.

There a pair kernel is one function of the overlap for each second moment. Elementary closed forms are kept, with their
diagonal computed once; of others, quintic splines hold

.. math:: E f(u) f(v) \quad\text{and}\quad \sqrt{1 - s^2}\; E f'(u) f'(v) \qquad\text{over}\quad
          \operatorname{artanh} s, \quad s = \frac{p}{q + \beta} .

A saturating function has the singularities of its kernel just outside |p| = q, ever closer as q grows; the variable
spreads the ends logarithmically and the root removes the divergence, so that about a hundred intervals serve any q.

Error: intervals are halved until, in their middles and at several second moments, overlap and slope differ from the
kernel by less than ``TOLERANCE`` of their diagonal. It is absolute: where 1 - p/q is itself of that size, its digits
are lost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import factorial, pi, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from fathometer.kernels.closed_forms import ErfKernel, GELUKernel, IdentityKernel, ReLUKernel
from fathometer.kernels.protocol import Moment, PairKernel
from fathometer.spec.arrays import FloatArray
from fathometer.spec.batch import cut_aligned

TOLERANCE = 1e-8
_INTERVALS = (32, 64, 128, 256, 512, 1024)
_DEGREE = 5
_LARGEST = 1e8  # sharper functions need more intervals than the finest table has
_SOFTNESS = 0.3  # beta: 1/alpha^2 of the error function nearest to tanh, SiLU and GELU within a factor of two
_CHECKED = 7  # second moments at which a table is compared with the kernel
_ELEMENTARY = (ErfKernel, GELUKernel, IdentityKernel, ReLUKernel)


class Place(NamedTuple):
    """Where overlaps lie in a table: the piece, the fraction of it, and sqrt(1 - s^2)."""

    piece: NDArray[np.intp]
    fraction: FloatArray
    root: FloatArray


@dataclass(frozen=True)
class SplineTable:
    """One spline for every row.

    Args:
        pieces: Coefficients of the powers of the fraction of an interval, highest first; shape ``(6, n_rows *
            n_intervals)``.
    """

    pieces: FloatArray

    @classmethod
    def of(cls, values: FloatArray) -> SplineTable:
        """Interpolate values at equidistant nodes; shape ``(n_rows, n_intervals + 1)``."""
        n_intervals = values.shape[1] - 1
        spline = make_interp_spline(np.arange(n_intervals + 1.0), values, k=_DEGREE, axis=1)
        left = np.arange(float(n_intervals))
        pieces = np.stack([spline(left, nu=power) / factorial(power) for power in range(_DEGREE, -1, -1)])
        return cls(pieces.reshape(_DEGREE + 1, -1))

    def __call__(self, place: Place) -> FloatArray:
        """Return the splines there."""
        value: FloatArray = self.pieces[0].take(place.piece)
        for power in range(1, _DEGREE + 1):
            value *= place.fraction
            value += self.pieces[power].take(place.piece)
        return value


class FixedMomentKernel:
    """The kernel of an activation where both second moments equal a given one.

    Args:
        kernel: What to evaluate.
        q: The second moment, a number or an array; overlaps asked for later broadcast with it.
    Raises:
        ArithmeticError: if the finest table misses the tolerance, or a second moment is zero or huge.
    """

    def __init__(self, kernel: PairKernel, q: Moment) -> None:
        self.q = q
        self._kernel = kernel
        self._overlap_diagonal = kernel.overlap(q, q, q)
        self._slope_diagonal = kernel.slope_overlap(q, q, q)
        self._row = np.arange(prod(np.shape(q))).reshape(np.shape(q))
        self._last: tuple[Moment, Place] | None = None
        self._tables = None if isinstance(kernel, _ELEMENTARY) else self._tabulate()

    def part(self, index: tuple[slice, ...]) -> FixedMomentKernel:
        """Return the kernel on a part of a grid, sharing the tables; ``index`` as in :func:`fathometer.spec.sliced`."""
        cut = copy.copy(self)
        cut.q, cut._overlap_diagonal, cut._slope_diagonal, cut._row = (
            cut_aligned(np.asarray(x), index) for x in (self.q, self._overlap_diagonal, self._slope_diagonal, self._row)
        )
        return cut

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f(u) f(v); the diagonal where both arguments are the same object."""
        if p is q_a:
            return self._overlap_diagonal
        if self._tables is None:
            return self._kernel.overlap(self.q, self.q, p)
        return self._tables[0](self._place(p))

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f'(u) f'(v); the diagonal where both arguments are the same object."""
        if p is q_a:
            return self._slope_diagonal
        if self._tables is None:
            return self._kernel.slope_overlap(self.q, self.q, p)
        place = self._place(p)
        return self._tables[1](place) / place.root

    def mean(self, q: Moment) -> FloatArray:
        """Return E f(u)."""
        return self._kernel.mean(q)

    def _place(self, p: Moment) -> Place:
        """Return where an overlap lies in the tables; asked twice in a row, for overlap and slope."""
        if self._last is None or self._last[0] is not p:
            self._last = (p, _locate(p, self.q, self._row, self._n_intervals))
        return self._last[1]

    def _tabulate(self) -> tuple[SplineTable, SplineTable]:
        q = np.reshape(self.q, -1)
        if not np.all((q > 0) & (q < _LARGEST)):
            raise ArithmeticError(f"tables need second moments between 0 and {_LARGEST:g}")
        nodes, weights = _moment_nodes(q)
        units = np.stack([self._overlap_diagonal, self._slope_diagonal]).reshape(2, -1, 1)
        checked = np.unique(np.linspace(0, len(q) - 1, _CHECKED).astype(int))
        known = self._at(nodes, np.linspace(-1, 1, _INTERVALS[0] + 1))
        worst = np.inf
        for n in _INTERVALS:
            middles = (2 * np.arange(n) + 1) / n - 1
            overlap, slope = SplineTable.of(weights @ known[0]), SplineTable.of(weights @ known[1])
            place = _locate(_overlaps(q[checked], middles), q[checked, None], checked[:, None], n)
            seen = np.stack([overlap(place), slope(place)])
            error = np.abs(seen - self._at(q[checked], middles)) / units[:, checked]
            error[1] /= place.root
            worst = float(np.max(error))
            if worst <= TOLERANCE:
                self._n_intervals = n
                return overlap, slope
            merged = np.empty((2, len(nodes), 2 * n + 1))
            merged[..., ::2], merged[..., 1::2] = known, self._at(nodes, middles)
            known = merged
        raise ArithmeticError(f"a table of {_INTERVALS[-1]} intervals errs by {worst:.1e} of the diagonal")

    def _at(self, q: FloatArray, positions: FloatArray) -> FloatArray:
        """Return what is tabulated at fractions of the largest artanh s, shape ``(2, n_q, n_positions)``."""
        column, p = q[:, None], _overlaps(q, positions)
        root = np.sqrt(1 - (p / (_SOFTNESS + column)) ** 2)
        kernel = self._kernel
        return np.stack([kernel.overlap(column, column, p), kernel.slope_overlap(column, column, p) * root])


def _overlaps(q: FloatArray, positions: FloatArray) -> FloatArray:
    column = q[:, None]
    return np.asarray(
        np.clip((_SOFTNESS + column) * np.tanh(positions * np.arctanh(column / (_SOFTNESS + column))), -column, column)
    )


def _locate(p: Moment, q: Moment, row: NDArray[np.intp], n_intervals: int) -> Place:
    sine = p / (_SOFTNESS + q)
    half = n_intervals / 2
    position = np.arctanh(sine) * (half / np.arctanh(q / (_SOFTNESS + q))) + half
    piece = np.minimum(np.maximum(position, 0.0).astype(np.intp), n_intervals - 1)
    return Place(piece + row * n_intervals, position - piece, np.sqrt(1 - sine * sine))


def _moment_nodes(q: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return second moments to evaluate at, and the matrix that interpolates from them to ``q``.

    Many second moments are reached from Chebyshev nodes in log q, in which kernels are analytic; few are their own.
    """
    low, high = np.log(q.min(initial=np.inf)), np.log(q.max(initial=0.0))
    n_nodes = 24 + int(np.ceil(6 * (high - low))) if np.isfinite(low) else len(q)
    if len(q) <= n_nodes:
        return q, np.eye(len(q))
    angle = (np.arange(n_nodes) + 0.5) * (pi / n_nodes)
    nodes = (low + high) / 2 + (high - low) / 2 * np.cos(angle)
    weights = (-1.0) ** np.arange(n_nodes) * np.sin(angle)  # barycentric
    gap = np.log(q)[:, None] - nodes
    hit = gap == 0
    terms = weights / np.where(hit, 1.0, gap)
    terms = np.where(hit.any(axis=1, keepdims=True), hit, terms)
    return np.exp(nodes), terms / terms.sum(axis=1, keepdims=True)
