"""All schemes predicted on one architecture, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import DomainError, NotCoveredError, SpecError, nearest
from fathometer.observables import backward
from fathometer.prescription.plans import SchemePlan, every_sublayer
from fathometer.prescription.schemes import SCHEMES, apply_scheme, scheme_options
from fathometer.propagation import Moments, StreamOverflowError, check_moments, propagate_gram
from fathometer.propagation.exchangeable import HalfLayer, Record
from fathometer.spec import Sublayer, Transformer, refuse_arrays, with_field

FloatArray = NDArray[np.float64]


_OVERFLOW = 1e150


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """What the theory says of one scheme; numbers are NaN unless ``status`` is ``"ok"``.

    Attributes:
        scheme: Its name.
        status: ``"ok"``, ``"undefined"`` (on this architecture), ``"not covered"`` (what the scheme makes of it has no
            theory here) or ``"overflow"`` (of the stream).
        reason: Why there are no numbers.
        q_final: Second moment of the stream after the last residual sum, in front of a norm there.
        q_spread: Largest over smallest such second moment, of the input too unless norms follow the sums.
        apjn_log: ``ln J^{L,0}``, natural log of the averaged partial Jacobian norm.
        gradient_log: Log gradient amplification of a mean-pooled loss, from the output to the input.
        cosine_final: Cosine of two tokens at the output.
        largest_step: Largest ``|change of ln q|`` or ``|change of ln J|`` over one layer, q as above.
    """

    scheme: str
    status: str = "ok"
    reason: str = ""
    q_final: float = math.nan
    q_spread: float = math.nan
    apjn_log: float = math.nan
    gradient_log: float = math.nan
    cosine_final: float = math.nan
    largest_step: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Schemes side by side on one architecture, in the order asked for, and the tokens they were given."""

    rows: tuple[ComparisonRow, ...]
    n_tokens: int
    q: float
    p: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that do not exist become ``None``."""
        rows = [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
            for row in self.rows
        ]
        return {"schema": 1, "n_tokens": self.n_tokens, "q": self.q, "p": self.p, "rows": rows}


def compare_schemes(
    spec: Transformer,
    names: Sequence[str] | None = None,
    *,
    n_tokens: int,
    p: float,
    q: float = 1.0,
    **options: Any,
) -> Comparison:
    """Predict one architecture under several schemes.

    Args:
        spec: The architecture.
        names: Schemes, all of :data:`SCHEMES` by default.
        n_tokens: Number of tokens.
        p: Mean overlap of two tokens at the first block.
        q: Mean square per coordinate there.
        options: Given to every scheme that has them; ``r0`` is ``p / q`` unless given. A ``dropout`` rate holds for
            all schemes: predictions are in training mode, and without it at the spec's own rates.
    Returns:
        One row a scheme. Cost at 1000 layers: 0.2 s a scheme, or that of full Gram matrices for a causal spec.
    Raises:
        SpecError, DomainError: for an unknown scheme, an option none of them has, or moments no tokens can have. A
            scheme that is not defined on this architecture, whose result the theory does not cover, or under which the
            stream overflows is a row that says so.
    """
    start = check_moments(n_tokens, q, p)
    if np.ndim(start.q):
        raise DomainError("compare_schemes takes single numbers q and p", value=np.shape(start.q))
    chosen = list(SCHEMES) if names is None else list(names)
    accepted = {name: scheme_options(name) for name in chosen}
    known = {option for table in accepted.values() for option in table}
    for option in options:
        if option not in known:
            raise SpecError(f"none of these schemes has an option {option!r}{nearest(option, known)}")
    refuse_arrays(spec, "a scheme")
    if "dropout" in options:
        spec = with_field(spec, "dropout", options["dropout"])
    given = {"r0": max(p / q, 0.0), "n_tokens": n_tokens, **options}
    rows = []
    for name in chosen:
        try:
            plan = apply_scheme(spec, name, **{key: given[key] for key in given if key in accepted[name]})
        except (SpecError, DomainError) as error:
            rows.append(ComparisonRow(scheme=name, status="undefined", reason=str(error)))
        except NotCoveredError as error:
            rows.append(ComparisonRow(scheme=name, status="not covered", reason=str(error)))
        else:
            rows.append(_predicted(plan, spec, n_tokens, Moments(float(q), float(p))))
    return Comparison(rows=tuple(rows), n_tokens=n_tokens, q=float(q), p=float(p))


def _predicted(plan: SchemePlan, spec: Transformer, n_tokens: int, start: Moments) -> ComparisonRow:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            curves = (_causal_curves if spec.is_causal else _curves)(plan.spec, spec, n_tokens, start)
    except StreamOverflowError as error:
        return ComparisonRow(scheme=plan.name, status="overflow", reason=str(error))
    except NotCoveredError as error:
        return ComparisonRow(scheme=plan.name, status="not covered", reason=str(error))
    ends = np.cumsum([len(block.sublayers) for block in spec.layers()])
    borders = np.concatenate([[0], ends])
    counted = spec.blocks[0].sublayers[0].stream_norm is None  # else the input is no sum in front of a norm
    sums = np.concatenate([[start.q], curves.sums]) if counted else curves.sums
    sums_log = np.log(sums[borders if counted else ends - 1])
    steps = np.concatenate([np.diff(sums_log), np.diff(curves.apjn_log[borders])])
    return ComparisonRow(
        scheme=plan.name,
        q_final=float(sums[-1]),
        q_spread=float(sums.max() / sums.min()),
        apjn_log=float(curves.apjn_log[0]),
        gradient_log=float(curves.gradient_log),
        cosine_final=float(curves.cosine),
        largest_step=float(np.max(np.abs(steps))),
    )


class _Curves(NamedTuple):
    """Second moments after each residual sum, ln J at every border, and what a pooled loss and two tokens see."""

    sums: FloatArray
    apjn_log: FloatArray
    gradient_log: float
    cosine: float


def _curves(planned: Transformer, spec: Transformer, n_tokens: int, stream: Moments) -> _Curves:
    """Propagate a plan; transfer matrices of all layers that share an architecture are built in one call."""
    records: list[Record] = []
    sublayers: list[Sublayer] = []
    for block in planned.blocks:
        steps = [HalfLayer(sublayer, n_tokens, DEFAULT_CLOSURE) for sublayer in block.sublayers]
        for _ in range(block.repeat):
            for step in steps:
                stream, _, record = step.forward(stream)
                if not record.residual.q < _OVERFLOW:
                    raise StreamOverflowError(f"the stream overflows at sublayer {len(records)}")
                records.append(record)
                sublayers.append(step.sublayer)
    transfer = np.empty((len(records), 2, 2))
    start = 0
    for block in spec.blocks:
        width = len(block.sublayers)
        for offset in range(width):
            where = slice(start + offset, start + width * block.repeat, width)
            step = HalfLayer(_gathered(sublayers[where]), n_tokens, DEFAULT_CLOSURE)
            matrices = step.transfer(_gathered_records(records[where]))
            transfer[where] = np.moveaxis(np.broadcast_to(matrices, (2, 2, block.repeat)), 2, 0)
        start += width * block.repeat
    pooled = backward(transfer, alignment=1.0 if n_tokens > 1 else 0.0)
    return _Curves(
        np.array([record.residual.q for record in records], dtype=np.float64),
        backward(transfer).log_norm,
        pooled.log_norm[0],
        stream.p / stream.q,
    )


def _causal_curves(planned: Transformer, spec: Transformer, n_tokens: int, start: Moments) -> _Curves:
    """Propagate a plan on full Gram matrices; second moments are averages over positions."""
    trajectory = propagate_gram(planned, start.p + (start.q - start.p) * np.eye(n_tokens), closure=DEFAULT_CLOSURE)
    (apjn, _), (pooled, _) = trajectory.backward(None, np.ones((n_tokens, n_tokens)))
    own = np.trace(trajectory.grams, axis1=-2, axis2=-1) / n_tokens
    skips = np.array([sublayer.skip_scale for sublayer in every_sublayer(planned)], dtype=np.float64)
    sums = skips**2 * own[:-1] + np.trace(trajectory.added, axis1=-2, axis2=-1) / n_tokens
    if not np.all(sums < _OVERFLOW):
        raise StreamOverflowError(f"the stream overflows at sublayer {int(np.argmin(sums < _OVERFLOW))}")
    shared = (trajectory.grams[-1].sum() / n_tokens - own[-1]) / (n_tokens - 1) if n_tokens > 1 else 0.0
    return _Curves(sums, apjn, pooled[0], shared / own[-1])


def _gathered(sublayers: Sequence[Sublayer]) -> Sublayer:
    """Return one sublayer whose scales are arrays over those given, which differ in nothing else."""
    first = sublayers[0]
    if all(sublayer is first for sublayer in sublayers):
        return first
    scales: dict[str, Any] = {
        name: np.array([getattr(s.branch, name) for s in sublayers], dtype=np.float64)
        for name in first.branch.scale_names
    }
    branch = replace(first.branch, **scales)
    return replace(first, branch=branch)


def _gathered_records(records: Sequence[Record]) -> Record:
    return Record(*(Moments(*np.array([r[slot] for r in records], dtype=np.float64).T) for slot in range(4)))
