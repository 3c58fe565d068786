"""Figures of the moments paper: what is drawn, at a toy size; whole models against theory, slowly."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from fathometer import papers
from fathometer.errors import BatchError, DomainError, ModelError
from fathometer.measurement.layerwise import _layer, _run, layerwise_draw
from fathometer.measurement.moments import measure_moments
from fathometer.models import equiangular_tokens, reference_network
from fathometer.models.seeding import named_generator
from fathometer.observables.model_moments import moments
from fathometer.papers.item import SMALL, silent
from fathometer.papers.moments.profiles import COSINE, DROPOUT, Q0, deepscalelm, predicted, xavier
from fathometer.plotting import to_png
from fathometer.plotting.moments.components import draw_components
from fathometer.prescription import apply_scheme
from fathometer.report.moments import render_moments
from fathometer.spec import LayerNorm, Scales, Sublayer, Transformer, preset

TOY = replace(SMALL, d_model=64, n_layers=5, n_heads=2, n_tokens=16, seeds=3)
ITEMS = [f"moments/figure-{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ITEMS)
def test_every_figure_is_computed_tabulated_and_drawn(name: str) -> None:
    told: list[tuple[int, int]] = []
    item = papers.find_item(name)
    result = item.run(TOY, lambda label, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    for curve in result.panels:
        shape = (len(result.names), len(result.depths[curve]))
        assert result.theory[curve].shape == result.simulated[curve].shape == result.errors[curve].shape == shape
        law = result.laws.get(curve)
        assert law is None or law.shape == shape
    data = result.to_dict()
    assert data["schema"] == 1 and data["about"]["size"]["n_layers"] == 5
    rows = result.table().rows
    assert len(rows) == len(result.names) * len(result.panels) + len(result.constants)
    figure = item.draw(result)
    assert len(figure.axes) == len(result.panels)
    for ax, curve in zip(figure.axes, result.panels, strict=True):
        drawn = ax.lines[0].get_ydata()
        power = 0.5 if curve == "weight_log" else 1.0
        wanted = result.theory[curve][0]
        np.testing.assert_allclose(drawn, np.exp(power * wanted) if curve.endswith("_log") else wanted)
    assert to_png(figure)[:4] == b"\x89PNG"


def test_gaps_are_relative_but_of_the_cosine() -> None:
    result = papers.find_item("moments/figure-4").run(replace(TOY, seeds=1), silent)
    changed = replace(result, theory={name: curve + 0.1 for name, curve in result.simulated.items()})
    np.testing.assert_allclose(changed.gaps("cosine", 0), 0.1)
    np.testing.assert_allclose(changed.gaps("gradient_log", 1), math.e**0.1 - 1)
    np.testing.assert_allclose(changed.gaps("q", 0), 0.1 / result.simulated["q"][0])


def one_by_one(seed: int = 3) -> tuple[Transformer, torch.Tensor]:
    spec = xavier(replace(TOY, n_layers=3), Sublayer.post_norm).without_dropout()
    tokens = equiangular_tokens(n_tokens=16, d_model=64, q=Q0, p=COSINE, batch=2, seed=seed, dtype=torch.float64)
    return spec, tokens


def test_layer_by_layer_is_the_whole_network() -> None:
    """The same weights in one module: stream, sums, gradients and weight gradients agree to rounding."""
    spec, tokens = one_by_one()
    found = layerwise_draw(spec, tokens, seed=3, top_alignment=0.2, weights=True)
    whole = reference_network(spec, dtype=torch.float64)
    for layer, block in enumerate(spec.layers()):
        part = _layer(block, 64, 3, layer, tokens)
        whole.blocks[layer].load_state_dict(part.blocks[0].state_dict())
    leaf = tokens.clone().requires_grad_()
    out = whole(leaf)
    generator = named_generator(3, "cotangent")
    own, shared = torch.randn(tokens.shape, generator=generator), torch.randn((2, 1, 64), generator=generator)
    gradient = (math.sqrt(0.8) * own + math.sqrt(0.2) * shared).double()
    matrices = [p for p in whole.blocks[0].parameters() if p.ndim == 2]
    at_input, *weights = torch.autograd.grad(out, [leaf, *matrices], gradient)
    unit = float(gradient.square().mean())
    assert found.q[-1] == pytest.approx(float(out.detach().square().mean()), rel=1e-10)
    assert math.exp(found.gradient_log[0]) == pytest.approx(float(at_input.square().mean()) / unit, rel=1e-10)
    total = sum(float(w.square().sum()) for w in weights) / 2 / unit
    assert math.exp(found.weight_log[0]) == pytest.approx(total, rel=1e-10)
    assert np.all(np.isnan(layerwise_draw(spec, tokens, seed=3).weight_log))


def test_dropout_meets_the_same_masks_on_the_way_back() -> None:
    _, tokens = one_by_one()
    spec = xavier(replace(TOY, n_layers=3), Sublayer.pre_norm)
    state = torch.random.get_rng_state()
    found = layerwise_draw(spec, tokens, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    stream = leaf = tokens.clone().requires_grad_()
    for layer, block in enumerate(spec.layers()):
        stream = _run(_layer(block, 64, 3, layer, tokens), stream, 3, layer)
    gradient = torch.randn(tokens.shape, generator=named_generator(3, "cotangent")).double()
    (at_input,) = torch.autograd.grad(stream, leaf, gradient)
    relative = float(at_input.square().mean() / gradient.square().mean())
    assert math.exp(found.gradient_log[0]) == pytest.approx(relative, rel=1e-10)
    plain = layerwise_draw(spec.without_dropout(), tokens, seed=3)
    assert plain.q[-1] != pytest.approx(found.q[-1], rel=1e-3)


def test_mistakes_of_a_layerwise_draw_are_named() -> None:
    spec, tokens = one_by_one()
    with pytest.raises(BatchError, match=r"expected tokens of shape \(batch, n_tokens, 64\); got \(16, 64\)"):
        layerwise_draw(spec, tokens[0], seed=0)
    with pytest.raises(DomainError, match=r"top_alignment must lie in \[0, 1\]; got 2"):
        layerwise_draw(spec, tokens, seed=0, top_alignment=2)
    huge = Scales(query=1.0, key=1.0, value=1e20, output=1e20, mlp_in=1.0, mlp_out=1.0)
    wild = Transformer.uniform(n_layers=2, d_model=64, n_heads=2, norm=LayerNorm(), scales=huge)
    with pytest.raises(ModelError, match="leaves the range of its number format in block 0 of 2"):
        layerwise_draw(wild, tokens.float(), seed=0)


def test_components_are_drawn_and_printed_beside_the_theory() -> None:
    spec = preset("vit", n_layers=2, d_model=64)
    seen = measure_moments(reference_network(spec), torch.randn(1, 12, 64), seeds=2)
    theory = moments(spec, n_tokens=12, q=1.0, p=0.0)
    figure = draw_components(seen, theory, 1, "toy")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == list(seen.rows(1)) and to_png(figure)[:4] == b"\x89PNG"
    text = StringIO()
    render_moments(Console(file=text, width=160), seen, theory, 1)
    row = next(line for line in text.getvalue().splitlines() if "mlp.activation" in line)
    assert "±" in row and f"{theory['mlp.activation'].q[1]:.4g}" in row


SHOWN = {
    "pre-norm, Xavier": lambda size: apply_scheme(xavier(size, Sublayer.pre_norm), "xavier").spec,
    "post-norm, Xavier": lambda size: apply_scheme(xavier(size, Sublayer.post_norm), "xavier").spec,
    "pre-norm, DeepScaleLM": lambda size: deepscalelm(size, Sublayer.pre_norm),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_whole_models_of_96_layers(name: str) -> None:
    """Against geometric means over eight networks of width 256 with four samples of 64 tokens each.

    Xavier weights have the fans of whole matrices here, so that scores have variance one: with those of single heads
    it is 2.6, and heads of 64 dimensions then amplify gradients at the first layers by a tenth beyond leading order.
    """
    size = replace(SMALL, n_layers=96, seeds=8)
    spec = SHOWN[name](size)
    theory = predicted(spec, size.n_tokens)
    draws = []
    for seed in range(size.seeds):
        tokens = equiangular_tokens(n_tokens=64, d_model=256, q=Q0, p=COSINE, batch=4, seed=seed)
        draws.append(layerwise_draw(spec, tokens, seed=seed))
    q = np.exp(np.mean([np.log(draw.sum_q) for draw in draws], axis=0)) / theory["q"] - 1
    cosine = np.mean([draw.p / draw.q for draw in draws], axis=0) - theory["cosine"]
    logs = np.array([draw.gradient_log for draw in draws])
    assert np.median(np.abs(q)) <= 0.04 and np.max(np.abs(q)) <= 0.12
    assert np.max(np.abs(cosine)) <= 0.04
    if name == "post-norm, Xavier":
        layers = np.arange(24, 73)
        slopes = np.polyfit(layers, logs[:, layers].T, 1)[0]
        wanted = np.polyfit(layers, theory["gradient_log"][layers], 1)[0]
        assert abs(slopes.mean() - wanted) <= slopes.std(ddof=1)
        return
    gradient = np.exp(logs.mean(axis=0) - theory["gradient_log"]) - 1
    assert np.median(np.abs(gradient)) <= 0.04 and np.max(np.abs(gradient)) <= 0.12


@pytest.mark.slow
def test_deepscalelm_over_a_thousand_layers() -> None:
    size = replace(SMALL, n_layers=1000, d_model=256)
    spec = deepscalelm(size, Sublayer.pre_norm)
    theory = predicted(spec, 64)
    tokens = equiangular_tokens(n_tokens=64, d_model=256, q=Q0, p=COSINE, batch=4)
    found = layerwise_draw(spec, tokens, seed=0, top_alignment=0.0)
    assert found.sum_q.min() >= 1 / 1.25 and found.sum_q.max() <= 1.25
    assert found.gradient_log.min() >= -2.0
    assert np.max(np.abs(np.exp(found.gradient_log - theory["gradient_log"]) - 1)) <= 0.12


@pytest.mark.parametrize(("n_layers", "count"), [(64, "layers"), (192, "blocks")])
def test_the_fall_of_gradients_under_deepscalelm(n_layers: int, count: str) -> None:
    """No further than (1 - beta^2)^N, which only infinitely many tokens reach for independent output gradients."""
    spec = xavier(replace(SMALL, n_layers=n_layers), Sublayer.pre_norm)
    falls = []
    for n_tokens in (64, 256, 1024):
        plan = apply_scheme(spec, "deepscalelm", r0=0.221, n_tokens=n_tokens, dropout=DROPOUT, count=count)
        stream = moments(plan.spec, n_tokens=n_tokens, q=Q0, p=0.221 * (1 - DROPOUT))["stream"]
        falls.append(math.exp(stream.gradient_log[0]))
    bound = (1 - (2 if count == "layers" else 1) / n_layers) ** n_layers
    assert falls[0] > falls[1] > falls[2] > bound
    assert falls[2] == pytest.approx(bound, rel=0.05)
