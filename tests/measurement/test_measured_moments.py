"""Moments of components measured in real modules, against theory and against naive autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fathometer.errors import DomainError, ModelError, NotCoveredError
from fathometer.measurement.measure import observe
from fathometer.measurement.moments import measure_moments
from fathometer.models import equiangular_tokens, reference_network
from fathometer.models.seeding import named_generator
from fathometer.observables.model_moments import moments
from fathometer.spec import Block, LayerNorm, RMSNorm, Scales, SelfAttention, Sublayer, Transformer

Z, DRAWS = 4.5, 40
#: Finite-width allowance per block and for tokens that overlap at random: ``(n_tokens + 4)/d_model`` of a number.
WIDTH, TOKENS = 256, 12
BIAS = (TOKENS + 4) / WIDTH

SCALES = {"query": 1.0, "key": 1.0, "value": 1.0, "output": 1.1, "mlp_in": 1.2, "mlp_out": 0.9}
NETWORKS = {
    "pre": {"norm": LayerNorm(), "activation": "relu", "skip_scale": 0.9, "branch_scale": 0.6},
    "post": {"norm": LayerNorm(), "activation": "gelu", "placement": Sublayer.post_norm},
    "sandwich": {"norm": RMSNorm(), "activation": "silu", "placement": Sublayer.sandwich, "gate": 1.1},
    "grouped": {"norm": RMSNorm(), "activation": "tanh", "n_kv_heads": 1},
}


def network(gate=None, **given) -> Transformer:
    scales = Scales(**SCALES, gate=gate)
    return Transformer.uniform(n_layers=2, d_model=WIDTH, n_heads=4, scales=scales, **given)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_component_is_as_predicted(name: str) -> None:
    """The largest gap allowed stays below what a factor of two would make."""
    spec = network(**NETWORKS[name])
    tokens = equiangular_tokens(n_tokens=TOKENS, d_model=WIDTH, q=1.0, p=0.3)
    found = measure_moments(reference_network(spec), tokens, seeds=DRAWS, top_alignment=0.3)
    theory = moments(spec, n_tokens=TOKENS, q=1.0, p=0.3, top_alignment=0.3)
    assert list(found.components) == list(theory.components)
    wrong = []
    for place, seen in found.components.items():
        wanted = theory[place]
        for quantity in ("mean", "q", "p", "gradient_log", "gradient_alignment"):
            value, expected = getattr(seen, quantity), getattr(wanted, quantity)
            unit = {"mean": np.sqrt(wanted.q), "q": wanted.q, "p": wanted.q}.get(quantity, np.ones_like(value))
            allowed = Z * seen.errors[quantity] + BIAS * unit
            known = np.isfinite(value)
            assert known.all() or place.endswith(("scores", "weights"))
            bad = np.flatnonzero(known & ~(np.abs(value - expected) <= allowed))
            wrong += [(place, quantity, int(i), value[i], expected[i], allowed[i]) for i in bad]
            largest = {"gradient_log": 0.45}.get(quantity, 0.5)
            assert np.all((allowed / unit)[known] < largest), (place, quantity, allowed / unit)
    assert wrong == []


def test_one_draw_is_what_autograd_gives() -> None:
    spec = network(**NETWORKS["pre"])
    model = reference_network(spec, dtype=torch.float64)
    tokens = equiangular_tokens(n_tokens=TOKENS, d_model=WIDTH, q=1.0, p=0.3, dtype=torch.float64)
    found = measure_moments(model, tokens, seeds=1, seed=3)
    kept: dict[str, torch.Tensor] = {}
    mlp = model.blocks[0].sublayers[1]
    for name, module in (("mlp_in", mlp.branch.mlp_in), ("activation", mlp.branch.activation)):
        module.register_forward_hook(lambda m, a, out, name=name: kept.update({name: out}))
    out = model(tokens.requires_grad_())
    generator = named_generator(3, "cotangent")
    cotangent = torch.randn(out.shape, generator=generator).double()
    gradients = torch.autograd.grad(out, list(kept.values()), cotangent)
    for (name, tensor), gradient in zip(kept.items(), gradients, strict=True):
        seen = found[f"mlp.{name}"]
        assert seen.q[0] == pytest.approx(float(tensor.detach().square().mean()), rel=1e-9)
        assert seen.mean[0] == pytest.approx(float(tensor.detach().mean()), rel=1e-9)
        relative = float(gradient.square().mean() / cotangent.square().mean())
        assert np.exp(seen.gradient_log[0]) == pytest.approx(relative, rel=1e-9)
        total = gradient[0].sum(0).square().sum() - gradient[0].square().sum()
        shared = float(total / (TOKENS * (TOKENS - 1) * gradient.shape[-1]) / gradient.square().mean())
        assert seen.gradient_alignment[0] == pytest.approx(shared, rel=1e-9)
    assert not found["mlp.mlp_in"].errors


def test_gradients_of_scores_and_weights() -> None:
    """No module of a network puts them out, so attention with dropout is written down."""
    n, d, heads, rate, draws = 12, 256, 2, 0.2, 60
    scales = {"query": 1.3, "key": 1.1, "value": 0.8, "output": 1.2, "value_bias": 0.5}
    branch = SelfAttention(**scales, n_heads=heads, attention_dropout=rate)
    spec = Transformer(blocks=(Block(sublayers=(Sublayer(branch=branch, skip_scale=0.0),)),), d_model=d)
    theory = moments(spec, n_tokens=n, q=1.0, p=0.3, top_alignment=0.4)
    random, rows = torch.Generator().manual_seed(0), []
    for seed in range(draws):
        x = equiangular_tokens(n_tokens=n, d_model=d, q=1.0, p=0.3, seed=seed, dtype=torch.float64)[0]
        matrices = {
            name: torch.randn(d, d, generator=random, dtype=torch.float64) * scales[name] / d**0.5
            for name in ("query", "key", "value", "output")
        }
        q, k, v = (x @ matrices[name].T for name in ("query", "key", "value"))
        v = v + scales["value_bias"] * torch.randn(d, generator=random, dtype=torch.float64)
        q, k, v = (t.view(n, heads, -1).transpose(0, 1) for t in (q, k, v))
        scores = (q @ k.mT / (d / heads) ** 0.5).requires_grad_()
        kept = torch.rand(heads, n, n, generator=random, dtype=torch.float64) >= rate
        weights = scores.softmax(-1) * kept / (1 - rate)
        out = (weights @ v).transpose(0, 1).reshape(n, d) @ matrices["output"].T
        own, shared = torch.randn(n, d, generator=random), torch.randn(1, d, generator=random)
        gradient = (0.6**0.5 * own + 0.4**0.5 * shared).double()
        found = torch.autograd.grad(out, [scores, weights], gradient)
        row = [float(t.detach().square().mean()) for t in (scores, weights)]
        for g in found:
            square = g.square().mean()
            pairs = (g.sum(-2).square() - g.square().sum(-2)).mean() / (n * (n - 1))
            row += [float(square), float(pairs / square)]
        rows.append(row)
    mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / draws**0.5
    wanted = []
    for name in ("scores", "weights"):
        place = theory[f"attention.{name}"]
        wanted += [float(np.exp(place.gradient_log[0])), float(place.gradient_alignment[0])]
    wanted = np.array([theory["attention.scores"].q[0], theory["attention.weights"].q[0], *wanted])
    assert np.all(np.abs(mean - wanted) <= Z * error + BIAS * wanted), (mean, wanted, error)
    assert np.all(Z * error + BIAS * wanted < 0.35 * wanted)


def hugging(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a small model of a family with random weights, and bytes or pixels for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 256, (2, 24))}
    small = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
    if kind == "gpt2":
        return transformers.GPT2Model(transformers.GPT2Config(n_embd=128, n_layer=3, n_head=4)), ids
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**small)), ids
    if kind == "llama":
        return transformers.LlamaModel(transformers.LlamaConfig(**small, vocab_size=256, num_key_value_heads=2)), ids
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "vit"])
def test_real_architectures_have_the_components_of_the_theory(kind: str) -> None:
    model, batch = hugging(kind)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    found = measure_moments(model, batch, seeds=3)
    assert torch.equal(random, torch.random.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    read = observe(model, batch, seeds=1, forward=False)
    assert read.reading is not None
    theory = moments(read.reading.spec, gram=read.gram)
    assert set(found.components) - set(theory.components) <= {"attention.scores"}
    assert set(theory.components) <= set(found.components)
    for place, wanted in theory.components.items():
        seen = found[place]
        # d_model = 128 and three draws: factors are wrong by far more.
        np.testing.assert_allclose(seen.q, wanted.q, rtol=0.3, err_msg=place)
        known = np.isfinite(wanted.gradient_log) & np.isfinite(seen.gradient_log)
        gap = (seen.gradient_log - wanted.gradient_log)[known]
        np.testing.assert_allclose(gap, 0.0, atol=0.3, err_msg=place)


def test_what_a_fused_attention_module_hides_is_left_out() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True) for _ in range(2)]
    found = measure_moments(nn.Sequential(*layers), torch.randn(1, 10, 64), seeds=2)
    assert "attention.mixed" not in found.components and "attention.query" not in found.components
    assert {"attention.weights", "attention.branch", "mlp.activation", "mlp.sum"} <= set(found.components)


def test_mistakes_are_named() -> None:
    model, tokens = reference_network(network(**NETWORKS["pre"])), torch.randn(1, 8, WIDTH)
    with pytest.raises(DomainError, match=r"top_alignment must lie in \[0, 1\]; got -0.1"):
        measure_moments(model, tokens, top_alignment=-0.1)
    with pytest.raises(ModelError, match="seeds must be a positive integer; got 0"):
        measure_moments(model, tokens, seeds=0)

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.mean() + self.down(torch.sin(self.up(self.norm(x))))

    with pytest.raises(NotCoveredError, match="block 0"):
        measure_moments(nn.Sequential(Parallel(), Parallel()), torch.randn(1, 8, 32))
