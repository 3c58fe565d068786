"""A real vision transformer on photographs: fold errors of equal-token and Gram-matrix theory by thirds of the depth.

The network is Hugging Face's ViT with random weights and ReLU, at the weight scales of ViT-base whatever its width; its
LayerNorms are replaced by Derf or DyT, all of them. Nothing is fitted: scales are read off the weights, and theory
starts from the patch tokens as they were measured at the first block.

Differs from the paper by: its classification token is left out of q and p there and kept here, as a token like all
others; the images are two photographs instead of CIFAR-100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import MissingExtraError, NotCoveredError
from fathometer.observables import predict
from fathometer.papers.apjn.architecture import described, name_of
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.results import Profile
from fathometer.spec import Derf, DyT, LayerNorm, Transformer

if TYPE_CHECKING:
    from torch import nn

NORMS: tuple[LayerNorm | Derf | DyT, ...] = (LayerNorm(), Derf(alpha=0.5), DyT(alpha=1.0))
CURVES = ("q", "p", "apjn_log")
THEORIES = ("equal tokens", "Gram matrix")
PATCH = 16
SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Curves and fold errors.

    Attributes:
        norms: Names, first axis of every array.
        theory: By theory, then by curve: shape ``(n_norms, n_layers + 1)``.
        measured, errors: By curve, the same shape; errors are relative for ``_log`` curves.
        folds: By theory, then by curve: shape ``(n_norms, 4)``, whole depth and its thirds from the input on.
        noise: By curve: the fold that one standard error of the measurement makes, by thirds; shape ``(n_norms, 3)``.
        about: Sizes, images, closure.
    """

    norms: tuple[str, ...]
    theory: dict[str, dict[str, FloatArray]]
    measured: dict[str, FloatArray]
    errors: dict[str, FloatArray]
    folds: dict[str, dict[str, FloatArray]]
    noise: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return all fold errors."""
        rows: list[tuple[Cell, ...]] = []
        symbols = {"q": "q", "p": "p", "apjn_log": "J"}
        for i, norm in enumerate(self.norms):
            for curve in CURVES:
                noise = float(self.noise[curve][i].mean()) if curve in self.noise else float("nan")
                for theory in THEORIES:
                    rows.append(
                        (norm, symbols[curve], theory, *(float(x) for x in self.folds[theory][curve][i]), noise)
                    )
        return Table(
            title=f"Fold errors on {self.about['batch']} (1 is perfect)",
            headings=("norm", "curve", "theory", "whole", "first third", "middle", "last third", "weight noise"),
            rows=tuple(rows),
        )


def photographs(size: Size, progress: Progress = silent) -> Photographs:
    """Measure and predict a ViT with each norm.

    Source: the experiment, arXiv:2604.11890v3; the Gram-matrix theory, derived in the documentation.
    """
    from fathometer.diagnosis.comparison import fold_error
    from fathometer.measurement import load_batch, observe
    from fathometer.models import LoadedModel

    def fold(measured: Profile, theory: dict[str, FloatArray], curve: str) -> list[float]:
        whole, thirds = fold_error(measured.curves[curve], theory[curve], logarithmic=curve.endswith("_log"))
        return [whole, *thirds]

    side = PATCH * math.isqrt(size.n_tokens)
    seen: list[tuple[Profile, dict[str, dict[str, FloatArray]]]] = []
    label = ""
    for i, norm in enumerate(NORMS):

        def report(text: str, done: int, total: int, at: int = i, name: str = name_of(norm)) -> None:
            progress(f"{name}, {text}", at * total + done, len(NORMS) * total)

        model = vision_transformer(size, side)
        if not isinstance(norm, LayerNorm):
            swap_norms(model, norm)
        batch = load_batch(
            "photographs", LoadedModel(model=model, name="hf:vit", kind="image", image_size=side), batch_size=SAMPLES
        )
        found = observe(model, batch, seeds=size.seeds, forward=False, pooled=False, progress=report)
        if found.reading is None:
            raise NotCoveredError(found.not_covered or "the blocks cannot be read")
        label = batch.label
        seen.append((found.profile, theories(found.reading.spec, found.gram)))
    shaped = {
        theory: {curve: np.stack([predicted[theory][curve] for _, predicted in seen]) for curve in CURVES}
        for theory in THEORIES
    }
    folds = {
        theory: {
            curve: np.array([fold(measured, predicted[theory], curve) for measured, predicted in seen])
            for curve in CURVES
        }
        for theory in THEORIES
    }
    return Photographs(
        norms=tuple(name_of(norm) for norm in NORMS),
        theory=shaped,
        measured={curve: np.stack([measured.curves[curve] for measured, _ in seen]) for curve in CURVES},
        errors={
            curve: np.stack([measured.errors[curve] for measured, _ in seen]) for curve in CURVES if size.seeds > 1
        },
        folds=folds,
        noise={
            curve: np.stack([_noise(measured, curve) for measured, _ in seen]) for curve in CURVES if size.seeds > 1
        },
        about=described(
            size,
            batch=f"{label}, {math.isqrt(size.n_tokens) ** 2} patches",
            scales="ViT-base, std 0.02",
            closure=DEFAULT_CLOSURE.name,
        ),
    )


def theories(spec: Transformer, gram: FloatArray) -> dict[str, dict[str, FloatArray]]:
    """Return q, p and ln J from each sample's mean square and overlap alone, and from its whole Gram matrix."""
    n = gram.shape[-1]
    diagonal = np.trace(gram, axis1=-2, axis2=-1)
    q, p = diagonal / n, (gram.sum(axis=(-2, -1)) - diagonal) / (n * (n - 1))
    equal = predict(spec, n_tokens=n, q=q, p=p).curves
    top = equal["apjn_log"].max(axis=1, keepdims=True)
    averaged = np.log(np.exp(equal["apjn_log"] - top).mean(axis=1)) + top[:, 0]
    full = predict(spec, gram=gram).curves
    return {
        THEORIES[0]: {"q": equal["q"].mean(axis=1), "p": equal["p"].mean(axis=1), "apjn_log": averaged},
        THEORIES[1]: {curve: full[curve] for curve in CURVES},
    }


def vision_transformer(size: Size, side: int) -> nn.Module:
    """Return a ViT with random weights, ReLU and no pooler; random states are left as found."""
    import torch

    try:
        from transformers import ViTConfig, ViTModel
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    config = ViTConfig(
        hidden_size=size.d_model,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        intermediate_size=4 * size.d_model,
        hidden_act="relu",
        initializer_range=0.02 * math.sqrt(768 / size.d_model),
        image_size=side,
        patch_size=PATCH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = ViTModel(config, add_pooling_layer=False)
    return model.requires_grad_(False)


def swap_norms(model: nn.Module, norm: Derf | DyT) -> int:
    """Put ``norm`` where ``model`` has a LayerNorm, in place; return how many were replaced."""
    import torch
    from torch import nn

    from fathometer.models.reference import norm_module

    places = [
        (parent, name, child.weight.numel())
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.LayerNorm)
    ]
    for parent, name, width in places:
        module = norm_module(norm, width)
        with torch.no_grad():
            for field, parameter in module.named_parameters():
                parameter.fill_(getattr(norm, "gain" if field == "weight" else field))
        setattr(parent, name, module.requires_grad_(False))
    return len(places)


def _noise(measured: Profile, curve: str) -> FloatArray:
    scale = 1.0 if curve.endswith("_log") else np.abs(measured.curves[curve])
    return np.exp([part.mean() for part in np.array_split(measured.errors[curve] / scale, 3)])
