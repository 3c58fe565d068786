"""What DeepScaleLM draws outside the blocks of a real model: the tables and maps of its stem, and its head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fathometer.application.drawing import Draw, draw
from fathometer.application.multipliers import modules_sharing
from fathometer.errors import NotCoveredError
from fathometer.measurement.batches import Batch
from fathometer.measurement.untouched import untouched
from fathometer.models.identify import identify_norm
from fathometer.models.roles import ModelRoles, ParameterRole
from fathometer.models.trace import Trace, leaves, recording
from fathometer.prescription.plans import EndRow
from fathometer.prescription.unit_ends import unit_head, unit_stem
from fathometer.spec import Head, PatchStem, Stem, TokenStem


@dataclass(frozen=True, kw_only=True)
class EndDrawn:
    """One table or matrix outside the blocks that was drawn, the formula, and a padding symbol whose row is zero."""

    parameter: ParameterRole
    std: float
    reason: str
    padding: int | None = None


@dataclass(frozen=True)
class Ends:
    """What is to be drawn outside the blocks, the plan's rows about it, and the multipliers of a tied head."""

    rows: tuple[EndDrawn, ...] = ()
    stem: tuple[EndRow, ...] = ()
    head: tuple[EndRow, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()

    def places(self, model: nn.Module) -> list[tuple[EndDrawn, nn.Parameter]]:
        """Return every row with its parameter."""
        parameters = dict(model.named_parameters())
        return [(row, parameters[row.parameter.parameter]) for row in self.rows]


def plan_ends(model: nn.Module, batch: Batch, roles: ModelRoles, dropout: float, notes: list[str]) -> Ends:
    """Return what DeepScaleLM draws outside the blocks; what it leaves alone goes into the notes."""
    found = _stem_of(roles)
    rows: list[EndDrawn] = []
    stem_rows: tuple[EndRow, ...] = ()
    head_rows: tuple[EndRow, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()
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
    if tied and isinstance(stem, PatchStem):
        stem, more = unit_stem(_target_stem(roles), dropout=dropout)
        stem_rows += more
    if tied or roles.of("head"):
        _, head_rows = unit_head(Head(tied=bool(tied)), stem, d_model=roles.d_model)
    if tied:
        heads = modules_sharing(model, tied)
        own = _head_factor(model, batch, roles, heads)
        factor = head_rows[0].multiplier / own
        if own != 1:
            notes.append(f"the model's own factor of {own:.6g} between its last norm and its head is divided out")
        if not heads:
            raise NotCoveredError(
                "the head multiplies by the token embedding outside any module of its own; multiply its logits by "
                f"{factor:.6g} in the model's code"
            )
        if not math.isclose(factor, 1.0, rel_tol=1e-3):
            multipliers = tuple((name, factor) for name in heads)
    by_role = {row.role: row for row in (*stem_rows, *(() if tied else head_rows))}
    parameters = dict(model.named_parameters())
    paddings = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    for role in roles.roles:
        if role.layer is not None or not parameters[role.parameter].requires_grad:
            continue
        if role.role in by_role:
            row = by_role[role.role]
            assert row.std is not None
            padding = paddings.get(id(parameters[role.parameter]))
            rows.append(EndDrawn(parameter=role, std=row.std, reason=row.reason, padding=padding))
        elif role.role == "head_hidden":
            rows.append(EndDrawn(parameter=role, std=role.fan_in**-0.5, reason="var 1 / fan_in"))
        elif role.role.endswith("_bias") and role.role.removesuffix("_bias") in (*by_role, "head_hidden"):
            rows.append(EndDrawn(parameter=role, std=0.0, reason="zero"))
    left = sorted({role.role for role in roles.roles if role.layer is None} - {row.parameter.role for row in rows})
    if left:
        notes.append(f"left as they are outside the blocks: {', '.join(left)}")
    return Ends(tuple(rows), stem_rows, head_rows, multipliers)


def draw_ends(model: nn.Module, ends: Ends, seed: int) -> None:
    """Draw every planned table and matrix, Gaussian, in place; the draw depends on the seed and the name only."""
    rows = [Draw(row.parameter.parameter, row.parameter.key, row.parameter.of, row.std) for row in ends.rows]
    draw(model, rows, seed=seed, label="written")


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


def _target_stem(roles: ModelRoles) -> TokenStem:
    """Return the stem of a decoder's tokens, in a model whose encoder has patches or the like."""
    return TokenStem(token=1.0, position=float(bool(roles.of("position_embedding"))))


def _head_factor(model: nn.Module, batch: Batch, roles: ModelRoles, heads: Sequence[str]) -> float:
    """Return the number by which the model's code multiplies tokens between the last norm and the head; 1 for none."""
    outside = {
        name: leaf
        for name, leaf in leaves(model).items()
        if not any(name == block or name.startswith(f"{block}.") for block in roles.blocks)
    }
    trace = Trace()
    with untouched(model), torch.no_grad(), recording(outside, trace):
        batch.call(model)
    normed = None
    for call in trace.calls:
        if call.name in heads and normed is not None and normed.shape == call.before.shape:
            factor = float((normed * call.before).sum() / normed.square().sum().clamp_min(1e-300))
            same = torch.allclose(normed * factor, call.before, rtol=1e-3, atol=1e-6)
            return float(f"{factor:.4g}") if same and abs(factor - 1) > 1e-3 else 1.0
        if identify_norm(call.module, call.before, call.after) is not None:
            normed = call.after
    return 1.0
