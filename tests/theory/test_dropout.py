"""Dropout on branches and on attention weights: both representations, and simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fathometer.attention import Annealed, Exact, Uniform
from fathometer.errors import NotCoveredError, SpecError
from fathometer.models import reference_network
from fathometer.models.stacked import stacked_network
from fathometer.observables import backward, predict, weight_gradients
from fathometer.propagation import propagate, propagate_gram
from fathometer.spec import DyT, LayerNorm, Scales, SelfAttention, Sublayer, Transformer, from_dict, to_dict, with_field

SCALES = Scales(query=1.1, key=1.0, value=0.9, output=1.1, mlp_in=1.2, mlp_out=1.0)


LAYER_NORM = LayerNorm()


def transformer(placement=Sublayer.pre_norm, norm=LAYER_NORM, n_layers=2, d_model=64, **changes) -> Transformer:
    given = {"dropout": 0.2, "attention_dropout": 0.3, **changes}
    return Transformer.uniform(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=2,
        norm=norm,
        scales=SCALES,
        activation="relu",
        placement=placement,
        **given,
    )


@pytest.mark.parametrize("closure", [Exact(), Annealed(), Uniform()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "placement", [Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich], ids=lambda p: p.__name__
)
@pytest.mark.parametrize("norm", [LayerNorm(), DyT(alpha=0.7)], ids=["layer_norm", "dyt"])
def test_equal_tokens_and_gram_matrices_agree(closure, placement, norm) -> None:
    spec, n, q, p = transformer(placement, norm), 9, 1.3, 0.4
    equal = propagate(spec, n_tokens=n, q=q, p=p, closure=closure)
    gram = propagate_gram(spec, p + (q - p) * np.eye(n), closure=closure)
    np.testing.assert_allclose(gram.grams[:, 0, 0], equal.q, rtol=1e-9)
    np.testing.assert_allclose(gram.grams[:, 0, 1], equal.p, rtol=1e-9)
    start = np.full((n, n), 0.2) + 0.8 * np.eye(n)
    ((log_norm, matrices),) = gram.backward(start)
    expected = backward(equal.transfer, alignment=0.2)
    np.testing.assert_allclose(log_norm, expected.log_norm, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(matrices[:, 0, 1], expected.alignment, rtol=1e-7)


def test_the_forward_map_of_perturbations_is_adjoint_to_the_backward_map() -> None:
    spec, n = transformer(), 7
    gram = 0.3 + 0.7 * np.eye(n)
    trajectory = propagate_gram(spec, gram, closure=Exact())
    ((log_norm, _),) = trajectory.backward(None)
    np.testing.assert_allclose(trajectory.forward_log[-1], log_norm[0], rtol=1e-9)


def _simulated(spec: Transformer, n: int, q: float, p: float, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (q, p) after the network and (J, K) at its input for every draw of weights, inputs and masks."""
    rng = np.random.default_rng(0)
    d, found = spec.d_model, []
    for seed in range(draws):
        shared, own = rng.normal(size=(1, d)), rng.normal(size=(n, d))
        x = torch.tensor(np.sqrt(p) * shared + np.sqrt(q - p) * own, requires_grad=True)
        model = reference_network(spec, seed=seed, dtype=torch.float64)
        torch.manual_seed(seed)
        out = model.train()(x[None])[0]
        g0 = torch.tensor(np.sqrt(0.3) * rng.normal(size=(1, d)) + np.sqrt(0.7) * rng.normal(size=(n, d)))
        (g,) = torch.autograd.grad((out * g0).sum(), x)
        row = []
        for t in (out.detach().numpy(), g.numpy()):
            own_square = (t**2).mean()
            row += [own_square, ((t.sum(0) ** 2).mean() / n - own_square) / (n - 1)]
        found.append(row)
    values = np.array(found)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(draws)


@pytest.mark.parametrize("causal", [False, True])
def test_simulation(causal: bool) -> None:
    """One block, d = 192: 4.5 standard errors plus 2 / sqrt(d_head) % for few dimensions a head."""
    n, q, p = 12, 1.0, 0.3
    spec = transformer(n_layers=1, d_model=192, causal=causal, attention_dropout=0.4, dropout=0.3)
    spec = with_field(spec, "value", 2.0)
    mean, error = _simulated(spec, n, q, p, draws=150)
    gram = propagate_gram(spec, p + (q - p) * np.eye(n), closure=Exact())
    start = np.full((n, n), 0.3) + 0.7 * np.eye(n)
    ((log_norm, matrices),) = gram.backward(start)
    off = ~np.eye(n, dtype=bool)
    theory = np.array(
        [
            np.trace(gram.grams[-1]) / n,
            gram.grams[-1][off].mean(),
            np.exp(log_norm[0]),
            np.exp(log_norm[0]) * matrices[0][off].mean(),
        ]
    )
    allowance = 0.02 * np.abs(theory)
    assert np.all(np.abs(mean - theory) <= 4.5 * error + allowance), (mean, theory, error)
    without = propagate_gram(with_field(spec, "attention_dropout", 0.0), p + (q - p) * np.eye(n), closure=Exact())
    assert abs(np.trace(without.grams[-1]) / n - mean[0]) > 4.5 * error[0] + allowance[0]


def test_weight_gradients_see_the_masks() -> None:
    """Query, key, value and output gradients of attention with dropped weights, by simulation."""
    n, d = 10, 128
    spec = transformer(n_layers=1, d_model=d, attention_dropout=0.5, dropout=0.0)
    spec = replace(spec, blocks=(replace(spec.blocks[0], sublayers=spec.blocks[0].sublayers[:1]),))
    predicted = weight_gradients(spec, n_tokens=n, q=1.0, p=0.3)
    rng = np.random.default_rng(1)
    squares: dict[str, list[float]] = {role: [] for role in ("query", "key", "value", "output")}
    for seed in range(120):
        x = torch.tensor(np.sqrt(0.3) * rng.normal(size=(1, d)) + np.sqrt(0.7) * rng.normal(size=(n, d)))
        model = reference_network(spec, seed=seed, dtype=torch.float64)
        torch.manual_seed(seed)
        (model.train()(x[None])[0] * torch.tensor(rng.normal(size=(n, d)))).sum().backward()
        for name, parameter in model.named_parameters():
            role = name.split(".")[-2]
            if role in squares:
                squares[role].append(float(parameter.grad.square().sum()))
    for role, values in squares.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
        theory = float(np.exp(predicted.logs[role][0]))
        tolerance = 0.12 if role in ("query", "key") else 0.04  # random overlaps of tokens, see weight_gradients
        assert abs(mean - theory) < 4.5 * error + tolerance * theory, (role, mean, theory, error)


def test_rates_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Sublayer\.dropout must lie in \[0, 1\); got 1"):
        transformer(dropout=1.0)
    with pytest.raises(
        SpecError, match=r"SelfAttention\.attention_dropout must lie in \[0, 1\); got 1\.5 at index \(1,\)"
    ):
        transformer(attention_dropout=np.array([0.1, 1.5]))
    with pytest.raises(SpecError, match=r"dropout must be >= 0; got -0\.1"):
        transformer(dropout=-0.1)
    with pytest.raises(SpecError, match="centred"):
        SelfAttention(query=1, key=1, value=1, output=1, centred=True, attention_dropout=0.1)


def test_rates_are_part_of_the_file_form_and_of_grids() -> None:
    spec = transformer()
    assert from_dict(to_dict(spec)) == spec
    assert spec.has_dropout and not spec.without_dropout().has_dropout
    grid = with_field(spec, "dropout", np.array([0.0, 0.2]))
    profile = predict(grid, n_tokens=8, q=1.0, p=0.2)
    one = predict(spec, n_tokens=8, q=1.0, p=0.2)
    np.testing.assert_allclose(profile.q[:, 1], one.q, rtol=1e-12)
    with pytest.raises(NotCoveredError, match="no dropout"):
        stacked_network(spec)


def test_networks_drop_in_training_mode_only() -> None:
    spec = transformer(n_layers=1)
    model, x = reference_network(spec, seed=0), torch.randn(1, 5, 64)
    plain = reference_network(spec.without_dropout(), seed=0)
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert not torch.allclose(model.train()(x), plain(x))
