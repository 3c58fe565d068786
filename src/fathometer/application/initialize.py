"""Writing a spec's weight scales and residual factors into a torch model, in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fathometer.application.multipliers import ResidualMultiplier, insertable_factors, multipliers_in
from fathometer.errors import BatchError, FathometerError, ModelError, NotCoveredError, SpecError
from fathometer.measurement.batches import as_batch
from fathometer.measurement.sounding import record_calls
from fathometer.measurement.untouched import untouched
from fathometer.models import Stack, SublayerReading, WeightSlice, check_weights, find_stacks, named_stack, read_block
from fathometer.models.branches import leaving, producer_of, split_branches
from fathometer.models.reading import spec_of
from fathometer.models.seeding import named_generator
from fathometer.models.trace import Trace, tracing
from fathometer.models.weights import check_order
from fathometer.spec import CrossAttention, GatedMLP, SelfAttention, Sublayer, Transformer, array_fields

#: Field of a branch with the standard deviation of a role's bias; roles that are missing have none in the theory.
_BIASES = {"value": "value_bias", "output": "output_bias", "mlp_in": "in_bias", "mlp_out": "out_bias"}
_EPSILONS = ("eps", "variance_epsilon", "epsilon")


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
class _ReadBlock:
    """One block of the model: what its sublayers are, and which module puts out each branch."""

    parts: tuple[SublayerReading, ...]
    exits: tuple[str, ...]
    epsilons: tuple[float, ...]


def write_spec(
    model: nn.Module,
    batch: Any,
    target: Transformer,
    *,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    on_conflict: Literal["raise", "first"] = "raise",
) -> Applied:
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
        target: A transformer of the same architecture.
        seed: Which draw.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
        on_conflict: What to do when layers that share a weight get different scales: ``"raise"``, or let the
            ``"first"`` layer win.
    Returns:
        The table of what was done; ``remove()`` takes the multipliers out again.
    Raises:
        SpecError: if the spec describes another architecture, or shared weights get different scales.
        NotCoveredError: for a model that cannot be read, or a residual factor that no multiplier can bring about.
        ModelError, BatchError: for parameters that are not floating point, no blocks, or a batch that does not fit.
    """
    if on_conflict not in ("raise", "first"):
        raise SpecError(f"on_conflict must be 'raise' or 'first'; got {on_conflict!r}")
    for where, array in array_fields(target):
        raise SpecError(f"a model needs single numbers; {where} is an array of shape {array.shape}")
    check_weights(model)
    earlier = [(module, hook.residual_factor) for module, hook in multipliers_in(model)]
    for _, hook in multipliers_in(model):
        hook.remove()
    try:
        stack, width, read = _read(model, batch, blocks)
        _check_architecture(read, target, width)
        rows, notes = _weight_rows(model, stack, read, target, on_conflict)
        residual, more = _residual_rows(model, stack, read, target, on_conflict)
    except BaseException:
        for module, factor in earlier:
            ResidualMultiplier(module, factor)
        raise
    _draw(model, rows, seed)
    multipliers = tuple(ResidualMultiplier(model.get_submodule(row.module), row.factor) for row in residual)
    return Applied(
        target=target,
        blocks=stack.names,
        rows=tuple(rows),
        residual=tuple(residual),
        seed=seed,
        notes=tuple([*notes, *more]),
        _multipliers=multipliers,
    )


@dataclass(frozen=True, kw_only=True)
class ModelInside:
    """What the blocks of a model compute.

    Attributes:
        names: Full names of the blocks.
        spec: The transformer they make, with the scales of their weights.
        own_factors: Residual factors other than one that the model's code applies, in words.
    """

    names: tuple[str, ...]
    spec: Transformer
    own_factors: tuple[str, ...]


def read_model(model: nn.Module, batch: Any, blocks: str | Sequence[nn.Module] | None = None) -> ModelInside:
    """Read the blocks of a model, one traced call each; the model is left as found.

    Args:
        model: A torch module with residual blocks.
        batch: What it can be called with.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
    Raises:
        NotCoveredError: naming the block and what the theory has no map for.
        ModelError, BatchError: as :func:`write_spec`.
    """
    check_weights(model)
    inserted = [(module, hook.residual_factor) for module, hook in multipliers_in(model)]
    for _, hook in multipliers_in(model):
        hook.remove()
    try:
        stack, width, read = _read(model, batch, blocks)
    finally:
        for module, factor in inserted:
            ResidualMultiplier(module, factor)
    tolerance = _tolerance(stack)
    own = [text for block in read for text in _own_factors(block, tolerance)]
    return ModelInside(names=stack.names, spec=spec_of([block.parts for block in read], width), own_factors=tuple(own))


def _read(
    model: nn.Module, batch: Any, blocks: str | Sequence[nn.Module] | None
) -> tuple[Stack, int, list[_ReadBlock]]:
    """Return the blocks, the width of the stream, and what every block computes.

    Every block is run on the stream in front of the first one: what a deep stack has made of it (overflow, branches
    lost in rounding) would only hide what the code does.
    """
    ready = as_batch(batch)
    with untouched(model):
        try:
            if blocks is not None:
                stack = named_stack(model, blocks)
            else:
                stack = find_stacks(model, lambda: ready.call(model))[0]
            calls, _ = record_calls(model, stack, ready, False, 0)
        except FathometerError:
            raise
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise BatchError(
                f"the model does not run on {ready.label}: {type(error).__name__}: {first_line}"
            ) from error
        stream = calls[0].stream
        if not bool(torch.isfinite(stream).all()):
            raise ModelError(f"the stream in front of {stack.names[0]!r} is NaN or infinite; check the embedding")
        read = []
        for layer, (name, block, call) in enumerate(zip(stack.names, stack.blocks, calls, strict=True)):
            entered = stream.clone()
            with torch.no_grad(), tracing(block) as trace:
                out = call.run(block, entered)
            try:
                parts = read_block(name, entered, out.detach(), trace)
                read.append(_located(name, parts, trace))
            except (NotCoveredError, SpecError) as error:
                raise NotCoveredError(f"block {layer}: {error}") from error
    return stack, int(stream.shape[-1]), read


def _located(name: str, parts: tuple[SublayerReading, ...], trace: Trace) -> _ReadBlock:
    """Return a block's reading together with the module that puts out each branch."""
    exits, epsilons = [], []
    for branch, part in zip(split_branches(trace), parts, strict=True):
        check_order(branch, part.roles)
        # Behind a norm on the branch, else right at its last matrix: dropout and layer scale commute with a factor.
        exit_name = branch.exit.name if part.sublayer.output_norm is None else leaving(branch, trace)[3]
        module = next(call.module for call in trace.calls if call.name == exit_name)
        if sum(call.module is module for call in trace.calls) != 1:
            raise NotCoveredError(f"{exit_name!r} runs more than once in a block; no factor can be put behind it")
        exits.append(f"{name}.{exit_name}")
        norm = producer_of(branch.source, trace)
        eps = 0.0 if norm is None else next((getattr(norm.module, n) for n in _EPSILONS if hasattr(norm.module, n)), 0)
        power = 1.0 if norm is None else float(norm.before.square().mean())
        epsilons.append(float(eps or 0.0) / power if power else 0.0)
    return _ReadBlock(parts=parts, exits=tuple(exits), epsilons=tuple(epsilons))


def _check_architecture(read: list[_ReadBlock], target: Transformer, width: int) -> None:
    """Refuse a target that describes another network than the model's code computes."""
    if target.d_model != width or target.n_layers != len(read):
        raise SpecError(
            f"the model has {len(read)} blocks of width {width}; the spec {target.n_layers} of width {target.d_model}"
        )
    for layer, (block, wanted) in enumerate(zip(read, target.layers(), strict=True)):
        if len(block.parts) != len(wanted.sublayers):
            raise SpecError(
                f"block {layer} has {len(block.parts)} sublayers in the model, {len(wanted.sublayers)} in the spec"
            )
        for j, (part, sublayer) in enumerate(zip(block.parts, wanted.sublayers, strict=True)):
            mine, theirs = _fixed(part.sublayer), _fixed(sublayer)
            for key in mine:
                if key not in theirs or not _same(mine[key], theirs[key]):
                    raise SpecError(
                        f"block {layer}, sublayer {j}: the model has {key} {mine[key]!r}, "
                        f"the spec {theirs.get(key, 'none')!r}"
                    )


def _fixed(sublayer: Sublayer) -> dict[str, Any]:
    """Return what the code of a sublayer fixes, so that no weight can change it."""
    out: dict[str, Any] = {
        "branch": type(sublayer.branch).__name__,
        **{slot: type(getattr(sublayer, slot)).__name__ for slot in ("input_norm", "output_norm", "stream_norm")},
    }
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        out |= {key: getattr(branch, key) for key in ("n_heads", "causal", "qk_norm", "score_multiplier")}
        out["n_kv_heads"] = branch.n_kv_heads or branch.n_heads
    elif not isinstance(branch, CrossAttention):
        out |= {"activation": branch.activation, "ratio": branch.ratio}
    return out


def _same(mine: Any, theirs: Any) -> bool:
    """Compare two fixed properties; what was read off a finite sample carries its error."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=0.1)
    return bool(mine == theirs)


def _weight_rows(
    model: nn.Module, stack: Stack, read: list[_ReadBlock], target: Transformer, on_conflict: str
) -> tuple[list[WeightRow], list[str]]:
    """Return what to draw, and notes on what is left alone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows: list[WeightRow] = []
    gains = False
    for layer, (block, wanted) in enumerate(zip(read, target.layers(), strict=True)):
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
    notes = ["embeddings, heads and norms are left as they are"]
    if gains:
        notes.append("the spec's norm gains differ from the model's, which stay (epsilon counts as a lower gain)")
    drawn = {row.parameter for row in rows}
    rest = [
        f"{name}.{suffix}"
        for name, module in zip(stack.names, stack.blocks, strict=True)
        for suffix, parameter in module.named_parameters()
        if parameter.ndim >= 2 and f"{name}.{suffix}" not in drawn
    ]
    if rest:
        notes.append(f"matrices in the blocks that have no role in the spec are left as they are: {', '.join(rest)}")
    return _without_conflicts(rows, parameters, on_conflict), notes


def _without_conflicts(rows: list[WeightRow], parameters: Mapping[str, Tensor], on_conflict: str) -> list[WeightRow]:
    """Return the rows with each stored weight drawn once.

    Raises:
        SpecError: naming two names of one weight that get different scales.
    """
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
    model: nn.Module, stack: Stack, read: list[_ReadBlock], target: Transformer, on_conflict: str
) -> tuple[list[ResidualRow], list[str]]:
    """Return which module outputs to multiply by what, and notes."""
    rows: list[ResidualRow] = []
    own_factors: list[str] = []
    deviation = 0.0
    by_module: dict[int, ResidualRow] = {}
    tolerance = _tolerance(stack)
    for layer, (block, wanted) in enumerate(zip(read, target.layers(), strict=True)):
        own = tuple(part.sublayer for part in block.parts)
        try:
            branches, sizes = insertable_factors(own, wanted.sublayers, tolerance=tolerance)
        except NotCoveredError as error:
            raise NotCoveredError(f"block {layer}: {error.reason}") from None
        places = [*zip(block.exits, branches, strict=True), (stack.names[layer], sizes[-1])]
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
        own_factors += _own_factors(block, tolerance)
    notes = []
    if own_factors:
        rest = f" and {len(own_factors) - 1} more" if len(own_factors) > 1 else ""
        notes.append(f"the model's own residual factors are divided out: {own_factors[0]}{rest}")
    if deviation > 1e-3:
        notes.append(
            f"the epsilon of the norms is not small beside the stream: branches are off by about {deviation:.1%} "
            "where the skip factor is carried by the block's output"
        )
    return rows, notes


def _tolerance(stack: Stack) -> float:
    """Return the relative error of residual factors read off tensors."""
    return max(1e-5, *(4 * torch.finfo(parameter.dtype).eps for parameter in stack.blocks[0].parameters()))


def _own_factors(block: _ReadBlock, tolerance: float) -> list[str]:
    """Describe the residual factors other than one that the code of a block applies."""
    return [
        f"{float(s.skip_scale):g} on the skip and {float(s.branch_scale):g} on the branch of {exit_name!r}"
        for s, exit_name in zip((part.sublayer for part in block.parts), block.exits, strict=True)
        if any(abs(float(factor) - 1) > tolerance for factor in (s.skip_scale, s.branch_scale))
    ]


def _draw(model: nn.Module, rows: list[WeightRow], seed: int) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for row in rows:
            view = row.part.of(parameters[row.parameter])
            # Not the key of a later redraw with the same seed, which must be independent of this one.
            generator = named_generator(seed, f"written {row.key}")
            noise = torch.randn(view.shape, generator=generator, dtype=torch.float32)
            view.copy_(noise.mul_(row.std))
