r"""Many pairs at once, by the Hermite series (Mehler's formula).

With :math:`h_k = He_k/\sqrt{k!}`, orthonormal under the standard Gaussian, and the correlation c of the pair,

.. math:: E f(u) f(v) = \sum_k a_k(q_a)\, a_k(q_b)\, c^k, \qquad a_k(q) = E f(\sqrt q\,x)\, h_k(x).

A Gram matrix of n tokens needs coefficients at its n second moments only, and its n^2 overlaps are then a polynomial
in c. Cutting the series leaves at most, by Cauchy-Schwarz,

.. math:: \Bigl|\sum_{k\ge K} a_k(q_a)\, a_k(q_b)\, c^k\Bigr| \le |c|^K \sqrt{t_K(q_a)\, t_K(q_b)}, \qquad
          t_K = E f^2 - \sum_{k<K} a_k^2.

The series is used for pairs whose bound is below ``TOLERANCE``; the others are left to the method that holds
everywhere. Even and odd orders are cut apart: half of tanh, and but for one term half of GELU and SiLU, is zero.

Source: Mehler, J. reine angew. Math. 66 (1866) 161; in this context Daniely, Frostig and Singer, NeurIPS 2016.
Error: ``TOLERANCE`` times sqrt(E f(u)^2 E f(v)^2) for the cut, plus a rounding error of order 1e-15 of it.
Tails count from the discrete sums, hence the bound is as good as the grid; f must also be small at its ends, which is
checked: a function growing like exp(x) is not expanded at large q.
Assumes: f analytic in a strip of known half width d around the real axis. In standard deviations, d / sqrt(q) decides
all: coefficients fall like exp(-d sqrt(2k/q)), and a trapezoid step h finds them up to exp(-2 pi d / (h sqrt(q))).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import pi, prod, sqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fathometer.kernels.protocol import Moment, ScalarFunction
from fathometer.spec.arrays import FloatArray

TOLERANCE = 1e-12  # relative to sqrt(E f(u)^2 E f(v)^2)
_RANGE = 12.5  # standard deviations; f and the orders above weigh in with the root of the density, 4e-18 there
_EDGE = 1e-13  # largest weight of f at the end of that range, relative to its root mean square
_ROUNDING = 1e-15  # of E f^2, to which the sum of the squared coefficients can be trusted
_TINY = np.finfo(np.float64).tiny
_TILE_POINTS = 1 << 15  # function values held at a time: temporaries of f should fit a cache
_TILE_PAIRS = 1 << 15  # pairs summed at a time, for the same reason
_PRODUCT = 1 << 18  # multiplications of one matrix product: more would start threads, which cost more than they save
_COEFFICIENTS = 1 << 21  # coefficients held at a time

Mask: TypeAlias = NDArray[np.bool_]
Expectation: TypeAlias = Callable[[Moment, Moment, Moment], FloatArray]


@dataclass(frozen=True, kw_only=True)
class HermiteGrid:
    """Trapezoid rule for the Hermite coefficients of functions analytic within ``strip``.

    Args:
        step: Between nodes, in standard deviations.
        strip: Narrowest strip, in standard deviations, for which the rule is exact to rounding: it makes the error
            exp(-2 pi strip / step + strip^2 / 2) equal exp(-40), five digits of which the poles of f'^2 may cost.
        n_terms: Number of even and of odd orders. Enough at c = 1 in the first two grids.
    """

    step: float
    strip: float
    n_terms: int

    @property
    def nodes(self) -> FloatArray:
        """Nodes from zero to the end of the range; their mirror images belong to the rule."""
        return np.arange(0.0, _RANGE + 0.5 * self.step, self.step)


_GRIDS = (  # from functions that hardly vary over one standard deviation to those that vary a lot
    HermiteGrid(step=0.2, strip=1.3, n_terms=96),
    HermiteGrid(step=0.1, strip=0.645, n_terms=384),
    HermiteGrid(step=0.05, strip=0.32, n_terms=1000),
    HermiteGrid(step=0.025, strip=0.16, n_terms=1000),
)


@lru_cache(maxsize=16)
def _rule(grid: HermiteGrid) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the weights of the nodes, and of f(x) +- f(-x) for every even and odd order."""
    x = grid.nodes
    root = np.exp(-0.25 * x * x) / (2.0 * pi) ** 0.25
    orders = np.empty((2 * grid.n_terms, len(x)))
    orders[0], orders[1] = root, x * root  # h_k times the root of the density: neither over- nor underflows
    for k in range(2, len(orders)):
        orders[k] = (x * orders[k - 1] - sqrt(k - 1) * orders[k - 2]) / sqrt(k)
    weights = grid.step * root
    weights[0] *= 0.5  # the node at zero is its own mirror image
    return weights * root, weights * orders[::2], weights * orders[1::2]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Coefficients of one parity at an array of second moments, the order along the first axis.

    Args:
        parity: Zero or one, for the orders 0, 2, 4... or 1, 3, 5...
        coefficients: ``a_k``, shape (n, *shape).
        tails: Entry n is the root of what n terms lack of E f^2, relative to the root of E f^2; shape (n + 1, *shape).
    """

    parity: int
    coefficients: FloatArray
    tails: FloatArray

    @classmethod
    def of(cls, parity: int, coefficients: FloatArray, square: FloatArray, total: FloatArray) -> Terms:
        """Derive the tails from E f^2 of this parity (``square``) and of both (``total``)."""
        tails = np.concatenate([square[None], square - np.cumsum(np.square(coefficients), axis=0)])
        np.maximum(tails, 0.0, out=tails)
        tails += _ROUNDING * total
        tails /= np.maximum(total, _TINY)
        return cls(parity=parity, coefficients=coefficients, tails=np.sqrt(tails, out=tails))

    def bound(self, other: Terms, n_terms: int, cosine: FloatArray) -> FloatArray:
        """Return the largest possible error of ``n_terms`` terms, relative to sqrt(E f(u)^2 E f(v)^2)."""
        powers: FloatArray = np.abs(cosine) ** (2 * n_terms + self.parity)
        value: FloatArray = powers * self.tails[n_terms] * other.tails[n_terms]
        return value

    def needed(self, other: Terms, largest: float) -> int | None:
        """Return the fewest terms within half the tolerance for all pairs with ``|c| <= largest``, if any number is."""
        axes = tuple(range(1, self.tails.ndim))
        powers = largest ** (2.0 * np.arange(len(self.tails)) + self.parity)
        within = powers * self.tails.max(axis=axes) * other.tails.max(axis=axes) <= 0.5 * TOLERANCE
        return int(np.argmax(within)) if within.any() else None

    def reshaped(self, shape: tuple[int, ...]) -> Terms:
        """Return the same for second moments in another shape."""
        return Terms(
            parity=self.parity,
            coefficients=self.coefficients.reshape(-1, *shape),
            tails=self.tails.reshape(-1, *shape),
        )


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Hermite coefficients of f at an array of second moments.

    Args:
        parts: Those of even and those of odd order.
        square: E f^2, summed on its own.
        usable: Where the grid resolves f and f is small at its ends. Elsewhere everything else is zero.
    """

    parts: tuple[Terms, Terms]
    square: FloatArray
    usable: Mask

    @classmethod
    def of(cls, function: ScalarFunction, std: FloatArray, resolved: Mask, grid: HermiteGrid) -> Coefficients:
        """Expand ``function(std x)`` where the grid has ``resolved`` it."""
        x, n, n_std = grid.nodes, grid.n_terms, std.size
        weights, *rules = _rule(grid)
        stack = max(1, min(n_std, _PRODUCT // (n * len(x))))
        padded = -(-n_std // stack) * stack
        flat, usable = np.zeros(padded), np.zeros(padded, dtype=np.bool_)
        flat[:n_std], usable[:n_std] = np.where(resolved, std, 0.0).ravel(), resolved.ravel()
        squares, terms = np.empty((2, padded)), np.empty((2, n, padded))
        rows = stack * max(1, _TILE_POINTS // (stack * len(x)))
        for first in range(0, padded, rows):
            tile = slice(first, first + rows)
            points = np.multiply.outer(flat[tile], x)
            with np.errstate(over="ignore", invalid="ignore"):  # f may overflow out here; then it is not usable
                right, left = function(points), function(-points)
                for parity, part in enumerate((right + left, right - left)):
                    product = part.reshape(-1, stack, len(x)) @ rules[parity].T
                    terms[parity, :, tile] = product.reshape(-1, n).T
                    squares[parity, tile] = np.square(part) @ (0.5 * weights)
            edge = np.maximum(np.abs(right[:, -1]), np.abs(left[:, -1])) * np.exp(-0.25 * x[-1] ** 2)
            square = squares[0, tile] + squares[1, tile]
            usable[tile] &= np.isfinite(square) & (edge <= _EDGE * np.sqrt(square))
        squares[:, ~usable], terms[:, :, ~usable] = 0.0, 0.0
        squares, terms, usable = squares[:, :n_std], terms[:, :, :n_std], usable[:n_std]
        total = squares[0] + squares[1]
        even, odd = (Terms.of(parity, terms[parity], squares[parity], total) for parity in (0, 1))
        return cls(parts=(even, odd), square=total, usable=usable).reshaped(std.shape)

    def reshaped(self, shape: tuple[int, ...]) -> Coefficients:
        """Return the same for second moments in another shape."""
        even, odd = self.parts
        return Coefficients(
            parts=(even.reshaped(shape), odd.reshaped(shape)),
            square=self.square.reshape(shape),
            usable=self.usable.reshape(shape),
        )


@dataclass(frozen=True, kw_only=True)
class Worth:
    """When the series is faster than the method it replaces.

    Args:
        n_pairs: Fewest pairs.
        sharing: Fewest pairs per second moment.
        n_terms: Most terms of each parity.
        reach: Smallest fraction of pairs for which so many terms suffice.
    """

    n_pairs: int
    sharing: int
    n_terms: int
    reach: float


@dataclass(frozen=True, kw_only=True)
class HermiteSeries:
    """Gaussian expectations of one function over many pairs.

    Args:
        function: On float64 arrays of any shape.
        strip: Half width of the strip around the real axis where it is analytic.
        worth: When to use the series.
    """

    function: ScalarFunction
    strip: float
    worth: Worth

    def expectation(self, q_a: Moment, q_b: Moment, p: Moment, *, otherwise: Expectation) -> FloatArray:
        """Return E f(u) f(v), from ``otherwise`` where the series does not hold or would not be faster."""
        if isinstance(p, float) and isinstance(q_a, float) and isinstance(q_b, float):
            return otherwise(q_a, q_b, p)
        shape = np.broadcast_shapes(np.shape(q_a), np.shape(q_b), np.shape(p))
        size = prod(shape)
        if size < self.worth.n_pairs or (q_a is p and q_b is p):  # on the diagonal there is nothing to expand
            return otherwise(q_a, q_b, p)
        first, second = _distinct(q_a, len(shape)), _distinct(q_b, len(shape))
        if size < self.worth.sharing * max(first.size, second.size):
            return otherwise(q_a, q_b, p)
        std_a, std_b = np.sqrt(first), np.sqrt(second)
        resolved_a, resolved_b = (std * _GRIDS[-1].strip <= self.strip for std in (std_a, std_b))
        if not (resolved_a.any() and resolved_b.any()):
            return otherwise(q_a, q_b, p)
        widest = max(np.max(std_a, where=resolved_a, initial=0.0), np.max(std_b, where=resolved_b, initial=0.0))
        grid = next(grid for grid in _GRIDS if widest * grid.strip <= self.strip)
        grid = replace(grid, n_terms=min(grid.n_terms, self.worth.n_terms))
        overlap, out = np.broadcast_to(np.asarray(p, dtype=np.float64), shape), np.empty(shape)
        for block in _blocks(shape, (first.shape, second.shape), _COEFFICIENTS // (2 * grid.n_terms)):
            a, b = _part(std_a, block), _part(std_b, block)
            at_a = Coefficients.of(self.function, a, _part(resolved_a, block), grid)
            if a.size == b.size and np.array_equal(a.ravel(), b.ravel()):
                at_b = at_a.reshaped(b.shape)
            else:
                at_b = Coefficients.of(self.function, b, _part(resolved_b, block), grid)
            moments = _part(first, block), _part(second, block), overlap[block]
            _fill(out[block], moments, (at_a, at_b), self.worth.reach, otherwise)
        return out


def _fill(
    out: FloatArray,
    moments: tuple[FloatArray, FloatArray, FloatArray],
    coefficients: tuple[Coefficients, Coefficients],
    reach: float,
    otherwise: Expectation,
) -> None:
    """Write the expectations of a block: the sum of the series, E f^2 on the diagonal, ``otherwise`` for the rest."""
    (q_a, q_b, p), (at_a, at_b) = moments, coefficients
    cosine = p / np.maximum(np.sqrt(q_a * q_b), _TINY)
    np.minimum(np.maximum(cosine, -1.0, out=cosine), 1.0, out=cosine)
    usable = at_a.usable & at_b.usable
    same = (cosine == 1.0) & (q_a == q_b) & usable
    largest = float(np.max(np.abs(cosine), where=~same, initial=0.0))
    within, lengths = usable, []
    for a, b in zip(at_a.parts, at_b.parts, strict=True):
        length = a.needed(b, largest)
        if length is None:
            length = len(a.coefficients)
            within = within & (a.bound(b, length, cosine) <= 0.5 * TOLERANCE)
        lengths.append(length)
    rest = np.broadcast_to(~(within | same), out.shape)
    if np.mean(rest) > 1.0 - reach:
        out[...] = otherwise(q_a, q_b, p)
        return
    for tile in _blocks(out.shape, (out.shape,), _TILE_PAIRS):
        c = cosine[tile]
        even, odd = (
            _horner(*(_part(x.coefficients[:length], (slice(None), *tile)) for x in pair), x=np.square(c))
            for *pair, length in zip(at_a.parts, at_b.parts, lengths, strict=True)
        )
        out[tile] = even + c * odd
    np.copyto(out, at_a.square, where=same)
    if rest.any():
        out[rest] = otherwise(np.broadcast_to(q_a, out.shape)[rest], np.broadcast_to(q_b, out.shape)[rest], p[rest])


def _horner(a: FloatArray, b: FloatArray, *, x: FloatArray) -> FloatArray:
    """Return ``sum_n a_n b_n x^n``."""
    total, term = np.zeros_like(x), np.empty_like(x)
    for a_n, b_n in zip(a[::-1], b[::-1], strict=True):
        total *= x
        total += np.multiply(a_n, b_n, out=term)
    return total


def _distinct(q: Moment, ndim: int) -> FloatArray:
    """Return ``q`` with ``ndim`` axes, those along which it only repeats itself cut to length one."""
    array = np.asarray(q, dtype=np.float64)
    array = array[(None,) * (ndim - array.ndim)]
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


def _blocks(shape: tuple[int, ...], operands: tuple[tuple[int, ...], ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Halve ``shape`` until no part of an operand, of a shape that broadcasts to it, exceeds ``limit`` elements."""
    pending = [tuple((0, length) for length in shape)]
    while pending:
        spans = pending.pop()
        lengths = [
            [stop - start if n > 1 else 1 for (start, stop), n in zip(spans, operand, strict=True)]
            for operand in operands
        ]
        largest = max(lengths, key=prod)
        if prod(largest) <= max(limit, 1):
            yield tuple(slice(*span) for span in spans)
            continue
        axis = next(axis for axis, length in enumerate(largest) if length > 1)
        start, stop = spans[axis]
        middle = (start + stop) // 2
        for half in ((middle, stop), (start, middle)):
            pending.append((*spans[:axis], half, *spans[axis + 1 :]))


def _part(array: NDArray[Any], block: tuple[slice, ...]) -> NDArray[Any]:
    """Return the part of a broadcast operand that belongs to a block."""
    return array[tuple(s if n > 1 else slice(None) for s, n in zip(block, array.shape, strict=True))]
