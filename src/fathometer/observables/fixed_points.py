r"""Where tokens end up when one block is repeated for ever.

One block maps the second moment q and the cosine c = p/q of the tokens to new ones. Equal tokens, c = 1, stay equal:
the *collapsed* state always exists. Whether it attracts, and where tokens go if it does not, are the phases

* ``"collapsed"``: the collapsed state attracts, and depth makes all tokens alike;
* ``"simplex"``: it repels, and tokens settle at a common cosine 0 < c < 1, the corners of a simplex;
* ``"orthogonal"``: they settle at c = 0, up to terms in ``1/n``.

Source: the map and the first two phases, Cowsik et al., arXiv:2403.02579; the split of the chaotic phase, its boundary
    and the reduction to one dimension are derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fathometer.attention import DEFAULT_CLOSURE, Closure, Uniform, as_closure
from fathometer.errors import DomainError
from fathometer.propagation import BlockMap, Moments, check_tokens
from fathometer.spec import Transformer, batch_shape

FloatArray = NDArray[np.float64]

PHASES = ("collapsed", "simplex", "orthogonal")

_LARGEST, _SMALLEST = 1e9, 1e-9  # second moments searched when the norm equation is not linear
_NEAREST = 1e-8  # 1 - c below which an interior state is not told from the collapsed one
_DIFFERENCE = 1e-5  # step of the central differences in the Jacobian
_MANY_TOKENS = 10**6  # from which the most negative shared cosine is zero
_MARGINAL = 1e-12  # growth of the angle below which it is rounding
_HALVINGS = 52
_INTERIOR_HALVINGS = 30  # of a range of 18 in log(1 - c): to 2e-8
_MANY = 4096  # points of a grid from which tables of activations pay


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """A state that one block maps to itself.

    Attributes:
        q: Second moment at the block's border.
        cosine: p/q.
        rates: Eigenvalues of the map in (q, c) there, larger modulus first; of the collapsed state, that of the norm
            and that of the angle.
        kind: ``"collapsed"``, ``"orthogonal"`` where the state attracts and orthogonal tokens do in the limit of many
            tokens, or whose cosine is zero; else ``"simplex"``.
    """

    q: float
    cosine: float
    rates: tuple[complex, complex]
    kind: str

    @property
    def is_stable(self) -> bool:
        """Whether every rate has modulus below one."""
        return max(abs(rate) for rate in self.rates) < 1


@dataclass(frozen=True, kw_only=True)
class StableState:
    """The attracting state of every point of a grid.

    Attributes:
        phase: One of :data:`PHASES`, or ``"none"`` where the norm grows for ever or dies out; shape
            ``batch``.
        q, cosine: The state; meaningful where ``phase`` is not ``"none"``.
        transfer: Transfer matrix of the block on (J, K) at that state; shape ``(2, 2, *batch)``.
    """

    phase: NDArray[np.str_]
    q: FloatArray
    cosine: FloatArray
    transfer: FloatArray


def last_block(spec: Transformer, n_tokens: int, closure: Closure | str) -> BlockMap:
    """Return the last block of a spec as a map on moments, causal masks dropped: late positions stand in for all.

    Raises:
        DomainError: for fewer than two tokens, which have no angle.
    """
    check_tokens(n_tokens)
    if n_tokens < 2:
        raise DomainError(f"angles between tokens need n_tokens >= 2; got {n_tokens}", value=n_tokens)
    block = spec.bidirectional().blocks[-1]
    return BlockMap(block, n_tokens, as_closure(closure), tabulate=prod(batch_shape(spec)) >= _MANY)


def fixed_norm(block: BlockMap, cosine: Any) -> FloatArray:
    """Return the second moment that a block preserves at a given cosine.

    It is infinite where the norm grows for ever, and zero where the stream dies out.

    With a norm that divides by the size of a token in front of every branch, or after every sum, the equation is
    linear in q: three evaluations. Otherwise it is bisected in log q within ``[1e-9, 1e9]``, 52 evaluations.

    Args:
        block: The block.
        cosine: p/q, a number or an array that broadcasts with the block's fields.
    """
    slope = _norm_slope(block, cosine)
    if slope is not None:
        return _linear_norm(block, cosine, slope)
    low = np.full(np.shape(_level(block, 1.0, cosine)), np.log(_SMALLEST))
    high = np.full(low.shape, np.log(_LARGEST))
    with np.errstate(over="ignore", invalid="ignore"):
        grows = _level(block, np.exp(high), cosine) >= np.exp(high)
        dies = _level(block, np.exp(low), cosine) <= np.exp(low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            rises = _level(block, np.exp(middle), cosine) > np.exp(middle)
            low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return np.asarray(np.where(grows, np.inf, np.where(dies, 0.0, np.exp((low + high) / 2))))


def starting_norm(spec: Transformer, n_tokens: int, closure: Closure | str) -> FloatArray:
    """Return the second moment that the last block preserves for equal tokens, for stacks to start from.

    Raises:
        DomainError: if there is none at some point of the grid.
    """
    q = fixed_norm(last_block(spec, n_tokens, closure), 1.0)
    if not np.all(exists(q)):
        raise DomainError(
            "the norm of the stream grows for ever or dies out: give the second moment q of the tokens", value=np.inf
        )
    return q


def exists(q: FloatArray) -> NDArray[np.bool_]:
    """Return where :func:`fixed_norm` found one."""
    return np.isfinite(q) & (q > 0)


def _level(block: BlockMap, q: Any, cosine: Any) -> FloatArray:
    return np.asarray(block.forward(Moments(q, cosine * q)).q)


def _norm_slope(block: BlockMap, cosine: Any) -> FloatArray | None:
    """Return dq'/dq where q' is linear in q, as behind norms that divide by the size of a token; it knows no cosine."""
    one, two, four = (_level(block, q, cosine) for q in (1.0, 2.0, 4.0))
    slope = two - one
    return slope if np.all(np.abs(four - two - 2 * slope) <= 1e-12 * np.abs(four)) else None


def _linear_norm(block: BlockMap, cosine: Any, slope: FloatArray) -> FloatArray:
    grows = slope >= 1 - 1e-12
    offset = _level(block, 1.0, cosine) - slope
    return np.asarray(np.where(grows, np.inf, offset / np.where(grows, 1.0, 1 - slope)))


def stable_state(spec: Transformer, *, n_tokens: int, closure: Closure | str = DEFAULT_CLOSURE) -> StableState:
    """Return where tokens end up under the last block of a spec.

    Where the collapsed state repels, the excess ``c' - c`` at the fixed norm is bisected in ``log(1 - c)`` from 1e-8
    to the most negative cosine that ``n_tokens`` tokens can share: about 80 evaluations of one block for the whole
    grid, 25 times as many where the norm equation is not linear. That assumes a single state below the collapsed one,
    as found for every odd activation with LayerNorm; :func:`fixed_points` searches for more.

    Args:
        spec: The transformer; its fields may be arrays.
        n_tokens: Number of tokens.
        closure: How the softmax is averaged. ``UniformLargeN`` is the limit of many tokens.
    """
    block = last_block(spec, n_tokens, closure)
    q = fixed_norm(block, 1.0)
    nowhere = ~exists(q)
    if np.all(nowhere):
        return StableState(
            phase=np.full(q.shape, "none"),
            q=q,
            cosine=np.full(q.shape, np.nan),
            transfer=np.full((2, 2, *q.shape), np.nan),
        )
    growth = angle_rate(block, np.where(nowhere, 1.0, q))
    cosine = np.where(growth > 1 + _MARGINAL, _interior(block), 1.0)
    q = np.where(nowhere, 1.0, fixed_norm(block, cosine))
    phase = np.where(cosine == 1.0, "collapsed", "simplex")
    phase = np.where((cosine < 1.0) & _orthogonal_attracts(spec), "orthogonal", phase)
    transfer = block.transfer(Moments(q, cosine * q))
    phase, q, cosine = np.broadcast_arrays(phase, q, cosine)
    return StableState(phase=np.where(nowhere, "none", phase), q=q, cosine=cosine, transfer=transfer)


def fixed_points(
    spec: Transformer, *, n_tokens: int, closure: Closure | str = DEFAULT_CLOSURE, resolution: int = 400
) -> tuple[FixedPoint, ...]:
    """Return every state that the last block of a spec preserves, by growing cosine.

    At a given cosine the norm equation has one root, which leaves one equation in the cosine. It is evaluated on a
    grid, dense near 0 and 1, in one vectorised call, and every change of sign is refined by Brent's method.

    Args:
        spec: The transformer, scalar fields.
        n_tokens: Number of tokens.
        closure: How the softmax is averaged.
        resolution: Points of the grid: two states closer than one interval are missed.
    Raises:
        DomainError: if the stream grows for ever, so that no state exists.
    """
    block = last_block(spec, n_tokens, closure)
    end = float(fixed_norm(block, 1.0))
    if end == 0:
        raise DomainError("no fixed point: the stream dies out", value=end)
    if not np.isfinite(end):
        raise DomainError(
            "no fixed point: the norm of the stream grows with every block. Exponents become power laws in depth; "
            "see power_laws",
            value=end,
        )
    found = [
        FixedPoint(q=end, cosine=1.0, rates=(_norm_rate(block, end), float(angle_rate(block, end))), kind=PHASES[0])
    ]
    steps = np.geomspace(_NEAREST, 0.1, resolution // 2)
    lowest = -1 / block.n_others if block.n_others < _MANY_TOKENS else 0.0
    below = np.linspace(lowest, 0, resolution // 8, endpoint=False)[1:]
    grid = np.unique(np.concatenate([1 - steps, np.linspace(0.1, 0.9, resolution // 4), steps, [lowest, 0.0], below]))
    excess = _excess(block, grid)
    zero = np.abs(excess) < 1e-13
    roots = [float(cosine) for cosine in grid[zero & ((grid == 0) | (grid == lowest))]]
    for i in np.flatnonzero((excess[:-1] * excess[1:] < 0) & ~zero[:-1] & ~zero[1:]):
        roots.append(float(brentq(lambda c: float(_excess(block, c)), grid[i], grid[i + 1], xtol=1e-14, rtol=1e-14)))
    for cosine in roots:
        q = float(fixed_norm(block, cosine))
        first, second = np.linalg.eigvals(_jacobian(block, q, cosine))
        rates = (first, second) if abs(first) >= abs(second) else (second, first)
        apart = abs(cosine) < 1e-6 or (abs(rates[0]) < 1 and bool(_orthogonal_attracts(spec)))
        kind = "orthogonal" if apart else "simplex"
        found.append(FixedPoint(q=q, cosine=cosine, rates=(complex(rates[0]), complex(rates[1])), kind=kind))
    return tuple(sorted(found, key=lambda point: point.cosine))


def angle_rate(block: BlockMap, q: Any) -> FloatArray:
    """Return the factor of q - p over one block for nearly equal tokens of second moment ``q``.

    By duality it is the factor of gradients that sum to zero over tokens, the (1, -1/(n-1)) direction of the transfer
    matrix at collapse. Where ``q`` is preserved, it is the factor of 1 - cosine.
    """
    matrix = block.transfer(Moments(q, q))
    return np.asarray(matrix[0, 0] - matrix[0, 1] / block.n_others)


def _excess(block: BlockMap, cosine: Any, slope: FloatArray | None = None) -> FloatArray:
    """Return c' - c at the fixed norm."""
    q = fixed_norm(block, cosine) if slope is None else _linear_norm(block, cosine, slope)
    q = np.where(np.isfinite(q), q, _LARGEST)
    return np.asarray(block.forward(Moments(q, cosine * q)).p / q - cosine)


def _interior(block: BlockMap) -> FloatArray:
    """Return the cosine below one that attracts, by bisection in log(1 - c)."""
    slope = _norm_slope(block, 0.5)
    shape = np.shape(_excess(block, 0.5, slope))
    low, high = np.full(shape, np.log(_NEAREST)), np.full(shape, np.log1p(1 / block.n_others))
    for _ in range(_INTERIOR_HALVINGS):
        middle = (low + high) / 2
        rises = _excess(block, np.maximum(-np.expm1(middle), -1 / block.n_others), slope) > 0
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    cosine = -np.expm1((low + high) / 2)
    return np.where(np.abs(cosine) < 1e-6, 0.0, np.maximum(cosine, -1 / block.n_others))


def _orthogonal_attracts(spec: Transformer) -> NDArray[np.bool_]:
    """Return where orthogonal tokens stay orthogonal, stably, in the limit of many tokens."""
    block = last_block(spec, 10**9, Uniform())
    q = fixed_norm(block, 0.0)
    q = np.where(np.isfinite(q), q, _LARGEST)
    invariant = np.abs(block.forward(Moments(q, 0.0 * q)).p) <= 1e-7 * q
    return np.asarray(invariant & (block.transfer(Moments(q, 0.0 * q))[1, 1] < 1))


def _norm_rate(block: BlockMap, q: float) -> float:
    step = _DIFFERENCE * q
    up, down = (float(block.forward(Moments(x, x)).q) for x in (q + step, q - step))
    return (up - down) / (2 * step)


def _jacobian(block: BlockMap, q: float, cosine: float) -> FloatArray:
    """Return the derivative of (log q, c) -> (log q', c') by central differences, error about 1e-10."""

    def after(log_q: float, c: float) -> FloatArray:
        moments = block.forward(Moments(np.exp(log_q), c * np.exp(log_q)))
        return np.array([np.log(moments.q), moments.p / moments.q])

    step = min(_DIFFERENCE, (1 - cosine) / 2)
    low = max(cosine - step, -1 / block.n_others)
    centre = np.log(q)
    return np.stack(
        [
            (after(centre + step, cosine) - after(centre - step, cosine)) / (2 * step),
            (after(centre, cosine + step) - after(centre, low)) / (cosine + step - low),
        ],
        axis=1,
    )
