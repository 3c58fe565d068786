"""Remedies computed from the theory: every number is solved for on the model's own spec, nothing is canned.

A remedy family varies one thing over a grid in one vectorised prediction; the mildest value that cures is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import Closure
from fathometer.diagnosis.criteria import CRITERIA, Curves
from fathometer.diagnosis.report import Finding, Remedy
from fathometer.diagnosis.thresholds import Thresholds
from fathometer.errors import FathometerError
from fathometer.models.reading import ModelReading
from fathometer.models.weights import WeightSlice
from fathometer.observables import profile_of
from fathometer.propagation import propagate
from fathometer.spec import Derf, DyT, Sublayer, Transformer, scaled_field

FloatArray = NDArray[np.float64]
_DOWN = np.geomspace(1.0, 1e-3, 61)[1:]
_UP = np.geomspace(1.0, 1e4, 81)[1:]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where predictions start: token count and moments at the first block, and the closure."""

    n_tokens: int
    q: float
    p: float
    closure: Closure


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of change: a factor applied to a spec, and the lines that apply it to the model."""

    title: str
    cures: frozenset[str]
    factors: FloatArray
    change: Callable[[Transformer, FloatArray], Transformer]
    snippet: Callable[[float], str]
    restores_skip: bool = False


def remedies(
    findings: Sequence[Finding], reading: ModelReading, start: Start, limits: Thresholds, skips: FloatArray | None
) -> tuple[Remedy, ...]:
    """Return the remedies that remove at least one finding by the theory's account, best first.

    Only findings the theory itself reproduces are treated: where it does not, its word on a cure is worth nothing.

    Ranking: findings removed, then smallness of the change. Cost: one vectorised prediction of the model per family.
    """
    if not findings:
        return ()
    spec = reading.spec.bidirectional()  # late positions stand in for all
    failing = {f.name for f in findings}
    before = _curves(spec, start)
    if before is None:
        return ()
    fails_before = _failures(before, limits, skips)
    out: list[tuple[int, float, Remedy]] = []
    for family in _families(reading, failing):
        targets = family.cures & failing & fails_before
        if not targets:
            continue
        found = _mildest(family, spec, start, limits, targets, fails_before, skips)
        if found is None:
            continue
        factor, cured, after = found
        remedy = Remedy(
            title=family.title.format(factor=f"{factor:.3g}", inverse=f"{1 / factor:.3g}"),
            cures=tuple(sorted(cured)),
            before=headline(before),
            after=headline(after),
            snippet=family.snippet(factor),
            factor=float(factor),
        )
        out.append((-len(cured), abs(float(np.log(factor))), remedy))
    out.sort(key=lambda item: item[:2])
    return tuple(remedy for _, _, remedy in out)


def headline(curves: Curves) -> dict[str, float]:
    """Return the few numbers a remedy is judged by."""
    numbers = {
        "gradient amplification": float(np.exp(min(curves["apjn_log"][0], 700.0))),
        "relative sensitivity, largest": float(
            np.exp(min(np.max(curves["apjn_log"] + np.log(curves["q"]) - np.log(curves["q"][-1])), 700.0))
        ),
        "final mean square": float(curves["q"][-1]),
        "final cosine": float(curves["cosine"][-1]),
    }
    if "attention_entropy_relative" in curves:
        numbers["attention entropy, lowest"] = float(np.min(curves["attention_entropy_relative"]))
    if "attention_added_q" in curves and "mlp_added_q" in curves:
        total = float(np.sum(curves["attention_added_q"] + curves["mlp_added_q"]))
        numbers["MLP share of branches"] = float(np.sum(curves["mlp_added_q"])) / total if total > 0 else 0.0
    return numbers


def _families(reading: ModelReading, failing: set[str]) -> Iterable[Family]:
    gradient = frozenset(
        {"exploding_gradients", "vanishing_gradients", "rank_collapse", "signal_growth", "dominant_branch"}
    )
    sublayers = [s for block in reading.spec.blocks for s in block.sublayers]
    if any(isinstance(s.input_norm, (DyT, Derf)) or isinstance(s.stream_norm, (DyT, Derf)) for s in sublayers):
        alphas = [part.alpha for layer in reading.layers for part in layer if part.alpha is not None]
        yield Family(
            title="Multiply every norm's alpha by {factor}",
            cures=gradient,
            factors=_DOWN,
            change=lambda spec, f: scaled_field(spec, "alpha", f),
            snippet=lambda f: scale_parameters(alphas, f),
        )
    if all(s.skip_scale == 0 for s in sublayers):
        yield Family(
            title="Add skip connections: x + branch(x), with branches scaled by {factor}",
            cures=gradient,
            factors=np.concatenate([[1.0], _DOWN]),
            change=lambda spec, f: scaled_field(
                spec.map_sublayers(lambda s: replace(s, skip_scale=1.0)), "branch_scale", f
            ),
            snippet=lambda f: f"x = x + {f:.3g} * branch(norm(x))   # in every sublayer's forward",
            restores_skip=True,
        )
    if any(s.stream_norm is not None for s in sublayers):
        yield Family(
            title="Move the norm in front of the branch (pre-norm), branches scaled by {factor}",
            cures=gradient,
            factors=np.concatenate([[1.0], _DOWN]),
            change=lambda spec, f: scaled_field(spec.map_sublayers(_pre_norm), "branch_scale", f),
            snippet=lambda f: (
                f"x = x + {f:.3g} * branch(norm(x))   # instead of x = norm(x + branch(x)); e.g. norm_first=True"
            ),
        )
    if all(s.output_norm is None for s in sublayers):
        outputs = [s for role in ("output", "mlp_out") for s in _slices(reading, role)]
        yield Family(
            title="Scale what branches write to the stream by {factor}",
            cures=gradient,
            factors=_DOWN,
            change=lambda spec, f: _scaled(spec, ("output", "mlp_out"), f),
            snippet=lambda f: scale_weights(outputs, f),
        )
    everything = [s for layer in reading.layers for part in layer for s in part.roles.values()]
    roles = ("query", "key", "value", "output", "mlp_in", "mlp_out", "gate")
    yield Family(
        title="Multiply the std of every block matrix by {factor}",
        cures=gradient | {"attention_concentrated"},
        factors=_DOWN,
        change=lambda spec, f: _scaled(spec, roles, f),
        snippet=lambda f: scale_weights(everything, f),
    )
    if "attention_concentrated" in failing:
        score = [s for role in ("query", "key") for s in _slices(reading, role)]
        yield Family(
            title="Multiply query and key weights by {factor}",
            cures=frozenset({"attention_concentrated"}),
            factors=_DOWN,
            change=lambda spec, f: _scaled(spec, ("query", "key"), f),
            snippet=lambda f: scale_weights(score, f),
        )
    if "negligible_branch" in failing:
        for title, names in (
            ("Multiply MLP output weights by {factor}", ("mlp_out",)),
            ("Multiply attention output weights by {factor}", ("output",)),
            ("Multiply all branch output weights by {factor}", ("output", "mlp_out")),
        ):
            chosen = [s for role in names for s in _slices(reading, role)]
            yield Family(
                title=title,
                cures=frozenset({"negligible_branch"}),
                factors=_UP,
                change=lambda spec, f, names=names: _scaled(spec, names, f),  # type: ignore[misc]
                snippet=lambda f, chosen=chosen: scale_weights(chosen, f),  # type: ignore[misc]
            )


def _mildest(
    family: Family,
    spec: Transformer,
    start: Start,
    limits: Thresholds,
    targets: frozenset[str],
    fails_before: set[str],
    skips: FloatArray | None,
) -> tuple[float, set[str], Curves] | None:
    """Return the factor closest to one at which most targets pass, with a margin, and nothing new fails."""
    try:
        grid = _curves(family.change(spec, family.factors), start)
    except FathometerError:
        return None
    if grid is None:
        return None
    strict = limits.with_margin()
    best: tuple[int, float, float, set[str], Curves] | None = None
    for i, factor in enumerate(family.factors):
        curves = {name: curve[:, i] for name, curve in grid.items()}
        if not all(np.all(np.isfinite(curve)) for curve in curves.values()):
            continue  # the stream overflows here
        kept = None if family.restores_skip else skips
        if _failures(curves, limits, kept) - fails_before:
            continue
        cured = set(targets - _failures(curves, strict, kept))
        key = (-len(cured), abs(float(np.log(factor))))
        if cured and (best is None or key < best[:2]):
            best = (*key, float(factor), cured, curves)
    return None if best is None else best[2:]


def _failures(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> set[str]:
    return {c.name for c in CRITERIA if curves and c.test(curves, limits, skips) is not None}


def _curves(spec: Transformer, start: Start) -> Mapping[str, FloatArray] | None:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        try:
            profile = profile_of(propagate(spec, n_tokens=start.n_tokens, q=start.q, p=start.p, closure=start.closure))
        except FathometerError:
            return None
    batch = profile.curves["q"].shape[1:]
    return {
        name: np.broadcast_to(
            curve.reshape(curve.shape + (1,) * (1 + len(batch) - curve.ndim)), curve.shape[:1] + batch
        )
        for name, curve in profile.curves.items()
    }


def _pre_norm(sublayer: Sublayer) -> Sublayer:
    if sublayer.stream_norm is None:
        return sublayer
    return replace(sublayer, input_norm=sublayer.stream_norm, stream_norm=None)


def _scaled(spec: Transformer, names: Iterable[str], factors: FloatArray) -> Transformer:
    for name in names:
        try:
            spec = scaled_field(spec, name, factors)
        except FathometerError:
            continue
    return spec


def _slices(reading: ModelReading, role: str) -> list[WeightSlice]:
    return [part.roles[role] for layer in reading.layers for part in layer if role in part.roles]


def scale_weights(slices: Sequence[WeightSlice], factor: float) -> str:
    """Return lines that multiply the given weights of every block by ``factor``."""
    spans: dict[str, list[WeightSlice]] = {}
    for part in slices:
        spans.setdefault(part.parameter, []).append(part)
    whole: dict[str, None] = {}
    partial: dict[tuple[str, int, int, int], None] = {}
    for parameter, parts in spans.items():
        if sum(part.stop - part.start for part in parts) == parts[0].size:
            whole[_tail(parameter)] = None
        else:
            partial |= {(_tail(parameter), part.axis, part.start, part.stop - part.start): None for part in parts}
    lines = [*_LOOP, *_matching(list(whole), spans, f"weight.mul_({factor:.4g})")]
    for tail, axis, start, length in partial:
        lines += _matching([tail], spans, f"weight.narrow({axis}, {start}, {length}).mul_({factor:.4g})")
    return "\n".join(lines)


def scale_parameters(names: Sequence[str], factor: float) -> str:
    """Return lines that multiply the named parameters of every block by ``factor``."""
    tails = list(dict.fromkeys(map(_tail, names)))
    return "\n".join([*_LOOP, *_matching(tails, names, f"weight.mul_({factor:.4g})")])


_LOOP = ("with torch.no_grad():", "    for name, weight in model.named_parameters():")


def _matching(tails: Sequence[str], parameters: Iterable[str], action: str) -> list[str]:
    """Return the lines that apply an action to parameters of the blocks, and of no other part of the model."""
    if not tails:
        return []
    heads = sorted({_head(parameter) for parameter in parameters})
    within = f"name.startswith({_tuple(heads)}) and " if all(heads) else ""
    return [f"        if {within}name.endswith({_tuple(sorted(tails))}):", f"            {action}"]


def _head(parameter: str) -> str:
    """Return the part of a parameter name before its block index."""
    pieces = parameter.split(".")
    first = next((i for i, piece in enumerate(pieces) if piece.isdigit()), 0)
    return "".join(f"{piece}." for piece in pieces[:first])


def _tail(parameter: str) -> str:
    """Return the part of a parameter name after its block index, the same in every block."""
    pieces = parameter.split(".")
    first = next((i for i, piece in enumerate(pieces) if piece.isdigit()), -1)
    return "." + ".".join(pieces[first + 1 :]) if first >= 0 else parameter


def _tuple(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else "(" + ", ".join(map(repr, names)) + ")"
