"""``fathometer predict``: curves and moments in a terminal or as JSON, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fathometer.cli.app import app
from fathometer.cli.predict import predict
from fathometer.errors import DomainError, SpecError
from fathometer.observables import predict_encoder_decoder
from fathometer.observables.model_moments import moments
from fathometer.spec import CrossAttention, EncoderDecoder, dumps_toml, preset

runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(predict)
    done = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_moments_of_chosen_layers_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(dumps_toml(preset("vit", n_layers=6)))
    text = run(str(tmp_path / "spec.toml"), "--view", "moments", "--tokens", "16", "--layer", "1,4")
    rows = [line.split("│") for line in text.splitlines() if "mlp.activation" in line]
    wanted = moments(preset("vit", n_layers=6), n_tokens=16, q=1.0, p=0.4)["mlp.activation"]
    assert [(row[1].strip(), row[3].strip(), row[4].strip()) for row in rows] == [
        (str(layer), f"{wanted.mean[layer]:.4g}", f"{wanted.q[layer]:.4g}") for layer in (1, 4)
    ]
    assert "attention.scores" in text and "correlation" in text
    assert run("preset:vit", "--view", "moments", "--tokens", "16").count("mlp.activation") == 3


def test_moments_as_json_are_those_of_the_function() -> None:
    given = ("--tokens", "16", "--q", "0.9", "--p", "0.2", "--top-alignment", "0.5", "--closure", "annealed")
    found = json.loads(run("preset:bert", "--layers", "3", "--view", "moments", "--json", *given))
    wanted = moments(preset("bert", n_layers=3), n_tokens=16, q=0.9, p=0.2, top_alignment=0.5, closure="annealed")
    assert found == json.loads(wanted.to_json())
    assert found["about"]["closure"] == "annealed" and found["components"]["stream"]["gradient_alignment"][-1] == 0.5


def test_what_a_causal_mask_leaves_open_is_null() -> None:
    found = json.loads(run("preset:gpt2", "--layers", "2", "--view", "moments", "--tokens", "8", "--json"))
    query = found["components"]["attention.query"]
    assert query["gradient_log"] == [None, None] and query["q"][0] > 0


def test_curves_are_the_default() -> None:
    text = run("preset:vit", "--layers", "4", "--tokens", "16")
    assert "ln pooled gradient" in text and "Repeating the last block" in text
    assert len(json.loads(run("preset:vit", "--layers", "4", "--tokens", "16", "--json"))["curves"]["q"]) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--view", "moment"], SpecError, "there is no view 'moment'; did you mean 'moments'"),
        (["--layer", "2"], SpecError, "--layer belongs to --view moments"),
        (["--top-alignment", "0.3"], SpecError, "--top-alignment belongs to --view moments"),
        (["--view", "moments", "--layer", "a"], SpecError, "--layer must be integers separated by commas; got 'a'"),
        (["--view", "moments", "--layer", "12"], SpecError, r"layer must lie in \[0, 11\]; got 12"),
        (["--view", "moments", "--p", "3"], DomainError, "Did you pass a cosine"),
        (["--layers", "0"], SpecError, "must lie in"),
    ],
)
def test_mistakes_are_named(arguments: list[str], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run("preset:vit", "--tokens", "16", *arguments)


@pytest.mark.parametrize("view", ["curves", "moments"])
def test_no_torch_is_imported(view: str) -> None:
    code = (
        "import sys; from fathometer.cli.app import app\n"
        f"try: app(['predict', 'preset:vit', '--layers', '3', '--tokens', '8', '--view', '{view}'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'matplotlib', 'xarray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr


def test_an_encoder_decoder_has_curves_of_both_stacks(tmp_path: Path) -> None:
    cross = CrossAttention(query=1.0, key=1.0, value=1.0, output=1.0)
    encoder = preset("bert", n_layers=3)
    block = encoder.blocks[0]
    attention, mlp = block.sublayers
    decoder = replace(
        encoder, blocks=(replace(block, sublayers=(attention, replace(attention, branch=cross), mlp), repeat=2),)
    )
    both = EncoderDecoder(encoder=encoder, decoder=decoder, memory_norm=None)
    path = tmp_path / "both.toml"
    path.write_text(dumps_toml(both))
    found = json.loads(run(str(path), "--tokens", "8", "--memory-tokens", "16", "--json"))
    wanted = predict_encoder_decoder(both, n_tokens=8, q=1.0, p=0.4, n_memory=16, q_memory=1.0, p_memory=0.4)
    for stack, profile in zip(("encoder", "decoder"), wanted, strict=True):
        assert found[stack]["curves"]["q"] == pytest.approx(profile.q.tolist())
    text = run(str(path), "--tokens", "8")
    assert "encoder: 3 blocks, 8 tokens" in text and "decoder: 2 blocks" in text
    with pytest.raises(SpecError, match="--view"):
        run(str(path), "--view", "moments")
    for command in (["predict"], ["prescribe", "--scheme", "deepscalelm", "--k", "0.5"]):
        with pytest.raises(DomainError, match="got 0"):
            CliRunner().invoke(app, [*command, str(path), "--memory-tokens", "0"], catch_exceptions=False)
    with pytest.raises(SpecError, match="--memory-tokens belongs"):
        run("preset:bert", "--memory-tokens", "4")
    prescribed = runner.invoke(app, ["prescribe", str(path), "--scheme", "deepscalelm", "--tokens", "8", "--k", "1"])
    assert prescribed.exit_code == 0, prescribed.output
    assert "encoder: deepscalelm, 3 layers" in prescribed.output and "the gradient at the encoder" in prescribed.output
    as_json = json.loads(runner.invoke(app, ["prescribe", str(path), "--scheme", "xavier", "--json"]).output)
    assert {row["role"] for row in as_json["decoder"]["rows"]} >= {"query", "mlp_out"}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["preset:bert", "--scheme", "xavier", "--closure", "annealed"], "--closure"),
        (["preset:bert", "--compare", "--layers", "2", "--seed", "3"], "--seed"),
        (["hf:gpt2", "--scheme", "xavier", "--q", "2"], "--q"),
        (["preset:bert", "--seed", "3"], "--seed"),
    ],
)
def test_options_that_a_prescription_does_not_read_are_refused(arguments: list[str], option: str) -> None:
    with pytest.raises(SpecError, match=f"{option} is not read by"):
        runner.invoke(app, ["prescribe", *arguments], catch_exceptions=False)
