"""Specs as data: round trips, strict errors, and changing one number."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathometer.errors import SpecError
from fathometer.spec import (
    ACTIVATIONS,
    FAMILIES,
    FIELDS,
    MLP,
    Block,
    Branch,
    CrossAttention,
    Derf,
    DyT,
    GatedMLP,
    Head,
    LayerNorm,
    Network,
    PatchStem,
    Pointwise,
    PointwiseNorm,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    TokenStem,
    Transformer,
    dumps_json,
    dumps_toml,
    from_dict,
    load,
    preset,
    scaled_field,
    to_dict,
    with_field,
)

SCALES = Scales(query=0.5, key=0.6, value=0.7, output=0.8, mlp_in=0.9, mlp_out=1.1)
SINE = Pointwise(name="sine", value=np.sin, derivative=np.cos)


def build(**changes: Any) -> Transformer:
    arguments: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "norm": LayerNorm(),
        "scales": SCALES,
    } | changes
    return Transformer.uniform(**arguments)


# Round trips.

scales = st.floats(0.0, 1e3, allow_nan=False)
positive = st.floats(1e-6, 1e3)
norms = st.one_of(
    st.builds(LayerNorm, gain=scales),
    st.builds(RMSNorm, gain=scales),
    st.builds(DyT, alpha=positive, gain=scales),
    st.builds(Derf, alpha=positive, shift=st.floats(-3, 3), gain=scales),
)
activations = st.sampled_from(ACTIVATIONS)
heads = st.sampled_from([(1, None), (8, 2), (6, 6)])
branches: st.SearchStrategy[Branch] = st.one_of(
    st.builds(
        lambda pair, **rest: SelfAttention(n_heads=pair[0], n_kv_heads=pair[1], **rest),
        pair=heads,
        query=scales,
        key=scales,
        value=scales,
        output=scales,
        value_bias=scales,
        causal=st.booleans(),
        qk_norm=st.booleans(),
        score_multiplier=scales,
    ),
    st.builds(MLP, mlp_in=scales, mlp_out=scales, activation=activations, in_bias=scales, ratio=positive),
    st.builds(GatedMLP, gate=scales, mlp_in=scales, mlp_out=scales, activation=activations),
)
slots = st.one_of(st.none(), norms)
sublayers = st.builds(
    Sublayer,
    branch=branches,
    input_norm=slots,
    output_norm=slots,
    stream_norm=slots,
    skip_scale=scales,
    branch_scale=scales,
)
blocks = st.builds(Block, sublayers=st.lists(sublayers, min_size=1, max_size=3).map(tuple), repeat=st.integers(1, 500))
transformers = st.builds(
    Transformer, blocks=st.lists(blocks, min_size=1, max_size=3).map(tuple), d_model=st.integers(1, 10_000)
)


@settings(max_examples=150, deadline=None)
@given(spec=transformers)
def test_files_lose_nothing(spec: Transformer, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert from_dict(json.loads(dumps_json(spec))) == spec
    assert from_dict(to_dict(spec)) == spec
    folder = tmp_path_factory.mktemp("spec")
    for suffix, dumps in ((".json", dumps_json), (".toml", dumps_toml)):
        path = folder / f"spec{suffix}"
        path.write_text(dumps(spec), encoding="utf-8")
        assert load(path) == spec


@pytest.mark.parametrize("dumps", [dumps_json, dumps_toml])
def test_grids_survive_files(dumps: Any, tmp_path: Path) -> None:
    spec = with_field(build(), "mlp_in", np.array([[0.1, 0.2], [0.3, 0.4]]))
    path = tmp_path / ("spec.json" if dumps is dumps_json else "spec.toml")
    path.write_text(dumps(spec), encoding="utf-8")
    branch = load(path).blocks[0].sublayers[1].branch
    assert isinstance(branch, MLP)
    np.testing.assert_array_equal(branch.mlp_in, [[0.1, 0.2], [0.3, 0.4]])


def test_a_minimal_file_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(
        """
        d_model = 64
        [[blocks]]
        repeat = 12
        [[blocks.sublayers]]
        input_norm = { kind = "derf", alpha = 0.5 }
        branch = { kind = "mlp", mlp_in = 1, mlp_out = 0.5, activation = "relu" }
        """
    )
    spec = load(path)
    assert spec.n_layers == 12
    assert spec.blocks[0].sublayers[0] == Sublayer.pre_norm(
        MLP(mlp_in=1.0, mlp_out=0.5, activation="relu"), Derf(alpha=0.5)
    )


def test_python_functions_have_no_file_form() -> None:
    for spec in (build(activation=SINE), build(norm=PointwiseNorm(function=SINE))):
        for dumps in (dumps_json, dumps_toml):
            with pytest.raises(SpecError, match="pointwise function cannot be written to a file"):
                dumps(spec)


# Strict files.


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return a valid document with one entry changed, or removed where ``value`` is ``...``."""
    document: dict[str, Any] = to_dict(build(norm=Derf(alpha=0.5)))
    *parents, last = path.split(".")
    owner: Any = document
    for key in parents:
        owner = owner[int(key)] if key.isdigit() else owner[key]
    if value is ...:
        del owner[last]
    else:
        owner[last] = value
    return document


MLP_PATH, ATTENTION_PATH, NORM_PATH = (
    "blocks.0.sublayers.1.branch",
    "blocks.0.sublayers.0.branch",
    "blocks.0.sublayers.0.input_norm",
)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "spec must be a table; got list"),
        ({"d_model": 8}, "spec.blocks must be a non-empty list; got None"),
        (changed("blocks", []), r"spec\.blocks must be a non-empty list; got \[\]"),
        (changed("blocks", [3]), r"blocks\[0\] must be a table; got int"),
        (changed("widht", 8), r"spec has no field 'widht'.* Accepted: blocks, d_model, schema"),
        (changed("d_modle", 8), "spec has no field 'd_modle'; did you mean 'd_model'"),
        (changed("d_model", ...), "spec lacks d_model"),
        (changed("d_model", "8"), "spec: Transformer.d_model must be an integer; got '8'"),
        (changed("d_model", 8.0), "spec: Transformer.d_model must be an integer; got 8.0"),
        (changed("d_model", 0), r"spec: Transformer\.d_model must lie in \[1, 10000000\]; got 0"),
        (changed("schema", 2), "spec: Transformer.schema 2 is not known to this version; accepted: 1"),
        (changed("blocks.0.repeat", True), r"blocks\[0\]: Block\.repeat must be an integer; got True"),
        (changed("blocks.0.sublayers", {}), r"blocks\[0\]\.sublayers must be a non-empty list"),
        (changed("blocks.0.sublayers.1.branch", ...), r"blocks\[0\]\.sublayers\[1\] lacks branch"),
        (changed("blocks.0.sublayers.1.skip_scale", -1), r"sublayers\[1\]: Sublayer\.skip_scale must be >= 0; got -1"),
        (
            changed(MLP_PATH, "mlp"),
            r"sublayers\[1\]\.branch must be a table with a 'kind'; got 'mlp'\. Accepted: cross_attention, gated",
        ),
        (changed(f"{MLP_PATH}.kind", "mpl"), "branch.kind 'mpl' is unknown; did you mean 'mlp'"),
        (changed(f"{MLP_PATH}.mlp_inn", 1), r"branch has no field 'mlp_inn'; did you mean 'mlp_in'\?"),
        (changed(f"{MLP_PATH}.mlp_in", ...), r"sublayers\[1\]\.branch lacks mlp_in"),
        (changed(f"{MLP_PATH}.mlp_in", "1"), r"branch: MLP\.mlp_in must be a number or an array of numbers; got '1'"),
        (changed(f"{MLP_PATH}.mlp_in", True), r"MLP\.mlp_in must be a number or an array of numbers; got True"),
        (changed(f"{MLP_PATH}.mlp_in", [1, "a"]), r"MLP\.mlp_in must be a number or an array of numbers; got \["),
        (changed(f"{MLP_PATH}.mlp_in", math.nan), r"MLP\.mlp_in must be finite; got nan"),
        (changed(f"{MLP_PATH}.mlp_in", [1.0, -2.0]), r"MLP\.mlp_in must be >= 0; got -2 at index \(1,\)"),
        (changed(f"{MLP_PATH}.ratio", 0), r"MLP\.ratio must be > 0; got 0"),
        (changed(f"{MLP_PATH}.activation", "rellu"), r"MLP\.activation 'rellu' is unknown; did you mean 'relu'\?"),
        (changed(f"{ATTENTION_PATH}.n_kv_heads", 3), r"n_heads must be a multiple of n_kv_heads; got 4 and 3"),
        (changed(f"{ATTENTION_PATH}.n_heads", 0), r"SelfAttention\.n_heads must lie in \[1, 10000000\]; got 0"),
        (
            changed(f"{NORM_PATH}.kind", "layernorm"),
            "input_norm.kind 'layernorm' is unknown; did you mean 'layer_norm'",
        ),
        (changed(f"{NORM_PATH}.alpha", 0), r"input_norm: Derf\.alpha must be > 0; got 0"),
        (changed(f"{NORM_PATH}.beta", 0), r"input_norm has no field 'beta'.* Accepted: alpha, gain, kind, shift"),
    ],
)
def test_documents_are_read_strictly(document: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_dict(document)


@pytest.mark.parametrize("field", ["causal", "qk_norm"])
def test_flags_are_booleans(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field} must be true or false; got 'no'"):
        from_dict(changed(f"{ATTENTION_PATH}.{field}", "no"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spec.yaml", "", r"must end in \.toml or \.json; got '.*spec\.yaml'"),
        ("spec.toml", "d_model = = 3", "is not valid TOML"),
        ("spec.json", "{", "is not valid JSON"),
        ("spec.json", "[" * 100_000, "is not valid JSON"),
        ("spec.json", '{"d_model": NaN}', "must be"),
    ],
)
def test_broken_files_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no spec file at"):
        load(tmp_path / "spec.toml")


# Construction.


def test_empty_stacks_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Block\.sublayers must not be empty"):
        Block(sublayers=())
    with pytest.raises(SpecError, match=r"Transformer\.blocks must not be empty"):
        Transformer(blocks=(), d_model=4)


def test_too_many_blocks_are_refused() -> None:
    block = dataclasses.replace(build().blocks[0], repeat=6_000_000)
    with pytest.raises(SpecError, match="has 12000000 blocks; at most 10000000"):
        Transformer(blocks=(block, block), d_model=64)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="d_model must be a multiple of n_heads; got 64 and 5"):
        build(n_heads=5)


@pytest.mark.parametrize("depth", [0, -1, 2.0, True])
def test_depths_are_positive_integers(depth: Any) -> None:
    with pytest.raises(SpecError, match="n_layers must be a positive integer; got"):
        build().with_depth(depth)


@pytest.mark.parametrize(("arguments", "message"), [({"name": "a b"}, "identifier"), ({"value": 3}, "callable; got 3")])
def test_pointwise_functions_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(SINE, **arguments)


def test_depth_cuts_and_extends_the_last_blocks() -> None:
    first, last = build(n_layers=3).blocks[0], build(n_layers=4, norm=RMSNorm()).blocks[0]
    spec = Transformer(blocks=(first, last), d_model=64)
    assert [b.repeat for b in spec.with_depth(2).blocks] == [2]
    assert [b.repeat for b in spec.with_depth(5).blocks] == [3, 2]
    assert [b.repeat for b in spec.with_depth(9).blocks] == [3, 6]
    assert spec.with_depth(7) == spec
    assert len(list(spec.layers())) == spec.n_layers == 7


def test_scales_from_one_standard_deviation() -> None:
    scales = Scales.from_std(0.02, d_model=768, d_mlp=3072, gated=True)
    assert scales.query == pytest.approx(0.554256, abs=1e-6)
    assert scales.mlp_out == pytest.approx(1.108513, abs=1e-6)
    assert scales.gate == scales.mlp_in == scales.query
    assert Scales.from_std(0.02, d_model=768, d_mlp=3072).gate is None


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().d_model = 3  # type: ignore[misc]


# One number of a spec.


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_can_be_set_and_scaled(field: str) -> None:
    norm = Derf(alpha=0.5, shift=0.1)
    gated = build(norm=norm, scales=dataclasses.replace(SCALES, gate=1.0))
    plain = build(norm=norm)
    spec = with_field(plain if field in ("in_bias", "out_bias") else gated, field, 0.25)
    doubled = scaled_field(spec, field, 2.0)
    written = "branch_scale" if field == "residual_strength" else field
    assert json.dumps(to_dict(doubled)).count(f'"{written}": 0.5') >= 1
    assert doubled == with_field(spec, field, 0.5)
    assert spec != doubled


def test_residual_strength_preserves_norms() -> None:
    spec = with_field(build(), "residual_strength", np.array([0.0, 0.6, 1.0]))
    for sublayer in spec.blocks[0].sublayers:
        np.testing.assert_allclose(sublayer.skip_scale, [1.0, 0.8, 0.0], atol=1e-15)
        np.testing.assert_array_equal(sublayer.branch_scale, [0.0, 0.6, 1.0])
    for bad in (-0.1, 1.0001, np.array([0.5, np.nan])):
        with pytest.raises(SpecError, match=r"residual_strength must lie in \[0, 1\]"):
            with_field(build(), "residual_strength", bad)
    with pytest.raises(SpecError, match="belongs to skip_scale"):
        scaled_field(build(), "residual_strength", 0.5)  # plain sums have none to scale


def test_a_scope_restricts_a_field() -> None:
    attention, mlp = with_field(build(), "mlp.branch_scale", 0.3).blocks[0].sublayers
    assert (attention.branch_scale, mlp.branch_scale) == (1.0, 0.3)
    attention, mlp = with_field(build(norm=DyT(alpha=1.0)), "attention.alpha", 0.3).blocks[0].sublayers
    assert attention.input_norm == DyT(alpha=0.3)
    assert mlp.input_norm == DyT(alpha=1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp_inn", r"a spec has no field 'mlp_inn'; did you mean 'mlp_in'\?"),
        ("mpl.branch_scale", "a spec has no field 'mpl.branch_scale'; did you mean 'mlp.branch_scale'"),
        ("alpha", "no sublayer of this spec has the field 'alpha'"),
        ("gate", "no sublayer of this spec has the field 'gate'"),
        ("attention.mlp_in", "no sublayer of this spec has the field 'attention.mlp_in'"),
    ],
)
def test_unknown_fields_are_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        with_field(build(), name, 1.0)


def test_values_of_fields_are_checked() -> None:
    with pytest.raises(SpecError, match=r"MLP\.mlp_in must be >= 0; got -1"):
        with_field(build(), "mlp_in", -1.0)


# Families.


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_usual_size(family: str) -> None:
    row, spec = FAMILIES[family], preset(family)
    assert (spec.n_layers, spec.d_model, spec.is_causal) == (row.n_layers, row.d_model, row.causal)
    assert preset(family, n_layers=3, d_model=2 * row.d_head).n_layers == 3
    attention, mlp = spec.blocks[0].sublayers
    assert isinstance(attention.branch, SelfAttention)
    assert attention.branch.query == pytest.approx(row.std * row.d_model**0.5)
    assert isinstance(mlp.branch, GatedMLP if row.gated else MLP)
    assert mlp.branch.activation == row.activation


def test_gpt2_scales_its_output_matrices_with_depth() -> None:
    shallow, deep = (preset("gpt2", n_layers=n).blocks[0].sublayers[1].branch for n in (12, 48))
    assert isinstance(shallow, MLP)
    assert isinstance(deep, MLP)
    assert shallow.mlp_out == pytest.approx(2 * deep.mlp_out)
    assert shallow.mlp_out == pytest.approx(0.02 * (4 * 768) ** 0.5 / 24**0.5)
    assert shallow.mlp_in == deep.mlp_in


def test_bert_is_post_norm() -> None:
    first = preset("bert").blocks[0].sublayers[0]
    assert first.input_norm is None
    assert first.stream_norm == LayerNorm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt3"}, r"no preset 'gpt3'; did you mean 'gpt2'\?"),
        ({"family": "gpt2", "d_model": 100}, "d_model of 'gpt2' must be a multiple of 64; got 100"),
        ({"family": "gpt2", "n_layers": 0}, r"Block\.repeat must lie in \[1, 10000000\]; got 0"),
    ],
)
def test_impossible_presets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        preset(**arguments)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"stem": 3}, r"Network\.stem must be a TokenStem or PatchStem; got int"),
        ({"trunk": 4}, r"Network\.trunk must be a Transformer; got int"),
        ({"head": LayerNorm()}, r"Network\.head must be a Head; got LayerNorm"),
        (
            {
                "trunk": Transformer(
                    blocks=(Block(sublayers=(Sublayer(branch=CrossAttention(query=1, key=1, value=1, output=1)),)),),
                    d_model=8,
                )
            },
            "reads a memory; build an EncoderDecoder",
        ),
        ({"stem": PatchStem(patch=1.0), "head": Head(tied=True)}, "a PatchStem has none"),
    ],
)
def test_networks_of_wrong_parts_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Network(**{"stem": TokenStem(token=1.0), "trunk": preset("gpt2", n_layers=1), **parts})


def test_networks_have_no_file_form() -> None:
    network = Network(stem=TokenStem(token=1.0), trunk=preset("gpt2", n_layers=1))
    for write in (dumps_json, dumps_toml):
        with pytest.raises(SpecError, match="holds a Transformer or an EncoderDecoder; got Network; write its trunk"):
            write(network)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=r"got Block$"):
            write(network.trunk.blocks[0])  # type: ignore[arg-type]
