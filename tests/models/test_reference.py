"""Networks built from a spec: their weights, names, numerics and refusals."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.models import draw_weights, equiangular_tokens, reference_network, tokens_with_gram
from fathometer.models.reference import activation_module, norm_module, weight_stds
from fathometer.spec import (
    ACTIVATIONS,
    MLP,
    Block,
    Derf,
    DyT,
    GatedMLP,
    LayerNorm,
    Norm,
    Pointwise,
    PointwiseNorm,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    Transformer,
    with_field,
)

SCALES = Scales(query=0.5, key=0.6, value=0.7, output=0.8, mlp_in=0.9, mlp_out=1.1)
SINE = Pointwise(name="sine", value=np.sin, derivative=np.cos)


def build(**changes: Any) -> Transformer:
    arguments: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "norm": LayerNorm(),
        "scales": SCALES,
    } | changes
    return Transformer.uniform(**arguments)


def one(branch: Any) -> Transformer:
    return Transformer(blocks=(Block(sublayers=(Sublayer(branch=branch),)),), d_model=64)


def branch_of(model: nn.Module, number: int = 0) -> Any:
    """Return the branch of a sublayer of the first block."""
    return model.get_submodule(f"blocks.0.sublayers.{number}.branch")


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Weights.


def test_parameters_are_named_after_their_scales() -> None:
    assert set(parameters(reference_network(build(n_layers=1)))) == {
        "blocks.0.sublayers.0.input_norm.weight",
        "blocks.0.sublayers.0.branch.query.weight",
        "blocks.0.sublayers.0.branch.key.weight",
        "blocks.0.sublayers.0.branch.value.weight",
        "blocks.0.sublayers.0.branch.output.weight",
        "blocks.0.sublayers.1.input_norm.weight",
        "blocks.0.sublayers.1.branch.mlp_in.weight",
        "blocks.0.sublayers.1.branch.mlp_out.weight",
    }


@pytest.mark.parametrize(
    "branch",
    [
        SelfAttention(query=0.5, key=0.6, value=0.7, output=0.8, value_bias=0.3, output_bias=0.4, n_heads=4),
        SelfAttention(query=0.5, key=0.6, value=0.7, output=0.8, n_heads=4, n_kv_heads=2),
        MLP(mlp_in=0.9, mlp_out=1.1, in_bias=0.2, out_bias=0.3),
        GatedMLP(gate=1.2, mlp_in=0.9, mlp_out=1.1, ratio=2.5),
    ],
)
def test_weights_have_their_standard_deviations(branch: Any) -> None:
    drawn = []
    for name, parameter, std in weight_stds(reference_network(one(branch), seed=3)):
        drawn.append(name.removeprefix("blocks.0.sublayers.0.branch."))
        values = parameter.detach().double()
        field, kind = drawn[-1].split(".")
        if kind == "weight":
            fan_in = 160 if isinstance(branch, GatedMLP) and field == "mlp_out" else parameter.shape[1]
            assert std == pytest.approx(getattr(branch, field) / fan_in**0.5)
        # five standard errors of a standard deviation and of a mean
        assert float(values.square().mean().sqrt()) == pytest.approx(std, rel=5 / (2 * values.numel()) ** 0.5)
        assert abs(float(values.mean())) < 5 * std / values.numel() ** 0.5
    biases = [name for name in ("value", "output", "in", "out") if getattr(branch, f"{name}_bias", 0.0) > 0]
    assert len(drawn) == len(branch.scale_names) + len(biases)


def test_biases_are_as_declared() -> None:
    branch = MLP(mlp_in=0.9, mlp_out=1.1, in_bias=0.2, out_bias=0.0)
    stds = {name.rsplit("branch.")[-1]: std for name, _, std in weight_stds(reference_network(one(branch)))}
    assert stds["mlp_in.bias"] == 0.2
    assert "mlp_out.bias" not in stds


@pytest.mark.parametrize("norm", [LayerNorm(gain=1.3), RMSNorm(gain=1.3), DyT(alpha=0.7, gain=1.3)])
def test_norms_carry_their_numbers(norm: Norm) -> None:
    found = parameters(reference_network(build(norm=norm)))
    assert torch.all(found["blocks.1.sublayers.0.input_norm.weight"] == torch.tensor(1.3))
    if isinstance(norm, DyT):
        assert float(found["blocks.1.sublayers.0.input_norm.alpha"]) == pytest.approx(0.7)


def test_layers_differ_by_their_spec_and_their_draw() -> None:
    first, second = build(n_layers=1), build(n_layers=2, scales=dataclasses.replace(SCALES, query=5.0))
    spec = Transformer(blocks=first.blocks + second.blocks, d_model=64)
    found = parameters(reference_network(spec))
    queries = [found[f"blocks.{layer}.sublayers.0.branch.query.weight"] for layer in range(3)]
    assert float(queries[0].std()) == pytest.approx(0.5 / 8, rel=0.06)
    assert float(queries[1].std()) == pytest.approx(5.0 / 8, rel=0.06)
    assert not torch.equal(queries[1], queries[2])


# Randomness.


def test_a_draw_depends_on_seed_and_name_only() -> None:
    model = reference_network(build(), seed=5)
    before = parameters(model)
    draw_weights(model, 6)
    assert not torch.equal(before["blocks.0.sublayers.0.branch.key.weight"], branch_of(model).key.weight)
    draw_weights(model, 5)
    deeper = parameters(reference_network(build(n_layers=7), seed=5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter, deeper[name])


def test_weights_of_different_matrices_are_unrelated() -> None:
    found = parameters(reference_network(build()))
    matrices = [w.flatten() for name, w in found.items() if name.endswith((".query.weight", ".key.weight"))]
    correlations = torch.corrcoef(torch.stack(matrices)) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / 64


def test_the_first_weights_never_change() -> None:
    """A seed names a network for ever: published results depend on it."""
    weight = branch_of(reference_network(one(MLP(mlp_in=1.0, mlp_out=1.0)), seed=0)).mlp_in.weight
    assert weight[0, :3].tolist() == pytest.approx([-0.01460763, -0.08582724, -0.08477836], rel=1e-5)


def test_global_randomness_is_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    model = reference_network(build(), seed=4)
    draw_weights(model, 5)
    equiangular_tokens(n_tokens=4, d_model=64, q=1.0, p=0.5, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


def test_precision_changes_the_type_and_not_the_draw() -> None:
    single, double = (reference_network(build(), seed=2, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for one_parameter, other in zip(single.parameters(), double.parameters(), strict=True):
        assert other.dtype == torch.float64
        torch.testing.assert_close(one_parameter.double(), other, rtol=1e-6, atol=0)


def test_a_thousand_layers_are_built_in_seconds() -> None:
    start = time.perf_counter()
    assert len(reference_network(build(n_layers=1000, d_model=16)).blocks) == 1000
    assert time.perf_counter() - start < 60


# What the network computes.


@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich])
def test_a_block_is_its_equation(placement: Any) -> None:
    spec = build(n_layers=1, placement=placement, skip_scale=0.7, branch_scale=1.3, norm=Derf(alpha=0.5, shift=0.1))
    model = reference_network(spec, dtype=torch.float64)
    x = equiangular_tokens(n_tokens=5, d_model=64, q=1.0, p=0.3, batch=2, dtype=torch.float64)
    stream = x
    for number, sublayer in enumerate(spec.blocks[0].sublayers):
        norms = {
            slot: (lambda t: torch.erf(0.5 * t + 0.1)) if getattr(sublayer, slot) else (lambda t: t)
            for slot in ("input_norm", "output_norm", "stream_norm")
        }
        added = norms["output_norm"](branch_of(model, number)(norms["input_norm"](stream)))
        stream = norms["stream_norm"](0.7 * stream + 1.3 * added)
    torch.testing.assert_close(model(x), stream, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_its_formula(qk_norm: bool, causal: bool, n_kv_heads: int | None) -> None:
    branch = SelfAttention(
        query=2.0, key=2.0, value=1.0, output=1.0, n_heads=4, n_kv_heads=n_kv_heads, causal=causal,
        score_multiplier=0.7, qk_norm=qk_norm,
    )  # fmt: skip
    module = branch_of(reference_network(one(branch), dtype=torch.float64))
    x = torch.randn(1, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = []
    for head in range(4):
        group = head // (4 // (n_kv_heads or 4))
        rows, grouped = slice(16 * head, 16 * head + 16), slice(16 * group, 16 * group + 16)
        q, k, v = (
            x[0] @ m.weight[s].T for m, s in ((module.query, rows), (module.key, grouped), (module.value, grouped))
        )
        if qk_norm:
            q, k = (t / t.square().mean(-1, keepdim=True).sqrt() for t in (q, k))
        scores = 0.7 * q @ k.T / 4
        if causal:
            scores = scores.masked_fill(torch.triu(torch.ones(6, 6, dtype=torch.bool), 1), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v)
    torch.testing.assert_close(module(x)[0], torch.cat(heads, -1) @ module.output.weight.T, rtol=1e-9, atol=1e-9)


def test_gated_mlp_is_its_formula() -> None:
    module = branch_of(reference_network(one(GatedMLP(gate=1.0, mlp_in=1.0, mlp_out=1.0))))
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    wanted = module.mlp_out(torch.nn.functional.silu(module.gate(x)) * module.mlp_in(x))
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_a_module(activation: str) -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    wanted = {
        "relu": x.clamp(min=0),
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "gelu_tanh": x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "silu": x / (1 + torch.exp(-x)),
        "tanh": torch.tanh(x),
        "erf": torch.erf(x),
        "identity": x,
    }
    torch.testing.assert_close(activation_module(activation)(x), wanted[activation], rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter() -> None:
    spec = build(norm=DyT(alpha=0.5), scales=dataclasses.replace(SCALES, gate=1.0), activation="erf")
    model = reference_network(spec)
    model(equiangular_tokens(n_tokens=4, d_model=64, q=1.0, p=0.2)).square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


# Refusals.


def test_grids_are_refused_by_name() -> None:
    spec = with_field(build(), "mlp_in", np.array([0.1, 0.2]))
    with pytest.raises(
        SpecError, match=r"spec\.blocks\[0\]\.sublayers\[1\]\.branch\.mlp_in is an array of shape \(2,\)"
    ):
        reference_network(spec)


def test_numpy_functions_are_refused_by_name() -> None:
    with pytest.raises(NotCoveredError, match="the function 'sine' is given in numpy"):
        reference_network(build(activation=SINE))
    with pytest.raises(NotCoveredError, match="networks need a named activation or norm"):
        norm_module(PointwiseNorm(function=SINE), 64)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="d_model must be a multiple of n_heads; got 64 and 5"):
        reference_network(one(SelfAttention(query=1, key=1, value=1, output=1, n_heads=5)))


# Tokens.


@pytest.mark.parametrize(("q", "p"), [(1.0, 0.5), (0.3, 0.3), (2.0, -0.25), (1.0, 0.0)])
def test_equiangular_tokens_have_exact_moments(q: float, p: float) -> None:
    tokens = equiangular_tokens(n_tokens=9, d_model=16, q=q, p=p, batch=3, seed=7, dtype=torch.float64)
    wanted = torch.full((3, 9, 9), p, dtype=torch.float64)
    wanted[:, range(9), range(9)] = q
    torch.testing.assert_close(tokens @ tokens.mT / 16, wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(tokens[0], tokens[1])


def test_tokens_take_any_gram_matrix() -> None:
    factor = np.random.default_rng(0).normal(size=(5, 3))
    gram = factor @ factor.T
    tokens = tokens_with_gram(gram, d_model=8, dtype=torch.float64)
    np.testing.assert_allclose((tokens @ tokens.mT / 8)[0], gram, atol=1e-7)


def test_directions_of_tokens_are_uniform() -> None:
    tokens = equiangular_tokens(n_tokens=2, d_model=4, q=1.0, p=0.0, batch=4000, seed=1)
    assert float(tokens.mean(0).abs().max()) < 5 / 4000**0.5
    np.testing.assert_allclose(tokens.square().mean(0), 1.0, atol=5 * 2**0.5 / 4000**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_tokens": 9, "d_model": 8, "q": 1.0, "p": 0.5}, "needs d_model >= n_tokens; got d_model=8 and n_tokens=9"),
        ({"n_tokens": 3, "d_model": 8, "q": 1.0, "p": 1.5}, r"lowest eigenvalue is -0\.5"),
        ({"n_tokens": 3, "d_model": 8, "q": 1.0, "p": -0.6}, r"p must lie in \[-q/\(n_tokens-1\), q\]"),
    ],
)
def test_impossible_tokens_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        equiangular_tokens(**arguments)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones(3), r"gram must have shape \(n_tokens, n_tokens\); got \(3,\)"),
        (np.array([[1.0, 0.5], [0.1, 1.0]]), "must be symmetric and positive semidefinite"),
    ],
)
def test_matrices_that_are_no_gram_matrix_are_refused(gram: Any, message: str) -> None:
    with pytest.raises(DomainError, match=message):
        tokens_with_gram(gram, d_model=8)
