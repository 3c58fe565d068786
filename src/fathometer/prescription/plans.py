"""What a scheme sets: a row for each weight matrix, residual factors, and the spec that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.spec import (
    Block,
    CrossAttention,
    EncoderDecoder,
    Network,
    SelfAttention,
    Sublayer,
    Transformer,
    hidden_width,
    memory_width,
)

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


class EndRow(NamedTuple):
    """One table or matrix of a stem or head, and why.

    Attributes:
        role: Which one.
        std: Standard deviation of its entries, ``None`` where that needs a fan-in nobody gave.
        scale: What the spec holds: ``std * sqrt(fan_in)`` of a matrix, ``std`` of a table.
        multiplier: Factor on what enters it.
        reason: The formula.
    """

    role: str
    std: float | None
    scale: float
    multiplier: float
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
        stem, head: One row for each table or matrix in front of and behind the blocks, where the scheme was given a
            :class:`~fathometer.spec.Network` and says something about them.
        network: The network with the scheme's stem, blocks and head, where it was given one.
    """

    name: str
    spec: Transformer
    rows: tuple[Row, ...]
    residual: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
    stem: tuple[EndRow, ...] = ()
    head: tuple[EndRow, ...] = ()
    network: Network | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, without the spec."""
        return {
            "schema": 1,
            "scheme": self.name,
            "rows": [row._asdict() for row in self.rows],
            "residual": [{"skip_scale": skip, "branch_scale": branch} for skip, branch in self.residual],
            "stem": [row._asdict() for row in self.stem],
            "head": [row._asdict() for row in self.head],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderPlan:
    """What a scheme sets in an encoder and its decoder.

    Attributes:
        name: Of the scheme.
        spec: Both stacks with the scheme's scales and residual factors.
        encoder, decoder: The plan of each stack.
        notes: What concerns both.
    """

    name: str
    spec: EncoderDecoder
    encoder: SchemePlan
    decoder: SchemePlan
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain data, without the spec."""
        stacks = {"encoder": self.encoder.to_dict(), "decoder": self.decoder.to_dict()}
        return {"schema": 1, "scheme": self.name, **stacks, "notes": list(self.notes)}


class Setting(NamedTuple):
    """What a scheme does to one sublayer: standard deviations by role, the formula, residual factors, dropout.

    ``dropout`` is the rate on what the branch adds, ``None`` to leave that of the spec.
    """

    stds: Mapping[str, float]
    reason: str
    skip: float = 1.0
    branch: float = 1.0
    dropout: float | None = None


Rule = Callable[[int, Sublayer], Setting]


def planned(name: str, spec: Transformer, rule: Rule, notes: Sequence[str]) -> SchemePlan:
    """Apply a rule to every sublayer; layers that come out alike share one block."""
    settings = [rule(layer, sublayer) for layer, block in enumerate(spec.layers()) for sublayer in block.sublayers]
    return plan_of(name, spec, settings, notes)


def plan_of(name: str, spec: Transformer, settings: Sequence[Setting], notes: Sequence[str]) -> SchemePlan:
    """Set what is given for every sublayer in order of depth; layers that come out alike share one block."""
    following = iter(settings)
    blocks: list[Block] = []
    rows: list[Row] = []
    residual: list[tuple[float, float]] = []
    made: dict[tuple[int, tuple[float, ...]], Sublayer] = {}
    biased = False
    for layer, block in enumerate(spec.layers()):
        sublayers = []
        for j, sublayer in enumerate(block.sublayers):
            setting = next(following)
            scales: dict[str, Any] = {
                role: std * math.sqrt(fan_in(spec, sublayer, role)) for role, std in setting.stds.items()
            }
            rows += [Row(layer, j, role, setting.stds[role], scale, setting.reason) for role, scale in scales.items()]
            residual.append((setting.skip, setting.branch))
            rate = sublayer.dropout if setting.dropout is None else setting.dropout
            key = (id(sublayer), (*scales.values(), setting.skip, setting.branch))
            if key not in made:
                biases: dict[str, Any] = {bias: 0.0 for bias in BIASES if getattr(sublayer.branch, bias, 0.0)}
                biased = biased or bool(biases)
                branch = replace(sublayer.branch, **scales, **biases)
                made[key] = replace(
                    sublayer, branch=branch, skip_scale=setting.skip, branch_scale=setting.branch, dropout=rate
                )
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


def paired(name: str, spec: EncoderDecoder, encoder: SchemePlan, decoder: SchemePlan, note: str) -> EncoderDecoderPlan:
    """Join the plans of both stacks."""
    scaled = replace(spec, encoder=encoder.spec, decoder=decoder.spec)
    return EncoderDecoderPlan(name=name, spec=scaled, encoder=encoder, decoder=decoder, notes=(note,))


def every_sublayer(spec: Transformer) -> list[Sublayer]:
    """Return the sublayers of all layers in order."""
    return [sublayer for block in spec.layers() for sublayer in block.sublayers]


def fan_in(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    """Return the number of inputs of a weight matrix."""
    branch = sublayer.branch
    if isinstance(branch, CrossAttention) and role in ("key", "value"):
        return memory_width(branch, spec.d_model)
    if isinstance(branch, (SelfAttention, CrossAttention)) or role != "mlp_out":
        return spec.d_model
    return hidden_width(branch, spec.d_model)


def fan_out(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    """Return the number of outputs of a weight matrix."""
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        shared = role in ("key", "value") and branch.n_kv_heads is not None
        return spec.d_model * (branch.n_kv_heads or 1) // branch.n_heads if shared else spec.d_model
    return spec.d_model if role == "mlp_out" else hidden_width(branch, spec.d_model)
