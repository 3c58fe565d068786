"""The command that reproduces a paper's figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fathometer import papers
from fathometer.cli.reproduce import reproduce
from fathometer.errors import SpecError

runner = CliRunner()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(papers.SIZES, "small", replace(papers.SMALL, run_depth=300, grid=12))
    monkeypatch.chdir(tmp_path)
    yield


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(reproduce)
    done = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_without_a_name_everything_is_listed() -> None:
    text = run()
    assert all(name in text for name in papers.ITEMS) and len(papers.ITEMS) >= 8
    assert json.loads(run("--json")) == {name: item.about for name, item in papers.ITEMS.items()}


def test_an_item_is_computed_drawn_and_written(tmp_path: Path) -> None:
    text = run("apjn/growth", "--out", "here")
    assert "closed form" in text and "Written: here/result.json, here/figure.png" in text
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["figure.png", "result.json"]
    data = json.loads((tmp_path / "here" / "result.json").read_text())
    assert data["item"] == "apjn/growth" and data["about"]["size"]["run_depth"] == 300
    assert json.loads(run("apjn/growth", "--json"))["runs"] == data["runs"]
    assert (tmp_path / "fathometer-reproduce" / "apjn-growth" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing to reproduce called 'apjn/grwoth'; did you mean 'apjn/growth'"):
        run("apjn/grwoth")
    with pytest.raises(SpecError, match="there is no size 'smal'; did you mean 'small'"):
        run("apjn/growth", "--size", "smal")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="'file' is a file; name a folder with --out"):
        run("apjn/growth", "--out", "file")
