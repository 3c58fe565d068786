"""``initialize``: a scheme, by name, written into a real model: stem, blocks, residual factors and head."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from fathometer.application.ends import EndDrawn, Ends, draw_ends, plan_ends
from fathometer.application.inside import EncoderDecoderInside, ModelInside, inside_of, read_blocks
from fathometer.application.multipliers import ResidualMultiplier
from fathometer.application.widths import WidthsApplied, initialize_widths
from fathometer.application.writing import Applied, AppliedEncoderDecoder, write_read
from fathometer.errors import SpecError, nearest
from fathometer.measurement.batches import as_batch, default_batch
from fathometer.models.roles import read_roles
from fathometer.prescription import SCHEMES, SchemePlan, apply_scheme, scheme_options
from fathometer.prescription.plans import EncoderDecoderPlan
from fathometer.prescription.schemes import UNIT_SCHEMES
from fathometer.prescription.width_scaling import SCALINGS
from fathometer.spec import (
    CrossAttention,
    Derf,
    DyT,
    EncoderDecoder,
    LayerNorm,
    Norm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
)
from fathometer.spec.fields import NORM_SLOTS


class DoubleScalingWarning(UserWarning):
    """The model's own code scales its branches already; its factors are divided out of the scheme's."""


@dataclass(frozen=True, kw_only=True)
class Initialized:
    """What :func:`initialize` did to a model.

    Attributes:
        plan: The scheme on this architecture, of an encoder-decoder one for each stack.
        blocks: What was written into the blocks, see :class:`~fathometer.application.Applied`; of an encoder-decoder,
            what was written into each stack.
        ends: What was drawn outside of them.
        head_multipliers: Modules of a tied head whose outputs are multiplied, and the factors.
        notes: What was left alone, and what to know.
    """

    plan: SchemePlan | EncoderDecoderPlan
    blocks: Applied | AppliedEncoderDecoder
    ends: tuple[EndDrawn, ...]
    head_multipliers: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]
    _hooks: tuple[ResidualMultiplier, ...] = field(repr=False, compare=False, default=())

    def table(self) -> str:
        """Return one line per weight outside the blocks, the table of the blocks, the formulas, and the notes."""
        width = max((len(row.parameter.key) for row in self.ends), default=0)
        lines = [
            f"{row.parameter.role:<20}  {row.parameter.key:<{width}}  {row.std:.6g}  {row.reason}" for row in self.ends
        ]
        lines += [f"output of {name} times {factor:.6g}" for name, factor in self.head_multipliers]
        why = [f"{', '.join(roles)}: {reason}" for reason, roles in self.reasons().items()]
        notes = dict.fromkeys([*self.plan_notes(), *self.notes])
        return "\n".join([*lines, *([""] if lines else []), self.blocks.table(), "", *why, *notes])

    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Return the formulas of the blocks' weights, each with the roles it is for."""
        rows = [row for plan in self._plans for row in plan.rows]
        by_reason: dict[str, dict[str, None]] = {}
        for row in rows:
            by_reason.setdefault(row.reason, {})[row.role] = None
        return {reason: tuple(roles) for reason, roles in by_reason.items()}

    def plan_notes(self) -> tuple[str, ...]:
        """Return the choices and limits of the scheme on this architecture."""
        both = self.plan.notes if isinstance(self.plan, EncoderDecoderPlan) else ()
        return tuple(dict.fromkeys([*(note for plan in self._plans for note in plan.notes), *both]))

    @property
    def _plans(self) -> tuple[SchemePlan, ...]:
        return (self.plan.encoder, self.plan.decoder) if isinstance(self.plan, EncoderDecoderPlan) else (self.plan,)

    def remove(self) -> None:
        """Take all multipliers out of the model again; the weights stay as drawn."""
        self.blocks.remove()
        for hook in self._hooks:
            hook.remove()


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
    first block behind the new stem (of both stacks of an encoder-decoder), the second moment of what a patch map is
    given, and the rate of the blocks' dropout modules if they have one rate. Parameters and ``state_dict`` keys stay as
    they are, and a call with the same seed gives the same weights (of a width scaling, with given ``base_stds``).
    Frozen parameters stay.

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
        _check_width_options(scheme, options, on_conflict)
        ready = default_batch(model) if batch is None else as_batch(batch)
        return initialize_widths(
            model, scheme, batch=ready.inputs, seed=seed, blocks=blocks, overrides=overrides, **options
        )
    if scheme not in SCHEMES:
        raise SpecError(f"there is no scheme {scheme!r}{nearest(scheme, [*SCHEMES, *SCALINGS])}")
    ready = default_batch(model) if batch is None else as_batch(batch)
    with_ends = scheme in UNIT_SCHEMES
    roles = read_roles(model, ready.inputs, blocks=blocks, overrides=overrides) if with_ends else None
    notes: list[str] = []
    ends = Ends()
    if roles is not None:
        if "dropout" not in options:
            options["dropout"], note = _dropout_rate([model.get_submodule(name) for name in roles.blocks])
            notes.append(note)
        ends = plan_ends(model, ready, roles, options["dropout"], notes)
    before = [(row.parameter, row.parameter.of(tensor).detach().clone()) for row, tensor in ends.places(model)]
    try:
        draw_ends(model, ends, seed)
        blocks_read = read_blocks(model, ready, blocks)
        read = inside_of(blocks_read)
        _warn_of_double_scaling(model, read.own_factors)
        usual = _usual_options(read)
        accepted = scheme_options(scheme, type(read.spec))
        wanted = {name: value for name, value in usual.items() if name in accepted}
        plan: SchemePlan | EncoderDecoderPlan = apply_scheme(_rounded(read.spec), scheme, **(wanted | options))
        applied = write_read(model, blocks_read, plan.spec, seed=seed, on_conflict=on_conflict)
    except BaseException:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for row, values in before:
                row.of(parameters[row.parameter]).copy_(values)
        raise
    hooks = tuple(ResidualMultiplier(model.get_submodule(name), factor) for name, factor in ends.multipliers)
    for name, tokens in (("r0", "n_tokens"), ("r0_memory", "n_memory")):
        if name in wanted and name not in options:
            where = "the first block" if name == "r0" else "the encoder's first block"
            notes.append(
                f"{name} = {wanted[name]:.4g}, the cosine of {wanted[tokens]} tokens of {ready.label} at {where}"
            )
    notes += _start_notes(read) if with_ends else []
    return Initialized(
        plan=plan if isinstance(plan, EncoderDecoderPlan) else replace(plan, stem=ends.stem, head=ends.head),
        blocks=applied,
        ends=ends.rows,
        head_multipliers=ends.multipliers,
        notes=tuple(notes),
        _hooks=hooks,
    )


def _check_width_options(scheme: str, options: Mapping[str, Any], on_conflict: str) -> None:
    """Refuse options a width scaling does not have, and a call without those it needs."""
    if on_conflict != "raise":
        raise SpecError(f"on_conflict belongs to schemes that set layers one by one, not to {scheme!r}")
    parameters = inspect.signature(initialize_widths).parameters
    known = {name for name in parameters if name not in ("model", "scheme", "batch", "seed", "blocks", "overrides")}
    for option in options:
        if option not in known:
            raise SpecError(f"the scheme {scheme!r} has no option {option!r}{nearest(option, known)}")
    missing = [name for name in ("base_width", "base_stds") if name not in options]
    if missing:
        raise SpecError(
            f"the scheme {scheme!r} scales from a base width: give {' and '.join(missing)}, see initialize_widths"
        )


def _usual_options(read: ModelInside | EncoderDecoderInside) -> dict[str, Any]:
    """Return what schemes may ask about the tokens in front of the blocks."""
    options = {"r0": max(read.tokens.cosine, 0.0), "n_tokens": read.tokens.n_tokens}
    if isinstance(read, EncoderDecoderInside):
        memory = read.memory_tokens
        options |= {"r0_memory": max(memory.cosine, 0.0), "n_memory": memory.n_tokens}
    return options


def _start_notes(read: ModelInside | EncoderDecoderInside) -> list[str]:
    """Say where the stream does not start at second moment one: code between the stem's tables and the blocks."""
    stacks = {"the first block": read.tokens}
    if isinstance(read, EncoderDecoderInside):
        stacks["the encoder's first block"] = read.memory_tokens
    return [
        f"the stream enters {where} with second moment {tokens.q:.3g}, not one: the model's code scales it in front"
        for where, tokens in stacks.items()
        if not 0.6 < tokens.q < 1.6
    ]


def _rounded(spec: Transformer | EncoderDecoder) -> Any:
    """Return the spec with four digits of what was read off tensors, so that the weights found do not matter."""
    if isinstance(spec, EncoderDecoder):
        stacks = {name: _rounded(getattr(spec, name)) for name in ("encoder", "decoder")}
        return replace(spec, **stacks, memory_norm=_rounded_norm(spec.memory_norm))

    def change(sublayer: Sublayer) -> Sublayer:
        norms: dict[str, Any] = {slot: _rounded_norm(getattr(sublayer, slot)) for slot in NORM_SLOTS}
        branch = sublayer.branch
        if isinstance(branch, (SelfAttention, CrossAttention)):
            branch = replace(branch, score_multiplier=_four_digits(branch.score_multiplier))
        return replace(sublayer, branch=branch, **norms)

    return spec.map_sublayers(change)


def _rounded_norm(norm: Norm | None) -> Norm | None:
    """Return the norm with four digits of its gain."""
    if isinstance(norm, (LayerNorm, RMSNorm, DyT, Derf)):
        return replace(norm, gain=_four_digits(norm.gain))
    return norm


def _four_digits(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _warn_of_double_scaling(model: nn.Module, own_factors: Sequence[str]) -> None:
    config = getattr(model, "config", None)
    by_layer = [
        name
        for name in ("scale_attn_by_inverse_layer_idx", "residual_multiplier")
        if getattr(config, name, None) not in (None, False, 1)  # which True equals
        or getattr(config, name, None) is True
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
    """Return the rate all dropout modules of the blocks share, zero where they differ, and a note.

    A number that a block itself holds under the name ``dropout`` counts as a module's.
    """
    rates = {float(module.p) for block in blocks for module in block.modules() if isinstance(module, nn.Dropout)}
    rates |= {rate for block in blocks if isinstance(rate := getattr(block, "dropout", None), float)}
    if not rates:
        return 0.0, "the blocks have no dropout modules: dropout = 0"
    if len(rates) == 1:
        rate = rates.pop()
        return rate, f"dropout = {rate:g} is the rate of the blocks' dropout modules"
    return (
        0.0,
        f"the blocks' dropout modules have the rates {sorted(rates)}; dropout = 0 was planned with, give your own",
    )
