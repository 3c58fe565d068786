"""``initialize``: a scheme, by name, written into a real model: stem, blocks, residual factors and head."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fathometer.application.initialize import Applied, read_model, write_spec
from fathometer.application.initialize_widths import WidthsApplied, initialize_widths
from fathometer.application.multipliers import ResidualMultiplier, modules_sharing
from fathometer.errors import NotCoveredError, SpecError, nearest
from fathometer.measurement.batches import Batch, as_batch, default_batch
from fathometer.measurement.sounding import record_calls
from fathometer.measurement.statistics import gram_matrix
from fathometer.measurement.untouched import untouched
from fathometer.models.finding import find_stacks, named_stack
from fathometer.models.roles import ModelRoles, ParameterRole, read_roles
from fathometer.models.seeding import named_generator
from fathometer.prescription import SCHEMES, SchemePlan, apply_scheme, scheme_options
from fathometer.prescription.plans import EndRow
from fathometer.prescription.unit_ends import unit_head, unit_stem
from fathometer.prescription.width_scaling import SCALINGS
from fathometer.spec import (
    Derf,
    DyT,
    Head,
    LayerNorm,
    PatchStem,
    RMSNorm,
    SelfAttention,
    Stem,
    Sublayer,
    TokenStem,
    Transformer,
)
from fathometer.spec.fields import NORM_SLOTS

#: Schemes that say something about stem and head.
_WITH_ENDS = ("deepscalelm", "deepscalelm-simple")


class DoubleScalingWarning(UserWarning):
    """The model's own code scales its branches already; its factors are divided out of the scheme's."""


@dataclass(frozen=True, kw_only=True)
class EndDrawn:
    """One table or matrix outside the blocks that was drawn, and the formula."""

    parameter: ParameterRole
    std: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Initialized:
    """What :func:`initialize` did to a model.

    Attributes:
        plan: The scheme on this architecture.
        blocks: What was written into the blocks, see :class:`~fathometer.application.Applied`.
        ends: What was drawn outside of them.
        head_multiplier: Module whose output is multiplied, and the factor; ``None`` where there is none.
        notes: What was left alone, and what to know.
    """

    plan: SchemePlan
    blocks: Applied
    ends: tuple[EndDrawn, ...]
    head_multiplier: tuple[str, float] | None
    notes: tuple[str, ...]
    _hook: ResidualMultiplier | None = field(repr=False, compare=False, default=None)

    def table(self) -> str:
        """Return one line per weight outside the blocks, then the table of the blocks, then the notes."""
        width = max((len(row.parameter.key) for row in self.ends), default=0)
        lines = [
            f"{row.parameter.role:<20}  {row.parameter.key:<{width}}  {row.std:.6g}  {row.reason}" for row in self.ends
        ]
        if self.head_multiplier is not None:
            lines.append("output of {} times {:.6g}".format(*self.head_multiplier))
        return "\n".join([*lines, *([""] if lines else []), self.blocks.table(), *self.notes])

    def remove(self) -> None:
        """Take all multipliers out of the model again; the weights stay as drawn."""
        self.blocks.remove()
        if self._hook is not None:
            self._hook.remove()


@dataclass(frozen=True)
class _Ends:
    """What is to be drawn outside the blocks, the plan's rows about it, and the multiplier of a tied head."""

    rows: tuple[EndDrawn, ...] = ()
    stem: tuple[EndRow, ...] = ()
    head: tuple[EndRow, ...] = ()
    multiplier: tuple[str, float] | None = None

    def places(self, model: nn.Module) -> list[tuple[EndDrawn, nn.Parameter]]:
        """Return every row with its parameter."""
        parameters = dict(model.named_parameters())
        return [(row, parameters[row.parameter.parameter]) for row in self.rows]


_NO_ENDS = _Ends()


def initialize(
    model: nn.Module,
    scheme: str,
    batch: Any = None,
    *,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    overrides: Mapping[str, str] | None = None,
    on_conflict: Literal["raise", "first"] = "raise",
    **options: Any,
) -> Initialized | WidthsApplied:
    """Initialise a model by a named scheme, in place.

    The blocks get the scheme's weight scales and residual factors, as in :func:`fathometer.application.write_spec`.
    DeepScaleLM also draws the stem's tables and maps and the head, and puts a multiplier on the logits of a tied head.
    What the scheme needs to know is read off the model: its architecture, the number of tokens and their cosine at the
    first block behind the new stem, the second moment of what a patch map is given, and the rate of the blocks' dropout
    modules if they have one rate. Parameters and ``state_dict`` keys stay as they are, and a call with the same seed
    gives the same weights.

    Args:
        model: A torch module with residual blocks.
        scheme: One of :data:`fathometer.prescription.SCHEMES`; or a width scaling (``"neural-tangent"``, ``"hybrid"``,
            ``"maximal-update"``, ...), which takes the options of :func:`fathometer.application.initialize_widths`.
        batch: What the model can be called with: a tensor, or a tuple or dict of tensors. By default, for models with
            a Hugging Face configuration, the text of the interpreter's documentation as bytes, or Gaussian pixels:
            give your own data, as DeepScaleLM depends on the cosine of its tokens.
        seed: Which draw.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
        overrides: Roles of parameters that cannot be told, see :func:`fathometer.models.parameter_roles`.
        on_conflict: What to do when layers that share a weight get different scales, see
            :func:`fathometer.application.write_spec`. A tied table has the embedding's scale; the head follows by its
            multiplier.
        options: Those of the scheme; what is given here is not read off the model.
    Returns:
        The table of what was done; ``remove()`` takes the multipliers out again.
    Raises:
        SpecError: for an unknown scheme or option, one that is missing, or shared weights with different scales.
        ModelError: for parameters that are quantised, sharded or on the meta device, or have no role in the blocks or
            ends; it names the override to use.
        NotCoveredError: for a model that cannot be read, or a factor that no multiplier can bring about.
        BatchError: for a batch that does not fit, or none for a model without a known configuration.
    """
    if scheme in SCALINGS:
        ready = default_batch(model) if batch is None else as_batch(batch)
        return initialize_widths(
            model, scheme, batch=ready.inputs, seed=seed, blocks=blocks, overrides=overrides, **options
        )
    if scheme not in SCHEMES:
        raise SpecError(f"there is no scheme {scheme!r}{nearest(scheme, [*SCHEMES, *SCALINGS])}")
    ready = default_batch(model) if batch is None else as_batch(batch)
    with_ends = scheme in _WITH_ENDS
    roles = read_roles(model, ready.inputs, blocks=blocks, overrides=overrides) if with_ends else None
    notes: list[str] = []
    ends = _NO_ENDS
    if roles is not None:
        if "dropout" not in options:
            options["dropout"], note = _dropout_rate([model.get_submodule(name) for name in roles.blocks])
            notes.append(note)
        ends = _ends(model, ready, roles, options["dropout"], notes)
    before = [(row.parameter, row.parameter.of(tensor).detach().clone()) for row, tensor in ends.places(model)]
    try:
        _draw(model, ends, seed)
        read = read_model(model, ready, blocks)
        _warn_of_double_scaling(model, read.own_factors)
        cosine, n_tokens = _first_tokens(model, ready, blocks)
        usual = {"r0": max(cosine, 0.0), "n_tokens": n_tokens}
        wanted = {name: value for name, value in usual.items() if name in scheme_options(scheme)}
        plan = apply_scheme(_rounded(read.spec), scheme, **(wanted | options))
        applied = write_spec(model, ready, plan.spec, seed=seed, blocks=blocks, on_conflict=on_conflict)
    except BaseException:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for row, values in before:
                row.of(parameters[row.parameter]).copy_(values)
        raise
    hook = (
        None
        if ends.multiplier is None
        else ResidualMultiplier(model.get_submodule(ends.multiplier[0]), ends.multiplier[1])
    )
    if "r0" in wanted and "r0" not in options:
        notes.append(f"r0 = {wanted['r0']:.4g}, the cosine of {n_tokens} tokens of {ready.label} at the first block")
    return Initialized(
        plan=replace(plan, stem=ends.stem, head=ends.head),
        blocks=applied,
        ends=ends.rows,
        head_multiplier=ends.multiplier,
        notes=tuple(notes),
        _hook=hook,
    )


def _rounded(spec: Transformer) -> Transformer:
    """Return the spec with four digits of what was read off tensors, so that the weights found do not matter."""

    def change(sublayer: Sublayer) -> Sublayer:
        norms: dict[str, Any] = {
            slot: replace(norm, gain=_four_digits(norm.gain))
            for slot in NORM_SLOTS
            if isinstance(norm := getattr(sublayer, slot), (LayerNorm, RMSNorm, DyT, Derf))
        }
        branch = sublayer.branch
        if isinstance(branch, SelfAttention):
            branch = replace(branch, score_multiplier=_four_digits(branch.score_multiplier))
        return replace(sublayer, branch=branch, **norms)

    return spec.map_sublayers(change)


def _four_digits(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _warn_of_double_scaling(model: nn.Module, own_factors: Sequence[str]) -> None:
    config = getattr(model, "config", None)
    by_layer = [
        name for name in ("scale_attn_by_inverse_layer_idx", "residual_multiplier") if getattr(config, name, None)
    ]
    found = [*(own_factors[:1]), *(f"config.{name} = {getattr(config, name)!r}" for name in by_layer)]
    if found:
        warnings.warn(
            f"the model scales its branches already: {'; '.join(found)}. Residual factors are divided out, so that "
            "depth is not counted twice; score factors stay and are part of the plan",
            DoubleScalingWarning,
            stacklevel=3,
        )


def _dropout_rate(blocks: Sequence[nn.Module]) -> tuple[float, str]:
    """Return the rate all dropout modules of the blocks share, zero where they differ, and a note."""
    rates = {float(module.p) for block in blocks for module in block.modules() if isinstance(module, nn.Dropout)}
    if not rates:
        return 0.0, "the blocks have no dropout modules: dropout = 0"
    if len(rates) == 1:
        rate = rates.pop()
        return rate, f"dropout = {rate:g} is the rate of the blocks' dropout modules"
    return (
        0.0,
        f"the blocks' dropout modules have the rates {sorted(rates)}; dropout = 0 was planned with, give your own",
    )


def _patch_input(model: nn.Module, batch: Any, roles: ModelRoles) -> float:
    """Return the mean square of what the patch map is applied to."""
    name = roles.of("patch_embedding")[0].parameter.rpartition(".")[0]
    seen: list[float] = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(float(args[0].detach().double().square().mean()))

    with untouched(model), torch.no_grad():
        handle = model.get_submodule(name).register_forward_pre_hook(watch)
        try:
            batch.call(model)
        finally:
            handle.remove()
    return seen[0]


def _stem_of(roles: ModelRoles) -> tuple[Stem, int | None] | None:
    """Return which tables and maps a model's stem has, and the fan-in of its patch map; ``None`` for no stem."""
    patches = roles.of("patch_embedding")
    if patches:
        positions, classes = bool(roles.of("position_embedding")), bool(roles.of("class_token"))
        stem = PatchStem(patch=1.0, position=float(positions), class_token=1.0 if classes else None)
        return stem, patches[0].fan_in
    if not roles.of("token_embedding"):
        return None
    position, segment = (float(bool(roles.of(role))) for role in ("position_embedding", "segment_embedding"))
    return TokenStem(token=1.0, position=position, segment=segment), None


def _ends(model: nn.Module, batch: Batch, roles: ModelRoles, dropout: float, notes: list[str]) -> _Ends:
    """Return what DeepScaleLM draws outside the blocks; what it leaves alone goes into the notes."""
    found = _stem_of(roles)
    rows: list[EndDrawn] = []
    stem_rows: tuple[EndRow, ...] = ()
    head_rows: tuple[EndRow, ...] = ()
    multiplier: tuple[str, float] | None = None
    stem: Stem = TokenStem(token=1.0)
    if found is None:
        notes.append("the model has no stem: its input should have second moment one")
    else:
        stem, fan_in = found
        if isinstance(stem, PatchStem):
            moment = _patch_input(model, batch, roles)
            stem, stem_rows = unit_stem(stem, dropout=dropout, input_second_moment=moment, input_fan_in=fan_in)
        else:
            stem, stem_rows = unit_stem(stem, dropout=dropout)
    tied = {row.parameter for row in roles.roles if row.tied}
    if tied or roles.of("head"):
        _, head_rows = unit_head(Head(tied=bool(tied)), stem, d_model=roles.d_model)
    if tied:
        heads = modules_sharing(model, tied)
        factor = head_rows[0].multiplier
        if not heads:
            raise NotCoveredError(
                "the head multiplies by the token embedding outside any module of its own; multiply its logits by "
                f"{factor:.6g} in the model's code"
            )
        multiplier = heads[0], factor
    by_role = {row.role: row for row in (*stem_rows, *(() if tied else head_rows))}
    for role in roles.roles:
        if role.layer is not None:
            continue
        if role.role in by_role:
            row = by_role[role.role]
            assert row.std is not None
            rows.append(EndDrawn(parameter=role, std=row.std, reason=row.reason))
        elif role.role == "head_hidden":
            rows.append(EndDrawn(parameter=role, std=role.fan_in**-0.5, reason="var 1 / fan_in"))
        elif role.role.endswith("_bias") and role.role.removesuffix("_bias") in (*by_role, "head_hidden"):
            rows.append(EndDrawn(parameter=role, std=0.0, reason="zero"))
    left = sorted({role.role for role in roles.roles if role.layer is None} - {row.parameter.role for row in rows})
    if left:
        notes.append(f"left as they are outside the blocks: {', '.join(left)}")
    return _Ends(tuple(rows), stem_rows, head_rows, multiplier)


def _draw(model: nn.Module, ends: _Ends, seed: int) -> None:
    with torch.no_grad():
        for row, parameter in ends.places(model):
            view = row.parameter.of(parameter)
            generator = named_generator(seed, f"written {row.parameter.key}")
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float32).mul_(row.std))


def _first_tokens(model: nn.Module, batch: Batch, blocks: str | Sequence[nn.Module] | None) -> tuple[float, int]:
    """Return the mean cosine and the number of the tokens at the first block."""
    with untouched(model):
        stack = find_stacks(model, lambda: batch.call(model))[0] if blocks is None else named_stack(model, blocks)
        calls, _ = record_calls(model, stack, batch, False, 0)
    grams = gram_matrix(calls[0].stream)
    n = grams.shape[-1]
    own = np.trace(grams, axis1=-2, axis2=-1)
    shared = (grams.sum(axis=(-2, -1)) - own) / max(n - 1, 1)
    return float(shared.mean() / own.mean()), n
