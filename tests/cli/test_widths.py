"""The commands about widths: the table of a model, the coordinate check and the transfer check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fathometer.cli.app import app
from fathometer.errors import ModelError, SpecError

runner = CliRunner()

MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


def build(width):
    return Model(width)
"""


def run(*arguments: str) -> str:
    done = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_width_table_of_a_model() -> None:
    pytest.importorskip("transformers")
    arguments = ("widths", "hf:gpt2", "--scheme", "maximal-update", "--base-width", "128", "--layers", "2")
    text = run(*arguments)
    assert text.startswith("maximal-update, adamw: width 128 -> 768") and "mlp_in" in text
    data = json.loads(run(*arguments, "--json"))
    rows = {(row["role"], row["in_blocks"]): row["factors"] for row in data["rows"]}
    assert rows["mlp_out", True]["rate"] == pytest.approx(1 / 6) and rows["token_embedding", False]["rate"] == 1.0
    sgd = json.loads(run(*arguments[:3], "0.5", *arguments[4:], "--optimizer", "sgd", "--json"))
    assert sgd["scheme"]["s"] == 0.5 and sgd["optimizer"] == "sgd"
    with pytest.raises(SpecError, match="there is no scaling scheme 'mup'"):
        run("widths", "hf:gpt2", "--scheme", "mup", "--layers", "2")


def test_coordinate_check_writes_its_figure(tmp_path: Path) -> None:
    common = ("coordinate-check", "digits", "--widths", "16,32", "--seeds", "2", "--steps", "1")
    text = run(*common, "--schemes", "uniform,hybrid", "--out", str(tmp_path / "here"))
    assert "hybrid, 1 step" in text and "-0.25" in text
    assert (tmp_path / "here" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "here" / "result.json").read_text())
    assert [one["scheme"] for one in found] == ["uniform", "hybrid"] and found[1]["protocol"]["lr"] == 1e-5
    with pytest.raises(SpecError, match="--widths must be whole numbers separated by commas; got 'wide'"):
        run("coordinate-check", "digits", "--widths", "wide")


def test_transfer_check_of_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    common = (
        *("transfer-check", f"{tmp_path / 'mine.py'}:build", "--widths", "8,16", "--schemes", "uniform,1.0"),
        *("--steps", "5", "--seeds", "2", "--count", "3", "--tokens", "6", "--samples", "2", "--fixed", "n_heads"),
        *("--lowest", "0.001", "--journal", str(tmp_path / "journal.json")),
    )
    data = json.loads(run(*common, "--json"))
    assert data["schemes"] == ["uniform", "s = 1"] and data["rates"] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert data["widths"] == [8, 16] and data["protocol"]["base_width"] == 8
    text = run(*common, "--out", str(tmp_path / "out"))  # from the journal
    assert "shift in factors of 2" in text and (tmp_path / "out" / "figure.png").exists()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["losses"] == data["losses"]


def test_a_shift_that_is_not_known_has_no_error_bar() -> None:
    """Rates so small that both optima lie at the upper end of the grid."""
    small = ("--lowest", "1e-5", "--count", "3", "--steps", "20", "--seeds", "2", "--schemes", "hybrid")
    text = run("transfer-check", "digits", "--widths", "16,32", *small)
    assert "+0 (edge)" in text and "+-" not in text


def test_a_fixed_number_of_heads_has_no_one_power_behind_blocks(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    small = ("--widths", "8,16", "--seeds", "2", "--steps", "1", "--schemes", "1.0", "--fixed", "n_heads")
    text = run("coordinate-check", f"{tmp_path / 'mine.py'}:build", *small)
    rows = {line.split("  ")[0].strip(): line.split()[-1] for line in text.splitlines() if "+-" in line}
    assert rows["attention logits"] == "+0.50" and rows["block 1"] == "-"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no family of models 'langauge'; did you mean 'language'"):
        run("transfer-check", "langauge")
    with pytest.raises(SpecError, match="--count must be at least 3; got 2"):
        run("transfer-check", "language", "--count", "2")
    with pytest.raises(ModelError, match=r"there is no file 'none\.py'"):
        run("transfer-check", "none.py:build", "--widths", "8,16")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file; name a folder with --out"):
        run(
            "coordinate-check",
            "digits",
            "--widths",
            "16,32",
            "--schemes",
            "0",
            "--seeds",
            "2",
            "--out",
            str(tmp_path / "file"),
        )
