"""Stacked networks: each computes what a reference network computes, and knows nothing of the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fathometer.errors import BatchError, DomainError, NotCoveredError, SpecError
from fathometer.models import reference_network, stacked_network
from fathometer.spec import (
    ACTIVATIONS,
    MLP,
    Block,
    Derf,
    DyT,
    GatedMLP,
    LayerNorm,
    Pointwise,
    PointwiseNorm,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    Transformer,
    with_field,
)

D = 16
ROW, COLUMN = np.array([0.5, 1.0, 1.4]), np.array([[0.8], [1.3]])
SCALES = Scales(query=1.2, key=0.9, value=ROW, output=0.8, mlp_in=COLUMN, mlp_out=1.1)
SINE = Pointwise(name="sine", value=np.sin, derivative=np.cos)


def build(**changes: Any) -> Transformer:
    arguments: dict[str, Any] = {"n_layers": 2, "d_model": D, "n_heads": 2, "norm": LayerNorm(), "scales": SCALES}
    return Transformer.uniform(**arguments | changes)


def one(*branches: Any, **changes: Any) -> Transformer:
    return Transformer(
        blocks=(Block(sublayers=tuple(Sublayer(branch=branch, **changes) for branch in branches)),), d_model=D
    )


def attention(**changes: Any) -> SelfAttention:
    arguments: dict[str, Any] = {"query": 1.2, "key": 1.1, "value": ROW, "output": 0.8, "n_heads": 4}
    return SelfAttention(**arguments | changes)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


SPECS = {
    "layer norm, causal": build(norm=LayerNorm(gain=COLUMN), causal=True),
    "rms norm, post": build(norm=RMSNorm(gain=ROW), placement=Sublayer.post_norm, skip_scale=COLUMN),
    "dyt, sandwich": build(norm=DyT(alpha=ROW, gain=1.2), placement=Sublayer.sandwich, branch_scale=0.5),
    "derf, post, causal": build(norm=Derf(alpha=0.7, shift=COLUMN), placement=Sublayer.post_norm, causal=True),
    "derf, scaled residuals": build(norm=Derf(alpha=ROW, shift=-0.1), skip_scale=ROW, branch_scale=COLUMN),
    "gated, no norm": build(norm=None, scales=dataclasses.replace(SCALES, gate=COLUMN), ratio=2.5),
    "biases, some zero": one(
        attention(value_bias=0.3, output_bias=np.array([[0.0], [0.4]])),
        MLP(mlp_in=0.9, mlp_out=1.1, in_bias=0.3 * ROW, out_bias=np.array([[0.5], [0.0]]), activation="silu"),
        input_norm=RMSNorm(),
    ),
    "scores": one(attention(score_multiplier=3 * ROW, qk_norm=True, causal=True), attention(score_multiplier=COLUMN)),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_network_is_its_reference_network(name: str) -> None:
    spec = SPECS[name]
    model = stacked_network(spec, n_copies=2, seed=3)
    assert model.grid_shape in {(2, 3), (3,)} and model.n_networks == 2 * int(np.prod(model.grid_shape))
    x = torch.randn(model.n_networks, 3, 5, D, generator=torch.Generator().manual_seed(0))
    out = model(x)
    for index in range(model.n_networks):
        largest = max(1.0, float(out[index].detach().abs().max()))
        torch.testing.assert_close(model.single(index)(x[index]), out[index], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("name", SPECS)
def test_every_gradient_is_that_of_the_reference_network(name: str) -> None:
    model = stacked_network(SPECS[name], seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(model.n_networks, 2, 5, D, dtype=torch.float64, generator=generator).requires_grad_()
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    model(x).backward(cotangent)
    assert x.grad is not None
    index = model.n_networks - 2
    network, y = model.single(index), x.detach()[index].clone().requires_grad_()
    network(y).backward(cotangent[index])
    torch.testing.assert_close(x.grad[index], y.grad, rtol=1e-9, atol=1e-10)
    found = dict(network.named_parameters())
    checked = 0
    for prefix, module in model.named_modules():
        for part_name, part in module.named_parameters(recurse=False):
            gradient = part.grad
            assert gradient is not None
            if part_name == "inward":
                fields = module.branch.scale_names[:-1]
                rows = [found[f"{prefix}.{field}.weight"].grad for field in fields]
                torch.testing.assert_close(gradient[index], torch.cat(rows), rtol=1e-9, atol=1e-10)
            else:
                last = module.branch.scale_names[-1] if hasattr(module, "branch") else ""
                inner = module.branch.scale_names[-2] if hasattr(module, "branch") else ""
                renamed = {"outward": f"{last}.weight", "outer_bias": f"{last}.bias", "inner_bias": f"{inner}.bias"}
                single = found.get(f"{prefix}.{renamed.get(part_name, part_name)}")
                if single is None:  # a bias that this network has not
                    assert not gradient[index].any()
                    continue
                assert single.grad is not None
                torch.testing.assert_close(gradient[index].flatten(), single.grad.flatten(), rtol=1e-9, atol=1e-10)
            checked += 1
    assert checked >= len(model.blocks) * 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation(activation: str, gated: bool) -> None:
    branch: Any = (
        GatedMLP(gate=0.7, mlp_in=COLUMN, mlp_out=1.1, activation=activation)
        if gated
        else MLP(mlp_in=COLUMN, mlp_out=1.1, activation=activation)
    )
    model = stacked_network(one(branch))
    x = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0))
    for index in range(2):
        torch.testing.assert_close(model.single(index)(x[index : index + 1])[0], model(x)[index], rtol=1e-5, atol=1e-5)


def test_tokens_with_and_without_a_batch_axis_agree() -> None:
    model = stacked_network(SPECS["layer norm, causal"])
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x.repeat(3, 1, 1)[:6]), model(x.repeat(3, 1, 1)[:6, None])[:, 0])
    shared = x[:1].expand(model.n_networks, -1, -1)
    assert len({tuple(row.flatten()[:3].tolist()) for row in model(shared)}) == model.n_networks


# Weights.


def test_one_network_is_the_reference_network_of_its_seed() -> None:
    spec = build(scales=Scales(query=1, key=2, value=3, output=4, mlp_in=5, mlp_out=6))
    stacked, single = weights(stacked_network(spec, seed=7).single(0)), weights(reference_network(spec, seed=7))
    assert all(torch.equal(stacked[name], parameter) for name, parameter in single.items())


def test_weights_have_the_standard_deviation_of_their_grid_point() -> None:
    spec = with_field(build(n_layers=1), "mlp_out", np.array([[0.3], [2.0]]))
    model = stacked_network(spec, n_copies=20, seed=2)
    assert (model.grid_shape, model.n_networks) == ((2, 3), 120)
    for index in (0, 19, 20, 59, 60, 119):  # grid points (0, 0), (0, 0), (0, 1), (0, 2), (1, 0), (1, 2)
        row, column = divmod(index // 20, 3)
        found = weights(model.single(index))
        for name, scale, fan_in in (
            ("0.branch.value", float(ROW[column]), 16),
            ("1.branch.mlp_in", float(COLUMN[row, 0]), 16),
            ("1.branch.mlp_out", (0.3, 2.0)[row], 64),
        ):
            weight = found[f"blocks.0.sublayers.{name}.weight"]
            wanted = scale / fan_in**0.5
            assert float(weight.square().mean().sqrt()) == pytest.approx(wanted, rel=5 / (2 * weight.numel()) ** 0.5)


def test_copies_layers_and_seeds_differ_and_a_draw_repeats() -> None:
    spec = build()
    first, again, other = (stacked_network(spec, n_copies=2, seed=seed) for seed in (0, 0, 1))
    name = "blocks.0.sublayers.1.branch.inward"
    drawn = weights(first)[name]
    assert torch.equal(drawn, weights(again)[name])
    for unrelated in (weights(other)[name], weights(first)[name.replace("blocks.0", "blocks.1")], drawn.roll(1, 0)):
        assert abs(float(torch.corrcoef(torch.stack((drawn.flatten(), unrelated.flatten())))[0, 1])) < 0.05
    other.draw(0)
    assert torch.equal(drawn, weights(other)[name])


def test_precision_and_global_randomness() -> None:
    state = torch.get_rng_state()
    single, double = (stacked_network(build(), seed=2, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in weights(single).items():
        torch.testing.assert_close(parameter.double(), weights(double)[name], rtol=1e-6, atol=0)


# Independence.


@pytest.mark.parametrize("name", ["layer norm, causal", "scores"])
def test_a_network_depends_on_its_own_weights_only(name: str) -> None:
    model = stacked_network(SPECS[name])
    x = torch.randn(model.n_networks, 5, D, generator=torch.Generator().manual_seed(0))
    before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[1] = torch.nan
    after = model(x)
    others = [index for index in range(model.n_networks) if index != 1]
    assert torch.equal(before[others], after[others])
    assert after[1].isnan().all()


# Refusals.


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            with_field(build(), "query", np.ones(5)),
            SpecError,
            r"broadcast to one grid; got .*query \(5,\), .*value \(3",
        ),
        (with_field(build(), "value", np.ones(0)), SpecError, r"must not be empty; got the shape \(2, 0\)"),
        (one(MLP(mlp_in=1, mlp_out=1, ratio=ROW)), SpecError, r"need one width; .*branch\.ratio is an array"),  # type: ignore[arg-type]
        (one(attention(n_heads=5)), SpecError, "d_model must be a multiple of n_heads; got 16 and 5"),
        (one(attention(n_kv_heads=2)), NotCoveredError, "as many key as query heads"),
        (build(activation=SINE), NotCoveredError, "the function 'sine' is given in numpy"),
        (build(norm=PointwiseNorm(function=SINE)), NotCoveredError, "networks need a named activation or norm"),
    ],
)
def test_what_cannot_be_stacked_is_refused(spec: Transformer, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stacked_network(spec)


@pytest.mark.parametrize("n_copies", [0, 2.0, True])
def test_copies_are_counted(n_copies: Any) -> None:
    with pytest.raises(DomainError, match="n_copies must be a positive integer"):
        stacked_network(build(), n_copies=n_copies)


@pytest.mark.parametrize("shape", [(5, 4, D), (6, 4, D + 1), (6, D), (6, 1, 1, 4, D), (6, 0, D)])
def test_tokens_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BatchError, match=r"expected tokens of shape \(6, n_tokens, 16\) or \(6, batch, n_tokens, 16\)"):
        stacked_network(build())(torch.zeros(shape))


def test_networks_out_of_range_are_refused() -> None:
    model = stacked_network(build())
    for index in (-1, 6):
        with pytest.raises(DomainError, match=r"index must lie in \[0, 5\]"):
            model.single(index)


def test_second_gradients_are_refused() -> None:
    model = stacked_network(build())
    x = torch.randn(6, 4, D).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
