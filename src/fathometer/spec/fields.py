"""Naming one number of a spec, so that a diagram, a remedy or the command line can vary it."""

from __future__ import annotations

import dataclasses
from typing import Any

from fathometer.errors import SpecError, nearest
from fathometer.spec.branches import GatedMLP, SelfAttention
from fathometer.spec.norms import Derf, DyT, LayerNorm, RMSNorm
from fathometer.spec.transformer import Sublayer, Transformer

NORM_SLOTS = ("input_norm", "output_norm", "stream_norm")
BRANCH_FIELDS = (
    *SelfAttention.scale_names,
    "score_multiplier",
    "attention_dropout",
    "value_bias",
    "output_bias",
    *GatedMLP.scale_names,
    "in_bias",
    "out_bias",
)
NORM_FIELDS = ("alpha", "shift", "gain")
RESIDUAL_FIELDS = ("skip_scale", "branch_scale", "residual_strength", "dropout")
FIELDS = (*BRANCH_FIELDS, *NORM_FIELDS, *RESIDUAL_FIELDS)


def with_field(spec: Transformer, name: str, value: Any) -> Transformer:
    """Return ``spec`` with the number ``name`` set to ``value`` wherever it occurs.

    Args:
        spec: The transformer.
        name: A field such as ``"mlp_in"``, ``"alpha"`` or ``"branch_scale"``; the prefixes ``"attention."`` and
            ``"mlp."`` restrict it to one kind of sublayer, as in ``"mlp.branch_scale"``. ``"residual_strength"`` sets
            both residual factors, see :meth:`Sublayer.with_residual_strength`.
        value: A number, or an array to make the spec a grid.
    Raises:
        SpecError: if no such field exists (the nearest one is suggested) or the spec has it nowhere.
    """
    return _change(spec, name, lambda owner, field: value)


def scaled_field(spec: Transformer, name: str, factor: Any) -> Transformer:
    """Return ``spec`` with the number ``name`` multiplied by ``factor`` wherever it occurs."""
    return _change(spec, name, lambda owner, field: getattr(owner, field) * factor)


def _change(spec: Transformer, name: str, new: Any) -> Transformer:
    scope, _, field = name.rpartition(".")
    if field not in FIELDS or scope not in ("", "attention", "mlp"):
        known = [*FIELDS, *(f"{kind}.{f}" for kind in ("attention", "mlp") for f in RESIDUAL_FIELDS)]
        raise SpecError(f"a spec has no field {name!r}{nearest(name, known)}")
    touched = 0

    def update(owner: Any) -> Any:
        nonlocal touched
        touched += 1
        return dataclasses.replace(owner, **{field: new(owner, field)})

    def change(sublayer: Sublayer) -> Sublayer:
        nonlocal touched
        if scope and (scope == "attention") != sublayer.is_attention:
            return sublayer
        if field == "residual_strength":
            touched += 1
            return sublayer.with_residual_strength(new(sublayer, field))
        if field in RESIDUAL_FIELDS:
            return update(sublayer)  # type: ignore[no-any-return]
        if field in NORM_FIELDS:
            norms = {slot: getattr(sublayer, slot) for slot in NORM_SLOTS}
            changed = {
                slot: update(norm)
                for slot, norm in norms.items()
                if isinstance(norm, (LayerNorm, RMSNorm, DyT, Derf)) and hasattr(norm, field)
            }
            return dataclasses.replace(sublayer, **changed)
        if hasattr(sublayer.branch, field):
            return dataclasses.replace(sublayer, branch=update(sublayer.branch))
        return sublayer

    result = spec.map_sublayers(change)
    if not touched:
        raise SpecError(f"no sublayer of this spec has the field {name!r}")
    return result
