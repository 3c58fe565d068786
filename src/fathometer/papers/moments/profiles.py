r"""Figures 1 to 4: the stream and its gradients over depth, theory beside simulated networks.

Networks have ReLU MLPs of ratio four, LayerNorm, dropout of 0.1 on branches and on attention weights as in training,
and Gaussian tokens of unit second moment and cosine 0.2, near that of three embedding tables on text. Xavier weights
are those of the published code: query, key and value matrices of single heads, ``var W = 2/(d + d_head)``, outputs
``1/d`` and MLP ``2/(5 d)``. Output gradients are independent for every token.

Source: A. Kedia et al., arXiv:2403.09635, whose figures have 192 layers of width 1024; the small size has the widths
and depths of the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.observables import weight_gradients
from fathometer.observables.model_moments import moments
from fathometer.observables.moment_laws import exponential_gradients, linear_growth
from fathometer.papers.item import FULL, Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.prescription import apply_scheme
from fathometer.spec import LayerNorm, Placement, Scales, Sublayer, Transformer

DROPOUT = 0.1
Q0, COSINE = 1.0, 0.2
#: Curves and what they are; those ending in ``_log`` are natural logarithms.
CURVES = {
    "q": "second moment of the sum",
    "cosine": "cosine",
    "gradient_log": "gradients, mean square",
    "weight_log": "weight gradients, square norm",
}


@dataclass(frozen=True, kw_only=True)
class DepthProfiles:
    """Curves over depth of several architectures.

    Attributes:
        names: Architectures, the first axis of every array.
        panels: Curves to draw.
        depths: Layers of every curve.
        theory, simulated, errors: By curve, shape ``(n_names, n)``. Simulated are means over draws of the weights,
            geometric ones of all but the cosine; errors are standard errors, relative for those.
        laws: By curve, a limiting law in the same form; NaN where there is none.
        law_labels: What the law is, by curve.
        constants: Numbers worth printing.
        about: Sizes, dropout, seeds.
    """

    names: tuple[str, ...]
    panels: tuple[str, ...]
    depths: dict[str, FloatArray]
    theory: dict[str, FloatArray]
    simulated: dict[str, FloatArray]
    errors: dict[str, FloatArray]
    laws: dict[str, FloatArray]
    law_labels: dict[str, str]
    constants: dict[str, float]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def gaps(self, curve: str, name: int) -> FloatArray:
        """Return how far theory is from simulation: relatively, for the cosine absolutely."""
        theory, seen = self.theory[curve][name], self.simulated[curve][name]
        if curve == "cosine":
            return np.asarray(np.abs(theory - seen))
        ratio = np.exp(theory - seen) if curve.endswith("_log") else theory / seen
        return np.asarray(np.abs(ratio - 1))

    def table(self) -> Table:
        """Return the ends of all curves, the gaps between theory and simulation, and the laws' constants."""
        rows: list[tuple[Cell, ...]] = []
        for i, name in enumerate(self.names):
            for curve in self.theory:
                at = 0 if curve.endswith("_log") else -1
                theory, seen = float(self.theory[curve][i, at]), float(self.simulated[curve][i, at])
                error = float(self.errors[curve][i, at])
                if curve.endswith("_log"):
                    theory, seen = math.exp(theory), math.exp(seen)
                error = error if curve == "cosine" else error * seen
                gaps = self.gaps(curve, i)
                where = "input over output" if at == 0 else "output"
                rows.append(
                    (
                        name,
                        f"{CURVES[curve]}, {where}",
                        theory,
                        (seen, error),
                        float(np.median(gaps)),
                        float(gaps.max()),
                    )
                )
        rows += [("law", name, value, "", "", "") for name, value in self.constants.items()]
        return Table(
            title="Theory and simulation; gaps over all depths are relative, of the cosine absolute",
            headings=("network", "curve", "theory", "simulated", "median gap", "largest"),
            rows=tuple(rows),
        )


def pre_norm_forward(size: Size, progress: Progress = silent) -> DepthProfiles:
    """Figure 1: Xavier pre-norm, whose stream grows linearly."""
    sized = _paper_depth(size)
    spec = xavier(sized, Sublayer.pre_norm)
    law = linear_growth(spec, n_tokens=sized.n_tokens)
    found = profiles({"pre-norm, Xavier": spec}, sized, ("q", "cosine"), progress)
    depth = found.depths["q"]
    settled = found.theory["q"][0, -1] + (depth - depth[-1]) * law.velocity
    return replace(
        found,
        laws={"q": settled[None], "cosine": np.full((1, sized.n_layers + 1), law.cosine)},
        law_labels={"q": f"slope {law.velocity:.3f} a layer", "cosine": f"limit {law.cosine:.3f}"},
        constants={"growth per layer, settled": law.velocity, "cosine, settled": law.cosine},
    )


def pre_norm_backward(size: Size, progress: Progress = silent) -> DepthProfiles:
    """Figure 2: Xavier pre-norm, whose gradients fall hyperbolically from the input on."""
    sized = _paper_depth(size)
    spec = xavier(sized, Sublayer.pre_norm)
    found = profiles({"pre-norm, Xavier": spec}, sized, ("weight_log", "gradient_log"), progress)
    q = moments(spec, n_tokens=sized.n_tokens, q=Q0, p=COSINE)["mlp.sum"].q
    law = linear_growth(spec, n_tokens=sized.n_tokens)
    return replace(
        found,
        laws={"weight_log": law.exponent * np.log(q[-1] / q)[None]},
        law_labels={"weight_log": f"hyperbola $(q_L/q_\\ell)^{{{law.exponent:.2f}/2}}$"},
        constants={"power of the hyperbola": law.exponent},
    )


def post_norm_backward(size: Size, progress: Progress = silent) -> DepthProfiles:
    """Figure 3: Xavier post-norm, whose gradients vanish exponentially."""
    sized = _paper_depth(size)
    spec = xavier(sized, Sublayer.post_norm)
    law = exponential_gradients(spec, n_tokens=sized.n_tokens)
    found = profiles({"post-norm, Xavier": spec}, sized, ("gradient_log", "weight_log"), progress)
    laws = {}
    for curve in ("gradient_log", "weight_log"):
        theory, depth = found.theory[curve][0], found.depths[curve]
        middle = len(depth) // 2
        laws[curve] = (theory[middle] - law.slope * (depth - depth[middle]))[None]
    return replace(
        found,
        laws=laws,
        law_labels={
            "gradient_log": f"slope {-law.slope:.4f} a layer",
            "weight_log": f"slope {-law.slope / 2:.4f} a layer",
        },
        constants={
            "ln factor per layer": law.slope,
            "cosine, settled": law.cosine,
            "alignment of gradients, settled": law.alignment,
        },
    )


def deepscalelm_flat(size: Size, progress: Progress = silent) -> DepthProfiles:
    """Figure 4: DeepScaleLM in both placements, whose stream and gradients stay put."""
    sized = _paper_depth(size)
    specs = {
        f"{name}, DeepScaleLM": deepscalelm(sized, placement)
        for name, placement in (("pre-norm", Sublayer.pre_norm), ("post-norm", Sublayer.post_norm))
    }
    found = profiles(specs, sized, ("q", "cosine", "gradient_log"), progress)
    share = 2 / sized.n_layers
    layers = found.depths["gradient_log"]
    bound = (layers[-1] - layers) * math.log1p(-share)
    return replace(
        found,
        laws={"gradient_log": np.stack([bound, np.full(len(bound), np.nan)])},
        law_labels={"gradient_log": r"bound, pre-norm: $(1-2/N)^{N-\ell} \to e^{-2}$"},
        constants={"bound on the fall of gradients, pre-norm": math.exp(bound[0])},
    )


def xavier(size: Size, placement: Placement) -> Transformer:
    """Return the published code's Xavier network."""
    d, d_head = size.d_model, size.d_model // size.n_heads
    narrow = math.sqrt(2 * d / (d + d_head))
    scales = Scales(
        query=narrow, key=narrow, value=narrow, output=1.0, mlp_in=math.sqrt(2 / 5), mlp_out=math.sqrt(8 / 5)
    )
    return _network(size, placement, scales)


def deepscalelm(size: Size, placement: Placement) -> Transformer:
    """Return the network under the refined DeepScaleLM scheme with its default ``beta^2 = 2/N``."""
    one = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
    plan = apply_scheme(
        _network(size, placement, one),
        "deepscalelm",
        r0=COSINE / (1 - DROPOUT),
        n_tokens=size.n_tokens,
        dropout=DROPOUT,
    )
    return plan.spec


def _network(size: Size, placement: Placement, scales: Scales) -> Transformer:
    return Transformer.uniform(
        n_layers=size.n_layers,
        d_model=size.d_model,
        n_heads=size.n_heads,
        norm=LayerNorm(),
        activation="relu",
        scales=scales,
        placement=placement,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
    )


def _paper_depth(size: Size) -> Size:
    """Return the paper's depth at its width."""
    return replace(size, n_layers=192) if size == FULL else size


def profiles(
    specs: Mapping[str, Transformer], size: Size, panels: tuple[str, ...], progress: Progress
) -> DepthProfiles:
    """Predict and simulate networks with independent weights, tokens, dropout masks and output gradients."""
    theory = [predicted(spec, size.n_tokens) for spec in specs.values()]
    draws = []
    for i, (name, spec) in enumerate(specs.items()):

        def report(done: int, total: int, at: int = i, name: str = name) -> None:
            progress(f"{name}, weight draws", at * total + done, len(specs) * total)

        draws.append(simulated(spec, size.n_tokens, size.seeds, report))
    depths = {
        "q": np.arange(1.0, size.n_layers + 1),
        "cosine": np.arange(size.n_layers + 1.0),
        "gradient_log": np.arange(size.n_layers + 1.0),
        "weight_log": np.arange(size.n_layers + 0.0),
    }
    seen, errors = {}, {}
    for curve in panels:
        values = np.stack([draw[curve] for draw in draws])  # (names, seeds, depth)
        logs = values if curve == "cosine" or curve.endswith("_log") else np.log(values)
        mean = logs.mean(axis=1)
        seen[curve] = np.exp(mean) if curve == "q" else mean
        spread = logs.std(axis=1, ddof=1) if size.seeds > 1 else np.full(mean.shape, np.nan)
        errors[curve] = spread / math.sqrt(size.seeds)
    return DepthProfiles(
        names=tuple(specs),
        panels=panels,
        depths={curve: depths[curve] for curve in panels},
        theory={curve: np.stack([t[curve] for t in theory]) for curve in panels},
        simulated=seen,
        errors=errors,
        laws={},
        law_labels={},
        constants={},
        about=_described(size),
    )


def predicted(spec: Transformer, n_tokens: int) -> dict[str, FloatArray]:
    """Return the theory of every curve."""
    found = moments(spec, n_tokens=n_tokens, q=Q0, p=COSINE)
    stream = found["stream"]
    norms = weight_gradients(spec, n_tokens=n_tokens, q=Q0, p=COSINE).logs
    weights = np.logaddexp.reduce(np.stack(list(norms.values())), axis=0)
    return {
        "q": found["mlp.sum"].q,
        "cosine": stream.p / stream.q,
        "gradient_log": stream.gradient_log,
        "weight_log": weights - weights[-1],
    }


def simulated(spec: Transformer, n_tokens: int, seeds: int, report: Any) -> dict[str, FloatArray]:
    """Return every curve of every draw, shape ``(seeds, n)``."""
    from fathometer.measurement.layerwise import layerwise_draw
    from fathometer.models import equiangular_tokens

    rows: dict[str, list[FloatArray]] = {curve: [] for curve in CURVES}
    for seed in range(seeds):
        tokens = equiangular_tokens(n_tokens=n_tokens, d_model=spec.d_model, q=Q0, p=COSINE, seed=seed)

        def told(done: int, total: int, seed: int = seed) -> None:
            report(seed * total + done, seeds * total)

        draw = layerwise_draw(spec, tokens, seed=seed, weights=True, progress=told)
        rows["q"].append(draw.sum_q)
        rows["cosine"].append(draw.p / draw.q)
        rows["gradient_log"].append(draw.gradient_log)
        rows["weight_log"].append(draw.weight_log - draw.weight_log[-1])
    return {curve: np.stack(values) for curve, values in rows.items()}


def _described(size: Size) -> dict[str, Any]:
    from fathometer import __version__

    return {
        "paper": "arXiv:2403.09635",
        "version": __version__,
        "size": plain(size),
        "q": Q0,
        "cosine": COSINE,
        "dropout": DROPOUT,
        "closure": DEFAULT_CLOSURE.name,
    }
