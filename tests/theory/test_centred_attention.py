"""Gain-controlled attention: its output less the mean over tokens, in both representations and on random networks.

Worked numbers: the asymptotic theory of Giorlandino and Goldt, arXiv:2505.24333, computed by independent code.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Annealed, Closure, RandomEnergy, Uniform, UniformLargeN
from fathometer.errors import SpecError
from fathometer.models import draw_weights, reference_network, stacked_network, tokens_with_gram
from fathometer.observables import backward, forward, predict
from fathometer.propagation import Trajectory, branch_maps, exchangeable, propagate, propagate_gram
from fathometer.spec import MLP, Block, LayerNorm, RMSNorm, SelfAttention, Sublayer, Transformer
from fathometer.spec.files import from_dict, to_dict

FloatArray = NDArray[np.float64]
Z = 4.5
WIDTH, Q, COSINE = 256, 1.2, 0.4


def attention(**changes: Any) -> SelfAttention:
    arguments = {"query": 1.1, "key": 1.0, "value": 1.2, "output": 1.1, "n_heads": 4, "centred": True}
    return SelfAttention(**arguments | changes)


def network(placement: Any, n_layers: int, **changes: Any) -> Transformer:
    mlp = MLP(mlp_in=0.9, mlp_out=1.1, activation="relu", in_bias=0.2)
    block = Block(
        sublayers=(placement(attention(**changes), LayerNorm()), placement(mlp, LayerNorm())), repeat=n_layers
    )
    return Transformer(blocks=(block,), d_model=WIDTH)


def gram(n_tokens: int) -> FloatArray:
    return np.asarray(Q * (COSINE + (1 - COSINE) * np.eye(n_tokens)))


def pair(spec: Transformer, n_tokens: int, closure: Closure = DEFAULT_CLOSURE) -> Trajectory:
    return propagate(spec, n_tokens=n_tokens, q=Q, p=Q * COSINE, closure=closure)


@pytest.mark.parametrize("n_tokens", [2, 7, 24])
@pytest.mark.parametrize("closure", [DEFAULT_CLOSURE, Annealed(score_path=False)], ids=lambda closure: closure.name)
@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich])
def test_two_numbers_and_full_matrices_agree(placement: Any, closure: Closure, n_tokens: int) -> None:
    spec = network(placement, 3, value_bias=0.3, output_bias=0.2)
    short = pair(spec, n_tokens, closure)
    full = propagate_gram(spec, gram(n_tokens), closure=closure)
    np.testing.assert_allclose(full.grams[:, 0, 0], short.q, rtol=1e-12)
    np.testing.assert_allclose(full.grams[:, 0, 1], short.p, rtol=1e-12, atol=1e-12)
    boundaries = (0.0, 1.0)
    starts = (None, np.ones((n_tokens, n_tokens)))
    for alignment, (log_norm, matrices) in zip(boundaries, full.backward(*starts), strict=True):
        expected = backward(short.transfer, alignment=alignment)
        # The output norm of a sandwich divides by the small difference that centring leaves.
        np.testing.assert_allclose(log_norm, expected.log_norm, rtol=0, atol=3e-12)
        np.testing.assert_allclose(matrices[:, 0, 1], expected.alignment, rtol=0, atol=3e-12)
    ahead = forward(short.transfer, short.n_others)
    np.testing.assert_allclose(full.forward_log, ahead.log_norm, rtol=0, atol=3e-12)


def test_full_matrices_forward_is_adjoint_to_backward() -> None:
    n_tokens = 9
    spec = network(Sublayer.pre_norm, 2)
    sizes = np.sqrt(np.linspace(0.5, 2.0, n_tokens))
    full = propagate_gram(spec, sizes[:, None] * gram(n_tokens) * sizes, closure=DEFAULT_CLOSURE)
    (log_norm, _), *_ = full.backward(None)
    assert log_norm[0] == pytest.approx(full.forward_log[-1], abs=1e-12)


def test_added_tokens_have_no_mean() -> None:
    spec = network(Sublayer.pre_norm, 1, output_bias=0.7)
    step = pair(spec, 5)
    assert step.added_q[0] + 4 * step.added_p[0] == pytest.approx(0.0, abs=1e-15)
    assert step.added_q[0] > 0
    without = pair(network(Sublayer.pre_norm, 1, output_bias=0.0), 5)
    assert step.added_q[0] == without.added_q[0]


@pytest.mark.parametrize("closure", [DEFAULT_CLOSURE, Uniform(), UniformLargeN(), RandomEnergy()])
def test_one_token_adds_nothing(closure: Closure) -> None:
    spec = Transformer(blocks=(Block(sublayers=(Sublayer.pre_norm(attention(), LayerNorm()),)),), d_model=WIDTH)
    step = propagate(spec, n_tokens=1, q=1.3, p=0.0, closure=closure)
    assert (step.added_q[0], step.added_p[0]) == (0.0, 0.0)
    np.testing.assert_array_equal(step.transfer[0], np.eye(2))


@pytest.mark.parametrize("closure", [Uniform(), UniformLargeN(), RandomEnergy()], ids=lambda closure: closure.name)
def test_attention_that_tells_no_tokens_apart_is_silent(closure: Closure) -> None:
    spec = network(Sublayer.pre_norm, 1)
    step = pair(spec, 1000, closure)
    assert step.added_q[0] == 0
    np.testing.assert_allclose(step.transfer[0], np.eye(2), rtol=0, atol=1e-15)


# Random networks.

SETTINGS: dict[str, dict[str, Any]] = {
    "pre_norm": {"spec": network(Sublayer.pre_norm, 2), "n_tokens": 16},
    "post_norm": {"spec": network(Sublayer.post_norm, 2, query=1.3, key=1.3), "n_tokens": 16},
    "biases": {"spec": network(Sublayer.pre_norm, 1, value_bias=0.8, output_bias=0.8), "n_tokens": 32},
    "rms_norm_scaled": {
        "spec": Transformer(
            blocks=(
                Block(
                    sublayers=(
                        dataclasses.replace(
                            Sublayer.pre_norm(attention(query=1.5), RMSNorm(gain=0.9)),
                            skip_scale=0.5,
                            branch_scale=1.7,
                        ),
                    )
                ),
            ),
            d_model=WIDTH,
        ),
        "n_tokens": 32,
    },
}


@cache
def simulate(name: str) -> FloatArray:
    """Return q, p of the output and J, K of gradients at the input, one row for each weight draw."""
    spec, n_tokens = SETTINGS[name]["spec"], SETTINGS[name]["n_tokens"]
    model = reference_network(spec).requires_grad_(False)
    rows = []
    for seed in range(48):
        draw_weights(model, seed)
        x = tokens_with_gram(gram(n_tokens), d_model=WIDTH, batch=2, seed=seed).requires_grad_()
        y = model(x)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad(y, x, noise)
        rows.append([moment for t in (y, gradient) for moment in moments(t)])
    return np.array(rows)


def moments(x: torch.Tensor) -> tuple[float, float]:
    wide = x.detach().double()
    matrix = (wide @ wide.mT / x.shape[-1]).mean(0).numpy()
    n, diagonal = len(matrix), np.trace(matrix)
    return diagonal / n, (matrix.sum() - diagonal) / (n * (n - 1))


def excess(name: str) -> float:
    """Return the largest distance of a mean from its prediction over its tolerance."""
    spec, n_tokens = SETTINGS[name]["spec"], SETTINGS[name]["n_tokens"]
    found = simulate(name)
    trajectory = pair(spec, n_tokens)
    gradients = backward(trajectory.transfer)
    jacobian = np.exp(gradients.log_norm[0])
    predicted = np.array([trajectory.q[-1], trajectory.p[-1], jacobian, jacobian * gradients.alignment[0]])
    size = np.array([predicted[0], predicted[0], jacobian, max(abs(predicted[3]), jacobian / n_tokens)])
    allowance = 0.25 * spec.n_layers * len(spec.blocks[0].sublayers) / WIDTH
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    return float(np.max(np.abs(found.mean(axis=0) - predicted) / (Z * error + allowance * size)))


@pytest.mark.parametrize("name", SETTINGS)
def test_random_networks(name: str) -> None:
    assert excess(name) < 1


@pytest.mark.parametrize("name", SETTINGS)
def test_without_centring_the_comparison_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = branch_maps.AttentionMap.forward

    def wrong(self: branch_maps.AttentionMap, x: branch_maps.Moments, known: exchangeable.Attending) -> Any:
        plain = dataclasses.replace(self, branch=dataclasses.replace(self.branch, centred=False))
        return right(plain, x, known)

    monkeypatch.setattr(branch_maps.AttentionMap, "forward", wrong)
    assert excess(name) > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_that_are_not_centred_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = branch_maps.AttentionMap._uncentred_transfer
    monkeypatch.setattr(branch_maps.AttentionMap, "transfer", wrong)
    assert excess(name) > 1


def test_stacked_networks_compute_the_same() -> None:
    stack = stacked_network(network(Sublayer.pre_norm, 2, value_bias=0.3, output_bias=0.2), n_copies=2, seed=3)
    x = torch.randn(2, 3, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    together = stack(x)
    for i in range(2):
        torch.testing.assert_close(together[i], stack.single(i)(x[i]), rtol=1e-4, atol=1e-4)


# Worked numbers: sigma_v^2 = 1, sigma_w^2 = 0.2, sigma_b^2 = 4e-4, beta = 0.1, ReLU, unit skips, q = 1, p = 0.2.

N_TOKENS = 10**6
WORKED = {
    ("post", True): {100: 0.524991},
    ("pre", True): {100: 0.409638},
    ("post", False): {5: 0.892555, 20: 0.999996},
    ("pre", False): {5: 0.755969, 20: 0.949666, 100: 0.990856},
}


@pytest.mark.parametrize(("placement", "centred"), WORKED)
def test_worked_numbers(placement: str, centred: bool) -> None:
    scale = np.sqrt(0.1 * np.sqrt(np.log(N_TOKENS)))
    branch = SelfAttention(query=scale, key=scale, value=1.0, output=1.0, centred=centred)
    mlp = MLP(mlp_in=np.sqrt(0.2), mlp_out=np.sqrt(0.2), activation="relu", in_bias=0.02, out_bias=0.02, ratio=1.0)
    place = {"pre": Sublayer.pre_norm, "post": Sublayer.post_norm}[placement]
    sublayers = (place(branch, LayerNorm()), place(mlp, LayerNorm()))
    spec = Transformer(blocks=(Block(sublayers=sublayers, repeat=100),), d_model=720)
    profile = predict(spec, n_tokens=N_TOKENS, q=1.0, p=0.2, closure=RandomEnergy())
    for layer, printed in WORKED[placement, centred].items():
        assert profile.cosine[layer] == pytest.approx(printed, abs=5.1e-7)


# Descriptions.


def test_files_keep_the_flag() -> None:
    for centred in (True, False):
        spec = network(Sublayer.pre_norm, 2, centred=centred)
        assert from_dict(to_dict(spec)) == spec


def test_refusals() -> None:
    with pytest.raises(SpecError, match="a causal model would need a running mean"):
        attention(causal=True)
    with pytest.raises(SpecError, match=r"SelfAttention\.centred must be true or false; got 'yes'"):
        attention(centred="yes")
