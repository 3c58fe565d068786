"""Squared gradient norms of weight matrices: theory against random networks and a library's model.

A mean over independent weight draws must lie within ``4.5 SE + allowance`` of its prediction. The allowance is what
the theory leaves out: a quarter of sublayers / width; for queries and keys also ``n/d`` behind the first block, where
tokens have random overlaps, and ``v^2/d_head``.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fathometer.attention import DEFAULT_CLOSURE, AttentionStatistics, Closure, Exact, Uniform
from fathometer.errors import NotCoveredError, SpecError
from fathometer.measurement import measure_weight_gradients, observe
from fathometer.models import draw_weights, equiangular_tokens, reference_network
from fathometer.models.seeding import named_generator
from fathometer.observables import Gradients, jacobian, predict, weight_gradients
from fathometer.propagation.branch_maps import AttentionMap
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import (
    MLP,
    Block,
    DyT,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    Transformer,
    with_field,
)

FloatArray = NDArray[np.float64]
Z, WIDTH, Q, COSINE = 4.5, 256, 1.2, 0.4
pre, post, sandwich = Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich


def network(scores: float, **changes: Any) -> Transformer:
    """Return two blocks with sigma_QK^2 = ``scores``."""
    root = scores**0.25
    scales = Scales(query=1.2 * root, key=root / 1.2, value=1.1, output=0.9, mlp_in=0.9, mlp_out=1.1)
    arguments: dict[str, Any] = {"n_layers": 2, "d_model": WIDTH, "n_heads": 1, "norm": LayerNorm(), "scales": scales}
    return Transformer.uniform(**arguments | changes)


def alone(branch: Any, norm: Any = None, **changes: Any) -> Transformer:
    sublayer = dataclasses.replace(pre(branch, norm or LayerNorm()), **changes)
    return Transformer(blocks=(Block(sublayers=(sublayer,)),), d_model=WIDTH)


def attention(**changes: Any) -> SelfAttention:
    return SelfAttention(**({"query": 1.0, "key": 0.8, "value": 1.1, "output": 0.8} | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    spec: Transformer
    n_tokens: int = 16
    readout: str = "isotropic"
    mutants: tuple[str, ...] = ()
    draws: int = 64
    score_error: float = 0.0  # of queries and keys


GATED = Scales(query=0.8, key=0.9, value=1.0, output=1.1, mlp_in=0.9, mlp_out=1.1, gate=1.2)
BEHIND = 16 / WIDTH  # random overlaps behind the first block
SETTINGS = {
    "pre_norm_weak": Setting(spec=network(0.1), mutants=("alignment_dropped",), score_error=BEHIND),
    "pre_norm_strong": Setting(
        spec=network(3.0), mutants=("third_moments_lost", "alignment_dropped"), score_error=BEHIND
    ),
    "pre_norm_pooled": Setting(spec=network(1.0), readout="pooled", mutants=("alignment_dropped",), score_error=BEHIND),
    "post_norm_weak_pooled": Setting(
        spec=network(0.1, placement=post), readout="pooled", mutants=("alignment_dropped",), score_error=BEHIND
    ),
    "post_norm_strong": Setting(
        spec=network(3.0, placement=post, branch_scale=0.7),
        mutants=("third_moments_lost", "branch_factors_lost"),
        score_error=BEHIND,
    ),
    "many_tokens_strong": Setting(
        spec=alone(attention(query=1.5, key=1.1)), n_tokens=64, mutants=("third_moments_lost",)
    ),
    "many_tokens_strong_pooled": Setting(
        spec=alone(attention(query=1.5, key=1.1)), n_tokens=32, readout="pooled", mutants=("alignment_dropped",)
    ),
    "heads_share_keys": Setting(
        spec=alone(attention(n_heads=8, n_kv_heads=2), branch_scale=0.6),
        mutants=("branch_factors_lost",),
        score_error=0.02,
    ),
    "normalised_queries": Setting(
        spec=alone(attention(qk_norm=True, query=0.6, key=1.4), DyT(alpha=0.9, gain=1.5)), mutants=("scores_unscaled",)
    ),
    "biases_pooled": Setting(
        spec=alone(attention(value_bias=0.7, output_bias=0.4, n_heads=2, score_multiplier=0.5)),
        readout="pooled",
        mutants=("alignment_dropped",),
    ),
    "centred": Setting(spec=alone(attention(query=1.5, centred=True)), n_tokens=4, mutants=("mean_kept",)),
    "gated_sandwich": Setting(
        spec=network(1.0, scales=GATED, activation="silu", norm=RMSNorm(), placement=sandwich, branch_scale=0.8),
        mutants=("branch_factors_lost", "alignment_dropped"),
        score_error=BEHIND,
    ),
    "mlp_alone_pooled": Setting(
        spec=alone(MLP(mlp_in=1.2, mlp_out=0.8, activation="relu", in_bias=0.3, out_bias=0.2, ratio=2.0)),
        readout="pooled",
        mutants=("alignment_dropped",),
    ),
}


@cache
def simulate(name: str) -> dict[tuple[str, int], FloatArray]:
    """Return squared gradient norms of every weight draw, by role and block."""
    setting = SETTINGS[name]
    model = reference_network(setting.spec)
    rows = []
    for seed in range(setting.draws):
        draw_weights(model, seed)
        x = equiangular_tokens(
            n_tokens=setting.n_tokens, d_model=WIDTH, q=Q, p=Q * COSINE, batch=2, seed=setting.draws + seed
        )
        shape = (2, 1, WIDTH) if setting.readout == "pooled" else tuple(x.shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).expand_as(x)
        rows.append(squares(model, x, noise))
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def squares(model: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> dict[tuple[str, int], float]:
    """Return squared gradient norms of a reference network for one output gradient, by role and block."""
    names = [name for name, _ in model.named_parameters() if ".branch." in name and name.endswith(".weight")]
    weights = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(model(x), weights, noise)
    size = float(noise.double().square().mean()) * len(x)
    found = {}
    for name, gradient in zip(names, gradients, strict=True):
        found[name.split(".")[-2], int(name.split(".")[1])] = float(gradient.double().square().sum()) / size
    return found


def excess(name: str, closure: Closure = DEFAULT_CLOSURE) -> float:
    """Return the largest distance of a mean from its prediction over its tolerance."""
    setting = SETTINGS[name]
    theory = weight_gradients(
        setting.spec, n_tokens=setting.n_tokens, q=Q, p=Q * COSINE, readout=setting.readout, closure=closure
    )
    base = 0.25 * setting.spec.n_layers * len(setting.spec.blocks[0].sublayers) / WIDTH
    worst = 0.0
    found = simulate(name)
    assert {(role, int(layer)) for role in theory.logs for layer in theory.layers[role]} == set(found)
    for role, logs in theory.logs.items():
        for layer, log in zip(theory.layers[role], logs, strict=True):
            ratios = found[role, int(layer)] / np.exp(log)
            error = ratios.std(ddof=1) / np.sqrt(len(ratios))
            allowance = base + (setting.score_error if role in ("query", "key") else 0.0)
            worst = max(worst, float(np.abs(ratios.mean() - 1) / (Z * error + allowance)))
    return worst


@pytest.mark.parametrize("name", SETTINGS)
def test_random_networks(name: str) -> None:
    assert excess(name) < 1


# Wrong formulas.

MODULE = weight_gradients.__globals__


@dataclasses.dataclass(frozen=True)
class ThirdMomentsLost(Exact):
    """The weight of the scores without the terms ``-2 Y3 + Y2^2``."""

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        right = super().statistics(n_tokens, variance, correlation, entropy=entropy)
        return right._replace(score=right.y2, score_pair=right.y12)


def drop_alignment(patch: pytest.MonkeyPatch) -> None:
    def wrong(transfer: FloatArray, *, alignment: float) -> Gradients:
        right = jacobian.backward(transfer, alignment=alignment)
        return dataclasses.replace(right, alignment=0.0 * right.alignment)

    patch.setitem(MODULE, "backward", wrong)


def lose_branch_factors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HalfLayer, "at_branch", lambda self, record, own, shared: (own, shared))


def keep_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionMap, "before_centring", lambda self, own, shared: (own, shared))


def unscale_scores(patch: pytest.MonkeyPatch) -> None:
    """Forget that normalised queries divide their gradients by the scale of their weights."""
    right = MODULE["_attention_norms"]

    def wrong(branch_map: AttentionMap, *arguments: Any) -> dict[str, Any]:
        plain = dataclasses.replace(branch_map.branch, query=1.0, key=1.0)
        return right(dataclasses.replace(branch_map, branch=plain), *arguments)  # type: ignore[no-any-return]

    patch.setitem(MODULE, "_attention_norms", wrong)


MUTANTS = {
    "alignment_dropped": drop_alignment,
    "branch_factors_lost": lose_branch_factors,
    "mean_kept": keep_mean,
    "scores_unscaled": unscale_scores,
}


@pytest.mark.parametrize(("name", "mutant"), [(name, m) for name, s in SETTINGS.items() for m in s.mutants])
def test_a_wrong_formula_fails(name: str, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "third_moments_lost":
        assert excess(name, ThirdMomentsLost()) > 1
        return
    MUTANTS[mutant](monkeypatch)
    assert excess(name) > 1


# The prediction.


def test_a_grid_is_its_points() -> None:
    spec = network(1.0)
    values, multipliers = np.array([0.5, 1.0, 1.5]), np.array([[0.3], [1.0]])
    grid = with_field(with_field(spec, "value", values), "score_multiplier", multipliers)
    whole = weight_gradients(grid, n_tokens=12, q=Q, p=0.3)
    for i, value in enumerate(values):
        for j, multiplier in enumerate(multipliers[:, 0]):
            point = with_field(with_field(spec, "value", value), "score_multiplier", multiplier)
            single = weight_gradients(point, n_tokens=12, q=Q, p=0.3)
            for role, logs in single.logs.items():
                np.testing.assert_allclose(np.broadcast_to(whole.logs[role], (2, 2, 3))[:, j, i], logs, atol=1e-12)


def test_blocks_of_several_kinds_are_in_order() -> None:
    mlp = MLP(mlp_in=0.9, mlp_out=1.1)
    gated = GatedMLP(gate=1.0, mlp_in=0.9, mlp_out=1.1)
    first = Block(sublayers=(pre(attention(), LayerNorm()), pre(mlp, LayerNorm()), pre(gated, LayerNorm())), repeat=2)
    second = Block(sublayers=(pre(mlp, LayerNorm()),), repeat=2)
    found = weight_gradients(Transformer(blocks=(first, second), d_model=64), n_tokens=8, q=1.0, p=0.3)
    assert found.layers["query"].tolist() == [0, 1]
    assert found.layers["gate"].tolist() == [0, 1]
    assert found.layers["mlp_in"].tolist() == [0, 0, 1, 1, 2, 3]
    assert found.logs["mlp_in"].shape == (6,)


def test_nothing_arrives_through_scores_that_carry_no_gradient() -> None:
    spec = network(1.0)
    for options in ({"p": 0.3, "closure": Uniform()}, {"p": 1.0}):
        found = weight_gradients(spec, n_tokens=8, q=1.0, **options)
        assert np.all(np.isneginf(found.logs["query"])) and np.all(np.isneginf(found.logs["key"]))
        assert np.all(np.isfinite(found.logs["value"]))


def test_one_token() -> None:
    branch = attention(value_bias=0.5)
    found = weight_gradients(alone(branch), n_tokens=1, q=2.0, p=0.0, readout="pooled")
    assert float(found.logs["value"][0]) == pytest.approx(np.log(WIDTH**2 * branch.output**2))
    assert float(found.logs["output"][0]) == pytest.approx(np.log(WIDTH**2 * (branch.value**2 + 0.25)))


def test_depth_neither_overflows_nor_vanishes() -> None:
    found = weight_gradients(
        network(0.1, n_layers=3000, norm=RMSNorm(gain=2.0), placement=post), n_tokens=8, q=1.0, p=0.3
    )
    assert all(np.all(np.isfinite(found.logs[role])) for role in ("value", "output", "mlp_in", "mlp_out"))


def test_refusals() -> None:
    with pytest.raises(NotCoveredError, match="under a causal mask"):
        weight_gradients(network(1.0, causal=True), n_tokens=8, q=1.0, p=0.3)
    with pytest.raises(SpecError, match="no read-out 'pool'; did you mean 'pooled'"):
        weight_gradients(network(1.0), n_tokens=8, q=1.0, p=0.3, readout="pool")
    with pytest.raises(SpecError, match="no read-out 'one-token'"):
        measure_weight_gradients(nn.Identity(), torch.ones(1), readout="one-token")


# The measurement.


@pytest.mark.parametrize("readout", ["isotropic", "pooled"])
def test_the_measurement_is_the_gradient(readout: str) -> None:
    model = reference_network(network(1.0, n_heads=4, placement=post))
    x = equiangular_tokens(n_tokens=8, d_model=WIDTH, q=Q, p=0.5, batch=3)
    found = measure_weight_gradients(model, x, seeds=1, readout=readout)
    shape = (3, 1, WIDTH) if readout == "pooled" else tuple(x.shape)
    noise = torch.randn(shape, generator=named_generator(0, "cotangent")).expand_as(x)
    wanted = squares(model, x, noise)
    for role, logs in found.logs.items():
        np.testing.assert_allclose(logs, [np.log(wanted[role, i]) for i in found.layers[role]], atol=1e-4)
        assert np.all(np.isnan(found.errors[role]))


def test_the_model_is_left_alone_and_draws_repeat() -> None:
    model = reference_network(network(1.0, d_model=32))
    model.requires_grad_(False)
    kept = model.get_parameter("blocks.0.sublayers.0.branch.query.weight")
    kept.grad = torch.ones_like(kept)
    x = equiangular_tokens(n_tokens=8, d_model=32, q=Q, p=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (measure_weight_gradients(model, x, seeds=3) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "blocks.0.sublayers.0.branch.query.weight"
    ]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    for role in first.logs:
        np.testing.assert_array_equal(first.draws[role], second.draws[role])
    assert first.draws["mlp_in"].shape == (3, 2)


def test_one_fused_matrix_of_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for weight in model.parameters():  # the layers are copies of each other
        if weight.ndim == 2:
            nn.init.normal_(weight, std=1 / WIDTH**0.5)
    x = equiangular_tokens(n_tokens=12, d_model=WIDTH, q=1.0, p=0.4, batch=2)
    check_model(model, x, n_tokens=12, seeds=24)


def test_a_library_model() -> None:
    import transformers

    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=400, num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=2 * WIDTH
    )
    model: Any = transformers.BertModel(config)
    batch = {"input_ids": torch.randperm(400)[:32].view(2, 16)}  # all different, so that tokens are alike
    for readout in ("isotropic", "pooled"):
        check_model(model, batch, n_tokens=16, seeds=24, readout=readout)


def check_model(model: nn.Module, batch: Any, *, n_tokens: int, seeds: int, readout: str = "isotropic") -> None:
    """Compare a measured model with the theory of its reading."""
    found = measure_weight_gradients(model, batch, seeds=seeds, readout=readout)
    seen = observe(model, batch, seeds=1)
    assert seen.reading is not None
    profile = predict(seen.reading.spec, gram=seen.gram)
    start: dict[str, Any] = {"n_tokens": n_tokens, "q": float(profile.q[0]), "p": float(profile.p[0])}
    theory = weight_gradients(seen.reading.spec, readout=readout, **start)
    assert set(found.logs) == set(theory.logs)
    for role, logs in theory.logs.items():
        # Tokens of the model have random overlaps from the first block on.
        allowance = 0.25 * 4 / WIDTH + (1.5 * n_tokens / WIDTH if role in ("query", "key") else 0.0)
        np.testing.assert_array_equal(found.layers[role], theory.layers[role])
        ratio = np.exp(found.logs[role] - logs) - 1
        assert np.all(np.abs(ratio) < Z * found.errors[role] + allowance), (role, ratio, found.errors[role])
        assert np.all(found.errors[role] < 0.1)
