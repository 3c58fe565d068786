"""One network in many dialects of model code: every one is read as the same spec, or said to be not covered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fathometer.errors import ModelError
from fathometer.measurement import observe
from fathometer.measurement.batches import load_batch
from fathometer.models import load_model
from fathometer.observables import predict


class Dialect(nn.Module):
    """A pre-norm block whose attention is written in one of several ways."""

    def __init__(self, *, attention: str = "fused", activation: str = "plain", residual: str = "plain") -> None:
        super().__init__()
        d = 64
        self.attention, self.activation, self.residual = attention, activation, residual
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        self.relu = nn.ReLU(inplace=activation == "inplace")

    def mix(self, h: torch.Tensor) -> torch.Tensor:
        b, n, d = h.shape
        q, k, v = (p(h).view(b, n, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        if self.attention == "fused":
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.attention == "prescaled":
            out = nn.functional.scaled_dot_product_attention(q / 4, k, v, is_causal=True, scale=1.0)
        elif self.attention == "boolean":
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~future)
        elif self.attention == "alibi":
            slope = -torch.arange(float(n))[:, None].sub(torch.arange(float(n))).abs()
            mask = slope.masked_fill(future, -math.inf).to(q)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.attention == "padded":
            seen = ~future.expand(b, 1, n, n).clone()
            seen[0, :, :, -3:] = False
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif self.attention == "inline norm":
            q, k = (nn.functional.rms_norm(t, (16,)) for t in (q, k))
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            filled = {"softmax -inf": -math.inf, "softmax -1e9": -1e9, "softmax -1e4": -1e4}[self.attention]
            logits = (q @ k.transpose(-1, -2) / 4).masked_fill(future, filled)
            out = torch.softmax(logits, dim=-1) @ v
        return self.o(out.transpose(1, 2).reshape(b, n, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.residual == "inplace":
            y = self.mix(self.norm1(x))
            y += x
            x = y
            return x + self.down(self.relu(self.up(self.norm2(x))))
        x = x + self.mix(self.norm1(x))
        return x + self.down(self.relu(self.up(self.norm2(x))))


def _observed(dtype: torch.dtype = torch.float32, **options: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Dialect(**options), Dialect(**options)).to(dtype)
        tokens = torch.randn(2, 12, 64).to(dtype)
    return observe(model, tokens, seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["fused", "prescaled", "boolean", "softmax -inf", "softmax -1e9", "softmax -1e4"])
def test_same_attention_same_reading(attention: str, dtype: torch.dtype) -> None:
    found = _observed(dtype, attention=attention)
    assert found.reading is not None, found.not_covered
    branch = found.reading.spec.blocks[0].sublayers[0].branch
    assert branch.causal and not branch.qk_norm
    assert branch.score_multiplier == pytest.approx(1.0, rel=1e-3 if dtype == torch.float32 else 2e-2)
    assert found.own.logit_variance[0] == pytest.approx(
        _observed(dtype).own.logit_variance[0], rel=1e-3 if dtype == torch.float32 else 5e-2
    )


def test_normalised_queries_and_keys_without_a_module() -> None:
    branch = _observed(attention="inline norm").reading.spec.blocks[0].sublayers[0].branch
    assert branch.qk_norm
    assert branch.score_multiplier == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention": "alibi"}, "additive attention bias"),
        ({"attention": "padded"}, "padding"),
        ({"residual": "inplace"}, "in place"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(options: dict[str, str], reason: str) -> None:
    found = _observed(**options)
    assert found.reading is None
    assert reason in found.not_covered
    assert found.profile.apjn[0] > 1


class Broken(Dialect):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.mix(self.norm1(x))
        return x


def test_a_block_that_cannot_be_differentiated_is_named() -> None:
    with pytest.raises(ModelError, match=r"no gradient flows back through block '1': .*inplace operation"):
        observe(nn.Sequential(Broken(), Broken()), torch.randn(2, 12, 64), seeds=1)


def test_in_place_activation_is_seen_through() -> None:
    found = _observed(activation="inplace")
    assert found.reading is not None, found.not_covered
    assert found.reading.spec.blocks[0].sublayers[1].branch.activation == "relu"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_eager_and_fused_implementations_agree(name: str) -> None:
    read = {}
    for kind in ("sdpa", "eager"):
        loaded = load_model(f"hf:{name}", layers=2, width=128)
        loaded.model.set_attn_implementation(kind)
        found = observe(loaded.model, load_batch(None, loaded, n_tokens=24), seeds=1)
        assert found.reading is not None, found.not_covered
        read[kind] = found.reading.spec.blocks[0].sublayers[0].branch
    assert read["eager"].causal and read["eager"].qk_norm == read["sdpa"].qk_norm
    # with rotary positions a plain softmax shows only the spread of its logits: an estimate
    assert read["eager"].score_multiplier == pytest.approx(read["sdpa"].score_multiplier, rel=0.1)


def test_tokens_along_the_first_axis() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(64, 4, 128, norm_first=True, batch_first=True) for _ in range(3)]
        tokens = torch.randn(4, 16, 64)
    usual = observe(nn.Sequential(*layers), tokens, seeds=1)
    for layer in layers:
        layer.self_attn.batch_first = False
    turned = observe(nn.Sequential(*layers), tokens.transpose(0, 1).contiguous(), seeds=1)
    assert turned.profile.about["n_tokens"] == 16
    for name in ("q", "p", "attention_entropy"):
        assert getattr(turned.profile, name) == pytest.approx(getattr(usual.profile, name), rel=1e-4)
    assert turned.gram == pytest.approx(usual.gram, rel=1e-6)


def test_one_weight_in_two_blocks() -> None:
    first, second = Dialect(), Dialect()
    second.up.weight = first.up.weight
    found = observe(nn.Sequential(first, second), torch.randn(1, 8, 64), seeds=2)
    assert found.profile.errors


def test_tiny_layer_scale_is_not_zero() -> None:
    from tests.models.test_reading import FusedBlock

    found = observe(nn.Sequential(FusedBlock(scale=5e-5), FusedBlock(scale=5e-5)), torch.randn(2, 9, 64), seeds=1)
    assert found.reading is not None, found.not_covered
    scales = [part.sublayer.branch_scale for layer in found.reading.layers for part in layer]
    assert scales == pytest.approx([5e-5] * 4, rel=0.05)


def test_a_decoder_layer_is_cross_attention_not_self_attention() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True, norm_first=True), 2)
    found = observe(decoder, {"tgt": torch.randn(2, 9, 64), "memory": torch.randn(2, 9, 64)}, seeds=1)
    assert found.reading is None and "cross-attention" in found.not_covered


def test_additive_masks_of_the_multihead_module() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tokens = torch.randn(2, 9, 64)
    distance = (torch.arange(9.0)[:, None] - torch.arange(9.0)).abs()
    biased = observe(model, {"src": tokens, "mask": -distance}, seeds=1)
    assert biased.reading is None and "additive attention bias" in biased.not_covered
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, -2:] = True
    seen = observe(model, {"src": tokens, "src_key_padding_mask": padded}, seeds=1)
    assert seen.reading is None and "padding" in seen.not_covered


@pytest.mark.parametrize("attention", ["fused", "softmax -inf"])
@pytest.mark.parametrize("name", ["q", "o", "down"])
def test_weights_that_start_at_zero(name: str, attention: str) -> None:
    model = nn.Sequential(Dialect(attention=attention), Dialect(attention=attention))
    for block in model:
        nn.init.zeros_(getattr(block, name).weight)
    found = observe(model, torch.randn(2, 12, 64), seeds=2)
    assert found.reading is not None, found.not_covered
    sublayers = found.reading.spec.blocks[0].sublayers
    zero = {"q": sublayers[0].branch.query, "o": sublayers[0].branch.output, "down": sublayers[1].branch.mlp_out}[name]
    assert zero == 0.0
    theory = predict(found.reading.spec, gram=found.gram)
    assert theory.apjn_log[0] == pytest.approx(found.profile.apjn_log[0], abs=0.3)
