"""``initialize`` by name on real architectures."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from typer.testing import CliRunner

import fathometer as fm
from fathometer.application import DoubleScalingWarning, emit, insert_multipliers, multiplier_table
from fathometer.application.inside import read_model
from fathometer.cli.app import app
from fathometer.errors import BatchError, DomainError, ModelError, NotCoveredError, SpecError
from fathometer.measurement.batches import default_batch
from fathometer.models import reference_network

SMALL: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4}


def gpt2(**changes: Any) -> torch.nn.Module:
    config = {
        "n_layer": 6,
        "n_embd": 128,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return tr.GPT2LMHeadModel(tr.GPT2Config(**(config | changes)))


def bert() -> torch.nn.Module:
    return tr.BertForMaskedLM(
        tr.BertConfig(
            **SMALL, intermediate_size=512, vocab_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )


def llama() -> torch.nn.Module:
    return tr.LlamaForCausalLM(tr.LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=344, vocab_size=256))


def vit() -> torch.nn.Module:
    return tr.ViTForImageClassification(
        tr.ViTConfig(
            **SMALL, intermediate_size=512, image_size=32, patch_size=8, hidden_dropout_prob=0.0, num_labels=500
        )
    )


def t5() -> torch.nn.Module:
    return tr.T5EncoderModel(
        tr.T5Config(num_layers=6, d_model=128, num_heads=4, d_kv=32, d_ff=512, vocab_size=256, dropout_rate=0.0)
    )


@pytest.mark.parametrize("build", [gpt2, bert, llama, vit, t5])
def test_deepscalelm_starts_stream_and_logits_at_one_and_is_idempotent(build: Any) -> None:
    torch.manual_seed(0)
    model = build()
    keys = list(model.state_dict())
    fm.initialize(model, "deepscalelm", seed=1)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    table = multiplier_table(model)
    done = fm.initialize(model, "deepscalelm", seed=1)
    assert list(model.state_dict()) == keys
    assert multiplier_table(model) == table
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, first[key], rtol=0, atol=0)
    batch = default_batch(model)
    found = fm.measure(model, batch, seeds=1)
    assert np.all((found.q > 0.7) & (found.q < 1.4)), found.q
    assert abs(found.apjn_log).max() < 5.5
    with torch.no_grad():
        out = model.eval()(**batch.inputs)
    if "logits" in out and build is not vit:  # of a ViT the logits of two class tokens, nearly equal
        assert 0.6 < float(out.logits.var()) < 1.6
    done.remove()
    assert multiplier_table(model) == {}


def test_a_file_of_weights_needs_its_multipliers() -> None:
    model, other, batch = gpt2(), gpt2(), {"input_ids": torch.randint(256, (2, 32))}
    fm.initialize(model, "deepscalelm", batch)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        assert not torch.allclose(other.eval()(**batch).logits, wanted, rtol=0.1)
        insert_multipliers(other, multiplier_table(model))
        torch.testing.assert_close(other(**batch).logits, wanted)
    with pytest.raises(ModelError, match="no module 'nowhere'"):
        insert_multipliers(other, {"nowhere": 1.0})


def test_dropout_is_read_off_the_blocks() -> None:
    model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
    done = fm.initialize(model, "deepscalelm")
    assert done.plan.spec.blocks[0].sublayers[0].dropout == 0.1
    token = next(row for row in done.ends if row.parameter.role == "token_embedding")
    assert token.std == pytest.approx(np.sqrt(0.9 / 2))
    assert "dropout = 0.1 is the rate" in done.table()


def test_other_schemes_leave_the_ends_alone() -> None:
    model = gpt2()
    before = model.transformer.wte.weight.detach().clone()
    done = fm.initialize(model, "gpt2", std=0.03)
    torch.testing.assert_close(model.transformer.wte.weight.detach(), before, rtol=0, atol=0)
    assert done.ends == () and done.head_multipliers == ()
    assert float(model.transformer.h[0].attn.c_attn.weight.detach().std()) == pytest.approx(0.03, rel=0.02)


def test_code_that_scales_with_depth_is_warned_of() -> None:
    with pytest.warns(DoubleScalingWarning, match="scale_attn_by_inverse_layer_idx"):
        fm.initialize(gpt2(scale_attn_by_inverse_layer_idx=True, attn_implementation="eager"), "deepscalelm")
    granite = tr.GraniteForCausalLM(
        tr.GraniteConfig(**SMALL, num_key_value_heads=4, intermediate_size=344, vocab_size=256, residual_multiplier=0.3)
    )
    with pytest.warns(DoubleScalingWarning, match=r"0\.3 on the branch"):
        fm.initialize(granite, "deepscalelm")
    plain = tr.GraniteForCausalLM(
        tr.GraniteConfig(**SMALL, num_key_value_heads=4, intermediate_size=344, vocab_size=256)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DoubleScalingWarning)
        fm.initialize(gpt2(), "deepscalelm")
        fm.initialize(plain, "deepscalelm")


def test_a_failed_call_leaves_the_model_as_it_was() -> None:
    model = gpt2()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DomainError, match="beta"):
        fm.initialize(model, "deepscalelm", k=100.0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_bad_input() -> None:
    with pytest.raises(SpecError, match=r"there is no scheme 'deepscale'.*did you mean 'deepscalelm'"):
        fm.initialize(gpt2(), "deepscale")
    with pytest.raises(SpecError, match=r"no option 'dorpout'.*dropout"):
        fm.initialize(gpt2(), "deepscalelm", dorpout=0.1)
    with pytest.raises((DomainError, SpecError), match="dropout must lie"):
        fm.initialize(gpt2(), "deepscalelm", dropout=1.0)
    with pytest.raises(BatchError, match="a batch is needed"):
        fm.initialize(reference_network(fm.preset("gpt2", n_layers=1)), "xavier")
    quantised = gpt2()
    quantised.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(
        torch.zeros(128, 512, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight.*int8"):
        fm.initialize(quantised, "deepscalelm")


def test_queries_keys_and_values_head_by_head_are_refused() -> None:
    config = tr.GPTNeoXConfig(**SMALL, intermediate_size=512, vocab_size=256, use_parallel_residual=False)
    with pytest.raises(NotCoveredError, match="does not put out all queries, then all keys"):
        fm.initialize(tr.GPTNeoXModel(config), "deepscalelm")
    config = tr.Phi3Config(
        **SMALL, intermediate_size=344, vocab_size=256, pad_token_id=0, eos_token_id=0, bos_token_id=0
    )
    fm.initialize(tr.Phi3Model(config), "deepscalelm")


def test_reading_a_model_leaves_its_multipliers_removable() -> None:
    model, batch = gpt2(), {"input_ids": torch.randint(256, (2, 32))}
    done = fm.initialize(model, "deepscalelm", batch)
    table = multiplier_table(model)
    read_model(model, batch)
    with pytest.raises(SpecError, match="stacks without norms"):
        fm.initialize(model, "fixup", batch)
    assert multiplier_table(model) == table
    done.remove()
    assert multiplier_table(model) == {}


def test_frozen_parameters_stay_and_padding_stays_zero() -> None:
    model = bert()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    kept = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    done = fm.initialize(model, "deepscalelm")
    for parameter, before in zip((p for p in model.parameters() if not p.requires_grad), kept, strict=True):
        torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=0)
    assert "frozen parameters are left as they are: bert.encoder.layer.0.intermediate.dense.weight" in done.table()
    assert float(model.bert.embeddings.word_embeddings.weight.detach()[0].abs().max()) == 0.0
    with pytest.raises(ModelError, match="is frozen"):
        fm.initialize(bert().requires_grad_(False), "xavier")


def test_scores_that_the_code_does_not_divide_start_at_unit_variance() -> None:
    """T5 has no 1/sqrt(d_head); without a smaller query and key attention would condense and gradients explode."""
    model = t5()
    done = fm.initialize(model, "deepscalelm")
    query = next(row for row in done.blocks.rows if row.role == "query")
    assert query.std == pytest.approx(128**-0.5 * 32**-0.25, rel=1e-3)
    assert "m the score multiplier" in done.table()
    assert abs(fm.measure(model, default_batch(model), seeds=2).apjn_log).max() < 2.0


def test_a_table_says_why() -> None:
    text = fm.initialize(gpt2(), "deepscalelm").table()
    assert "query, key, value, output: queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/a_v)" in text
    assert "lambda^2 = " in text and "embeddings, heads" not in text


def test_width_scalings_by_name_need_their_base() -> None:
    with pytest.raises(SpecError, match="give base_width and base_stds"):
        fm.initialize(gpt2(), "maximal-update")
    with pytest.raises(SpecError, match=r"no option 'base_with'.*base_width"):
        fm.initialize(gpt2(), "hybrid", base_with=64)
    done = fm.initialize(gpt2(), "maximal-update", base_width=64, base_stds="read")
    with pytest.raises(SpecError, match="width scaling"):
        emit(done)


def test_emitted_code_names_stem_and_logits() -> None:
    done = fm.initialize(gpt2(), "deepscalelm")
    code = emit(done)
    assert "nn.init.normal_(model.transformer.wte.weight, std=0.707107)  # token_embedding" in code
    assert "# logits: 0.125 * model.lm_head(...)" in code
    assert "# token_embedding: std 0.707107" in emit(done, "megatron")


def test_emitted_code_has_the_effect_of_the_call() -> None:
    model = bert()
    code = emit(fm.initialize(model, "deepscalelm"))
    again = bert()
    exec(code, {"model": again})
    for (name, mine), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if mine.ndim > 1:
            ratio = float(theirs.detach().std() / mine.detach().std())
            assert ratio == pytest.approx(1, abs=8 / mine.numel() ** 0.5), name
    assert float(again.bert.embeddings.word_embeddings.weight.detach()[0].abs().max()) == 0.0


def test_the_command_line(tmp_path: Any) -> None:
    run = CliRunner().invoke
    common = ["prescribe", "hf:gpt2", "--scheme", "deepscalelm", "--layers", "3", "--tokens", "32"]
    shown = run(app, [*common, "--apply", str(tmp_path / "weights.pt")])
    assert shown.exit_code == 0, shown.output
    assert "transformer" not in shown.output and "wte.weight" in shown.output
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert saved["scheme"] == "deepscalelm" and "h.2.mlp" in "".join(saved["multipliers"])
    as_json = json.loads(run(app, [*common, "--json"]).output)
    assert {row["role"] for row in as_json["ends"]} == {"token_embedding", "position_embedding"}
    assert run(app, [*common, "--emit", "torchtitan"]).output.startswith("# a method of TransformerBlock")
    refused = run(app, [*common, "--emit", "jax"])
    assert refused.exit_code != 0
    assert run(app, ["prescribe", "preset:gpt2", "--scheme", "xavier", "--apply", "x.pt"]).exit_code != 0
