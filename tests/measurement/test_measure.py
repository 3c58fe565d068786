"""Measuring: estimators against brute force, and the contract that a user's model is left as found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fathometer as fm
from fathometer.errors import BatchError, ModelError
from fathometer.measurement import as_batch, observe
from fathometer.measurement.batches import load_batch
from fathometer.measurement.sounding import sound
from fathometer.measurement.statistics import average, row_statistics, token_moments
from fathometer.models import LoadedModel, Stack, load_model


def _network(depth: int = 3, width: int = 16, **options: object) -> nn.Module:
    spec = fm.Transformer.uniform(
        n_layers=depth,
        d_model=width,
        n_heads=2,
        norm=fm.LayerNorm(),
        activation="gelu",
        scales=fm.Scales(query=1.0, key=1.0, value=0.8, output=0.8, mlp_in=0.7, mlp_out=1.1),
        **options,  # type: ignore[arg-type]
    )
    return fm.reference_network(spec, seed=3, dtype=torch.float64)


def _stack(model: nn.Module) -> Stack:
    return Stack(tuple(f"blocks.{i}" for i in range(len(model.blocks))), tuple(model.blocks))


def test_apjn_estimate_is_the_jacobian_norm_in_expectation() -> None:
    """Against the full Jacobian: the mean over draws agrees within its standard error, forward and backward."""
    model = _network().eval()
    tokens = torch.randn(1, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], tokens[0])
    exact = float(jacobian.square().sum()) / tokens.numel()
    stack, batch = _stack(model), as_batch(tokens)
    backward, forward = [], []
    for seed in range(200):
        curves = sound(model, stack, batch, seed=seed, pooled=False).curves
        backward.append(math.exp(curves["apjn_log"][0]))
        forward.append(math.exp(curves["apjn_forward_log"][-1]))
    for values in (backward, forward):
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert abs(np.mean(values) - exact) < 4.5 * error
        assert error < 0.05 * exact
    assert abs(np.mean(backward) - 1.3 * exact) > 4.5 * np.std(backward, ddof=1) / math.sqrt(len(backward))


def test_every_layer_comes_from_one_pass() -> None:
    """The curve equals separate reverse passes with the same output gradient."""
    model = _network().eval()
    tokens = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    curves = sound(model, _stack(model), as_batch(tokens), seed=5, forward=False, pooled=False).curves
    streams = [tokens.clone().requires_grad_()]
    for block in model.blocks:
        streams.append(block(streams[-1]))
    from fathometer.models.seeding import named_generator

    cotangent = torch.randn(streams[-1].shape, generator=named_generator(5, "cotangent")).double()
    for layer, stream in enumerate(streams):
        (gradient,) = torch.autograd.grad(streams[-1], stream, cotangent, retain_graph=True)
        ratio = float(gradient.square().sum() / cotangent.square().sum())
        assert curves["apjn_log"][layer] == pytest.approx(math.log(ratio), abs=1e-9)
        q, p = token_moments(gradient)
        assert curves["gradient_alignment"][layer] == pytest.approx(p / q, abs=1e-9)


def test_token_moments_against_the_gram_matrix() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gram = (x @ x.transpose(1, 2)).numpy() / 5
    off = ~np.eye(7, dtype=bool)
    q, p = token_moments(x)
    assert q == pytest.approx(np.mean([np.diag(g).mean() for g in gram]))
    assert p == pytest.approx(np.mean([g[off].mean() for g in gram]))


def test_row_statistics_against_a_loop() -> None:
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float32)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    found = row_statistics(scores)
    entropy, y2, spread = [], [], []
    for row in range(5):
        for logits in scores[:, :, row, : row + 1].reshape(-1, row + 1).double().numpy():
            weights = np.exp(logits) / np.exp(logits).sum()
            entropy.append(-(weights * np.log(weights)).sum())
            y2.append((weights**2).sum())
            spread.append(logits.var(ddof=1) if row else 0.0)
    assert found["entropy"] == pytest.approx(np.mean(entropy), abs=1e-6)
    assert found["y2"] == pytest.approx(np.mean(y2), abs=1e-6)
    assert found["logit_variance"] == pytest.approx(np.mean(spread), abs=1e-5)


def test_average_of_logs_is_the_log_of_the_average() -> None:
    means, errors = average([{"apjn_log": np.log([1.0])}, {"apjn_log": np.log([3.0])}])
    assert means["apjn_log"] == pytest.approx(np.log([2.0]))
    assert errors["apjn_log"] == pytest.approx([math.sqrt(2) / math.sqrt(2) / 2])


class _Fails(nn.Module):
    def __init__(self, inner: nn.Module, after: int) -> None:
        super().__init__()
        self.inner, self.left = inner, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("planted")
        return self.inner(x)


@pytest.mark.parametrize("interrupt", [False, True], ids=["finished", "failing half way"])
def test_model_is_left_as_found(interrupt: bool) -> None:
    """Weights, gradients, hooks, modes and random state are bitwise what they were, also after an exception."""
    model = _network(depth=4).float()
    tokens = torch.randn(1, 6, 16)
    if interrupt:
        model.blocks[2] = _Fails(model.blocks[2], after=4)
    model.train()
    model.blocks[1].eval()
    model.blocks[0].requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    storage = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    random = torch.get_rng_state()
    if interrupt:
        with pytest.raises((RuntimeError, BatchError), match="planted"):
            fm.measure(model, tokens, seeds=3, blocks="blocks")
    else:
        fm.measure(model, tokens, seeds=3)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.data_ptr() == storage[name]
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is not None and bool((parameter.grad == 1).all())
    for name, module in model.named_modules():
        assert module.training == modes[name]
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_redraws_keep_scale_and_differ() -> None:
    found = observe(_network(width=32).float(), torch.randn(1, 6, 32), seeds=3)
    assert found.profile.errors["apjn_log"][0] > 0
    assert not np.array_equal(found.draws[0]["q"], found.draws[1]["q"])
    again = observe(
        _network(width=32).float(), torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)), seeds=1
    )
    assert not again.profile.errors


def test_half_precision_is_measured_too() -> None:
    model = _network(width=32).bfloat16()
    found = observe(model, torch.randn(1, 6, 32).bfloat16(), seeds=1, forward=False)
    assert found.reading is not None, found.not_covered
    assert np.all(np.isfinite(found.profile.q))


class _Stateful(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


def test_bad_input_is_one_clear_sentence() -> None:
    model, tokens = _network().float(), torch.randn(1, 4, 16)
    with pytest.raises(BatchError, match="NaN or infinity"):
        fm.measure(model, tokens * math.nan)
    with pytest.raises(BatchError, match="does not run on the given batch: "):
        fm.measure(model, torch.randn(1, 4, 17))
    with pytest.raises(BatchError, match="must be a tensor, a tuple or a dict"):
        fm.measure(model, "text")
    with pytest.raises(ModelError, match="seeds must be a positive integer; got 0"):
        fm.measure(model, tokens, seeds=0)
    with pytest.raises(ModelError, match="no blocks found"):
        fm.measure(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), tokens)
    with pytest.raises(ModelError, match=r"no module 'bloks'; did you mean 'blocks'\?"):
        fm.measure(model, tokens, blocks="bloks")
    with torch.no_grad():
        next(iter(model.blocks[1].parameters())).view(-1)[0] = math.inf
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        fm.measure(model, tokens)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ModelError, match="no randomness"):
        fm.measure(model, tokens)


def test_blocks_with_memory_are_refused() -> None:
    model = _network().float()
    model.blocks[1] = _Stateful(model.blocks[1])
    with pytest.raises(ModelError, match="another output when run twice"):
        fm.measure(model, torch.randn(1, 4, 16), blocks="blocks")


def test_batches(tmp_path: object) -> None:
    any_model = LoadedModel(model=nn.Identity(), name="mine.py:build", kind="any")
    text = LoadedModel(model=nn.Identity(), name="hf:gpt2", kind="text", max_tokens=32)
    assert load_batch("tokens:8x5", any_model).inputs.shape == (2, 5, 8)
    assert load_batch("text", text, n_tokens=16).inputs["input_ids"].shape == (2, 16)
    with pytest.raises(BatchError, match="more than the 32 positions"):
        load_batch("text", text, n_tokens=64)
    with pytest.raises(BatchError, match="takes text; got the batch 'photographs'"):
        load_batch("photographs", text)
    with pytest.raises(BatchError, match="a batch is needed"):
        load_batch(None, any_model)
    with pytest.raises(BatchError, match="there is no file"):
        load_batch("nowhere.pt", any_model)
    with pytest.raises(BatchError, match="cannot read the batch"):
        load_batch("batch.csv", any_model)
    with pytest.raises(BatchError, match="tokens:WIDTHxCOUNT"):
        load_batch("tokens:8", any_model)


def test_photographs_feed_an_image_model() -> None:
    pytest.importorskip("sklearn")
    loaded = load_model("hf:vit", layers=2, width=64)
    batch = load_batch(None, loaded, batch_size=3)
    assert batch.inputs["pixel_values"].shape == (3, 3, 224, 224)
    assert float(batch.inputs["pixel_values"].std()) > 0.1


def test_a_diverging_stream_is_named_as_growth() -> None:
    spec = fm.Transformer.uniform(
        n_layers=40,
        d_model=16,
        n_heads=2,
        norm=None,
        scales=fm.Scales(query=0.1, key=0.1, value=9.0, output=9.0, mlp_in=9.0, mlp_out=9.0),
    )
    with pytest.raises(ModelError, match=r"signal growth: the stream is NaN or infinite at block \d+ of 40"):
        fm.measure(fm.reference_network(spec, seed=0), torch.randn(1, 4, 16), seeds=1)


def test_a_key_value_cache_is_switched_off_and_on_again() -> None:
    """A block run twice would attend to its first run's keys: outputs agree, gradients lose their value path."""
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=50, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(50, (2, 32))}
    assert config.use_cache
    cached = fm.measure(model, batch, seeds=1)
    assert config.use_cache
    config.use_cache = False
    plain = fm.measure(model, batch, seeds=1)
    for name in ("apjn_log", "gradient_log", "q"):
        np.testing.assert_array_equal(cached.curves[name], plain.curves[name])


def test_attention_rows_are_those_of_the_theory() -> None:
    """Participation, overlap of two rows and condensation at a strong score variance, in standard errors."""
    scales = fm.Scales(query=1.6, key=1.0, value=1.0, output=1.0, mlp_in=1.5, mlp_out=1.0)
    spec = fm.Transformer.uniform(n_layers=2, d_model=192, n_heads=4, norm=fm.LayerNorm(), scales=scales)
    tokens = fm.equiangular_tokens(n_tokens=16, d_model=192, q=1.0, p=0.4)
    seen = fm.measure(fm.reference_network(spec), tokens, seeds=16)
    theory = fm.predict(spec, n_tokens=16, q=1.0, p=0.4)
    annealed = fm.predict(spec, n_tokens=16, q=1.0, p=0.4, closure="annealed")
    full = fm.predict(spec, gram=0.4 + 0.6 * np.eye(16))
    for name in ("participation", "row_overlap", "condensation"):
        allowed = 4.5 * seen.errors[name] + 0.25 * 4 / 192 * theory.curves[name]  # of sublayers / width
        assert np.all(np.abs(seen.curves[name] - theory.curves[name]) < allowed), name
        np.testing.assert_allclose(full.curves[name], theory.curves[name], rtol=1e-8)
    wrong = np.abs(seen.participation - annealed.participation)
    assert np.all(wrong > 4.5 * seen.errors["participation"] + 0.25 * 4 / 192 * theory.participation)


def test_row_statistics_of_known_weights() -> None:
    weights = torch.softmax(torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)), dim=-1).double()
    found = row_statistics(weights.log().float())
    pairs = [
        (weights[s, h, a] * weights[s, h, b]).sum()
        for s in range(2)
        for h in range(3)
        for a in range(5)
        for b in range(5)
        if a != b
    ]
    assert found["row_overlap"] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-6)
    spread = weights.log().var(dim=-1)
    assert found["condensation"] == pytest.approx(math.sqrt(float(spread.mean()) / (2 * math.log(7))), rel=1e-5)
