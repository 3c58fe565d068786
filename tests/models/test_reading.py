"""Reading a spec off real models: what a network was built from is what is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import fathometer as fm
from fathometer.errors import ModelError
from fathometer.measurement import observe
from fathometer.measurement.batches import load_batch
from fathometer.models import equiangular_tokens, find_stacks, load_model, reference_network
from fathometer.spec import GatedMLP, SelfAttention

SCALES = fm.Scales(query=0.6, key=0.9, value=0.8, output=0.7, mlp_in=1.1, mlp_out=0.5)


def _read(model: nn.Module, batch: Any) -> Any:
    found = observe(model, batch, seeds=1, forward=False, pooled=False)
    assert found.reading is not None, found.not_covered
    return found.reading


SPECS = {
    "pre": fm.Transformer.uniform(n_layers=2, d_model=128, n_heads=4, norm=fm.LayerNorm(), scales=SCALES),
    "post": fm.Transformer.uniform(
        n_layers=3, d_model=128, n_heads=4, norm=fm.LayerNorm(), scales=SCALES, placement=fm.Sublayer.post_norm
    ),
    "sandwich": fm.Transformer.uniform(
        n_layers=2, d_model=128, n_heads=4, norm=fm.RMSNorm(gain=1.5), scales=SCALES, placement=fm.Sublayer.sandwich
    ),
    "gated, grouped, causal": fm.Transformer.uniform(
        n_layers=2,
        d_model=128,
        n_heads=4,
        n_kv_heads=2,
        norm=fm.RMSNorm(),
        scales=dataclasses.replace(SCALES, gate=1.2),
        activation="silu",
        causal=True,
    ),
    "dyt, scaled residual": fm.Transformer.uniform(
        n_layers=2,
        d_model=128,
        n_heads=4,
        norm=fm.DyT(alpha=0.7),
        scales=SCALES,
        activation="relu",
        skip_scale=0.9,
        branch_scale=0.4,
    ),
    "derf": fm.Transformer.uniform(
        n_layers=2, d_model=128, n_heads=4, norm=fm.Derf(alpha=0.7, shift=0.2), scales=SCALES, activation="tanh"
    ),
    "no norm": fm.Transformer.uniform(
        n_layers=2, d_model=128, n_heads=4, norm=None, scales=SCALES, activation="gelu_tanh"
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_being_built_and_read(name: str) -> None:
    spec = SPECS[name]
    tokens = equiangular_tokens(n_tokens=12, d_model=128, q=1.0, p=0.3, batch=2, seed=0)
    reading = _read(reference_network(spec, seed=1), tokens)
    assert reading.spec.n_layers == spec.n_layers
    for built, read in zip(spec.layers(), reading.spec.layers(), strict=True):
        for a, b in zip(built.sublayers, read.sublayers, strict=True):
            assert type(a.branch) is type(b.branch)
            for field in a.branch.scale_names:
                # one draw of d^2 entries or more: the spread of their root mean square is 1/sqrt(2 d^2)
                assert getattr(b.branch, field) == pytest.approx(
                    getattr(a.branch, field), rel=4.5 / math.sqrt(2 * 128 * 64)
                )
            if isinstance(a.branch, SelfAttention):
                assert (a.branch.n_heads, a.branch.causal) == (b.branch.n_heads, b.branch.causal)
                assert (a.branch.n_kv_heads or a.branch.n_heads) == b.branch.n_kv_heads
            else:
                assert a.branch.activation == b.branch.activation
            for slot in ("input_norm", "output_norm", "stream_norm"):
                assert type(getattr(a, slot)) is type(getattr(b, slot)), slot
                if getattr(a, slot) is not None:
                    assert getattr(b, slot).gain == pytest.approx(getattr(a, slot).gain, rel=1e-3)
            assert b.skip_scale == pytest.approx(a.skip_scale, abs=1e-4)
            assert b.branch_scale == pytest.approx(a.branch_scale, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "causal", "gated", "pre"),
    [
        ("gpt2", True, False, True),
        ("llama", True, True, True),
        ("mistral", True, True, True),
        ("qwen2", True, True, True),
        ("qwen3", True, True, True),
        ("bert", False, False, False),
        ("vit", False, False, True),
        ("t5", False, False, True),
    ],
)
def test_real_architectures(name: str, causal: bool, gated: bool, pre: bool) -> None:
    loaded = load_model(f"hf:{name}", layers=3, width=128, heads=4)
    reading = _read(loaded.model, load_batch(None, loaded, n_tokens=16))
    assert reading.spec.n_layers == 3
    attention, mlp = reading.spec.blocks[0].sublayers
    assert attention.branch.causal is causal
    assert isinstance(mlp.branch, GatedMLP) is gated
    assert (attention.input_norm is not None) is pre
    assert (attention.stream_norm is not None) is not pre
    assert attention.branch.qk_norm is (name == "qwen3")
    assert attention.branch.n_heads == 4
    expected = {"query", "key", "value", "output"}
    assert set(reading.layers[0][0].roles) == expected
    parameters = dict(loaded.model.named_parameters())
    for layer in reading.layers:
        for part in layer:
            for weight in part.roles.values():
                assert weight.of(parameters[weight.parameter]).ndim == 2


def test_multihead_module_both_norm_placements_and_masks() -> None:
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first, activation="gelu")
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        reading = _read(model, torch.randn(2, 10, 64))
        attention, mlp = reading.spec.blocks[0].sublayers
        assert (attention.stream_norm is None) is norm_first
        assert mlp.branch.activation == "gelu"
        assert attention.branch.query == pytest.approx(
            float(layer.self_attn.in_proj_weight.detach()[:64].std()) * 8, rel=1e-2
        )
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    causal = _read(model, {"src": torch.randn(2, 10, 64), "mask": mask})
    assert causal.spec.is_causal
    window = torch.ones(10, 10, dtype=torch.bool).triu(1) | torch.ones(10, 10, dtype=torch.bool).tril(-3)
    found = observe(model, {"src": torch.randn(2, 10, 64), "mask": window}, seeds=1, forward=False)
    assert found.reading is None and "neither full nor causal" in str(found.not_covered)


class Parallel(nn.Module):
    """Attention and MLP side by side."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h)[0] + self.down(torch.relu(self.up(h)))


def test_what_is_not_covered_is_said() -> None:
    found = observe(nn.Sequential(Parallel(), Parallel()), torch.randn(1, 6, 32), seeds=2)
    assert found.reading is None
    assert "block 0" in str(found.not_covered)
    assert found.profile.q[-1] > found.profile.q[0]


def test_finding_prefers_blocks_over_their_sublayers_and_stages() -> None:
    model = reference_network(SPECS["pre"], seed=0)
    tokens = torch.randn(1, 5, 128)
    assert find_stacks(model, lambda: model(tokens))[0].names == ("blocks.0", "blocks.1")


def test_models_by_name(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"no architecture 'hf:gtp2'; did you mean 'gpt2'\?"):
        load_model("hf:gtp2")
    with pytest.raises(ModelError, match="cannot read the model 'gpt2'"):
        load_model("gpt2")
    with pytest.raises(ModelError, match="multiple of --heads"):
        load_model("hf:gpt2", width=100, heads=3)
    with pytest.raises(ModelError, match=r"must lie in \[1, 1000000\]; got 0"):
        load_model("hf:gpt2", layers=0)
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\ndef build(layers=2):\n    return nn.Linear(layers, 2)\ndef other():\n    return 1\n"
    )
    assert load_model(f"{file}:build", layers=5).model.in_features == 5
    with pytest.raises(ModelError, match=r"no function 'biuld'; did you mean 'build'\?"):
        load_model(f"{file}:biuld")
    with pytest.raises(ModelError, match="takes no argument 'width'"):
        load_model(f"{file}:build", width=8)
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module; got int"):
        load_model(f"{file}:other")
    with pytest.raises(ModelError, match="there is no file"):
        load_model("nowhere.py:build")


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first = load_model("hf:gpt2", layers=1, width=64, seed=1).model
    assert torch.equal(before, torch.get_rng_state())
    second = load_model("hf:gpt2", layers=1, width=64, seed=1).model
    assert torch.equal(first.h[0].mlp.c_fc.weight, second.h[0].mlp.c_fc.weight)


class FusedBlock(nn.Module):
    """The common vision block: one linear map for queries, keys and values, and a layer scale on each branch."""

    def __init__(self, d: int = 64, heads: int = 4, scale: float = 0.5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.act, self.fc2 = nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        self.ls1, self.ls2 = LayerScale(d, scale), LayerScale(d, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.ls1(self.proj(mixed))
        return x + self.ls2(self.fc2(self.act(self.fc1(self.norm2(x)))))


class LayerScale(nn.Module):
    def __init__(self, d: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((d,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def test_fused_projections_and_layer_scale() -> None:
    reading = _read(nn.Sequential(FusedBlock(), FusedBlock(scale=0.1)), torch.randn(2, 9, 64))
    scales = [part.sublayer.branch_scale for layer in reading.layers for part in layer]
    assert scales == pytest.approx([0.5, 0.5, 0.1, 0.1], rel=1e-4)
    roles = reading.layers[1][0].roles
    assert [(roles[r].parameter, roles[r].start, roles[r].stop) for r in ("query", "key", "value")] == [
        ("1.qkv.weight", 0, 64),
        ("1.qkv.weight", 64, 128),
        ("1.qkv.weight", 128, 192),
    ]


def test_timm_names_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the optional package: sizes are passed on, and its errors become one sentence."""
    import sys
    import types

    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        if name != "vit_tiny":
            raise RuntimeError(f"Unknown model ({name})")
        asked.update(options)
        model = nn.Sequential(FusedBlock(), FusedBlock())
        model.default_cfg = {"input_size": (3, 32, 32)}  # type: ignore[assignment]
        return model

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    loaded = load_model("timm:vit_tiny", layers=2, width=64)
    assert loaded.kind == "image" and loaded.image_size == 32
    assert asked == {"pretrained": False, "depth": 2, "embed_dim": 64}
    with pytest.raises(ModelError, match=r"timm cannot build 'vit_huge': Unknown model"):
        load_model("timm:vit_huge")
