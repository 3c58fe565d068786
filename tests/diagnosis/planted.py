"""Models with a planted failure, and healthy ones: the cases a diagnosis is judged by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fathometer as fm
from fathometer.measurement import load_batch
from fathometer.models import LoadedModel, equiangular_tokens, load_model, reference_network


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the findings that must (and that alone may) be reported."""

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    must: frozenset[str]
    may: frozenset[str] = frozenset()


class Encoder(nn.Module):
    """The framework's own encoder layers, each drawn on its own or copied from the first."""

    def __init__(self, depth: int, *, norm_first: bool, copies: bool = False, width: int = 128) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=norm_first)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [layer() for _ in range(depth)]
            tokens = torch.randn(2, 32, width)
        self.layers = nn.ModuleList([copy.deepcopy(layers[0]) for _ in layers] if copies else layers)
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers in turn."""
        for layer in self.layers:
            x = layer(x)
        return x


def _encoder(depth: int, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        model = Encoder(depth, **options)
        return model, model.tokens

    return build


def _hf(
    name: str, layers: int, edit: Callable[[str, torch.Tensor], None] | None = None, width: int = 256
) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        loaded: LoadedModel = load_model(f"hf:{name}", layers=layers, width=width)
        with torch.no_grad():
            for parameter_name, parameter in loaded.model.named_parameters():
                if (
                    edit is not None
                    and parameter.ndim == 2
                    and any(piece.isdigit() for piece in parameter_name.split("."))
                ):
                    edit(parameter_name, parameter)
        return loaded.model, load_batch(None, loaded, n_tokens=48)

    return build


def _reference(depth: int, norm: Any, width: int = 192, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        spec = fm.Transformer.uniform(
            n_layers=depth,
            d_model=width,
            n_heads=4,
            norm=norm,
            activation="relu",
            scales=fm.Scales(query=0.55, key=0.55, value=0.55, output=0.55, mlp_in=0.55, mlp_out=1.1),
            **options,
        )
        tokens = equiangular_tokens(n_tokens=32, d_model=width, q=1.0, p=0.3, batch=2, seed=0)
        return reference_network(spec, seed=0), tokens

    return build


def _times(factor: float, *endings: str) -> Callable[[str, torch.Tensor], None]:
    def edit(name: str, weight: torch.Tensor) -> None:
        if not endings or name.endswith(endings):
            weight.mul_(factor)

    return edit


def _sharp_scores(name: str, weight: torch.Tensor) -> None:
    if name.endswith("c_attn.weight"):
        weight[:, : 2 * weight.shape[0]].mul_(30)


UNHEALTHY = (
    Case(
        "encoder layers after the norm, 48 deep",
        _encoder(48, norm_first=False),
        frozenset({"rank_collapse", "vanishing_gradients"}),
    ),
    Case(
        "encoder layers all copied from one",
        _encoder(24, norm_first=True, copies=True),
        frozenset({"identical_layers"}),
    ),
    Case(
        "gate and output both scaled with depth",
        _hf("llama", 32, _times(1 / 8, "gate_proj.weight", "down_proj.weight")),
        frozenset({"negligible_branch"}),
    ),
    Case(
        "std ten times too large",
        _hf("gpt2", 12, _times(10)),
        frozenset({"attention_concentrated"}),
        frozenset({"exploding_gradients", "signal_growth", "dominant_branch"}),
    ),
    Case(
        "queries and keys thirty times too large",
        _hf("gpt2", 12, _sharp_scores),
        frozenset({"attention_concentrated"}),
        frozenset({"exploding_gradients"}),
    ),
    Case(
        "std 0.006",
        _hf("vit", 12, _times(0.3)),
        frozenset({"negligible_branch"}),
    ),
    Case(
        "no skip connections",
        _reference(24, fm.LayerNorm(), skip_scale=0.0),
        frozenset({"dominant_branch", "rank_collapse"}),
        frozenset({"vanishing_gradients", "exploding_gradients"}),
    ),
    Case(
        "DyT with alpha 4, 128 deep",
        _reference(128, fm.DyT(alpha=4.0)),
        frozenset({"exploding_gradients"}),
    ),
    Case(
        "Derf with alpha 2, 128 deep",
        _reference(128, fm.Derf(alpha=2.0)),
        frozenset({"exploding_gradients"}),
    ),
    Case(
        "no norm at all",
        _reference(48, None),
        frozenset({"signal_growth"}),
        frozenset({"exploding_gradients", "rank_collapse", "vanishing_gradients", "attention_concentrated"}),
    ),
    Case(
        "branches scaled to nothing",
        _reference(24, fm.LayerNorm(), branch_scale=0.01),
        frozenset({"negligible_branch"}),
    ),
    Case(
        "skip weakened to 0.1",
        _reference(24, fm.LayerNorm(), skip_scale=0.1),
        frozenset({"dominant_branch"}),
        frozenset({"rank_collapse", "vanishing_gradients", "exploding_gradients"}),
    ),
    Case(
        "attention output forgotten at 0.0001",
        _hf("gpt2", 12, _times(0.005, "attn.c_proj.weight")),
        frozenset({"negligible_branch"}),
    ),
    Case(
        "post-norm with large weights, 24 deep",
        _reference(
            24,
            fm.LayerNorm(),
            placement=fm.Sublayer.post_norm,
            branch_scale=2.0,
        ),
        frozenset({"rank_collapse", "vanishing_gradients"}),
        frozenset({"dominant_branch"}),
    ),
)

HEALTHY = (
    Case("gpt2", _hf("gpt2", 12), frozenset()),
    Case("llama", _hf("llama", 24), frozenset()),
    Case("bert", _hf("bert", 12), frozenset()),
    Case("vit", _hf("vit", 12), frozenset()),
    Case("t5", _hf("t5", 6), frozenset()),
    Case("qwen3", _hf("qwen3", 8), frozenset()),
    Case("encoder with the norm first", _encoder(24, norm_first=True), frozenset()),
    Case("DyT with alpha 0.5", _reference(24, fm.DyT(alpha=0.5)), frozenset()),
)
