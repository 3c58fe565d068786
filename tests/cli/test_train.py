"""``fathometer train``: a short run and what it says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fathometer.cli.app import app
from fathometer.errors import BatchError, SpecError

runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})
SHORT = ["--layers", "2", "--width", "64", "--steps", "6", "--warmup", "2", "--tokens", "16", "--batch", "2"]


def test_a_run_is_judged_by_the_frequencies_of_bytes() -> None:
    done = runner.invoke(app, ["train", "preset:gpt2", *SHORT, "--seeds", "2"])
    assert done.exit_code == 0, done.output
    assert "own scales: causal bytes of pydoc topics" in done.output
    assert "below zero is learned from context" in done.output


def test_attention_without_a_mask_fills_in_bytes(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    arguments = ["--scheme", "xavier", "--file", str(tmp_path / "text.txt"), "--json", "--recompute"]
    found = json.loads(runner.invoke(app, ["train", "preset:bert", *SHORT, *arguments]).output)
    assert found["objective"] == "masked"
    (run,) = found["runs"]
    assert run["status"] == "ok" and len(run["losses"]) == 6


def test_bad_input(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("a" * 2000)
    for arguments, error, message in (
        (["--task", "vision"], SpecError, "no task 'vision'"),
        (["--seeds", "0"], SpecError, "--seeds must be at least 1"),
        (["--file", str(tmp_path / "one.txt")], BatchError, "one"),
    ):
        with pytest.raises(error, match=message):
            runner.invoke(app, ["train", "preset:gpt2", *SHORT, *arguments], catch_exceptions=False)
