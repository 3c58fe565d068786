"""The command that maps theory over two fields."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fathometer.cli.diagram import diagram as command
from fathometer.diagrams import diagram
from fathometer.errors import SpecError
from fathometer.plotting import diagram as pictures
from fathometer.prescription import critical_line
from fathometer.report import OutputError
from fathometer.spec import dumps_toml, preset

runner = CliRunner()
MAP = ("preset:bert", "--x", "mlp_in=0.5:8:7", "--y", "output=0.1:1:5")


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(command)
    done = runner.invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_files_are_written_and_hold_the_diagram(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    text = run(*MAP, "--observable", "angle_exponent,phase", "--observable", "q", "--tokens", "64", "--cosine", "0.2")
    folder = tmp_path / "fathometer-diagram"
    assert sorted(path.name for path in folder.iterdir()) == ["diagram.json", "diagram.nc", "figure.png"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    expected = diagram(
        preset("bert"),
        x=("mlp_in", np.linspace(0.5, 8, 7)),
        y=("output", np.linspace(0.1, 1, 5)),
        observable=["angle_exponent", "phase", "q"],
        n_tokens=64,
        cosine=0.2,
    )
    data = json.loads((folder / "diagram.json").read_text())
    assert data == {**expected.to_dict(), "critical_lines": [], "notes": []}
    with xarray.open_dataset(folder / "diagram.nc", engine="h5netcdf") as opened:
        np.testing.assert_array_equal(opened["angle_exponent"], expected.values["angle_exponent"])
    assert "Written: fathometer-diagram/figure.png, fathometer-diagram/diagram.json" in text
    angle = expected.values["angle_exponent"]
    row = next(line for line in text.splitlines() if line.strip().startswith("angle_exponent"))
    assert row.split()[1:] == [
        f"{angle.min():.4g}",
        f"{np.median(angle):.4g}",
        f"{angle.max():.4g}",
        "100.0%",
        f"{np.mean(angle < 0):.1%}",
        "negative",
    ]
    assert f"{np.mean(expected.values['phase'] == 'simplex'):.1%} simplex" in text


def test_the_default_is_two_hundred_values_of_the_angle_exponent() -> None:
    data = json.loads(run("preset:bert", "--x", "mlp_in=1:2", "--y", "output=0.1:1", "--json"))
    assert np.shape(data["values"]["angle_exponent"]) == (200, 200) and list(data["values"]) == ["angle_exponent"]


def test_axes_may_be_geometric_and_the_depth_chosen(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(dumps_toml(preset("vit", n_layers=3)))
    arguments = ("--x", "mlp_in=0.5:8:4", "--y", "value=0.1:1:2", "--log-x", "--observable", "apjn_log", "--json")
    data = json.loads(run("spec.toml", *arguments, "--q", "0.5", "--layers", "20"))
    np.testing.assert_allclose(data["axes"]["mlp_in"], np.geomspace(0.5, 8, 4))
    np.testing.assert_allclose(data["axes"]["value"], [0.1, 1])
    assert data["about"]["spec"] == json.loads(json.dumps(expected_spec("vit", 20)))
    assert data["about"]["q"] == 0.5
    data = json.loads(run("preset:gpt2", *arguments, "--q", "0.5", "--layers", "48"))
    assert data["about"]["spec"] == json.loads(json.dumps(expected_spec("gpt2", 48)))  # its scales know the depth
    data = json.loads(run("preset:gpt2", "--x", "mlp_in=0.5:8:2", "--y", "value=0.1:1:3", "--log-y", "--json"))
    np.testing.assert_allclose(data["axes"]["value"], np.geomspace(0.1, 1, 3))


def expected_spec(family: str, n_layers: int) -> Any:
    found = diagram(preset(family, n_layers=n_layers), x=("mlp_in", [1.0]), y=("value", [1.0]))
    return found.about["spec"]


@pytest.mark.parametrize("field", ["output", "mlp_in"])
def test_the_critical_line_of_either_axis_is_solved_and_drawn(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    real = pictures.draw_diagram

    def watched(found: Any, **options: Any) -> Any:
        drawn.extend(options["lines"])
        return real(found, **options)

    monkeypatch.setattr(pictures, "draw_diagram", watched)
    data = json.loads(run(*MAP, "--critical", field, "--observable", "angle_exponent,q", "--json"))
    (line,) = data["critical_lines"]
    assert (line["observable"], line["x"]) == ("angle_exponent", field)
    assert line["y_values"] == data["axes"][line["y"]]
    assert "ok" in line["status"]
    for value, residual, status in zip(line["x_values"], line["residual"], line["status"], strict=True):
        assert (value is None) is (status != "ok")
        assert value is None or abs(residual) < 1e-12
    assert [entry.x for entry in drawn] == [field]
    several = "angle_exponent vanishes up to 2 times along mlp_in; its critical line is the smallest solution"
    assert data["notes"] == ([several] if field == "mlp_in" else [])


def test_a_line_of_the_gradient_exponent_is_that_of_the_same_tokens() -> None:
    y = ("mlp_in", np.linspace(2, 8, 4))
    options = ("--critical", "output", "--observable", "gradient_exponent", "--cosine", "0.9", "--q", "1", "--json")
    arguments = ("preset:bert", "--x", "mlp_in=2:8:4", "--y", "output=0.02:2:5", "--closure", "annealed", *options)
    (line,) = json.loads(run(*arguments))["critical_lines"]
    expected = critical_line(
        preset("bert"),
        x="output",
        y=y,
        low=0.02,
        high=2.0,
        n_tokens=256,
        observable="gradient_exponent",
        cosine=0.9,
        q=1.0,
        closure="annealed",
    )
    assert line["x_values"] == [value if np.isfinite(value) else None for value in expected.x_values.tolist()]
    assert "ok" in line["status"]


def test_a_line_that_does_not_exist_is_a_note() -> None:
    arguments = ("preset:bert", "--x", "mlp_in=1:2:3", "--y", "output=1:2:3", "--critical", "mlp_in")
    text = run(*arguments)
    assert "Note: no critical line: angle_exponent vanishes nowhere for mlp_in in [1, 2]: at output = 1 it is -" in text
    data = json.loads(run(*arguments, "--observable", "q", "--json"))
    assert data["critical_lines"] == [] and data["notes"][0].startswith("no critical line: none of the observables is")


def test_points_without_a_number_are_counted() -> None:
    text = run("preset:vit", "--x", "mlp_in=1:2:3", "--y", "skip_scale=0.5:1.5:3", "--observable", "angle_exponent")
    row = next(line for line in text.splitlines() if line.strip().startswith("angle_exponent"))
    assert "33.3%" in row
    text = run("preset:vit", "--x", "mlp_in=1:2:3", "--y", "skip_scale=1:1.5:3", "--observable", "angle_exponent,phase")
    assert all(
        "0.0%" in line and "–" in line for line in text.splitlines() if line.strip().startswith(("angle", "phase"))
    )


@pytest.mark.parametrize("package", ["xarray", "h5netcdf", "h5py"])
def test_netcdf_is_optional(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = run(*MAP, "--out", "here")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["diagram.json", "figure.png"]
    assert "diagram.nc needs: pip install 'fathometer[grid]'" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--x": "mlp_in"}, "--x 'mlp_in' is no axis; accepted: FIELD=LOW:HIGH or FIELD=LOW:HIGH:COUNT, for instance"),
        ({"--x": "mlp_in=1"}, "--x 'mlp_in=1' is no axis"),
        ({"--y": "=1:2"}, "--y '=1:2' is no axis"),
        ({"--x": "mlp_in=1:b"}, "--x 'mlp_in=1:b' is no axis"),
        ({"--x": "mlp_in=1:2:3:4"}, "--x 'mlp_in=1:2:3:4' is no axis"),
        ({"--x": "mlp_in=1:2:3.5"}, "--x 'mlp_in=1:2:3.5' is no axis"),
        ({"--x": "mlp_in=2:1"}, "--x 'mlp_in=2:1' is no axis; accepted: finite numbers with LOW < HIGH"),
        ({"--x": "mlp_in=1:inf"}, "accepted: finite numbers with LOW < HIGH"),
        ({"--x": "mlp_in=1:2:1"}, "--x 'mlp_in=1:2:1' is no axis; accepted: a COUNT from 2 to 4000"),
        ({"--x": "mlp_in=1:2:1000000"}, "accepted: a COUNT from 2 to 4000"),
        ({"--x": "mlp_inn=1:2"}, "no field 'mlp_inn'; did you mean 'mlp_in'?"),
        ({"--y": "mlp_in=1:2"}, "must be two fields; got 'mlp_in' twice"),
        ({"--x": "mlp_in=0:2", "--log-x": None}, "--x 'mlp_in=0:2' cannot be spaced geometrically; accepted with"),
        ({"--critical": "mlp"}, "--critical must name an axis; got 'mlp'.*Accepted: mlp_in, output"),
        ({"--observable": "phase,"}, "a diagram has no observable ''"),
        ({"--observable": "fase"}, "did you mean 'phase'?"),
        ({"--out": "file"}, "'file' is a file; name a folder with --out"),
    ],
    ids=str,
)
def test_mistakes_are_named(changes: dict[str, str | None], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = {"--x": "mlp_in=1:2:3", "--y": "output=1:2:3", **changes}
    arguments = [piece for pair in options.items() for piece in pair if piece is not None]
    with pytest.raises(SpecError, match=says):
        run("preset:bert", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fathometer.diagrams.Diagram.save", refuse)
    with pytest.raises(OutputError, match="cannot write to 'here': Permission denied"):
        run(*MAP, "--out", "here")


def test_the_command_is_registered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fathometer", "diagram", "preset:bert", "--x", "mlp_in=1:2", "--y", "output=2:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("fathometer: --y 'output=2:1' is no axis; accepted:")
