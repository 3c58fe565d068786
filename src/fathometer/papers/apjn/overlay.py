"""Curves over depth, theory beside simulated networks, for several norms: the form of four figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.observables import predict
from fathometer.papers.apjn.architecture import P0, Q0, described, name_of, network
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain
from fathometer.results import Profile
from fathometer.spec import Derf, DyT, Norm, Transformer

#: Name of a curve to (symbol, whether the end that counts is the input).
SYMBOLS = {
    "q": ("q", False),
    "p": ("p", False),
    "cosine": ("p/q", False),
    "apjn_log": ("J", True),
    "gradient_log": ("pooled G", True),
}


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Curves of several norms.

    Attributes:
        norms: Names, in the order of the first axis of every array.
        alphas: Slope of the saturating norm; ``None`` for LayerNorm.
        theory, simulated: Curve name to array of shape ``(n_norms, n_layers + 1)``; a ``_log`` curve is a natural
            logarithm.
        errors: Standard errors over weight draws, relative ones for ``_log`` curves; empty for a single draw.
        folds: Curve name to fold errors, shape ``(n_norms, 4)``: whole depth, then its thirds from the input on.
        about: Sizes, tokens, closure, seeds.
    """

    norms: tuple[str, ...]
    alphas: tuple[float | None, ...]
    theory: dict[str, FloatArray]
    simulated: dict[str, FloatArray]
    errors: dict[str, FloatArray]
    folds: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def end(self, curve: str, norm: int) -> tuple[float, float, float | None]:
        """Return theory, simulation and its standard error where the curve ends: at the input going back."""
        at = 0 if SYMBOLS[curve][1] else -1
        theory, simulated = self.theory[curve][norm, at], self.simulated[curve][norm, at]
        error = float(self.errors[curve][norm, at]) if curve in self.errors else None
        if curve.endswith("_log"):
            theory, simulated = np.exp(theory), np.exp(simulated)
            error = None if error is None else error * float(simulated)
        return float(theory), float(simulated), error

    def table(self) -> Table:
        """Return the ends of all curves and their fold errors."""
        rows: list[tuple[Cell, ...]] = []
        for i, norm in enumerate(self.norms):
            for curve, folds in self.folds.items():
                symbol, backwards = SYMBOLS[curve]
                theory, simulated, error = self.end(curve, i)
                where = "input" if backwards else "output"
                rows.append((norm, f"{symbol} at {where}", theory, (simulated, error), *folds[i]))
        return Table(
            title="Theory and simulation; fold errors over the whole depth and its thirds (1 is perfect)",
            headings=("norm", "curve", "theory", "simulated", "fold", "first", "middle", "last"),
            rows=tuple(rows),
        )


def overlay(size: Size, norms: Sequence[Norm], curves: Sequence[str], progress: Progress) -> Overlay:
    """Predict and simulate ViT-large blocks with each norm from equiangular tokens.

    Args:
        size: Of the simulated networks.
        norms: Which.
        curves: Names to keep.
        progress: Told about every weight draw.
    """
    from fathometer.diagnosis.comparison import fold_error

    pairs = []
    for i, norm in enumerate(norms):
        spec = network(size, norm)

        def report(label: str, done: int, total: int, at: int = i, name: str = name_of(norm)) -> None:
            progress(f"{name}, {label}", at * total + done, len(norms) * total)

        theory = predict(spec, n_tokens=size.n_tokens, q=Q0, p=P0)
        seen = simulate(spec, n_tokens=size.n_tokens, q=Q0, p=P0, seeds=size.seeds, progress=report)
        pairs.append((theory, seen))
    folds = {}
    for curve in curves:
        both = [
            fold_error(seen.curves[curve], theory.curves[curve], logarithmic=curve.endswith("_log"))
            for theory, seen in pairs
        ]
        folds[curve] = np.array([[whole, *thirds] for whole, thirds in both])
    return Overlay(
        norms=tuple(name_of(norm) for norm in norms),
        alphas=tuple(float(norm.alpha) if isinstance(norm, (Derf, DyT)) else None for norm in norms),
        theory={curve: np.stack([theory.curves[curve] for theory, _ in pairs]) for curve in curves},
        simulated={curve: np.stack([seen.curves[curve] for _, seen in pairs]) for curve in curves},
        errors={curve: np.stack([seen.errors[curve] for _, seen in pairs]) for curve in curves if size.seeds > 1},
        folds=folds,
        about=described(size, q=Q0, p=P0, scales="ViT-large, std 0.02", closure=DEFAULT_CLOSURE.name),
    )


def simulate(
    spec: Transformer, *, n_tokens: int, q: float, p: float, seeds: int, progress: Progress, batch: int = 1
) -> Profile:
    """Measure networks with independent weights, tokens and output gradients.

    Args:
        spec: What to build. One network is held at a time and its weights are redrawn in place.
        n_tokens, q, p: Equiangular tokens at the first block.
        seeds: Weight draws.
        progress: Told about every draw.
        batch: Samples of tokens per draw.
    Returns:
        Means with standard errors over draws.
    """
    from fathometer.measurement import observe
    from fathometer.measurement.statistics import average
    from fathometer.models import draw_weights, equiangular_tokens, reference_network

    model = reference_network(spec, seed=0).requires_grad_(False)
    draws = []
    for seed in range(seeds):
        if seed > 0:
            draw_weights(model, seed)
        tokens = equiangular_tokens(n_tokens=n_tokens, d_model=spec.d_model, q=q, p=p, batch=batch, seed=seed)
        draws.append(observe(model, tokens, seeds=1, seed=seed, forward=False).profile.curves)
        progress("weight draws", seed + 1, seeds)
    curves, errors = average(draws)
    return Profile(source="measurement", curves=curves, errors=errors, about={"weight_draws": seeds})
