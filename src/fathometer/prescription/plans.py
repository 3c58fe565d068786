"""What a scheme sets: a row for each weight matrix, residual factors, and the spec that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.spec import Block, SelfAttention, Sublayer, Transformer, hidden_width

FloatArray = NDArray[np.float64]


BIASES = ("value_bias", "output_bias", "in_bias", "out_bias")


class Row(NamedTuple):
    """One weight matrix of a plan: where it is, its standard deviation and ``scale = std * sqrt(fan_in)``, and why."""

    layer: int
    sublayer: int
    role: str
    std: float
    scale: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SchemePlan:
    """What a scheme sets in one architecture.

    Attributes:
        name: Of the scheme.
        spec: The architecture with the scheme's scales and residual factors.
        rows: One for each weight matrix, in order of depth.
        residual: The factors on skip and branch of every sublayer, in order of depth.
        notes: Choices, limits, and what else the scheme asks for.
    """

    name: str
    spec: Transformer
    rows: tuple[Row, ...]
    residual: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, without the spec."""
        return {
            "schema": 1,
            "scheme": self.name,
            "rows": [row._asdict() for row in self.rows],
            "residual": [{"skip_scale": skip, "branch_scale": branch} for skip, branch in self.residual],
            "notes": list(self.notes),
        }


class Setting(NamedTuple):
    """What a scheme does to one sublayer: standard deviations by role, residual factors, and the formula."""

    stds: Mapping[str, float]
    reason: str
    skip: float = 1.0
    branch: float = 1.0


Rule = Callable[[int, Sublayer], Setting]


def planned(name: str, spec: Transformer, rule: Rule, notes: Sequence[str]) -> SchemePlan:
    """Apply a rule to every sublayer in order of depth; layers that come out alike share one block."""
    blocks: list[Block] = []
    rows: list[Row] = []
    residual: list[tuple[float, float]] = []
    made: dict[tuple[int, tuple[float, ...]], Sublayer] = {}
    biased = False
    for layer, block in enumerate(spec.layers()):
        sublayers = []
        for j, sublayer in enumerate(block.sublayers):
            setting = rule(layer, sublayer)
            scales: dict[str, Any] = {
                role: std * math.sqrt(fan_in(spec, sublayer, role)) for role, std in setting.stds.items()
            }
            rows += [Row(layer, j, role, setting.stds[role], scale, setting.reason) for role, scale in scales.items()]
            residual.append((setting.skip, setting.branch))
            key = (id(sublayer), (*scales.values(), setting.skip, setting.branch))
            if key not in made:
                biases: dict[str, Any] = {bias: 0.0 for bias in BIASES if getattr(sublayer.branch, bias, 0.0)}
                biased = biased or bool(biases)
                branch = replace(sublayer.branch, **scales, **biases)
                made[key] = replace(sublayer, branch=branch, skip_scale=setting.skip, branch_scale=setting.branch)
            sublayers.append(made[key])
        if blocks and list(map(id, blocks[-1].sublayers)) == list(map(id, sublayers)):
            blocks[-1] = replace(blocks[-1], repeat=blocks[-1].repeat + 1)
        else:
            blocks.append(Block(sublayers=tuple(sublayers)))
    told = (*notes, "Biases of the spec were set to zero.") if biased else tuple(notes)
    return SchemePlan(
        name=name,
        spec=replace(spec, blocks=tuple(blocks)),
        rows=tuple(rows),
        residual=tuple(residual),
        notes=told,
    )


def every_sublayer(spec: Transformer) -> list[Sublayer]:
    """Return the sublayers of all layers in order."""
    return [sublayer for block in spec.layers() for sublayer in block.sublayers]


def fan_in(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    """Return the number of inputs of a weight matrix."""
    branch = sublayer.branch
    if isinstance(branch, SelfAttention) or role != "mlp_out":
        return spec.d_model
    return hidden_width(branch, spec.d_model)


def fan_out(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    """Return the number of outputs of a weight matrix."""
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        shared = role in ("key", "value") and branch.n_kv_heads is not None
        return spec.d_model * (branch.n_kv_heads or 1) // branch.n_heads if shared else spec.d_model
    return spec.d_model if role == "mlp_out" else hidden_width(branch, spec.d_model)
