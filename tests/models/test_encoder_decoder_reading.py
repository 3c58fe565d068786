"""Decoders with cross attention, read off real code: sublayers, the memory's norm, roles of all weights, refusals."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn
from torch.nn import functional as F

import fathometer as fm
from fathometer.application import read_encoder_decoder
from fathometer.errors import ModelError, NotCoveredError
from fathometer.models import parameter_roles, reference_encoder_decoder
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    EncoderDecoder,
    LayerNorm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
)

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

D, VOCABULARY = 64, 96
ATTENTION: dict[str, Any] = {"query": 0.8, "key": 1.3, "value": 0.6, "output": 1.1, "n_heads": 4}


def ids(n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, n_tokens), generator=torch.Generator().manual_seed(seed))


def t5(**changes: Any) -> nn.Module:
    sizes = {"num_layers": 2, "d_model": D, "num_heads": 4, "d_kv": 16, "d_ff": 128, "vocab_size": VOCABULARY}
    return tr.T5ForConditionalGeneration(tr.T5Config(**(sizes | changes)))


def bart() -> nn.Module:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 128))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return tr.BartForConditionalGeneration(
        tr.BartConfig(**sides, **heads, **special, d_model=D, vocab_size=VOCABULARY, max_position_embeddings=32)
    )


class Translator(nn.Module):
    """torch's own encoder-decoder with a table for each language, both looked up before the encoder runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, D), nn.Embedding(VOCABULARY, D)
        self.positions = nn.Embedding(32, D)
        self.stacks = nn.Transformer(D, 4, 2, 3, 128, batch_first=True, **options)
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = (
            table(t) + self.positions(torch.arange(t.shape[1]))
            for table, t in ((self.source, source), (self.target, target))
        )
        future = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out: Tensor = self.head(self.stacks(x, y, tgt_mask=future))
        return out


MODELS = {
    "t5": (t5, {"input_ids": ids(9), "decoder_input_ids": ids(7, 1)}),
    "bart": (bart, {"input_ids": ids(9), "decoder_input_ids": ids(7, 1)}),
    "torch, post-norm": (Translator, (ids(9), ids(7, 1))),
    "torch, pre-norm": (lambda: Translator(norm_first=True), (ids(9), ids(9, 1))),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_encoder_decoders(name: str) -> None:
    torch.manual_seed(0)
    build, batch = MODELS[name]
    found = read_encoder_decoder(build(), batch)
    pre = name in ("t5", "torch, pre-norm")
    assert [len(found.encoder), len(found.decoder)] == [2, 3 if "torch" in name else 2]
    assert all("encoder" in e for e in found.encoder) and all("decoder" in d for d in found.decoder)
    assert isinstance(found.spec.memory_norm, {"t5": RMSNorm, "bart": type(None)}.get(name, LayerNorm))
    assert (found.memory_tokens.n_tokens, found.tokens.n_tokens) == (9, 9 if pre and name != "t5" else 7)
    assert not found.spec.encoder.is_causal and found.spec.decoder.is_causal
    for block in found.spec.decoder.layers():
        own, cross, mlp = block.sublayers
        assert isinstance(own.branch, SelfAttention) and isinstance(mlp.branch, MLP)
        assert isinstance(cross.branch, CrossAttention)
        assert (cross.branch.n_heads, cross.branch.d_memory) == (4, None)
        assert cross.branch.score_multiplier == pytest.approx(4.0 if name == "t5" else 1.0, rel=1e-3)
        for sublayer in block.sublayers:
            assert (sublayer.input_norm is not None) is pre and (sublayer.stream_norm is None) is pre
            assert (sublayer.skip_scale, sublayer.branch_scale) == (1.0, 1.0)


@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm], ids=["pre", "post"])
@pytest.mark.parametrize("width", [64, 96], ids=["same width", "wider memory"])
def test_a_built_network_is_read_as_its_spec(placement: Any, width: int) -> None:
    norm = LayerNorm()
    own = placement(SelfAttention(**ATTENTION), norm)
    cross = placement(
        CrossAttention(
            **ATTENTION, n_kv_heads=2, score_multiplier=0.7, value_bias=0.3, d_memory=None if width == D else width
        ),
        norm,
    )
    cross = dataclasses.replace(cross, skip_scale=0.9, branch_scale=0.4)
    mlp = placement(MLP(mlp_in=0.9, mlp_out=1.2, activation="gelu", ratio=2.0), norm)
    spec = EncoderDecoder(
        encoder=Transformer(blocks=(Block(sublayers=(own, mlp), repeat=2),), d_model=width),
        decoder=Transformer(blocks=(Block(sublayers=(own, cross, mlp), repeat=2),), d_model=D),
        memory_norm=RMSNorm() if placement is Sublayer.pre_norm else None,
    )
    model = reference_encoder_decoder(spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(2, 11, width, generator=generator), torch.randn(2, 7, D, generator=generator))
    found = read_encoder_decoder(model, batch)
    assert (found.memory_tokens.n_tokens, found.tokens.n_tokens) == (11, 7)
    assert type(found.spec.memory_norm) is type(spec.memory_norm)
    for stack in ("encoder", "decoder"):
        wanted, got = getattr(spec, stack), getattr(found.spec, stack)
        for block, read in zip(wanted.layers(), got.layers(), strict=True):
            for a, b in zip(block.sublayers, read.sublayers, strict=True):
                assert type(a.branch) is type(b.branch)
                assert (b.skip_scale, b.branch_scale) == pytest.approx((a.skip_scale, a.branch_scale), rel=1e-4)
                for key, value in dataclasses.asdict(a.branch).items():
                    seen = getattr(b.branch, key)
                    if isinstance(value, float):  # root mean squares of finite matrices and, for biases, of 64 numbers
                        rel = 1e-3 if key in ("score_multiplier", "ratio") else 0.25 if key == "value_bias" else 0.05
                        assert seen == pytest.approx(value, rel=rel), key
                    elif key != "n_kv_heads":
                        assert seen == value, key
    assert found.spec.decoder.blocks[0].sublayers[1].branch.n_kv_heads == 2


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_role(name: str) -> None:
    build, batch = MODELS[name]
    model = build()
    rows = parameter_roles(model, batch)
    layers = 3 if "torch" in name else 2
    counts = Counter(row.role for row in rows)
    for role in ("query", "key", "value", "output"):
        assert counts[role] == 2 + 2 * layers, role
    assert counts["mlp_in"] == counts["mlp_out"] == 2 + layers
    assert {row.layer for row in rows if row.role == "key"} == set(range(2 + layers))
    tokens = [row.parameter for row in rows if row.role == "token_embedding"]
    assert tokens == {
        "t5": ["shared.weight"],
        "bart": ["model.shared.weight"],
    }.get(name, ["source.weight", "target.weight"])
    assert counts["segment_embedding"] == 0
    by_key = {row.key: row.role for row in rows}
    last = {
        "t5": "decoder.block.1.layer.1.EncDecAttention.k.weight",
        "bart": "model.decoder.layers.1.encoder_attn.k_proj.weight",
    }.get(name, f"stacks.decoder.layers.2.multihead_attn.in_proj_weight[{D}:{2 * D}]")
    assert by_key[last] == "key"


class Decoder(nn.Module):
    """A pre-norm block whose cross attention is written in one of several ways."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.o = (nn.Linear(D, D, bias=False) for _ in range(2))
        if attention == "fused keys and values":
            self.kv = nn.Linear(D, 2 * D, bias=False)
        else:
            self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(2))
        self.shrink = nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 128, bias=False), nn.Linear(128, D, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.norm(x)
        if self.attention == "memory of its own":
            memory = h[:, ::2].contiguous()
        elif self.attention == "values of another tensor":
            memory = memory + 1
        if self.attention == "keys first":
            k, v = self.k(memory), self.v(memory)
            q = self.q(h)
        elif self.attention == "fused keys and values":
            q = self.q(h)
            k, v = self.kv(memory).chunk(2, dim=-1)
        elif self.attention == "values of another tensor":
            q, k, v = self.q(memory), self.k(memory), self.v(h)
        else:
            q, k, v = self.q(h), self.k(memory), self.v(memory)
        q, k, v = (t.view(*t.shape[:2], 4, 16).transpose(1, 2) for t in (q, k, v))
        mask = None
        if self.attention == "normalised":
            q, k = (F.rms_norm(t, (16,)) for t in (q, k))
        elif self.attention == "padded":
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
            mask[:, -2:] = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.attention == "plain softmax":
            out = torch.softmax(q @ k.transpose(-1, -2) / 4, dim=-1) @ v
        x = x + self.o(out.transpose(1, 2).flatten(-2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Pair(nn.Module):
    """torch's encoder, and decoders that read it."""

    def __init__(self, attention: str = "plain", between: nn.Module | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.between = nn.Identity() if between is None else between
        self.decoder = nn.ModuleList(Decoder(attention) for _ in range(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.between(self.encoder(source))
        for block in self.decoder:
            target = block(target, memory=memory)
        return target


def pair(*args: Any) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair(*args), (torch.randn(2, 12, D), torch.randn(2, 12, D))


@pytest.mark.parametrize("attention", ["plain", "keys first", "fused keys and values", "plain softmax"])
def test_one_cross_attention_in_many_dialects(attention: str) -> None:
    model, batch = pair(attention)
    found = read_encoder_decoder(model, batch)
    cross, mlp = found.spec.decoder.blocks[0].sublayers
    assert isinstance(cross.branch, CrossAttention) and isinstance(mlp.branch, MLP)
    assert cross.branch.score_multiplier == pytest.approx(1.0, rel=1e-3)
    block = model.get_submodule("decoder.0")
    weights = {"query": block.q.weight, "output": block.o.weight}
    weights |= (
        {"key": block.kv.weight[:D], "value": block.kv.weight[D:]}
        if attention == "fused keys and values"
        else {"key": block.k.weight, "value": block.v.weight}
    )
    for role, weight in weights.items():
        assert getattr(cross.branch, role) == pytest.approx(float(weight.detach().square().mean().sqrt()) * 8, rel=1e-5)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("padded", "cross-attention that hides a part of the memory"),
        ("normalised", "cross-attention with normalised queries and keys"),
        ("memory of its own", "no stack of blocks attends|reads another sequence: cross-attention"),
        (
            "values of another tensor",
            "'q' and 'v' read different tensors, and which of them makes the queries is not known",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused(attention: str, reason: str) -> None:
    model, batch = pair(attention)
    with pytest.raises(NotCoveredError, match=reason):
        read_encoder_decoder(model, batch)


def test_what_stands_between_the_stacks() -> None:
    model, batch = pair("plain", nn.RMSNorm(D))
    assert isinstance(read_encoder_decoder(model, batch).spec.memory_norm, RMSNorm)
    model, batch = pair("plain", nn.Linear(D, D))
    with pytest.raises(NotCoveredError, match=r"between encoder and decoder stands 'between' \(Linear\)"):
        read_encoder_decoder(model, batch)


def test_keys_and_values_of_different_tensors() -> None:
    class Layer(nn.TransformerDecoderLayer):
        def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            x = tgt + self.multihead_attn(self.norm2(tgt), memory, memory + 1)[0]
            return x + self._ff_block(self.norm3(x))

    model, batch = pair()
    model.decoder = nn.ModuleList(Layer(D, 4, 128, batch_first=True) for _ in range(2))
    with pytest.raises(NotCoveredError, match="the keys and values of 'multihead_attn' are made of different tensors"):
        read_encoder_decoder(model, batch)


def test_a_decoder_alone_has_no_memory() -> None:
    model, targets = t5(), ids(7)
    alone = {"decoder_input_ids": targets, "encoder_outputs": (torch.randn(2, 9, D),)}
    with pytest.raises(NotCoveredError, match=r"the batch must run the encoder too \(no encoder_outputs\)"):
        read_encoder_decoder(model, alone)
    with pytest.raises(ModelError, match=r"'encoder\.block\.0.*q\.weight' .*has no role.*does not use it"):
        parameter_roles(model, alone)
    with pytest.raises(NotCoveredError, match="no stack of blocks attends to the output of another one"):
        read_encoder_decoder(model.decoder, {"input_ids": targets})  # no memory at all


def test_measuring_a_decoder_still_says_that_theory_does_not_cover_it() -> None:
    batch = {"input_ids": ids(9), "decoder_input_ids": ids(7, 1)}
    assert fm.diagnose(t5(), batch, seeds=2).not_covered is None  # the encoder
    report = fm.diagnose(t5(), batch, seeds=2, blocks="decoder.block")
    assert "cross-attention is read only together with the encoder" in str(report.not_covered)
    assert report.measured.apjn[0] > 0
