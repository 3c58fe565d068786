"""Writing a spec's weight scales and residual factors into a torch model, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import nn

from fathometer.application.drawing import Draw, draw, frozen_among
from fathometer.application.inside import (
    ReadPair,
    ReadStack,
    expect_pair,
    read_pair,
    read_stack,
    without_multipliers,
)
from fathometer.application.multipliers import ResidualMultiplier, insertable_factors, remove_multipliers
from fathometer.errors import NotCoveredError, SpecError
from fathometer.measurement.batches import as_batch
from fathometer.models import WeightSlice, check_weights
from fathometer.spec import (
    CrossAttention,
    EncoderDecoder,
    GatedMLP,
    Norm,
    SelfAttention,
    Sublayer,
    Transformer,
    array_fields,
    memory_width,
)

#: Field of a branch with the standard deviation of a role's bias; roles that are missing have none in the theory.
_BIASES = {"value": "value_bias", "output": "output_bias", "mlp_in": "in_bias", "mlp_out": "out_bias"}


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """One drawn weight or bias.

    Attributes:
        layer: Index of the block.
        role: What it is, such as ``"query"``, ``"mlp_out"`` or ``"value_bias"``.
        part: The parameter and the rows or columns of it.
        std: Standard deviation of its entries; zero for a bias set to zero.
    """

    layer: int
    role: str
    part: WeightSlice
    std: float

    @property
    def parameter(self) -> str:
        """Full name of the parameter."""
        return self.part.parameter

    @property
    def key(self) -> str:
        """The parameter and the slice, as in ``"h.0.attn.c_attn.weight[:, 0:768]"``."""
        if (self.part.start, self.part.stop) == (0, self.part.size):
            return self.parameter
        return f"{self.parameter}[{':, ' * self.part.axis}{self.part.start}:{self.part.stop}]"


@dataclass(frozen=True, kw_only=True)
class ResidualRow:
    """One multiplier.

    Attributes:
        layer: Index of the block.
        module: Full name of the module whose output is multiplied.
        factor: By what.
    """

    layer: int
    module: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What :func:`write_spec` did to a model.

    Attributes:
        target: The spec that was written.
        blocks: Full names of the blocks.
        rows: Every weight and bias drawn.
        residual: Every multiplier inserted; factors of one need none.
        seed: Seed of the draw.
        notes: What was left alone, and what to know.
    """

    target: Transformer
    blocks: tuple[str, ...]
    rows: tuple[WeightRow, ...]
    residual: tuple[ResidualRow, ...]
    seed: int
    notes: tuple[str, ...]
    _multipliers: tuple[ResidualMultiplier, ...] = field(repr=False, compare=False)

    def table(self) -> str:
        """Return one line per weight, then one per multiplier, then the notes."""
        width = max(len(text) for text in (*(row.key for row in self.rows), *(r.module for r in self.residual), ""))
        lines = [f"{'layer':>5}  {'role':<12}  {'parameter':<{width}}  std"]
        lines += [f"{row.layer:>5}  {row.role:<12}  {row.key:<{width}}  {row.std:.6g}" for row in self.rows]
        if self.residual:
            lines += ["", f"{'layer':>5}  {'':<12}  {'output of':<{width}}  factor"]
            lines += [f"{r.layer:>5}  {'residual':<12}  {r.module:<{width}}  {r.factor:.6g}" for r in self.residual]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    def remove(self) -> None:
        """Take the multipliers out of the model again; the weights stay as drawn."""
        for multiplier in self._multipliers:
            multiplier.remove()


@dataclass(frozen=True, kw_only=True)
class AppliedEncoderDecoder:
    """What :func:`write_spec` did to an encoder and its decoder.

    Attributes:
        target: The spec that was written.
        encoder, decoder: What was done to each.
    """

    target: EncoderDecoder
    encoder: Applied
    decoder: Applied

    @property
    def stacks(self) -> tuple[Applied, Applied]:
        """The encoder, then the decoder."""
        return self.encoder, self.decoder

    @property
    def blocks(self) -> tuple[str, ...]:
        """Full names of the blocks of both."""
        return (*self.encoder.blocks, *self.decoder.blocks)

    @property
    def rows(self) -> tuple[WeightRow, ...]:
        """Every weight and bias drawn, layers counted in each stack."""
        return (*self.encoder.rows, *self.decoder.rows)

    @property
    def residual(self) -> tuple[ResidualRow, ...]:
        """Every multiplier inserted, layers counted in each stack."""
        return (*self.encoder.residual, *self.decoder.residual)

    @property
    def seed(self) -> int:
        """Seed of the draw."""
        return self.encoder.seed

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left alone, and what to know."""
        return tuple(dict.fromkeys([*self.encoder.notes, *self.decoder.notes]))

    def table(self) -> str:
        """Return the tables of the encoder and of the decoder."""
        return "\n\n".join(["encoder", self.encoder.table(), "decoder", self.decoder.table()])

    def remove(self) -> None:
        """Take the multipliers out of the model again; the weights stay as drawn."""
        for stack in self.stacks:
            stack.remove()


@overload
def write_spec(
    model: nn.Module,
    batch: Any,
    target: Transformer,
    *,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    on_conflict: Literal["raise", "first"] = "raise",
) -> Applied: ...


@overload
def write_spec(
    model: nn.Module,
    batch: Any,
    target: EncoderDecoder,
    *,
    seed: int = 0,
    blocks: None = None,
    on_conflict: Literal["raise", "first"] = "raise",
) -> AppliedEncoderDecoder: ...


def write_spec(
    model: nn.Module,
    batch: Any,
    target: Transformer | EncoderDecoder,
    *,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    on_conflict: Literal["raise", "first"] = "raise",
) -> Applied | AppliedEncoderDecoder:
    """Give a model the weight scales and residual factors of a spec, in place.

    Every matrix of the blocks that has a role is drawn anew, independent Gaussian with standard deviation
    ``scale / sqrt(fan_in)``. The draw depends on the seed and the parameter's name only. Biases of these maps become
    what the spec says, mostly zero. Residual factors are inserted as multipliers of module outputs (forward hooks):
    the model's code, parameters and ``state_dict`` keys stay, and a factor that its code applies already is accounted
    for. A second call replaces weights and multipliers. Embeddings, heads, norms and anything else outside the roles
    are left alone. Code that stores only a ``state_dict`` loses the multipliers: call this again after loading, or
    write the factors into the block's forward.

    Args:
        model: A torch module with residual blocks, whose weights are neither all zero nor NaN.
        batch: Something the model can be called with: a tensor, or a tuple or dict of tensors.
        target: A transformer, or an encoder-decoder, of the same architecture.
        seed: Which draw.
        blocks: Path of the block container, or the blocks, where they are not found on their own; for one stack only.
        on_conflict: What to do when layers that share a weight get different scales: ``"raise"``, or let the
            ``"first"`` layer win.
    Returns:
        The table of what was done; ``remove()`` takes the multipliers out again.
    Raises:
        SpecError: if the spec describes another architecture, or shared weights get different scales.
        NotCoveredError: for a model that cannot be read, or a residual factor that no multiplier can bring about.
        ModelError, BatchError: for parameters that are not floating point, no blocks, or a batch that does not fit.
    """
    if isinstance(target, EncoderDecoder) and blocks is not None:
        raise SpecError("blocks name one stack; the stacks of an EncoderDecoder are found on their own")
    check_request(target, on_conflict)
    check_weights(model)
    ready = as_batch(batch)
    read: ReadStack | ReadPair
    with without_multipliers(model):
        if isinstance(target, EncoderDecoder):
            read = expect_pair(read_pair(model, ready))
        else:
            read = read_stack(model, ready, blocks)
    return write_read(model, read, target, seed=seed, on_conflict=on_conflict)


def check_request(target: Transformer | EncoderDecoder, on_conflict: str) -> None:
    """Refuse arrays in a spec to be written, and another rule for conflicts than those there are."""
    if on_conflict not in ("raise", "first"):
        raise SpecError(f"on_conflict must be 'raise' or 'first'; got {on_conflict!r}")
    for where, array in array_fields(target):
        raise SpecError(f"a model needs single numbers; {where} is an array of shape {array.shape}")


def write_read(
    model: nn.Module,
    read: ReadStack | ReadPair,
    target: Transformer | EncoderDecoder,
    *,
    seed: int,
    on_conflict: str,
) -> Applied | AppliedEncoderDecoder:
    """Do what :func:`write_spec` does to a model whose blocks have just been read."""
    check_request(target, on_conflict)
    if isinstance(target, EncoderDecoder):
        pair = expect_pair(read if isinstance(read, ReadPair) else None)
        _check_memory_norm(pair.memory_norm, target.memory_norm)
        work = [(pair.encoder, target.encoder), (pair.decoder, target.decoder)]
    else:
        assert isinstance(read, ReadStack)
        work = [(read, target)]
    for stack, wanted in work:
        _check_architecture(stack, wanted)
    weights = [_weight_rows(model, stack, wanted) for stack, wanted in work]
    kept = _without_conflicts(model, [row for rows, _ in weights for row in rows], on_conflict)
    shared: dict[int, ResidualRow] = {}
    residuals = [_residual_rows(model, stack, wanted, on_conflict, shared) for stack, wanted in work]
    frozen = frozen_among(model, [row.parameter for row in kept])
    kept = [row for row in kept if row.parameter not in frozen]
    remove_multipliers(model)
    # Not the label of a later redraw with the same seed, which must be independent of this one.
    draw(model, [Draw(row.parameter, row.key, row.part.of, row.std) for row in kept], seed=seed, label="written")
    drawn = set(map(id, kept))
    stay = [f"frozen parameters are left as they are: {', '.join(frozen)}"] if frozen else []
    done = [
        Applied(
            target=wanted,
            blocks=stack.stack.names,
            rows=tuple(row for row in rows if id(row) in drawn),
            residual=tuple(residual),
            seed=seed,
            notes=(*notes, *more, *stay),
            _multipliers=tuple(ResidualMultiplier(model.get_submodule(row.module), row.factor) for row in residual),
        )
        for (stack, wanted), (rows, notes), (residual, more) in zip(work, weights, residuals, strict=True)
    ]
    if isinstance(target, EncoderDecoder):
        return AppliedEncoderDecoder(target=target, encoder=done[0], decoder=done[1])
    return done[0]


def _check_memory_norm(mine: Norm | None, theirs: Norm | None) -> None:
    """Refuse another kind of norm behind the encoder than the model has."""
    if type(mine) is not type(theirs):
        raise SpecError(
            f"the model has memory_norm {type(mine).__name__!r} behind its encoder, the spec {type(theirs).__name__!r}"
        )


def _check_architecture(read: ReadStack, target: Transformer) -> None:
    """Refuse a target that describes another network than the model's code computes."""
    label, width = read.label, read.d_model
    if target.d_model != width or target.n_layers != len(read.blocks):
        raise SpecError(
            f"the model has {len(read.blocks)} {label}s of width {width}; the spec {target.n_layers} of width "
            f"{target.d_model}"
        )
    for layer, (block, wanted) in enumerate(zip(read.blocks, target.layers(), strict=True)):
        if len(block.parts) != len(wanted.sublayers):
            raise SpecError(
                f"{label} {layer} has {len(block.parts)} sublayers in the model, {len(wanted.sublayers)} in the spec"
            )
        for j, (part, sublayer) in enumerate(zip(block.parts, wanted.sublayers, strict=True)):
            mine, theirs = _fixed(part.sublayer, width), _fixed(sublayer, width)
            for key in mine:
                if key not in theirs or not _same(mine[key], theirs[key]):
                    raise SpecError(
                        f"{label} {layer}, sublayer {j}: the model has {key} {mine[key]!r}, "
                        f"the spec {theirs.get(key, 'none')!r}"
                    )


def _fixed(sublayer: Sublayer, width: int) -> dict[str, Any]:
    """Return what the code of a sublayer fixes, so that no weight can change it; ``width`` is that of the stream."""
    out: dict[str, Any] = {
        "branch": type(sublayer.branch).__name__,
        **{slot: type(getattr(sublayer, slot)).__name__ for slot in ("input_norm", "output_norm", "stream_norm")},
    }
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        out |= {key: getattr(branch, key) for key in ("n_heads", "score_multiplier")}
        out["n_kv_heads"] = branch.n_kv_heads or branch.n_heads
    if isinstance(branch, SelfAttention):
        out |= {key: getattr(branch, key) for key in ("causal", "qk_norm")}
    elif isinstance(branch, CrossAttention):
        out["d_memory"] = memory_width(branch, width)
    else:
        out |= {"activation": branch.activation, "ratio": branch.ratio}
    return out


def _same(mine: Any, theirs: Any) -> bool:
    """Compare two fixed properties; what was read off a finite sample carries its error."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=0.1)
    return bool(mine == theirs)


def _weight_rows(model: nn.Module, read: ReadStack, target: Transformer) -> tuple[list[WeightRow], list[str]]:
    """Return what to draw, and notes on what is left alone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows: list[WeightRow] = []
    gains = False
    for layer, (block, wanted) in enumerate(zip(read.blocks, target.layers(), strict=True)):
        for part, sublayer in zip(block.parts, wanted.sublayers, strict=True):
            for role, where in part.roles.items():
                fan_in = parameters[where.parameter].shape[1 - where.axis]
                std = float(getattr(sublayer.branch, role)) / math.sqrt(fan_in)
                rows.append(WeightRow(layer=layer, role=role, part=where, std=std))
                bias = f"{where.parameter.removesuffix('weight')}bias"
                if bias in parameters:
                    known = _BIASES.get(role) if not isinstance(sublayer.branch, GatedMLP) else None
                    place = WeightSlice(parameter=bias, axis=0, start=where.start, stop=where.stop, size=where.size)
                    std = float(getattr(sublayer.branch, known)) if known else 0.0
                    rows.append(WeightRow(layer=layer, role=f"{role}_bias", part=place, std=std))
            for slot in ("input_norm", "output_norm", "stream_norm"):
                mine, theirs = getattr(part.sublayer, slot), getattr(sublayer, slot)
                gains |= mine is not None and not math.isclose(
                    float(getattr(mine, "gain", 1.0)), float(getattr(theirs, "gain", 1.0)), rel_tol=0.01
                )
    notes = ["norms are left as they are"]
    if gains:
        notes.append("the spec's norm gains differ from the model's, which stay (epsilon counts as a lower gain)")
    drawn = {row.parameter for row in rows}
    rest = [
        f"{name}.{suffix}"
        for name, module in zip(read.stack.names, read.stack.blocks, strict=True)
        for suffix, parameter in module.named_parameters()
        if parameter.ndim >= 2 and f"{name}.{suffix}" not in drawn
    ]
    if rest:
        notes.append(f"matrices in the blocks that have no role in the spec are left as they are: {', '.join(rest)}")
    return rows, notes


def _without_conflicts(model: nn.Module, rows: list[WeightRow], on_conflict: str) -> list[WeightRow]:
    """Return the rows with each stored weight drawn once.

    Raises:
        SpecError: naming two names of one weight that get different scales.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept: list[WeightRow] = []
    by_storage: dict[int, list[WeightRow]] = {}
    for row in rows:
        sharing = by_storage.setdefault(id(parameters[row.parameter]), [])
        other = next((r for r in sharing if r.part.start < row.part.stop and row.part.start < r.part.stop), None)
        if other is None:
            sharing.append(row)
            kept.append(row)
        elif on_conflict == "raise" and not math.isclose(other.std, row.std, rel_tol=1e-6):
            raise SpecError(
                f"{other.key!r} and {row.key!r} are one weight, for which the spec asks standard deviations "
                f"{other.std:.6g} and {row.std:.6g}; on_conflict='first' lets the first layer win"
            )
    return kept


def _residual_rows(
    model: nn.Module, read: ReadStack, target: Transformer, on_conflict: str, by_module: dict[int, ResidualRow]
) -> tuple[list[ResidualRow], list[str]]:
    """Return which module outputs to multiply by what, and notes; ``by_module`` holds every module's first row."""
    rows: list[ResidualRow] = []
    deviation = 0.0
    tolerance = read.tolerance
    for layer, (block, wanted) in enumerate(zip(read.blocks, target.layers(), strict=True)):
        own = tuple(part.sublayer for part in block.parts)
        try:
            branches, sizes = insertable_factors(own, wanted.sublayers, tolerance=tolerance)
        except NotCoveredError as error:
            raise NotCoveredError(f"{read.label} {layer}: {error.reason}") from None
        places = [*zip(block.exits, branches, strict=True), (read.stack.names[layer], sizes[-1])]
        for module, factor in places:
            row = ResidualRow(layer=layer, module=module, factor=factor)
            first = by_module.setdefault(id(model.get_submodule(module)), row)
            if first is row:
                if not math.isclose(factor, 1.0, rel_tol=tolerance):
                    rows.append(row)
            elif on_conflict == "raise" and not math.isclose(first.factor, factor, rel_tol=1e-6):
                raise SpecError(
                    f"{first.module!r} and {module!r} are one module, whose output the spec asks to multiply by "
                    f"{first.factor:.6g} and {factor:.6g}; on_conflict='first' lets the first layer win"
                )
        deviation = max(
            [deviation, *(0.5 * eps * abs(1 - g * g) for eps, g in zip(block.epsilons, sizes[:-1], strict=True))]
        )
    notes = []
    own_factors = read.own_factors()
    if own_factors:
        rest = f" and {len(own_factors) - 1} more" if len(own_factors) > 1 else ""
        notes.append(f"the model's own residual factors are divided out: {own_factors[0]}{rest}")
    if deviation > 1e-3:
        notes.append(
            f"the epsilon of the norms is not small beside the stream: branches are off by about {deviation:.1%} "
            "where the skip factor is carried by the block's output"
        )
    return rows, notes
