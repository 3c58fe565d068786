"""Schemes on encoder-decoders and whole networks: unit second moments in theory and simulation, dropout, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.models import draw_weights, equiangular_tokens, reference_encoder_decoder
from fathometer.observables import backward_encoder_decoder, predict, predict_encoder_decoder
from fathometer.prescription import SCHEMES, apply_scheme, compare_schemes, unit_front_end, unit_stem
from fathometer.propagation import Trajectory, propagate, propagate_encoder_decoder
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    EncoderDecoder,
    GatedMLP,
    Head,
    LayerNorm,
    Network,
    PatchStem,
    Placement,
    SelfAttention,
    Sublayer,
    TokenStem,
    Transformer,
    preset,
    with_field,
)

PRE, POST = Sublayer.pre_norm, Sublayer.post_norm
PLACEMENTS = pytest.mark.parametrize("placement", [PRE, POST], ids=["pre", "post"])
TOKENS = {"n_tokens": 32, "n_memory": 48}
ODD = {"query": 0.3, "key": 3.1, "value": 0.7, "output": 0.6, "n_heads": 4}  # a scheme must replace them


def network(
    n_layers: int, placement: Placement = PRE, *, d_model: int = 128, activation: str = "relu", norm: bool = True
) -> EncoderDecoder:
    used = LayerNorm() if norm else None
    own = placement(SelfAttention(**ODD, attention_dropout=0.1), used)
    mlp = placement(MLP(mlp_in=0.9, mlp_out=1.7, activation=activation), used)
    cross = placement(CrossAttention(**ODD, attention_dropout=0.1), used)
    return EncoderDecoder(
        encoder=Transformer(blocks=(Block(sublayers=(own, mlp), repeat=n_layers),), d_model=d_model),
        decoder=Transformer(blocks=(Block(sublayers=(own, cross, mlp), repeat=n_layers),), d_model=d_model),
        memory_norm=used if placement is PRE else None,
    )


def sums(trajectory: Trajectory) -> np.ndarray[Any, Any]:
    """Return the second moment after every residual sum, in front of a norm there."""
    skips = np.array([s.skip_scale for block in trajectory.spec.layers() for s in block.sublayers])
    return np.asarray(skips**2 * trajectory.q[:-1] + trajectory.added_q)


@PLACEMENTS
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_deepscalelm_keeps_both_stacks_at_unit_second_moment(
    placement: Placement, activation: str, dropout: float
) -> None:
    options = {"r0": 0.2, "r0_memory": 0.4, "dropout": dropout, **TOKENS}
    plan = apply_scheme(network(24, placement, activation=activation), "deepscalelm", **options)
    keep = 1 - dropout
    found = propagate_encoder_decoder(
        plan.spec, **TOKENS, q=1.0, p=0.2 * keep, q_memory=1.0, p_memory=0.4 * keep, closure=DEFAULT_CLOSURE
    )
    for stack in (found.encoder, found.decoder):
        np.testing.assert_allclose(sums(stack), 1.0, atol=1e-9)
        assert all(s.dropout == dropout for block in stack.spec.layers() for s in block.sublayers)
    gradients = backward_encoder_decoder(found)
    share = 2 / 24
    lowest = 48 * math.log1p(-share)  # two attentions a layer
    assert lowest <= gradients.decoder.log_norm[0] < 0.2 * lowest
    pooled = backward_encoder_decoder(found, alignment=1.0).encoder.log_norm
    assert np.max(np.abs(pooled)) < 1.2  # N gradients of weight beta^2, from 32 tokens to 48


@PLACEMENTS
def test_causal_decoders_stay_near_unit_second_moment(placement: Placement) -> None:
    spec = network(24, placement)
    decoder = spec.decoder.map_sublayers(
        lambda s: (
            dataclasses.replace(s, branch=dataclasses.replace(s.branch, causal=True))
            if isinstance(s.branch, SelfAttention)
            else s
        )
    )
    causal = dataclasses.replace(spec, decoder=decoder)
    plan = apply_scheme(causal, "deepscalelm", r0=0.2, dropout=0.1, **TOKENS)
    encoder, masked = predict_encoder_decoder(plan.spec, **TOKENS, q=1.0, p=0.18, q_memory=1.0, p_memory=0.18)
    np.testing.assert_allclose(encoder.q, 1.0, atol=1e-9)
    np.testing.assert_allclose(masked.q, 1.0, atol=0.06)
    open_plan = apply_scheme(spec, "deepscalelm", r0=0.2, dropout=0.1, **TOKENS)
    assert plan.decoder.rows[2].std < 0.95 * open_plan.decoder.rows[2].std  # early positions see few keys
    np.testing.assert_allclose(plan.decoder.rows[6].std, open_plan.decoder.rows[6].std, rtol=0.02)  # of the memory, all


def test_gradients_of_the_encoder_do_not_depend_on_depth() -> None:
    levels = []
    for depth in (24, 96):
        plan = apply_scheme(network(depth), "deepscalelm", r0=0.2, dropout=0.1, **TOKENS)
        found = propagate_encoder_decoder(
            plan.spec, **TOKENS, q=1.0, p=0.18, q_memory=1.0, p_memory=0.18, closure=DEFAULT_CLOSURE
        )
        curves = backward_encoder_decoder(found).encoder.log_norm
        levels.append((curves[-1], curves[0]))
    np.testing.assert_allclose(*levels, atol=0.1)


def test_cross_attention_reads_the_correlation_behind_the_encoder() -> None:
    plan = apply_scheme(network(12), "deepscalelm", r0=0.2, r0_memory=0.3, reference=True)
    layers = list(plan.spec.decoder.layers())
    encoder = [row.std for row in plan.encoder.rows if row.role == "value"]
    r = 1 / (128 * encoder[-1] ** 2) ** 2
    share = 1 / 6
    r = (1 - share) * r + share  # attention, whose output has correlation one
    r = (1 - share) * r + share * relu_cosine(r)
    for layer in layers:
        assert layer.sublayers[1].branch.value == pytest.approx(r**-0.25, rel=1e-9)
    refined = apply_scheme(network(12), "deepscalelm", r0=0.2, r0_memory=0.3, n_tokens=10**6, n_memory=10**6)
    found = list(refined.spec.decoder.layers())[5].sublayers[1].branch.value
    assert found == pytest.approx(r**-0.25, rel=2e-3)


def relu_cosine(r: float) -> float:
    """Return the cosine of two tokens behind a ReLU."""
    return (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / math.pi


@PLACEMENTS
def test_random_encoder_decoders_keep_the_second_moment(placement: Placement) -> None:
    """Means of 9 draws: 4.5 standard errors plus 4 %, of 72 sublayers at width 192."""
    plan = apply_scheme(network(24, placement, d_model=192), "deepscalelm", r0=0.2, dropout=0.1, **TOKENS)
    model = reference_encoder_decoder(plan.spec).train()
    seen: list[float] = []
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks:
            for sublayer in block.sublayers:
                if placement is POST:
                    sublayer.stream_norm.register_forward_pre_hook(
                        lambda _, x: seen.append(float(x[0].square().mean()))
                    )
                else:
                    sublayer.register_forward_hook(lambda _, __, out: seen.append(float(out.square().mean())))
    with torch.no_grad():
        for seed in range(9):
            draw_weights(model, seed)
            torch.manual_seed(seed)
            source, target = (
                equiangular_tokens(n_tokens=n, d_model=192, q=1.0, p=0.18, seed=2 * seed + i)
                for i, n in enumerate((48, 32))
            )
            model(source, target)
    found = np.reshape(seen, (9, 48 + 72))
    error = found.std(axis=0, ddof=1) / 3
    assert np.all(np.abs(found.mean(axis=0) - 1.0) <= 4.5 * error + 0.04)
    assert np.max(error) < 0.05


@PLACEMENTS
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_part_of_the_plan(placement: Placement, causal: bool) -> None:
    spec = Transformer(blocks=network(16, placement).encoder.with_depth(16).blocks, d_model=128).map_sublayers(
        lambda s: dataclasses.replace(s, branch=dataclasses.replace(s.branch, **_masked(s, causal)))
    )
    plan = apply_scheme(spec, "deepscalelm", r0=0.2, n_tokens=32, dropout=0.2)
    assert plan.spec.blocks[0].sublayers[0].dropout == 0.2
    assert plan.spec == apply_scheme(with_field(spec, "dropout", 0.2), "deepscalelm", r0=0.2, n_tokens=32).spec
    if causal:
        profile = predict(plan.spec, n_tokens=32, q=1.0, p=0.16)
        np.testing.assert_allclose(profile.q, 1.0, atol=0.06)
    else:
        found = propagate(plan.spec, n_tokens=32, q=1.0, p=0.16, closure=DEFAULT_CLOSURE)
        np.testing.assert_allclose(sums(found), 1.0, atol=1e-9)
    rows = compare_schemes(spec, ["deepscalelm", "xavier"], n_tokens=32, p=0.2, dropout=0.2).rows
    assert rows[0].q_final == pytest.approx(1.0, abs=0.1 if causal else 0.02)
    plain = compare_schemes(spec, ["xavier"], n_tokens=32, p=0.2).rows[0]
    assert rows[1].cosine_final < plain.cosine_final - 0.01  # masks keep tokens apart


def _masked(sublayer: Sublayer, causal: bool) -> dict[str, bool]:
    return {"causal": causal} if sublayer.is_attention else {}


def test_stems_and_heads_of_text() -> None:
    trunk = preset("gpt2", n_layers=8)
    given = Network(stem=TokenStem(token=0.02, position=0.01, dropout=0.1), trunk=trunk, head=Head(tied=True))
    plan = apply_scheme(given, "deepscalelm", r0=0.02, n_tokens=64, dropout=0.1)
    std = math.sqrt(0.45)
    assert [(row.role, row.std) for row in plan.stem] == [("token_embedding", std), ("position_embedding", std)]
    assert plan.network is not None and plan.network.trunk == plan.spec
    assert plan.network.stem == TokenStem(token=std, position=std, dropout=0.1)
    assert plan.network.head.multiplier == plan.head[0].multiplier == pytest.approx(1 / math.sqrt(768 * 0.45))
    bert = Network(stem=TokenStem(token=1.0, position=1.0, segment=1.0), trunk=preset("bert", n_layers=8))
    bert_plan = apply_scheme(bert, "deepscalelm", r0=0.221, dropout=0.1, reference=True)
    assert bert_plan.stem[2].std == pytest.approx(0.5477, abs=1e-4)
    assert bert_plan.head[0].std == pytest.approx(768**-0.5) and bert_plan.head[0].scale == 1.0
    assert len(bert_plan.to_dict()["stem"]) == 3
    kept = apply_scheme(given, "xavier")
    assert kept.network is not None and kept.network.stem == given.stem and not kept.stem
    assert any("keep their scales" in note for note in kept.notes)
    # What is looked up has unit second moment behind the dropout: simulated with the tables themselves.
    rng = np.random.default_rng(0)
    tables = rng.normal(0, std, (2, 4000, 64)).sum(axis=0)
    mask = (rng.random(tables.shape) > 0.1) / 0.9
    assert np.mean((mask * tables) ** 2) == pytest.approx(1.0, abs=0.02)
    logits = plan.head[0].multiplier * rng.normal(size=(500, 768)) @ rng.normal(0, std, (768, 40))
    assert np.mean(logits**2) == pytest.approx(1.0, abs=0.06)


def test_the_rate_of_a_stem_is_its_own_unless_one_is_asked_for() -> None:
    trunk = preset("gpt2", n_layers=8)
    given = Network(stem=TokenStem(token=0.02, dropout=0.3), trunk=trunk)
    options = {"r0": 0.5, "n_tokens": 16}
    for name in ("deepscalelm", "deepscalelm-simple"):
        only = {} if name == "deepscalelm-simple" else options
        for asked, rate, inside in (({}, 0.3, 0.0), ({"dropout": 0.1}, 0.1, 0.1)):
            plan = apply_scheme(given, name, **only, **asked)
            assert plan.network is not None and plan.network.stem.dropout == rate
            assert plan.stem[0].std == pytest.approx(math.sqrt(1 - rate))
            assert {s.dropout for block in plan.spec.blocks for s in block.sublayers} == {inside}
    own = apply_scheme(given, "deepscalelm", **options)
    assert any("variance 0.7 / n_e" in note for note in own.notes)
    lowered = apply_scheme(trunk, "deepscalelm", r0=0.35, n_tokens=16)  # 0.5 (1 - 0.3): what enters the first block
    assert own.rows == lowered.rows != apply_scheme(trunk, "deepscalelm", **options).rows
    assert apply_scheme(trunk, "deepscalelm", **options, embedding_dropout=0.3).rows == lowered.rows
    mixed = apply_scheme(given, "deepscalelm", **options, dropout=0.1, embedding_dropout=0.2)
    assert mixed.network is not None and mixed.network.stem.dropout == 0.2
    for rate in (1.5, 1.0, -0.1, math.nan):
        with pytest.raises(DomainError, match=r"dropout must lie in \[0, 1\); got"):
            unit_stem(given.stem, dropout=rate)
        with pytest.raises(DomainError, match=r"embedding_dropout must lie in \[0, 1\); got"):
            apply_scheme(trunk, "deepscalelm", **options, embedding_dropout=rate)


def test_stems_of_images_and_sound() -> None:
    trunk = preset("vit", n_layers=6)
    stem = PatchStem(patch=1.0, position=0.02, class_token=0.0)
    options = {"r0": 0.5, "n_tokens": 50, "dropout": 0.2, "input_second_moment": 0.3}
    plan = apply_scheme(Network(stem=stem, trunk=trunk), "deepscalelm", **options, input_fan_in=768)
    std = math.sqrt(0.8 / 2)
    rows = {row.role: row for row in plan.stem}
    assert rows["patch_embedding"].std == pytest.approx(math.sqrt(0.8 / (2 * 768 * 0.3)))
    assert rows["patch_embedding"].scale == pytest.approx(rows["patch_embedding"].std * math.sqrt(768))
    assert rows["position_embedding"].std == rows["class_token"].std == pytest.approx(std)
    assert plan.network is not None and plan.network.stem.dropout == 0.2
    unknown = apply_scheme(Network(stem=stem, trunk=trunk), "deepscalelm-simple", dropout=0.2)
    assert unknown.stem[0].std is None and unknown.stem[0].scale == pytest.approx(std)
    rng = np.random.default_rng(0)
    pixels = rng.normal(0.2, math.sqrt(0.3 - 0.04), (400, 768))
    tokens = pixels @ rng.normal(0, rows["patch_embedding"].std, (768, 512)) + rng.normal(0, std, (400, 512))
    assert np.mean(tokens**2) == pytest.approx(0.8, abs=0.05)  # and dropout divides by 0.8
    front, position = unit_front_end(2.5, dropout=0.1, position=True)
    assert front.multiplier**2 * 2.5 + position.std**2 == pytest.approx(0.9)
    assert unit_front_end(2.5)[0].multiplier == pytest.approx(2.5**-0.5)


def test_other_schemes_on_encoder_decoders() -> None:
    spec = network(6)
    d = 128
    deep = apply_scheme(network(6, POST), "deepnorm")
    assert deep.encoder.residual[0][0] == pytest.approx(0.81 * (6**4 * 6) ** (1 / 16))
    assert deep.decoder.residual[0][0] == pytest.approx(18**0.25)
    assert deep.decoder.rows[6].std == pytest.approx(72**-0.25 * d**-0.5) and deep.decoder.rows[6].role == "value"
    t_fixed = apply_scheme(network(6, norm=False), "t-fixup")
    assert t_fixed.encoder.rows[2].std == pytest.approx(0.67 * 6**-0.25 * d**-0.5)
    assert t_fixed.decoder.rows[2].std == pytest.approx(54**-0.25 * d**-0.5)
    gpt2 = apply_scheme(spec, "gpt2")
    assert gpt2.decoder.rows[3].std == pytest.approx(0.02 / math.sqrt(18))
    for name in SCHEMES:
        made = network(6, POST) if name == "deepnorm" else network(6, norm="fixup" not in name)
        options = {"r0": 0.2, **TOKENS} if name == "deepscalelm" else {}
        plan = apply_scheme(made, name, **options)
        assert len(plan.encoder.rows) == 6 * 6 and len(plan.decoder.rows) == 6 * 10
        assert plan.spec.decoder == plan.decoder.spec and plan.to_dict()["decoder"]["scheme"] == name


def test_memories_of_another_width_have_another_fan_in() -> None:
    spec = network(4)
    narrow = EncoderDecoder(
        encoder=dataclasses.replace(spec.encoder, d_model=64),
        decoder=spec.decoder.map_sublayers(
            lambda s: (
                dataclasses.replace(s, branch=dataclasses.replace(s.branch, d_memory=64))
                if isinstance(s.branch, CrossAttention)
                else s
            )
        ),
    )
    plan = apply_scheme(narrow, "deepscalelm", r0=0.2, **TOKENS)
    rows = {row.role: row for row in plan.decoder.rows[4:8]}
    assert rows["key"].std == pytest.approx(64**-0.5) and rows["query"].std == pytest.approx(128**-0.5)
    assert rows["value"].scale == pytest.approx(rows["output"].scale)
    simple = apply_scheme(narrow, "deepscalelm-simple").decoder.rows
    assert simple[5].std == pytest.approx(64**-0.5) and simple[5].role == "key"
    xavier = apply_scheme(narrow, "xavier").decoder.rows
    assert xavier[6].std == pytest.approx(math.sqrt(2 / 192))


def test_bad_input() -> None:
    spec = network(6)
    with pytest.raises(SpecError, match="needs n_memory, unless reference=True"):
        apply_scheme(spec, "deepscalelm", r0=0.2, n_tokens=8)
    with pytest.raises(SpecError, match="no option 'memory'; did you mean 'n_memory'"):
        apply_scheme(spec, "deepscalelm", r0=0.2, memory=8)
    with pytest.raises(DomainError, match=r"r0_memory must lie in \[0, 1\]; got 1.5"):
        apply_scheme(spec, "deepscalelm", r0=0.2, r0_memory=1.5, **TOKENS)
    with pytest.raises(NotCoveredError, match="propagate_encoder_decoder"):
        apply_scheme(spec.decoder, "deepscalelm", r0=0.2, n_tokens=8)
    with pytest.raises(SpecError, match="for an EncoderDecoder only"):
        apply_scheme(spec.decoder, "deepscalelm", r0=0.2, reference=True)
    with pytest.raises(SpecError, match=r"single numbers; spec.encoder"):
        arrays = dataclasses.replace(spec, encoder=with_field(spec.encoder, "query", np.ones(2)))
        apply_scheme(arrays, "xavier")
    uneven = spec.encoder.map_sublayers(lambda s: dataclasses.replace(s, dropout=0.1 if s.is_attention else 0.2))
    with pytest.raises(SpecError, match=r"different dropout rates, 0.1, 0.2; give one"):
        apply_scheme(uneven, "deepscalelm", r0=0.2, n_tokens=8)
    text = Network(stem=TokenStem(token=1.0), trunk=spec.encoder)
    with pytest.raises(SpecError, match="belong to a PatchStem"):
        apply_scheme(text, "deepscalelm", r0=0.2, n_tokens=8, input_second_moment=2.0)
    image = Network(stem=PatchStem(patch=1.0), trunk=spec.encoder)
    for value in (0.0, math.nan):
        with pytest.raises(DomainError, match="input_second_moment must be positive"):
            apply_scheme(image, "deepscalelm", r0=0.2, n_tokens=8, input_second_moment=value)
        with pytest.raises(DomainError, match="second_moment must be positive"):
            unit_front_end(value)
    with pytest.raises(DomainError, match="input_fan_in must be at least 1"):
        apply_scheme(image, "deepscalelm", r0=0.2, n_tokens=8, input_fan_in=0)
    with pytest.raises(DomainError, match=r"dropout must lie in \[0, 1\); got 1"):
        unit_front_end(1.0, dropout=1)
    gated = network(6)
    gated = dataclasses.replace(
        gated,
        encoder=gated.encoder.map_sublayers(
            lambda s: s if s.is_attention else dataclasses.replace(s, branch=GatedMLP(gate=1, mlp_in=1, mlp_out=1))
        ),
    )
    with pytest.raises(SpecError, match="no gated MLP"):
        apply_scheme(gated, "deepscalelm", r0=0.2, reference=True)
