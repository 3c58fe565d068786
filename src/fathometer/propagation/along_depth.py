r"""A whole stack at once: the stream by a table of each branch, everything else vectorised over layers.

Only the stream has to be carried from layer to layer. Behind LayerNorm or RMSNorm a branch sees tokens of fixed second
moment, so that what it returns at unit output scales is a function of the cosine alone. It is tabulated as a quintic
spline in :math:`u = \sqrt{1 - c}`, in which activations with a kink are smooth too (:math:`\arccos c = 2 \arcsin
(u/\sqrt2)`), and checked halfway between the nodes. Equal and different layers are treated alike: those of one
architecture are gathered into a sublayer whose numbers are arrays over layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from fathometer.attention import Closure
from fathometer.errors import DomainError
from fathometer.propagation.branch_maps import Moments, attention_bias
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.propagation.trajectory import StreamOverflowError
from fathometer.spec import (
    MLP,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
    branch_names,
    refuse_arrays,
)

FloatArray = NDArray[np.float64]
_T = TypeVar("_T")

#: Largest relative error of a table, between its nodes.
TOLERANCE = 1e-10
_INTERVALS = (64, 128, 256, 512, 1024)
_MOST_TABLES = 16
_FIXED = (LayerNorm, RMSNorm)
_PLAIN = frozenset((str, int, bool, type(None)))
#: Output scales of a branch, as its table has them.
_UNIT: dict[type, dict[str, Any]] = {
    SelfAttention: {"value": 1.0, "output": 1.0, "value_bias": 0.0, "output_bias": 0.0},
    MLP: {"mlp_out": 1.0, "out_bias": 0.0},
    GatedMLP: {"mlp_in": 1.0, "mlp_out": 1.0},
}


class AlikeLayers(NamedTuple):
    """Sublayers of one architecture: one sublayer whose numbers are arrays over them, and where they stand.

    Attributes:
        sublayer: Numbers that differ have shape ``(len(half),)``.
        half: Half-layer indices, ascending.
        layer: Block of each.
        name: Of the branch within its block, the same for all; see :func:`fathometer.spec.branch_names`.
    """

    sublayer: Sublayer
    half: NDArray[np.int64]
    layer: NDArray[np.int64]
    name: str


def alike_layers(spec: Transformer) -> list[AlikeLayers]:
    """Return the sublayers of a stack, grouped by architecture and name within the block.

    Cost: about 5 microseconds for every distinct sublayer.

    Raises:
        SpecError: for arrays in the spec.
    """
    groups: dict[Any, list[tuple[Sublayer, int, int]]] = {}
    known: dict[int, Any] = {}
    half = 0
    names = {id(block): branch_names(block.sublayers) for block in spec.blocks}
    for layer, block in enumerate(spec.layers()):
        for name, sublayer in zip(names[id(block)], block.sublayers, strict=True):
            found = known.get(id(sublayer))
            if found is None:
                found = known[id(sublayer)] = _structure(sublayer, known)
                if found is None:
                    refuse_arrays(spec, "a stack of layers")
            groups.setdefault((name, found), []).append((sublayer, half, layer))
            half += 1
    out = []
    for (name, _), members in groups.items():
        sublayers, halves, layers = zip(*members, strict=True)
        out.append(AlikeLayers(_gathered(sublayers), np.array(halves), np.array(layers), name))
    return out


def _structure(value: Any, known: dict[int, Any]) -> tuple[Any, ...] | None:
    """Return what two parts of a spec share when they differ in numbers at most; ``None`` where there are arrays."""
    parts: list[Any] = [type(value), getattr(value, "ratio", None)]
    for part in vars(value).values():
        kind = type(part)
        if kind is float:
            continue
        if kind in _PLAIN:
            parts.append(part)
            continue
        if kind is np.ndarray:
            return None
        found = known.get(id(part))
        if found is None:
            found = known[id(part)] = _structure(part, known) if is_dataclass(part) else (part,)
            if found is None:
                return None
        parts.append(found)
    return tuple(parts)


def _gathered(values: Sequence[_T]) -> _T:
    """Return one part of a spec whose numbers are arrays over those given, where they differ."""
    first: Any = values[0]
    if all(value is first for value in values):
        return values[0]
    changed: dict[str, Any] = {}
    for field in fields(first):
        own = getattr(first, field.name)
        parts = [getattr(value, field.name) for value in values]
        if is_dataclass(own):
            joined = _gathered(parts)
            if joined is not own:
                changed[field.name] = joined
        elif isinstance(own, float) and parts.count(own) < len(parts):
            changed[field.name] = np.array(parts, dtype=np.float64)
    return replace(first, **changed) if changed else values[0]


def stream_path(spec: Transformer, *, n_tokens: int, start: Moments, closure: Closure) -> Moments:
    """Return q and p of the stream at every sublayer border, shape ``(n_half + 1,)``.

    Args:
        spec: The transformer, with single numbers in every field.
        n_tokens, closure: Number of tokens, and how the softmax is averaged.
        start: Moments at the first block.
    Returns:
        What :func:`fathometer.propagation.propagate` returns, to about the tolerance of the tables times the depth.
        Cost: 2 microseconds a sublayer behind LayerNorm or RMSNorm after half a millisecond a table, which layers of
        equal query, key and first MLP scales share; otherwise, and beyond 16 tables, 15 to 30.
    Raises:
        DomainError: if the stream overflows, naming the sublayer.
    """
    q, p = float(start.q), float(start.p)
    out_q, out_p = [q], [p]
    previous: Sublayer | None = None
    tables: dict[Any, _BranchTable | None] = {}
    steps: dict[tuple[int, Any], _Step] = {}
    for block in spec.blocks:
        for sublayer in block.sublayers * block.repeat:
            size = _fixed_size(sublayer, previous)
            key = (id(sublayer), size)
            step = steps.get(key)
            if step is None:
                step = steps[key] = _Step(sublayer, n_tokens, closure, size, tables)
            q, p = step(q, p)
            if not (math.isfinite(q) and math.isfinite(p)):
                raise StreamOverflowError(
                    f"the stream overflows at sublayer {len(out_q) - 1}: q is {out_q[-1]:.3g} one sublayer before. "
                    "Shorten the stack, scale branches down, or put norms in front of them",
                    value=out_q[-1],
                    index=(len(out_q) - 1,),
                )
            out_q.append(q)
            out_p.append(p)
            previous = sublayer
    return Moments(np.array(out_q), np.array(out_p))


def _fixed_size(sublayer: Sublayer, previous: Sublayer | None) -> float | None:
    """Return the second moment of the tokens a branch sees where a norm fixes it."""
    norm = sublayer.input_norm
    if norm is None and previous is not None:
        norm = previous.stream_norm
    return float(norm.gain) ** 2 if isinstance(norm, _FIXED) else None


class _Step:
    """One sublayer acting on plain floats."""

    def __init__(
        self,
        sublayer: Sublayer,
        n_tokens: int,
        closure: Closure,
        size: float | None,
        tables: dict[Any, _BranchTable | None],
    ) -> None:
        self._half: HalfLayer | None = None
        self._sublayer = sublayer
        self._skip, self._weight = float(sublayer.skip_scale) ** 2, float(sublayer.branch_scale) ** 2
        self._keep = 1 - float(sublayer.dropout)
        self._table = None
        self._sizes = []
        for norm in (sublayer.output_norm, sublayer.stream_norm):
            self._sizes.append(float(norm.gain) ** 2 if isinstance(norm, _FIXED) else None)
        pointwise = any(
            norm is not None and not isinstance(norm, _FIXED) for norm in (sublayer.output_norm, sublayer.stream_norm)
        )
        unit = _UNIT.get(type(sublayer.branch))
        if unit is not None and size is not None and size > 0 and not pointwise:
            self._gain, self._bias = _output_scales(sublayer)
            key = (size, type(sublayer.branch), *(v for k, v in vars(sublayer.branch).items() if k not in unit))
            if key not in tables and len(tables) < _MOST_TABLES:
                tables[key] = _tabulated(replace(sublayer.branch, **unit), n_tokens, closure, size)
            self._table = tables.get(key)
        if self._table is None:
            self._half = HalfLayer(sublayer, n_tokens, closure)

    def __call__(self, q: float, p: float) -> tuple[float, float]:
        """Return the stream after the sublayer."""
        if self._half is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                stream, _, _ = self._half.forward(Moments(q, p))
            return float(stream.q), float(stream.p)
        assert self._table is not None
        own, shared = self._table(p / q)
        own, shared = self._gain * own + self._bias, self._gain * shared + self._bias
        inner, outer = self._sizes
        if inner is not None:
            if not own > 0:
                raise DomainError("a norm at the end of a branch meets a branch that puts out nothing", value=own)
            own, shared = inner, inner * shared / own
        q = self._skip * q + self._weight * own / self._keep
        p = self._skip * p + self._weight * shared
        if outer is not None:
            q, p = outer, outer * p / q
        return q, p


def _output_scales(sublayer: Sublayer) -> tuple[Any, Any]:
    """Return the gain on both moments of a branch without output scales, and what its biases add."""
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        scale, bias = branch.value * branch.output, 0.0 if branch.centred else attention_bias(branch)
    elif isinstance(branch, MLP):
        scale, bias = branch.mlp_out, branch.out_bias * branch.out_bias
    else:
        assert isinstance(branch, GatedMLP)
        scale, bias = branch.mlp_in * branch.mlp_out, 0.0
    return scale * scale, bias  # no power, which would raise where a product overflows


class _BranchTable:
    """Moments of a branch's output over ``u = sqrt(1 - cosine)``, by piecewise polynomials of degree five."""

    def __init__(self, spline: Any, last: float, n_intervals: int) -> None:
        self._per_unit = n_intervals / last
        self._last_piece = n_intervals - 1
        nodes = np.arange(n_intervals) * (last / n_intervals)
        powers = [spline(nodes, nu=k) / (math.factorial(k) * self._per_unit**k) for k in range(6)]
        self._pieces: list[list[float]] = np.concatenate(powers, axis=1).tolist()

    def __call__(self, cosine: float) -> tuple[float, float]:
        """Return second moment and overlap."""
        at = math.sqrt(max(1.0 - cosine, 0.0)) * self._per_unit
        piece = min(int(at), self._last_piece)
        t = at - piece
        a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5 = self._pieces[piece]
        return (
            a0 + t * (a1 + t * (a2 + t * (a3 + t * (a4 + t * a5)))),
            b0 + t * (b1 + t * (b2 + t * (b3 + t * (b4 + t * b5)))),
        )


def _tabulated(branch: Any, n_tokens: int, closure: Closure, size: float) -> _BranchTable | None:
    """Return the table of a branch for tokens of second moment ``size``, or ``None`` where none is good enough."""
    step = HalfLayer(Sublayer(branch=branch), n_tokens, closure)
    last = math.sqrt(1 + (1 / (n_tokens - 1) if n_tokens > 1 else 1.0))

    def values(u: FloatArray) -> FloatArray:
        seen = Moments(np.full(u.shape, size), size * (1 - u**2))
        made = step.map.forward(seen, step.map.inspect(seen))  # type: ignore[arg-type]
        return np.stack([np.broadcast_to(moment, u.shape) for moment in made], axis=1)

    for count in _INTERVALS:
        u = np.linspace(0.0, last, 2 * count + 1)
        exact = values(u)
        if not np.all(np.isfinite(exact)):
            return None
        spline = make_interp_spline(u[::2], exact[::2], k=5, axis=0)
        error = np.max(np.abs(spline(u[1::2]) - exact[1::2]))
        if error <= TOLERANCE * np.max(exact[:, 0]):
            return _BranchTable(spline, last, count)
    return None
