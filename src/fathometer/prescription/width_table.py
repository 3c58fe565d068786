"""A width-scaling scheme as a table: what each role's standard deviation, rate, decay and epsilon are multiplied by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fathometer.errors import SpecError, nearest
from fathometer.prescription.width_scaling import (
    GAINS,
    HIDDEN,
    NARROW,
    SCALED_ROLES,
    Factors,
    FixedHeads,
    Optimizer,
    ScalingScheme,
    Sizes,
    check_count,
    check_widths,
    is_weight,
    scaling_scheme,
    width_factors,
)


class WidthExponents(NamedTuple):
    """Powers of the width at fixed patch size, number of outputs and MLP ratio."""

    variance: float
    rate: float
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class WidthRow:
    """What a scheme does to the parameters of one role.

    Attributes:
        role: The role; rows inside and outside the blocks differ where depth counts.
        in_blocks: Whether these are parameters of a block.
        fan_in, fan_out: Of the first such parameter. Parameters of one role and other factors have a row of their own.
        factors: Target over base.
        exponents: Powers of the width.
        reason: The formula.
    """

    role: str
    in_blocks: bool
    fan_in: int
    fan_out: int
    factors: Factors
    exponents: WidthExponents
    reason: str


@dataclass(frozen=True, kw_only=True)
class WidthTable:
    """A scheme from one base width to one target width.

    Attributes:
        scheme, optimizer: What was asked for.
        d_model, base_width: Target and base; factors are absolute without a base.
        n_layers, base_layers: Blocks of the target and of the base.
        rows: One for each role and distinct factors, the blocks' first.
        output_multiplier: Factor on the logits of a tied head, target over base; an untied head needs none.
        residual_multiplier: Factor on every branch, target over base.
        notes: What else to know.
    """

    scheme: ScalingScheme
    optimizer: Optimizer
    d_model: int
    base_width: int | None
    n_layers: int
    base_layers: int
    rows: tuple[WidthRow, ...]
    output_multiplier: float
    residual_multiplier: float
    notes: tuple[str, ...]

    def row(self, role: str, *, in_blocks: bool, fan_in: int | None = None, fan_out: int | None = None) -> WidthRow:
        """Return the row of a role.

        Args:
            role, in_blocks: The role and its place.
            fan_in, fan_out: Which, where parameters of this role differ in their factors.
        Raises:
            SpecError: if there is none, or more than one.
        """
        found = [
            row
            for row in self.rows
            if (row.role, row.in_blocks) == (role, in_blocks)
            and fan_in in (None, row.fan_in)
            and fan_out in (None, row.fan_out)
        ]
        if len(found) > 1:
            fans = ", ".join(f"{row.fan_in} -> {row.fan_out}" for row in found)
            raise SpecError(f"the table has several rows {role!r}; say which by fan_in and fan_out: {fans}")
        if not found:
            raise SpecError(f"the table has no row {role!r}{nearest(role, {row.role for row in self.rows})}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {
            "schema": 1,
            **asdict(self),
            "rows": [
                {
                    "role": row.role,
                    "in_blocks": row.in_blocks,
                    "fan_in": row.fan_in,
                    "fan_out": row.fan_out,
                    "factors": row.factors._asdict(),
                    "exponents": row.exponents._asdict(),
                    "reason": row.reason,
                }
                for row in self.rows
            ],
        }

    def table(self) -> str:
        """Return one line a row: factors on std, rate, decay and epsilon, their exponents, and the reason."""
        widths = f"{self.base_width} -> {self.d_model}" if self.base_width else f"{self.d_model}, absolute factors"
        head = f"{self.scheme.name}, {self.optimizer}: width {widths}"
        if self.base_layers != self.n_layers:
            head += f", {self.base_layers} -> {self.n_layers} blocks"
        shared = Counter((row.role, row.in_blocks) for row in self.rows)
        names = [
            ("" if row.in_blocks else "outside: ")
            + row.role
            + (f" {row.fan_in} -> {row.fan_out}" if shared[row.role, row.in_blocks] > 1 else "")
            for row in self.rows
        ]
        width = max(map(len, names), default=0)
        lines = [
            head,
            f"{'role':<{width}}  {'std':>10} {'rate':>10} {'decay':>10} {'eps':>10}  {'var ~ n^':>8} {'rate ~ n^':>9}",
        ]
        for name, row in zip(names, self.rows, strict=True):
            weight = is_weight(row.role)
            shown = zip(row.factors, (weight, True, weight, self.optimizer == "adamw"), strict=True)
            numbers = " ".join(f"{value:>10.4g}" if counts else f"{'-':>10}" for value, counts in shown)
            variance = _number(row.exponents.variance) if weight else "-"
            rate = _number(row.exponents.rate)
            lines.append(f"{name:<{width}}  {numbers}  {variance:>8} {rate:>9}  {row.reason}")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.table()


def width_table(
    parameters: Iterable[Sizes],
    scheme: str | float | ScalingScheme,
    *,
    d_model: int,
    base_width: int | None,
    optimizer: Optimizer = "adamw",
    fixed: FixedHeads = "d_head",
    n_heads: Sequence[int] = (),
    d_head: int | None = None,
    n_layers: int = 1,
    base_layers: int | None = None,
    tied: bool = False,
) -> WidthTable:
    """Return what a scheme changes from a base width, where rates were tuned, to a target width.

    Args:
        parameters: Those of the target model; see :func:`standard_parameters` for a model on paper.
        scheme: Name, s, or scheme.
        d_model, base_width: Target and base. A base that is wider than the target is allowed, and noted.
        optimizer: ``"sgd"`` or ``"adamw"``.
        fixed: Which of ``"d_head"`` and ``"n_heads"`` the base has in common with the target.
        n_heads: Numbers of heads of the target (queries, keys and values), which have to fit the base too.
        d_head: Width of a head; without it heads divide the width among them.
        n_layers, base_layers: Blocks of the target and the base; the same where the base is not given.
        tied: Whether the token embedding is the head's matrix.
    Raises:
        SpecError: for an unknown scheme or optimizer, or widths not divisible by heads.
        DomainError: for s outside [0, 1] or sizes that are not positive.
    """
    chosen = scaling_scheme(scheme)
    below = n_layers if base_layers is None else base_layers
    below_width = d_model if base_width is None else base_width
    check_widths(d_model=d_model, base_width=below_width, n_heads=n_heads, d_head=d_head, fixed=fixed)
    for name, value in (("n_layers", n_layers), ("base_layers", below)):
        check_count(name, value)
    found: dict[tuple[Any, ...], WidthRow] = {}
    for parameter in parameters:
        factors = width_factors(
            parameter,
            chosen,
            d_model=d_model,
            base_width=base_width,
            optimizer=optimizer,
            fixed=fixed,
            n_layers=n_layers,
            base_layers=below,
        )
        octave = width_factors(
            parameter, chosen, d_model=d_model, base_width=d_model / 2, optimizer=optimizer, fixed=fixed
        )
        row = WidthRow(
            role=parameter.role,
            in_blocks=parameter.in_blocks,
            fan_in=parameter.fan_in,
            fan_out=parameter.fan_out,
            factors=factors,
            exponents=WidthExponents(*(math.log2(value) for value in (octave.std**2, octave.rate, octave.epsilon))),
            reason=_reason(parameter.role, optimizer),
        )
        found.setdefault((row.role, row.in_blocks, *(f"{factor:.12g}" for factor in factors)), row)
    rows = sorted(found.values(), key=lambda row: (not row.in_blocks, SCALED_ROLES.index(row.role)))
    output = (d_model / (1 if base_width is None else base_width)) ** (-(1 + chosen.s) / 2) if tied else 1.0
    residual = (n_layers / below) ** -chosen.residual_exponent
    return WidthTable(
        scheme=chosen,
        optimizer=optimizer,
        d_model=d_model,
        base_width=base_width,
        n_layers=n_layers,
        base_layers=below,
        rows=tuple(rows),
        output_multiplier=output,
        residual_multiplier=residual,
        notes=tuple(_notes(d_model, base_width, output, residual, optimizer, chosen, fixed)),
    )


def standard_parameters(
    *, d_model: int, ratio: float = 4.0, vision: bool = False, n_outputs: int = 1000
) -> list[Sizes]:
    """Return the parameters of a usual transformer, for tables on paper.

    Args:
        d_model: Width of the stream.
        ratio: Hidden width of the MLP over the width.
        vision: Patches of 16 x 16 x 3 and a class token in place of a vocabulary.
        n_outputs: Outputs of the head.
    """
    n, hidden = d_model, round(ratio * d_model)
    fans = {
        "query": (n, n),
        "key": (n, n),
        "value": (n, n),
        "output": (n, n),
        "mlp_in": (n, hidden),
        "mlp_out": (hidden, n),
    }
    inside = [Sizes(role, *pair, True) for role, pair in fans.items()]
    inside += [Sizes(f"{role}_bias", 1, pair[1], True) for role, pair in fans.items()]
    inside += [Sizes(role, 1, n, True) for role in GAINS]
    stem = [Sizes("patch_embedding", 768, n, False), Sizes("class_token", 1, n, False)]
    ends = [*(stem if vision else [Sizes("token_embedding", 1, n, False)]), Sizes("position_embedding", 1, n, False)]
    ends += [Sizes(role, 1, n, False) for role in GAINS]
    return [*inside, *ends, Sizes("head", n, n_outputs, False), Sizes("head_bias", 1, n_outputs, False)]


def _reason(role: str, optimizer: Optimizer) -> str:
    """Return the formula in words, with what fan_in is for this role."""
    last = role in ("head", "head_bias")
    units = "" if last else "fan_out" if role in NARROW else "n"
    power = "s" if optimizer == "sgd" else "(s/2)"
    top = f"{units}^{power}" if units else "1"
    inputs = "fan_in" if role in HIDDEN or role in ("patch_embedding", "head") else ""
    outputs = "sqrt(fan_out)" if optimizer == "adamw" else ""
    bottom = f"({inputs} {outputs})" if inputs and outputs else inputs or outputs
    kind = "variance n^-s / fan_in" if role == "head" else "variance 1 / fan_in" if inputs else "fan_in 1"
    if role == "patch_embedding":
        kind += ", which is fixed"
    if role in NARROW:
        kind += ", a choice"
    return f"{kind}; rate {top} / {bottom}" if bottom else f"{kind}; rate {top}"


def _notes(
    d_model: int,
    base_width: int | None,
    output: float,
    residual: float,
    optimizer: Optimizer,
    scheme: ScalingScheme,
    fixed: FixedHeads,
) -> list[str]:
    kept = "is one number for all" if base_width is None else "is that of the base"
    notes = [f"lr * weight_decay of every decayed parameter {kept}; biases and norms are not decayed"]
    if optimizer == "sgd":
        notes.append("eps does not occur in SGD")
    if base_width is not None and base_width > d_model:
        notes.append(f"the base is wider than the target ({base_width} > {d_model}): rates are extrapolated downwards")
    if fixed == "n_heads" and scheme.s > 0 and base_width not in (None, d_model):
        notes.append(
            "heads change their width: where trained scores grow with it, divide them by d_head instead of its root"
        )
    if output != 1.0:
        notes.append(f"tied head: multiply the logits by {output:.6g}, since the embedding keeps its variance")
    if residual != 1.0:
        notes.append(f"multiply every branch by {residual:.6g} (on top of what the base does)")
    return notes


def _number(value: float) -> str:
    return f"{value + 0.0:.4g}" if abs(value) > 1e-12 else "0"
