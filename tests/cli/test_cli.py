"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fathometer as fm
from fathometer.cli.app import app
from fathometer.diagnosis import UnhealthyError
from fathometer.errors import SpecError
from fathometer.report import OutputError
from fathometer.spec import dumps_toml, preset
from fathometer.testing import assert_healthy

FILE = """
import torch
from torch import nn

def build(layers=8):
    layer = lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    return nn.Sequential(*[layer() for _ in range(layers)])

def copied(layers=8):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

def zero():
    model = build()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fathometer", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "spec.toml").write_text(dumps_toml(preset("vit", n_layers=6)))
    return tmp_path


def test_diagnose_writes_a_report(folder: Path) -> None:
    done = run(
        "diagnose", "mine.py:build", "--batch", "tokens:64x16", "--seeds", "2", "--out", "out", "--strict", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "Healthy" in done.stdout
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"report.html", "report.json", "overview.png"} <= names
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["healthy"] and report["about"]["n_layers"] == 8


def test_strict_exit_code_for_an_unhealthy_model(folder: Path) -> None:
    done = run(
        "diagnose",
        "mine.py:copied",
        "--batch",
        "tokens:64x16",
        "--seeds",
        "1",
        "--strict",
        "--json",
        "--no-forward",
        cwd=folder,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"][0]["name"] == "identical_layers"
    assert "normal_" in report["remedies"][0]["snippet"]


def test_predict_prints_and_emits_json(folder: Path) -> None:
    done = run("predict", "spec.toml", "--tokens", "196", "--q", "0.27", "--p", "0.11", cwd=folder)
    assert done.returncode == 0 and "exact closure" in done.stdout
    done = run("predict", "preset:bert", "--layers", "4", "--json", cwd=folder)
    profile = json.loads(done.stdout)
    assert len(profile["curves"]["q"]) == 5


def test_prescribe_solves_alpha_by_depth(folder: Path) -> None:
    done = run("prescribe", "preset:vit", "--norm", "derf", "--depths", "12,128", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows[0]["status"] == "ok" and rows[0]["alpha"] > rows[1]["alpha"] > 0.3
    done = run("prescribe", "preset:vit", "--field", "branch_scale", "--match", "pooled", "--value", "4", cwd=folder)
    assert done.returncode == 0 and "branch_scale" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("diagnose", "hf:gtp2"), "did you mean 'gpt2'?"),
        (("diagnose", "mine.py:build"), "a batch is needed for 'mine.py:build'"),
        (("diagnose", "mine.py:build", "--batch", "tokens:63x16"), "does not run on 2 x 16 Gaussian tokens"),
        (("diagnose", "mine.py:build", "--batch", "nowhere.pt"), "there is no file 'nowhere.pt'"),
        (("diagnose", "mine.py:zero", "--batch", "tokens:64x16"), "no randomness to propagate"),
        (("diagnose", "mine.py:build", "--batch", "tokens:64x16", "--closure", "anealed"), "did you mean 'annealed'?"),
        (("diagnose", "hf:gpt2", "--layers", "100000000000000000000"), "must lie in [1, 1000000]"),
        (("diagnose", "hf:gpt2", "--layers", "2", "--tokens", "2000"), "2000 tokens are more than the 1024 positions"),
        (("prescribe", "preset:vit"), "no sublayer of this spec has the field 'alpha'"),
        (("prescribe", "preset:vit", "--norm", "derff"), "accepted: dyt, derf"),
        (("prescribe", "preset:vit", "--norm", "derf", "--depths", "a"), "integers separated by commas; got 'a'"),
        (("reproduce", "apjn/forwards"), "did you mean 'apjn/forward'?"),
        (("predict", "nowhere.toml"), "no spec file at 'nowhere.toml'"),
        (("predict", "preset:vit", "--layers", "0"), "must lie in [1, 10000000]; got 0"),
        (("predict", "preset:vit", "--p", "1.2"), "Did you pass a cosine?"),
        (("predict", "preset:vit", "--tokens", "0"), "n_tokens must be an integer >= 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_missing_extra_is_named(folder: Path) -> None:
    (folder / "transformers.py").write_text("raise ImportError('planted')\n")
    done = run("diagnose", "hf:gpt2", "--layers", "2", cwd=folder)
    assert done.returncode == 2
    assert "pip install 'fathometer[hf]'" in done.stderr


def test_helper_for_test_suites(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        import mine
    finally:
        sys.path.remove(str(folder))
    tokens = fm.equiangular_tokens(n_tokens=12, d_model=64, q=1.0, p=0.2, batch=1, seed=0)
    assert assert_healthy(mine.build(), tokens, seeds=1).healthy
    with pytest.raises(UnhealthyError, match="Identical layers: 8 of 8 blocks hold the same weights"):
        assert_healthy(mine.copied(), tokens, seeds=1)


def test_a_file_of_weights_that_cannot_be_written_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("fathometer.models.load_model", build)
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a folder; name a file with --apply"),
        (tmp_path / "file" / "deeper" / "weights.pt", "cannot write .*file' is a file"),
    ):
        with pytest.raises(SpecError, match=message):
            prescribe("--apply", str(path))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(SpecError, match="no permission to write in"):
            prescribe("--apply", str(tmp_path / "weights.pt"))
    with pytest.raises(SpecError, match="--emit prints code and --json the table; give one"):
        prescribe("--emit", "torch", "--json")


def test_weights_that_fail_to_be_written_leave_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match=r"cannot write .*weights\.pt': No space left"):
        prescribe(
            "--batch", "tokens:64x8", "--apply", str(tmp_path / "weights.pt"), spec=f"{tmp_path / 'mine.py'}:build"
        )
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def prescribe(*arguments: str, spec: str = "hf:gpt2") -> None:
    CliRunner().invoke(app, ["prescribe", spec, "--scheme", "xavier", *arguments], catch_exceptions=False)
