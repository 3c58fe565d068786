"""The role of every parameter of real and made-up models, and what is said where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fathometer as fm
from fathometer.errors import BatchError, ModelError, NotCoveredError
from fathometer.models import ParameterRole, load_model, parameter_roles, read_roles, reference_network
from fathometer.training.vision import PatchClassifier

transformers = pytest.importorskip("transformers")

D, VOCABULARY = 64, 100
BERT = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**BERT, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**BERT, "image_size": 32, "patch_size": 8}
ATTENTION = {"query", "key", "value", "output"}
MLP = {"mlp_in", "mlp_out"}
NORM = {"norm_gain", "norm_bias"}


def biased(*roles: str) -> set[str]:
    return {*roles, *(f"{role}_bias" for role in roles)}


def ids(rows: int = 2, columns: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(0))


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def hf(config: str, model: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return built


def spec(**options: Any) -> fm.Transformer:
    scales = fm.Scales(query=1, key=1, value=1, output=1, mlp_in=1, mlp_out=1)
    return fm.Transformer.uniform(n_layers=2, d_model=32, n_heads=4, scales=scales, **options)


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, 4, 128, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)


def gpt2_lm() -> nn.Module:
    return hf("GPT2Config", "GPT2LMHeadModel", n_embd=D, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1)


#: Name -> model, batch, roles outside the blocks (name to role), and the set of roles inside.
CASES: dict[str, Any] = {
    "gpt2, tied": lambda: (
        gpt2_lm(),
        {"input_ids": ids()},
        {
            "transformer.wte.weight": "token_embedding",
            "transformer.wpe.weight": "position_embedding",
            "transformer.ln_f.weight": "norm_gain",
            "transformer.ln_f.bias": "norm_bias",
        },
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "bert with masked-token head": lambda: (
        hf("BertConfig", "BertForMaskedLM", **TEXT),
        {"input_ids": ids()},
        {
            "bert.embeddings.word_embeddings.weight": "token_embedding",
            "bert.embeddings.position_embeddings.weight": "position_embedding",
            "bert.embeddings.token_type_embeddings.weight": "segment_embedding",
            "bert.embeddings.LayerNorm.weight": "norm_gain",
            "bert.embeddings.LayerNorm.bias": "norm_bias",
            "cls.predictions.bias": "head_bias",
            "cls.predictions.transform.dense.weight": "head_hidden",
            "cls.predictions.transform.dense.bias": "head_hidden_bias",
            "cls.predictions.transform.LayerNorm.weight": "norm_gain",
            "cls.predictions.transform.LayerNorm.bias": "norm_bias",
        },
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "bert classifier, positions in the batch, padded": lambda: (
        hf("BertConfig", "BertForSequenceClassification", **TEXT),
        {
            "input_ids": ids(),
            "position_ids": torch.arange(12).expand(2, 12),
            "token_type_ids": torch.tensor([0] * 6 + [1] * 6).expand(2, 12),
            "attention_mask": torch.tensor([[1] * 12, [1] * 8 + [0] * 4]),
        },
        {
            "bert.embeddings.word_embeddings.weight": "token_embedding",
            "bert.embeddings.position_embeddings.weight": "position_embedding",
            "bert.embeddings.token_type_embeddings.weight": "segment_embedding",
            "bert.embeddings.LayerNorm.weight": "norm_gain",
            "bert.embeddings.LayerNorm.bias": "norm_bias",
            "bert.pooler.dense.weight": "head_hidden",
            "bert.pooler.dense.bias": "head_hidden_bias",
            "classifier.weight": "head",
            "classifier.bias": "head_bias",
        },
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "llama, grouped heads": lambda: (
        hf("LlamaConfig", "LlamaForCausalLM", **TEXT, num_key_value_heads=2),
        {"input_ids": ids()},
        {"model.embed_tokens.weight": "token_embedding", "model.norm.weight": "norm_gain", "lm_head.weight": "head"},
        ATTENTION | MLP | {"gate", "norm_gain"},
    ),
    "qwen3, norms of queries and keys": lambda: (
        hf("Qwen3Config", "Qwen3ForCausalLM", **TEXT, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
        {"input_ids": ids()},
        {"model.embed_tokens.weight": "token_embedding", "model.norm.weight": "norm_gain"},
        ATTENTION | MLP | {"gate", "norm_gain", "qk_norm_gain"},
    ),
    "phi3, gate and up fused": lambda: (
        hf("Phi3Config", "Phi3ForCausalLM", **TEXT, num_key_value_heads=2),
        {"input_ids": ids()},
        {"model.embed_tokens.weight": "token_embedding", "model.norm.weight": "norm_gain", "lm_head.weight": "head"},
        ATTENTION | MLP | {"gate", "norm_gain"},
    ),
    "clip, an activation the theory has not": lambda: (
        hf("CLIPVisionConfig", "CLIPVisionModel", **IMAGE),
        pixels(),
        {
            "embeddings.class_embedding": "class_token",
            "embeddings.patch_embedding.weight": "patch_embedding",
            "embeddings.position_embedding.weight": "position_embedding",
            "pre_layrnorm.weight": "norm_gain",
            "pre_layrnorm.bias": "norm_bias",
            "post_layernorm.weight": "norm_gain",
            "post_layernorm.bias": "norm_bias",
        },
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "vit classifier": lambda: (
        hf("ViTConfig", "ViTForImageClassification", **IMAGE),
        pixels(),
        {
            "vit.embeddings.cls_token": "class_token",
            "vit.embeddings.position_embeddings": "position_embedding",
            "vit.embeddings.patch_embeddings.projection.weight": "patch_embedding",
            "vit.embeddings.patch_embeddings.projection.bias": "patch_embedding_bias",
            "vit.layernorm.weight": "norm_gain",
            "vit.layernorm.bias": "norm_bias",
            "classifier.weight": "head",
            "classifier.bias": "head_bias",
        },
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "beit, layer scale": lambda: (
        hf("BeitConfig", "BeitModel", **IMAGE, use_relative_position_bias=True),
        pixels(),
        {
            "embeddings.cls_token": "class_token",
            "embeddings.patch_embeddings.projection.weight": "patch_embedding",
            "embeddings.patch_embeddings.projection.bias": "patch_embedding_bias",
            "pooler.layernorm.weight": "norm_gain",
            "pooler.layernorm.bias": "norm_bias",
        },
        (biased(*ATTENTION, *MLP) | NORM | {"layer_scale", "relative_position"}) - {"key_bias"},
    ),
    "t5 encoder": lambda: (
        load_model("hf:t5", layers=2, width=D, heads=4).model,
        {"input_ids": ids()},
        {"shared.weight": "token_embedding", "encoder.final_layer_norm.weight": "norm_gain"},
        ATTENTION | MLP | {"norm_gain", "relative_position"},
    ),
    "torch encoder": lambda: (
        encoder(),
        torch.randn(2, 9, D, generator=torch.Generator().manual_seed(0)),
        {"norm.weight": "norm_gain", "norm.bias": "norm_bias"},
        biased(*ATTENTION, *MLP) | NORM,
    ),
    "reference network": lambda: (
        reference_network(spec(norm=fm.Derf(alpha=0.5))),
        torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)),
        {},
        ATTENTION | MLP | {"norm_gain", "norm_shape"},
    ),
    "patch classifier of raw parameters": lambda: (
        PatchClassifier(spec(norm=fm.RMSNorm()), seed=0),
        torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0)),
        {
            "embed": "patch_embedding",
            "positions": "position_embedding",
            "norm.weight": "norm_gain",
            "norm.bias": "norm_bias",
            "head.weight": "head",
            "head.bias": "head_bias",
        },
        ATTENTION | MLP | {"norm_gain"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_entry_of_every_parameter_has_one_role(name: str) -> None:
    model, batch, ends, inside = CASES[name]()
    modes = [module.training for module in model.modules()]
    keys, state = list(model.state_dict()), torch.get_rng_state()
    rows = parameter_roles(model, batch)
    outside = {row.parameter: row.role for row in rows if row.layer is None}
    assert outside == ends
    assert {row.role for row in rows if row.layer == 0} == inside
    assert {row.role for row in rows if row.layer == 1} == inside - {"relative_position"} or "beit" in name
    for parameter_name, parameter in model.named_parameters():
        count = torch.zeros_like(parameter)
        for row in rows:
            if row.parameter == parameter_name:
                row.of(count).add_(1)
        assert bool((count == 1).all()), parameter_name
    # left as found
    assert modes == [module.training for module in model.modules()] and keys == list(model.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _by_key(rows: tuple[ParameterRole, ...]) -> dict[str, tuple[str, int, int]]:
    return {row.key: (row.role, row.fan_in, row.fan_out) for row in rows}


def test_fans_and_slices() -> None:
    rows = _by_key(parameter_roles(gpt2_lm(), {"input_ids": ids()}))
    block = "transformer.h.1"
    assert rows[f"{block}.attn.c_attn.weight[:, 0:64]"] == ("query", D, D)
    assert rows[f"{block}.attn.c_attn.weight[:, 128:192]"] == ("value", D, D)
    assert rows[f"{block}.attn.c_attn.bias[64:128]"] == ("key_bias", 1, D)
    assert rows[f"{block}.mlp.c_fc.weight"] == ("mlp_in", D, 4 * D)
    assert rows[f"{block}.mlp.c_proj.weight"] == ("mlp_out", 4 * D, D)
    assert rows[f"{block}.mlp.c_fc.bias"] == ("mlp_in_bias", 1, 4 * D)
    assert rows["transformer.wte.weight"] == ("token_embedding", 1, D)
    model, batch, *_ = CASES["llama, grouped heads"]()
    sizes = read_roles(model, batch)
    assert (sizes.d_model, sizes.n_heads, sizes.n_kv_heads) == (D, 4, 2)
    rows = _by_key(sizes.roles)
    assert rows["model.layers.0.self_attn.k_proj.weight"] == ("key", D, D // 2)
    assert rows["model.layers.0.mlp.gate_proj.weight"] == ("gate", D, 128)
    assert rows["lm_head.weight"] == ("head", D, VOCABULARY)
    model, batch, *_ = CASES["vit classifier"]()
    rows = _by_key(parameter_roles(model, batch))
    assert rows["vit.embeddings.patch_embeddings.projection.weight"] == ("patch_embedding", 3 * 8 * 8, D)
    assert rows["vit.embeddings.cls_token"] == ("class_token", 1, D)
    model, batch, *_ = CASES["t5 encoder"]()
    rows = _by_key(parameter_roles(model, batch))
    assert rows["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == ("relative_position", 1, 4)
    model, batch, *_ = CASES["patch classifier of raw parameters"]()
    rows = _by_key(parameter_roles(model, batch))
    assert rows["embed"] == ("patch_embedding", 4, 32) and rows["positions"] == ("position_embedding", 1, 32)


def test_only_a_shared_table_is_tied() -> None:
    assert [row.parameter for row in parameter_roles(gpt2_lm(), {"input_ids": ids()}) if row.tied] == [
        "transformer.wte.weight"
    ]
    model, batch, *_ = CASES["llama, grouped heads"]()
    assert not any(row.tied for row in parameter_roles(model, batch))


def test_ids_in_ascending_order_are_still_tokens() -> None:
    rows = _by_key(parameter_roles(gpt2_lm(), {"input_ids": torch.arange(12).expand(2, 12)}))
    assert rows["transformer.wte.weight"][0] == "token_embedding"
    assert rows["transformer.wpe.weight"][0] == "position_embedding"


def test_branch_exits() -> None:
    model, batch, *_ = CASES["torch encoder"]()
    assert read_roles(model, batch).exits == (
        "layers.0.self_attn",
        "layers.0.linear2",
        "layers.1.self_attn",
        "layers.1.linear2",
    )


def t5(**options: Any) -> nn.Module:
    return hf(
        "T5Config",
        "T5ForConditionalGeneration",
        d_model=D,
        d_kv=16,
        num_layers=2,
        num_heads=4,
        d_ff=128,
        vocab_size=VOCABULARY,
        **options,
    )


def test_a_decoder_with_cross_attention() -> None:
    batch = {"input_ids": ids(), "decoder_input_ids": ids()}
    rows = parameter_roles(t5(), batch)
    leaves = {"q": "query", "k": "key", "v": "value", "o": "output", "wi": "mlp_in", "wo": "mlp_out"}
    overrides = {f"decoder.block.*.{leaf}.weight": role for leaf, role in leaves.items()}
    assert parameter_roles(t5(), batch, overrides=overrides) == rows
    decoder = [row for row in rows if row.parameter.startswith("decoder.block.1.")]
    assert {row.layer for row in decoder} == {3}
    assert sum(row.role == "query" for row in decoder) == 2
    assert _by_key(tuple(decoder))["decoder.block.1.layer.2.DenseReluDense.wo.weight"] == ("mlp_out", 128, D)
    assert next(row for row in rows if row.role == "token_embedding").tied


class Odd(nn.Module):
    """A model around torch's encoder with parts to misuse."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, D)
            self.encoder = encoder()
            self.head = nn.Linear(D, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(tokens)))
        return out


def test_without_a_role() -> None:
    model = Odd()
    model.extra = nn.Parameter(torch.zeros(3, 5))
    message = (
        r"'extra' of shape \(3, 5\) has no role: the forward pass of this batch does not use it; "
        r"give it one with overrides=\{'extra': ROLE\}"
    )
    with pytest.raises(ModelError, match=message):
        parameter_roles(model, ids())
    rows = parameter_roles(model, ids(), overrides={"ext*": "head_hidden"})
    assert _by_key(rows)["extra"] == ("head_hidden", 5, 3)


def test_with_two_roles() -> None:
    model = Odd()
    model.head = nn.Linear(D, D, bias=False)
    model.head.weight = model.encoder.layers[0].self_attn.out_proj.weight
    with pytest.raises(ModelError, match=r"out_proj\.weight' has two roles, 'output' and 'head'; settle it with overr"):
        parameter_roles(model, ids())
    rows = parameter_roles(model, ids(), overrides={"encoder.layers.0.self_attn.out_proj.weight": "output"})
    assert sum(row.role == "head" for row in rows) == 0
    # a layer that shares its weights with another is no conflict
    model = Odd()
    model.encoder.layers[1].linear1.weight = model.encoder.layers[0].linear1.weight
    assert sum(row.role == "mlp_in" for row in parameter_roles(model, ids())) == 1
    model.encoder.layers[0].self_attn.out_proj.weight = nn.Parameter(torch.randn(D, D))
    model.encoder.layers[1].linear1 = nn.Linear(D, D)
    model.encoder.layers[1].linear2 = nn.Linear(D, D)
    model.encoder.layers[1].linear2.weight = model.encoder.layers[0].self_attn.out_proj.weight
    with pytest.raises(ModelError, match=r"out_proj\.weight' has two roles, 'output' and 'mlp_out'"):
        parameter_roles(model, ids())


def test_overrides() -> None:
    model = Odd()
    with pytest.raises(ModelError, match=r"'haed\.weight' matches no parameter; did you mean 'head\.weight'"):
        parameter_roles(model, ids(), overrides={"haed.weight": "head"})
    with pytest.raises(ModelError, match=r"names no role 'heads'; did you mean 'head'"):
        parameter_roles(model, ids(), overrides={"head.weight": "heads"})
    with pytest.raises(ModelError, match=r"'head\.weight' is given two roles by overrides: 'head' .* 'head_hidden'"):
        parameter_roles(model, ids(), overrides={"head.*t": "head", "head.weight": "head_hidden"})
    rows = _by_key(parameter_roles(model, ids(), overrides={"head.weight": "head_hidden"}))
    assert rows["head.weight"] == ("head_hidden", D, 10) and rows["head.bias"] == ("head_hidden_bias", 1, 10)


def test_parameters_that_are_not_here() -> None:
    model = Odd()
    model.extra = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'extra' has dtype torch\.int8; accepted: floating point \(not quantised\)"):
        parameter_roles(model, ids())
    model.extra = nn.Parameter(torch.zeros(0))
    with pytest.raises(ModelError, match="'extra' is sharded or empty"):
        parameter_roles(model, ids())
    model.extra = nn.Parameter(torch.zeros(3))
    model.extra.placements = ()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="'extra' is sharded or empty"):
        parameter_roles(model, ids())
    model.extra = nn.Parameter(torch.full((3,), torch.nan))
    with pytest.raises(ModelError, match="'extra' holds NaN"):
        parameter_roles(model, ids())
    flat = torch.zeros(6)
    model.extra, model.more = nn.Parameter(flat[:3]), nn.Parameter(flat[3:])
    with pytest.raises(ModelError, match="'extra' and 'more' are slices of one storage"):
        parameter_roles(model, ids())
    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ModelError, match=r"'embed\.weight' is on the meta device"):
        parameter_roles(model, ids())


def test_batches_and_blocks_that_do_not_fit() -> None:
    with pytest.raises(BatchError, match=r"does not run on the batch: IndexError"):
        parameter_roles(Odd(), ids() + VOCABULARY)
    with pytest.raises(ModelError, match=r"no module 'encoder\.layer'; did you mean 'encoder\.layers'"):
        parameter_roles(Odd(), ids(), blocks="encoder.layer")
    assert parameter_roles(Odd(), ids(), blocks="encoder.layers") == parameter_roles(Odd(), ids())
    assert parameter_roles(Odd(), (ids(),)) == parameter_roles(Odd(), {"tokens": ids()})
    swin = hf("SwinConfig", "SwinModel", image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4])
    with pytest.raises(NotCoveredError, match="the width of the stream changes from 32 to 64"):
        parameter_roles(swin, pixels())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = transformers.utils.logging
    level = logger.get_verbosity()
    logger.set_verbosity_error()
    yield
    logger.set_verbosity(level)
