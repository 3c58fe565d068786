"""Well-known families as data, at any depth and width.

A family is a row: the weight standard deviation its reference code uses, its norm and where it stands, its activation,
its MLP ratio. These rows describe block matrices only; embeddings and heads do not enter the recursion, which starts
from the tokens' second moments at the first block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fathometer.errors import SpecError, nearest
from fathometer.spec.fields import scaled_field
from fathometer.spec.norms import LayerNorm, Norm, RMSNorm
from fathometer.spec.transformer import Placement, Scales, Sublayer, Transformer


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the preset table.

    Args:
        norm, placement, activation, causal, gated, ratio: The architecture.
        std: Standard deviation of every block matrix.
        depth_scaled: Whether the matrices that write to the stream carry an extra ``1/sqrt(2 n_layers)``.
        d_model, n_layers, d_head: The usual size.
        source: Where the initialisation is defined.
    """

    norm: Norm
    placement: Placement
    activation: str
    causal: bool
    gated: bool
    ratio: float
    std: float
    depth_scaled: bool
    d_model: int
    n_layers: int
    d_head: int
    source: str


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        norm=LayerNorm(),
        placement=Sublayer.pre_norm,
        activation="gelu_tanh",
        causal=True,
        gated=False,
        ratio=4.0,
        std=0.02,
        depth_scaled=True,
        d_model=768,
        n_layers=12,
        d_head=64,
        source="Radford et al. 2019: std 0.02, output matrices divided by sqrt(2 n_layers)",
    ),
    "bert": Family(
        norm=LayerNorm(),
        placement=Sublayer.post_norm,
        activation="gelu",
        causal=False,
        gated=False,
        ratio=4.0,
        std=0.02,
        depth_scaled=False,
        d_model=768,
        n_layers=12,
        d_head=64,
        source="Devlin et al. 2018: std 0.02",
    ),
    "llama": Family(
        norm=RMSNorm(),
        placement=Sublayer.pre_norm,
        activation="silu",
        causal=True,
        gated=True,
        ratio=2.6875,
        std=0.02,
        depth_scaled=False,
        d_model=4096,
        n_layers=32,
        d_head=128,
        source="Touvron et al. 2023; std 0.02 as in the common reference implementation",
    ),
    "vit": Family(
        norm=LayerNorm(),
        placement=Sublayer.pre_norm,
        activation="gelu",
        causal=False,
        gated=False,
        ratio=4.0,
        std=0.02,
        depth_scaled=False,
        d_model=768,
        n_layers=12,
        d_head=64,
        source="Dosovitskiy et al. 2020; std 0.02 as in the common reference implementation",
    ),
}


def preset(family: str, *, n_layers: int | None = None, d_model: int | None = None) -> Transformer:
    """Return the spec of a family at a depth and width, its usual ones by default.

    >>> preset("vit", n_layers=24, d_model=1024).n_layers
    24
    """
    if family not in FAMILIES:
        raise SpecError(f"there is no preset {family!r}{nearest(family, FAMILIES)}")
    row = FAMILIES[family]
    depth = row.n_layers if n_layers is None else n_layers
    width = row.d_model if d_model is None else d_model
    if width % row.d_head:
        raise SpecError(f"d_model of {family!r} must be a multiple of {row.d_head}; got {width}")
    spec = Transformer.uniform(
        n_layers=depth,
        d_model=width,
        n_heads=width // row.d_head,
        norm=row.norm,
        activation=row.activation,
        scales=Scales.from_std(row.std, d_model=width, d_mlp=round(row.ratio * width), gated=row.gated),
        causal=row.causal,
        ratio=row.ratio,
        placement=row.placement,
    )
    if row.depth_scaled:
        for name in ("output", "mlp_out"):
            spec = scaled_field(spec, name, 1 / math.sqrt(2 * depth))
    return spec
