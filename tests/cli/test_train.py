"""``fathometer train``: a short run and what it says."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from typer.testing import CliRunner

from fathometer._version import __version__
from fathometer.cli.app import app
from fathometer.errors import BatchError, SpecError
from fathometer.observables import predict
from fathometer.spec import preset
from fathometer.training import byte_text, language

runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})
SHORT = ["--layers", "2", "--width", "64", "--steps", "6", "--warmup", "2", "--tokens", "16", "--batch", "2"]


def test_a_run_is_judged_by_the_frequencies_of_bytes() -> None:
    done = runner.invoke(app, ["train", "preset:gpt2", *SHORT, "--seeds", "2"])
    assert done.exit_code == 0, done.output
    assert "own scales: causal bytes of pydoc topics" in done.output
    assert "0 of 2 learned from context: more than 0.1 below" in done.output
    spec, cosine = preset("gpt2", n_layers=2, d_model=64), byte_text().input_collision("causal") / 2
    curves = predict(spec, n_tokens=16, q=1.0, p=cosine).curves
    assert f"q 1 -> {curves['q'][-1]:.4g}, cosine {cosine:.3g} -> {curves['cosine'][-1]:.3g}" in done.output
    assert f"ln J of all blocks {curves['apjn_log'][0]:.4g}" in done.output


def test_an_interrupted_run_is_printed_and_ends_like_one(monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "batch_loss", stop)
    done = runner.invoke(app, ["train", "preset:gpt2", *SHORT, "--seeds", "2"])
    assert done.exit_code == 130 and "interrupted" in done.output and "0.0 " not in done.output
    done = runner.invoke(app, ["train", "preset:gpt2", *SHORT, "--json"])
    assert done.exit_code == 130 and json.loads(done.output)["runs"][0]["status"] == "interrupted"


def test_attention_without_a_mask_fills_in_bytes(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    arguments = ["--scheme", "xavier", "--file", str(tmp_path / "text.txt"), "--json", "--recompute"]
    found = json.loads(runner.invoke(app, ["train", "preset:bert", *SHORT, *arguments]).output)
    about = found["about"]
    assert about["objective"] == "masked" and about["scheme"] == "xavier" and about["rate"] == 1e-3
    assert about["steps"] == 6 and about["seeds"] == [0] and about["version"] == __version__
    assert about["text"]["digest"] == hashlib.sha256((tmp_path / "text.txt").read_bytes()).hexdigest()
    assert about["network"]["trunk"]["blocks"][0]["repeat"] == 2 and about["theory"]["status"] == "ok"
    (run,) = found["runs"]
    assert run["status"] == "ok" and len(run["losses"]) == 6


def test_a_gpu_that_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="--device cuda needs a GPU, and torch finds none here"):
        runner.invoke(app, ["train", "preset:gpt2", *SHORT, "--device", "cuda"], catch_exceptions=False)


def test_bad_input(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("a" * 2000)
    for arguments, error, message in (
        (["--task", "vision"], SpecError, "no task 'vision'"),
        (["--device", "toaster"], SpecError, "--device must be cpu or cuda; got 'toaster'"),
        (["--seeds", "0"], SpecError, "--seeds must be at least 1"),
        (["--file", str(tmp_path / "one.txt")], BatchError, "one"),
    ):
        with pytest.raises(error, match=message):
            runner.invoke(app, ["train", "preset:gpt2", *SHORT, *arguments], catch_exceptions=False)
