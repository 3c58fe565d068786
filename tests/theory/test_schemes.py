"""Initialisation schemes: worked numbers, laws of the predicted curves, a simulation, and bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.cli.app import app
from fathometer.errors import DomainError, SpecError
from fathometer.models import draw_weights, reference_network, tokens_with_gram
from fathometer.observables import predict
from fathometer.prescription import SCHEMES, apply_scheme, compare_schemes, scheme_options
from fathometer.propagation import propagate
from fathometer.spec import (
    MLP,
    GatedMLP,
    LayerNorm,
    Placement,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    Transformer,
    preset,
    with_field,
)

N_TOKENS, COSINE = 64, 0.2
PRE, POST = Sublayer.pre_norm, Sublayer.post_norm
PLACEMENTS = pytest.mark.parametrize("placement", [PRE, POST], ids=["pre", "post"])


def stack(
    n_layers: int,
    placement: Placement = PRE,
    *,
    d_model: int = 128,
    n_heads: int = 4,
    norm: Any = LayerNorm(),  # noqa: B008
    gate: float | None = None,
    **options: Any,
) -> Transformer:
    """Return a stack whose own scales, all of them unusual, a scheme must replace."""
    scales = Scales(query=0.3, key=3.1, value=0.7, output=0.6, mlp_in=0.9, mlp_out=1.7, gate=gate)
    options = {"activation": "relu", **options}
    return Transformer.uniform(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        norm=norm,
        scales=scales,
        placement=placement,
        **options,
    )


def sums(spec: Transformer, *, n_tokens: int = N_TOKENS, cosine: float = COSINE) -> np.ndarray[Any, Any]:
    """Return the second moment after every residual sum, in front of a norm there."""
    trajectory = propagate(spec, n_tokens=n_tokens, q=1.0, p=cosine, closure=DEFAULT_CLOSURE)
    skips = np.array([s.skip_scale for block in spec.layers() for s in block.sublayers])
    return np.asarray(skips**2 * trajectory.q[:-1] + trajectory.added_q)


def refined(spec: Transformer, **options: Any) -> Transformer:
    return apply_scheme(spec, "deepscalelm", **{"r0": COSINE, "n_tokens": N_TOKENS, **options}).spec


def test_published_recurrence_gives_the_worked_numbers() -> None:
    plan = apply_scheme(stack(12), "deepscalelm", r0=0.221, dropout=0.1, reference=True)
    value = np.array([row.std for row in plan.rows if row.role == "value"])
    np.testing.assert_allclose(value[[0, 11]], [0.128913069, 0.091468701], rtol=1e-8)
    correlations = 0.9 / (128 * value**2) ** 2
    np.testing.assert_allclose(correlations[[0, 1, 5, 11]], [0.1989, 0.336953243, 0.641559102, 0.784752168], rtol=5e-9)
    halved = apply_scheme(stack(12), "deepscalelm", r0=0.221, dropout=0.1, reference=True, count="blocks")
    value = np.array([row.std for row in halved.rows if row.role == "output"])
    np.testing.assert_allclose((0.9 / (128 * value**2) ** 2)[[1, 11]], [0.270199027, 0.655640412], rtol=5e-9)
    assert plan.residual == ((math.sqrt(1 - 1 / 6), math.sqrt(1 / 6)),) * 24
    mlp = [row.std for row in plan.rows if row.role.startswith("mlp")]
    np.testing.assert_allclose(mlp, math.sqrt(math.sqrt(0.9 / 2) / 128))


def test_published_recurrence_is_the_limit_of_many_tokens() -> None:
    options = {"r0": 0.221, "dropout": 0.1}
    exact = apply_scheme(stack(24), "deepscalelm", n_tokens=10**6, **options)
    published = apply_scheme(stack(24), "deepscalelm", reference=True, **options)
    np.testing.assert_allclose([r.std for r in exact.rows], [r.std for r in published.rows], rtol=1e-5)
    few = apply_scheme(stack(24), "deepscalelm", n_tokens=16, **options)
    assert few.rows[2].std < 0.97 * published.rows[2].std  # attention to single tokens counts


@PLACEMENTS
@pytest.mark.parametrize("n_layers", [12, 100, 1000])
def test_refined_deepscalelm_keeps_the_second_moment(n_layers: int, placement: Placement) -> None:
    np.testing.assert_allclose(sums(refined(stack(n_layers, placement))), 1.0, rtol=0, atol=1e-6)


@PLACEMENTS
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu", "ratio": 3.0},
        {"activation": "silu", "gate": 1.0, "norm": RMSNorm(), "n_kv_heads": 2, "ratio": 8 / 3},
        {"activation": "relu", "norm": LayerNorm(gain=1.3)},
        {"activation": "tanh", "norm": None},
    ],
    ids=["gelu", "llama", "gain", "no norm"],
)
def test_refined_deepscalelm_on_other_architectures(options: dict[str, Any], placement: Placement) -> None:
    spec = stack(16, placement, **options)
    planned = refined(spec)
    added = propagate(planned, n_tokens=N_TOKENS, q=1.0, p=COSINE, closure=DEFAULT_CLOSURE).added_q
    np.testing.assert_allclose(added, 2 / 16, rtol=1e-9)  # every branch: unit second moment times beta^2
    assert planned.n_layers == 16


def test_causal_masks_are_averaged_over_positions() -> None:
    causal, open_ = stack(12, causal=True), stack(12)
    profile = predict(refined(causal, r0=0.02), n_tokens=N_TOKENS, q=1.0, p=0.02)
    np.testing.assert_allclose(profile.q, 1.0, atol=0.06)
    unmasked = apply_scheme(open_, "deepscalelm", r0=0.02, n_tokens=N_TOKENS)
    masked = apply_scheme(causal, "deepscalelm", r0=0.02, n_tokens=N_TOKENS)
    assert masked.rows[2].std < 0.95 * unmasked.rows[2].std  # early positions see few keys
    alone = apply_scheme(causal, "deepscalelm", r0=0.5, n_tokens=1)
    np.testing.assert_allclose(alone.rows[2].scale, 1.0)


@PLACEMENTS
@pytest.mark.parametrize(("k", "count"), [(2.0, "layers"), (0.5, "layers"), (2.0, "blocks")])
def test_gradients_fall_no_further_than_the_bound(k: float, count: str, placement: Placement) -> None:
    n = 64
    planned = refined(stack(n, placement), k=k, count=count)
    curve = predict(planned, n_tokens=N_TOKENS, q=1.0, p=COSINE).apjn_log
    beta_squared = k / n if count == "layers" else k / (2 * n)
    assert curve[0] >= n * math.log1p(-beta_squared)
    assert curve[0] < 0.2 * n * math.log1p(-beta_squared)  # and the bound says something
    reached = compare_schemes(stack(n, placement), ["deepscalelm"], n_tokens=N_TOKENS, p=COSINE, k=k, count=count)
    np.testing.assert_allclose(reached.rows[0].apjn_log, curve[0], rtol=1e-9)


def test_the_bound_does_not_move_with_depth() -> None:
    falls = [
        compare_schemes(stack(n), ["deepscalelm"], n_tokens=N_TOKENS, p=COSINE).rows[0].apjn_log
        for n in (64, 256, 1024)
    ]
    assert max(falls) - min(falls) < 0.05 and min(falls) > -2


def test_xavier_in_front_of_norms_grows_linearly() -> None:
    # ReLU adds 2/5 * 4 * 2/5 / 2 = 0.32 a layer; attention its gain, which tends to one as tokens align.
    q = propagate(
        apply_scheme(stack(400), "xavier").spec, n_tokens=N_TOKENS, q=1.0, p=COSINE, closure=DEFAULT_CLOSURE
    ).q[::2]
    slope = np.diff(q)
    assert 1.2 < slope[100] < slope[300] < 1.32
    np.testing.assert_allclose(slope[300], slope[399], rtol=2e-3)


def test_simple_deepscalelm_settles_below_one() -> None:
    spec = apply_scheme(stack(64), "deepscalelm-simple", dropout=0.0).spec
    q = propagate(spec, n_tokens=N_TOKENS, q=1.0, p=COSINE, closure=DEFAULT_CLOSURE).q
    assert 0.6 < q[-1] < 0.75


def test_standard_deviations_of_the_other_schemes() -> None:
    llama = stack(8, gate=1.0, activation="silu", n_kv_heads=2, ratio=3.0)
    rows = {row.role: row.std for row in apply_scheme(llama, "xavier").rows[:7]}
    d = 128
    expected = {"query": 2 * d, "key": 1.5 * d, "value": 1.5 * d, "output": 2 * d}
    expected |= dict.fromkeys(("gate", "mlp_in", "mlp_out"), 4 * d)
    assert rows == pytest.approx({role: math.sqrt(2 / fans) for role, fans in expected.items()})
    for name in ("gpt2", "megatron"):
        plan = apply_scheme(llama, name)
        stds = {row.role: row.std for row in plan.rows}
        assert stds == {role: 0.02 / 4 if role in ("output", "mlp_out") else 0.02 for role in expected}
        assert [row.std for row in plan.rows if row.role == "key"] == [0.02] * 8
    layered = [row.std for row in apply_scheme(llama, "ds-init").rows if row.role == "query"]
    np.testing.assert_allclose(layered, d**-0.5 / np.sqrt(np.arange(1, 9)))
    deep = apply_scheme(stack(8, POST), "deepnorm")
    assert deep.residual[0] == (2.0, 1.0) and deep.rows[0].std == pytest.approx(d**-0.5)
    assert deep.rows[2].std == pytest.approx(d**-0.5 / math.sqrt(math.sqrt(64)))
    bare = stack(8, norm=None)
    fixed = {row.role: row.std for row in apply_scheme(bare, "fixup").rows}
    assert fixed["output"] == fixed["mlp_out"] == 0.0
    assert fixed["value"] == pytest.approx(d**-0.5 / 4) and fixed["mlp_in"] == pytest.approx(math.sqrt(2 / d) / 4)
    t_fixed = {row.role: row.std for row in apply_scheme(bare, "t-fixup").rows}
    assert t_fixed["value"] == pytest.approx(0.67 * 8**-0.25 * d**-0.5) and t_fixed["key"] == pytest.approx(d**-0.5)
    decoder = {row.role: row.std for row in apply_scheme(stack(8, norm=None, causal=True), "t-fixup").rows}
    assert decoder["value"] == pytest.approx(72**-0.25 * d**-0.5)


def test_gpt2_scheme_is_the_preset() -> None:
    plan = apply_scheme(preset("gpt2"), "gpt2")
    assert len(plan.spec.blocks) == 1
    assert same_scales(plan.spec, preset("gpt2"))


def same_scales(a: Transformer, b: Transformer) -> bool:
    scales = [
        [getattr(s.branch, name) for block in spec.layers() for s in block.sublayers for name in s.branch.scale_names]
        for spec in (a, b)
    ]
    return bool(np.allclose(*scales, rtol=1e-12))


@pytest.mark.parametrize("name", ["skipinit", "rezero"])
def test_silent_branches_say_so(name: str) -> None:
    plan = apply_scheme(stack(6), name)
    assert {branch for _, branch in plan.residual} == {0.0}
    assert any("gradients to their weights vanish" in note for note in plan.notes)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_plan_keeps_the_architecture_and_agrees_with_its_spec(name: str) -> None:
    placement, norm = (POST, LayerNorm()) if name == "deepnorm" else (PRE, None if "fixup" in name else LayerNorm())
    spec = with_field(stack(5, placement, norm=norm), "output_bias", 0.3)
    given = {"r0": COSINE, "n_tokens": N_TOKENS}
    plan = apply_scheme(spec, name, **{key: value for key, value in given.items() if key in scheme_options(name)})
    layers = list(plan.spec.layers())
    assert len(layers) == 5 and len(plan.residual) == 10 and len(plan.rows) == 5 * 6
    for row in plan.rows:
        sublayer = layers[row.layer].sublayers[row.sublayer]
        assert getattr(sublayer.branch, row.role) == row.scale
        assert row.scale == pytest.approx(row.std * math.sqrt(512 if row.role == "mlp_out" else 128))
        assert (sublayer.skip_scale, sublayer.branch_scale) == plan.residual[2 * row.layer + row.sublayer]
    attention, mlp = layers[0].sublayers
    assert isinstance(attention.branch, SelfAttention) and isinstance(mlp.branch, MLP)
    assert (attention.input_norm, attention.stream_norm) == (
        spec.blocks[0].sublayers[0].input_norm,
        spec.blocks[0].sublayers[0].stream_norm,
    )
    assert attention.branch.output_bias == 0.0 and any("Biases" in note for note in plan.notes)
    assert plan.to_dict()["rows"][0]["role"] == "query"


def test_comparison_keeps_the_order_and_agrees_with_predict() -> None:
    spec = stack(24, activation="gelu", d_model=256)
    assert [row.scheme for row in compare_schemes(spec, n_tokens=N_TOKENS, p=COSINE).rows] == list(SCHEMES)
    names = ["xavier", "deepnorm", "deepscalelm", "ds-init"]
    table = compare_schemes(spec, names, n_tokens=N_TOKENS, p=0.3, q=1.5)
    assert [row.scheme for row in table.rows] == names
    undefined = table.rows[1]
    assert undefined.status == "undefined" and "post-norm" in undefined.reason and math.isnan(undefined.apjn_log)
    assert table.to_dict()["rows"][1]["q_final"] is None
    for row in (table.rows[0], table.rows[2], table.rows[3]):
        given = {"r0": 0.2, "n_tokens": N_TOKENS} if row.scheme == "deepscalelm" else {}
        profile = predict(apply_scheme(spec, row.scheme, **given).spec, n_tokens=N_TOKENS, q=1.5, p=0.3)
        assert row.q_final == pytest.approx(profile.q[-1])
        assert row.apjn_log == pytest.approx(profile.apjn_log[0])
        assert row.gradient_log == pytest.approx(profile.gradient_log[0])
        assert row.cosine_final == pytest.approx(profile.cosine[-1])
        steps = [np.max(np.abs(np.diff(log))) for log in (np.log(profile.q), profile.apjn_log)]
        assert row.largest_step == pytest.approx(max(steps))


def test_comparison_of_causal_and_of_exploding_stacks() -> None:
    causal = stack(4, causal=True)
    row = compare_schemes(causal, ["gpt2"], n_tokens=16, p=0.3).rows[0]
    profile = predict(apply_scheme(causal, "gpt2").spec, n_tokens=16, q=1.0, p=0.3)
    assert row.apjn_log == pytest.approx(profile.apjn_log[0]) and row.cosine_final == pytest.approx(profile.cosine[-1])
    assert row.q_final == pytest.approx(profile.q[-1])
    exploding = compare_schemes(stack(900, norm=None), ["xavier", "t-fixup"], n_tokens=N_TOKENS, p=COSINE).rows
    assert [row.status for row in exploding] == ["overflow", "ok"]
    assert "overflows at sublayer" in exploding[0].reason


def test_comparisons_of_what_the_theory_does_not_cover_are_rows() -> None:
    """Without norms, causal stacks of growing variance leave the range of the averages, or overflow."""
    spec = with_field(stack(40, norm=None, causal=True), "score_multiplier", 3.0)
    rows = {row.scheme: row for row in compare_schemes(spec, n_tokens=6, p=0.2).rows}
    assert len(rows) == len(SCHEMES) and {row.status for row in rows.values()} >= {"ok", "undefined", "not covered"}
    assert rows["xavier"].status == "not covered" and "nats" in rows["xavier"].reason
    assert rows["deepnorm"].status == "undefined" and rows["fixup"].status == "ok"
    assert all(math.isnan(row.q_final) == (row.status != "ok") for row in rows.values())
    exploding = with_field(stack(900, norm=None, causal=True), "score_multiplier", 0.0)
    (row,) = compare_schemes(exploding, ["xavier"], n_tokens=4, p=0.2).rows
    assert row.status == "overflow" and "overflows at sublayer" in row.reason


@pytest.mark.parametrize(
    ("count", "lowest", "limit"), [("layers", "e^-2.043", "e^-k = 0.1353"), ("blocks", "e^-1.011", "e^-0.5k = 0.3679")]
)
def test_the_stated_limit_of_gradients_counts_as_the_scheme_does(count: str, lowest: str, limit: str) -> None:
    """48 layers, k = 2: (1 - 2/48)^48 tends to e^-2, (1 - 2/96)^48 to e^-1."""
    notes = apply_scheme(preset("bert", n_layers=48), "deepscalelm-simple", count=count).notes
    assert lowest in notes[1] and limit in notes[1]


def test_every_architecture_kind_is_scaled() -> None:
    planned = refined(preset("llama", n_layers=4, d_model=256), r0=0.3)
    assert isinstance(planned.blocks[0].sublayers[1].branch, GatedMLP)
    first, last = planned.blocks[0].sublayers[0].branch, planned.blocks[-1].sublayers[0].branch
    assert isinstance(first, SelfAttention) and isinstance(last, SelfAttention)
    assert first.query == pytest.approx(1.0) and first.value > last.value > 1.0
    sandwich = apply_scheme(stack(4, Sublayer.sandwich), "deepscalelm", r0=COSINE, n_tokens=N_TOKENS)
    assert any("undoes the scales" in note for note in sandwich.notes)
    np.testing.assert_allclose(sums(sandwich.spec), 1.0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("deepscalem", {}, SpecError, "did you mean 'deepscalelm'?"),
        ("deepscalelm", {"r0": 0.2, "n_token": 4}, SpecError, "no option 'n_token'; did you mean 'n_tokens'?"),
        ("xavier", {"std": 1.0}, SpecError, "no option 'std'; it has none"),
        ("deepscalelm", {}, SpecError, "needs r0"),
        ("deepscalelm", {"r0": 0.2}, SpecError, "needs n_tokens, unless reference=True"),
        ("deepscalelm", {"r0": 1.2, "n_tokens": 4}, DomainError, r"r0 must lie in \[0, 1\]; got 1.2"),
        ("deepscalelm", {"r0": math.nan, "n_tokens": 4}, DomainError, "r0 must lie in"),
        ("deepscalelm", {"r0": 0.2, "n_tokens": 0}, DomainError, "n_tokens must be an integer >= 1"),
        ("deepscalelm", {"r0": 0.2, "n_tokens": 4, "dropout": 1.0}, DomainError, r"dropout must lie in \[0, 1\)"),
        ("deepscalelm-simple", {"dropout": -0.1}, DomainError, "dropout must lie in"),
        ("deepscalelm-simple", {"k": 0.0}, DomainError, "k must be positive"),
        ("deepscalelm-simple", {"k": 8.0}, DomainError, "must be below one; got 1 with k = 8, N = 8 layers"),
        ("deepscalelm-simple", {"alpha": 0.0}, DomainError, "must be below one"),
        ("deepscalelm-simple", {"alpha": -1.0}, DomainError, "alpha must be finite and >= 0"),
        ("deepscalelm-simple", {"count": "layer"}, SpecError, "did you mean 'layers'?"),
        ("deepscalelm", {"r0": 0.0, "reference": True}, DomainError, "diverges at r0 = 0"),
        ("gpt2", {"std": 0.0}, DomainError, "std must be positive"),
        ("ds-init", {"alpha": 2.0}, DomainError, r"alpha must lie in \(0, 1\]"),
        ("deepnorm", {}, SpecError, "post-norm stacks"),
        ("fixup", {}, SpecError, "stacks without norms"),
        ("t-fixup", {}, SpecError, "stacks without norms"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        apply_scheme(stack(8), name, **options)


def test_bad_specs() -> None:
    with pytest.raises(SpecError, match=r"single numbers; spec.blocks\[0\].* is an array of shape \(3,\)"):
        apply_scheme(with_field(stack(8), "gain", np.ones(3)), "xavier")
    with pytest.raises(SpecError, match="no gated MLP"):
        apply_scheme(stack(8, gate=1.0), "deepscalelm", r0=0.2, reference=True)
    silent = stack(8).map_sublayers(
        lambda s: dataclasses.replace(s, branch=dataclasses.replace(s.branch, centred=True)) if s.is_attention else s
    )
    with pytest.raises(DomainError, match="layer 0 puts out nothing to scale up"):
        apply_scheme(silent, "deepscalelm", r0=1.0, n_tokens=4)
    with pytest.raises(SpecError, match="none of these schemes has an option 'kk'"):
        compare_schemes(stack(8), n_tokens=4, p=0.1, kk=2)
    with pytest.raises(DomainError, match="Did you pass a cosine"):
        compare_schemes(stack(8), n_tokens=4, p=1.1)


@PLACEMENTS
def test_random_networks_keep_the_second_moment(placement: Placement) -> None:
    # d_model 256, 48 layers: 96 sublayers over the width allow a few percent of drift, four draws as much scatter.
    spec = refined(stack(48, placement, d_model=256, n_heads=4), n_tokens=32)
    model = reference_network(spec)
    seen: list[float] = []
    for block in model.blocks:
        for sublayer in block.sublayers:
            if placement is POST:
                sublayer.stream_norm.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].square().mean())))
            else:
                sublayer.register_forward_hook(lambda _, __, out: seen.append(float(out.square().mean())))
    gram = COSINE + (1 - COSINE) * np.eye(32)
    with torch.no_grad():
        for seed in range(4):
            draw_weights(model, seed)
            model(tokens_with_gram(gram, d_model=256, batch=2, seed=seed))
    np.testing.assert_allclose(np.reshape(seen, (4, 96)).mean(axis=0), 1.0, atol=0.1)


def test_command_line_prints_schemes() -> None:
    runner = CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"})
    arguments = ["prescribe", "preset:bert", "--layers", "16", "--tokens", "32"]
    shown = runner.invoke(app, [*arguments, "--scheme", "deepscalelm"])
    assert shown.exit_code == 0, shown.output
    assert "value, output" in shown.output and "12-15" in shown.output and "beta^2 = 0.125" in shown.output
    dumped = runner.invoke(app, [*arguments, "--scheme", "deepscalelm", "--r0", "0.2", "--reference", "--json"])
    rows = json.loads(dumped.output)["rows"]
    assert len(rows) == 16 * 6 and rows[2]["role"] == "value" and rows[2]["scale"] == pytest.approx(0.2**-0.25)
    compared = runner.invoke(app, [*arguments, "--compare"])
    assert "ds-init" in compared.output and "fixup: undefined" in compared.output
    table = json.loads(runner.invoke(app, [*arguments, "--compare", "--json"]).output)
    assert [row["scheme"] for row in table["rows"]] == list(SCHEMES) and table["q"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scheme", "gpt3"], "did you mean 'gpt2'?"),
        (["--scheme", "gpt2", "--k", "2"], "no option 'k'"),
        (["--scheme", "gpt2", "--compare"], "give one"),
        (["--layers", "3"], "--layers belongs to --scheme or --compare"),
        (["--compare", "--q", "0"], "q must be positive"),
    ],
)
def test_command_line_refuses_what_makes_no_sense(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["prescribe", "preset:vit", *arguments])
    assert result.exit_code and isinstance(result.exception, (SpecError, DomainError))
    assert says in str(result.exception)
