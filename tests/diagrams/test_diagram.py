"""Maps over two fields: every point is what the theory says of that one spec."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.diagrams import OBSERVABLES, Axis, Diagram, diagram
from fathometer.errors import DomainError, MissingExtraError, SpecError
from fathometer.observables import (
    exponents,
    failure_modes,
    fixed_norm,
    gradient_exponent,
    last_block,
    predict,
    stable_state,
)
from fathometer.prescription import NoRootError, critical_line
from fathometer.spec import Scales, Transformer, preset, with_field

WIDTHS, STRENGTHS = np.array([0.7, 2.0, 4.0, 7.0]), np.array([0.2, 0.6, 0.9])
X, Y = ("mlp_in", WIDTHS), ("mlp.residual_strength", STRENGTHS)
N_TOKENS, COSINE = 64, 0.3


@pytest.fixture(scope="module")
def spec() -> Transformer:
    """Both phases lie on its map: attention pulls tokens together, wide perceptrons push them apart."""
    scales = Scales(query=1.5, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
    uniform = Transformer.uniform(
        n_layers=5, d_model=64, n_heads=2, norm=preset("vit").blocks[0].sublayers[0].input_norm, scales=scales
    )
    return with_field(uniform, "attention.residual_strength", 0.3)


@pytest.fixture(scope="module")
def everything(spec: Transformer) -> Diagram:
    return diagram(spec, x=X, y=Y, observable=list(OBSERVABLES), n_tokens=N_TOKENS, cosine=COSINE)


def by_point(spec: Transformer, name: str) -> Any:
    """What the scalar interface says of one spec."""
    if name == "angle_exponent":
        return exponents(spec, n_tokens=N_TOKENS).angle
    if name == "token_exponent":
        return exponents(spec, n_tokens=N_TOKENS, state="stable").token
    if name == "coherent_exponent":
        return exponents(spec, n_tokens=N_TOKENS, state="stable").coherent
    if name in ("failure_mode", "condensation", "trainable_depth"):
        q = float(exponents(spec, n_tokens=N_TOKENS).q)
        found = failure_modes(spec, n_tokens=N_TOKENS, q=q, cosine=COSINE)
        return getattr(found, name.replace("failure_", ""))
    if name == "crossover_depth":
        return exponents(spec, n_tokens=N_TOKENS).crossover_depth
    if name == "gradient_exponent":
        return gradient_exponent(spec, n_tokens=N_TOKENS, cosine=COSINE)
    if name in ("stable_cosine", "phase"):
        state = stable_state(spec, n_tokens=N_TOKENS)
        return state.phase if name == "phase" else state.cosine
    q = float(fixed_norm(last_block(spec, N_TOKENS, DEFAULT_CLOSURE), 1.0))
    profile = predict(spec, n_tokens=N_TOKENS, q=q, p=COSINE * q)
    return profile.curves[name][-1 if name in ("q", "cosine") else 0]


@pytest.mark.parametrize("name", OBSERVABLES)
def test_every_point_is_the_scalar_prediction(spec: Transformer, everything: Diagram, name: str) -> None:
    values, status = everything.values[name], everything.status[name]
    assert values.shape == status.shape == (3, 4)
    assert np.all(status == "ok")
    for i, strength in enumerate(STRENGTHS):
        for j, width in enumerate(WIDTHS):
            point = with_field(with_field(spec, "mlp_in", float(width)), "mlp.residual_strength", float(strength))
            expected = by_point(point, name)
            if name in ("phase", "failure_mode"):
                assert values[i, j] == expected
            else:
                np.testing.assert_allclose(values[i, j], expected, rtol=1e-7, atol=1e-9)


def test_the_map_has_both_phases(everything: Diagram) -> None:
    assert {"collapsed", "simplex"} == set(everything.values["phase"].ravel().tolist())
    opens = everything.values["angle_exponent"] > 0
    np.testing.assert_array_equal(opens, everything.values["phase"] == "simplex")


def test_a_norm_that_grows_for_ever_is_a_status_not_a_number(spec: Transformer) -> None:
    found = diagram(
        spec, x=("attention.skip_scale", [0.9, 1.2]), y=("mlp_in", [1.0, 2.0]), observable=["angle_exponent", "phase"]
    )
    for name in found.values:
        np.testing.assert_array_equal(found.status[name], [["ok", "no fixed point"]] * 2)
    assert np.all(np.isnan(found.values["angle_exponent"][:, 1]))
    with pytest.raises(DomainError, match="give the second moment q of the tokens"):
        diagram(spec, x=("attention.skip_scale", [0.9, 1.2]), y=X, observable="apjn_log")


def test_an_overflow_is_a_status(spec: Transformer) -> None:
    bare = spec.map_sublayers(lambda sublayer: replace(sublayer, input_norm=None)).with_depth(1000)
    x, y = ("skip_scale", [0.9, 2.0]), ("mlp_out", [0.1, 0.2])
    found = diagram(bare, x=x, y=y, observable=["q", "apjn_log"], q=1.0, closure="annealed")
    for name in found.values:
        np.testing.assert_array_equal(found.status[name], [["ok", "overflow"]] * 2)


# Input.


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": ("mlp_inn", [1.0])}, SpecError, "no field 'mlp_inn'; did you mean 'mlp_in'?"),
        ({"x": ("alpha", [1.0])}, SpecError, "no sublayer of this spec has the field 'alpha'"),
        ({"observable": "angel_exponent"}, SpecError, "no observable 'angel_exponent'; did you mean 'angle_exponent'?"),
        ({"observable": ["phase", "fase"]}, SpecError, "no observable 'fase'; did you mean 'phase'?"),
        ({"x": Y}, SpecError, "must be two fields; got 'mlp.residual_strength' twice"),
        ({"x": ("residual_strength", [0.1, 0.2])}, SpecError, "overwrites 'mlp.residual_strength' everywhere"),
        ({"x": ("mlp_in", [])}, DomainError, "values of axis 'mlp_in' must be a finite, one-dimensional, non-empty"),
        ({"x": ("mlp_in", [1.0, np.nan])}, DomainError, "must be a finite, one-dimensional, non-empty array"),
        ({"x": ("mlp_in", [[1.0]])}, DomainError, "must be a finite, one-dimensional, non-empty array"),
        ({"x": ("mlp_in", "wide")}, DomainError, r"an axis is a pair \(field, values\)"),
        ({"x": (1, [1.0])}, DomainError, r"an axis is a pair \(field, values\)"),
        ({"x": "mlp_in"}, DomainError, r"an axis is a pair \(field, values\)"),
        ({"y": ("mlp.residual_strength", [0.5, 1.2])}, SpecError, r"must lie in \[0, 1\]; got 1.2 at index \(1, 0\)"),
        ({"y": ("mlp.residual_strength", [-0.1])}, SpecError, r"residual_strength must lie in \[0, 1\]; got -0.1"),
        ({"x": ("mlp_in", [-1.0])}, SpecError, "mlp_in must be >= 0; got -1|in must be >= 0; got -1"),
        ({"n_tokens": 1}, DomainError, "angles between tokens need n_tokens >= 2; got 1"),
        ({"n_tokens": 1, "observable": "q"}, DomainError, "need n_tokens >= 2"),
        ({"n_tokens": 2.5}, DomainError, "n_tokens must be an integer"),
        ({"cosine": 1.5}, DomainError, "1.5"),
        ({"closure": "anealed"}, Exception, "did you mean 'annealed'?"),
    ],
    ids=str,
)
def test_bad_input_is_named(spec: Transformer, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        diagram(spec, **{"x": X, "y": Y, **changes})


# Files.


def test_json_holds_the_diagram(everything: Diagram) -> None:
    data = json.loads(everything.to_json())
    assert data == everything.to_dict()
    assert data["schema"] == 1 and data["source"] == "theory"
    assert data["axes"] == {"mlp.residual_strength": STRENGTHS.tolist(), "mlp_in": WIDTHS.tolist()}
    for name, values in everything.values.items():
        np.testing.assert_array_equal(np.array(data["values"][name]), values)
        assert data["status"][name] == everything.status[name].tolist()
    about = data["about"]
    assert (about["n_tokens"], about["cosine"], about["q"]) == (N_TOKENS, COSINE, None)
    assert about["closure"] == DEFAULT_CLOSURE.name


def test_json_has_no_numbers_that_are_not_finite() -> None:
    made = Diagram(
        x=Axis.of(("mlp_in", [1.0, 2.0, 3.0])),
        y=Axis.of(("mlp_out", [1.0])),
        values={"crossover_depth": np.array([[np.inf, np.nan, 3.0]])},
        status={"crossover_depth": np.array([["ok", "overflow", "ok"]])},
        source="theory",
    )
    assert json.loads(made.to_json())["values"]["crossover_depth"] == [[None, None, 3.0]]


def test_counts_of_numpy_are_written_as_numbers(spec: Transformer) -> None:
    found = diagram(spec, x=X, y=Y, n_tokens=np.int64(8))  # type: ignore[arg-type]
    assert json.loads(found.to_json())["about"]["n_tokens"] == 8


def test_netcdf_is_written_in_one_step_and_reopens_equal(everything: Diagram, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    path = tmp_path / "map.nc"
    path.write_bytes(b"old")
    assert everything.save(path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.nc"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with xarray.open_dataset(path, engine="h5netcdf") as opened:
        assert opened["phase"].dims == ("mlp.residual_strength", "mlp_in")
        np.testing.assert_array_equal(opened["mlp_in"], WIDTHS)
        for name, values in everything.values.items():
            np.testing.assert_array_equal(opened[name].values.astype(values.dtype), values)
            np.testing.assert_array_equal(opened[f"{name}_status"].values.astype(str), everything.status[name])
        assert json.loads(opened.attrs["about"]) == everything.about


def test_standard_errors_are_saved_beside_the_values(everything: Diagram) -> None:
    pytest.importorskip("xarray")
    measured = Diagram(
        x=everything.x,
        y=everything.y,
        values={"q": everything.values["q"]},
        errors={"q": 0.1 * everything.values["q"]},
        status={"q": everything.status["q"]},
        source="measurement",
    )
    dataset = measured.to_dataset()
    np.testing.assert_array_equal(dataset["q_error"], 0.1 * everything.values["q"])
    assert dataset.attrs["source"] == "measurement"


def test_a_failed_save_leaves_the_old_file(
    everything: Diagram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    path = tmp_path / "map.nc"
    path.write_bytes(b"old")

    def broken(self: Any, target: Path, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(xarray.Dataset, "to_netcdf", broken)
    with pytest.raises(OSError, match="disk full"):
        everything.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.nc"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("package", ["xarray", "h5netcdf", "h5py"])
def test_a_missing_package_is_named(
    everything: Diagram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    pytest.importorskip("xarray")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package '{package}'; .*fathometer\[grid\]"):
        everything.save(tmp_path / "map.nc")
    assert list(tmp_path.iterdir()) == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Critical lines, over the whole range a diagram may have.


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.9), (0.0, 1.0)])
def test_a_line_is_found_also_between_a_branch_that_does_nothing_and_one_that_does_everything(
    spec: Transformer, low: float, high: float
) -> None:
    """At both ends of [0, 1] there is no exponent: no fixed point where nothing is added, everything wiped out."""
    given = with_field(spec, "mlp.residual_strength", 0.5)
    line = critical_line(
        given, x="attention.residual_strength", y=("mlp_in", WIDTHS), low=low, high=high, n_tokens=N_TOKENS
    )
    assert line.status.tolist() == ["ok"] * 4
    np.testing.assert_array_equal(line.crossings, 1)
    at_line = with_field(with_field(given, "mlp_in", WIDTHS), "attention.residual_strength", line.x_values)
    np.testing.assert_allclose(exponents(at_line, n_tokens=N_TOKENS).angle, 0.0, atol=1e-13)


def test_an_exponent_that_falls_without_end_is_negative(spec: Transformer) -> None:
    wide = with_field(spec, "mlp_in", 3.0)
    y = ("mlp.residual_strength", [0.0, 0.9])
    line = critical_line(wide, x="attention.residual_strength", y=y, low=0.1, high=1.0, n_tokens=N_TOKENS)
    assert line.status.tolist() == ["negative", "ok"]


def test_a_line_needs_a_field_that_survives(spec: Transformer) -> None:
    with pytest.raises(SpecError, match=r"setting 'residual_strength' overwrites 'mlp\.residual_strength' everywhere"):
        critical_line(spec, x="residual_strength", y=Y, low=0.1, high=0.9, n_tokens=N_TOKENS)


def test_a_line_of_the_gradient_exponent_takes_the_second_moment(spec: Transformer) -> None:
    plain = with_field(with_field(spec, "skip_scale", 1.0), "branch_scale", 0.5)
    options: dict[str, Any] = {
        "x": "mlp_in", "y": ("value", [0.5]), "low": 0.1, "high": 4.0, "observable": "gradient_exponent"
    }  # fmt: skip
    with pytest.raises(DomainError, match="give the second moment q"):
        critical_line(plain, n_tokens=N_TOKENS, **options)
    with pytest.raises(NoRootError, match=r"gradient_exponent vanishes nowhere for mlp_in in .* at value = 0\.5 it is"):
        critical_line(plain, n_tokens=N_TOKENS, q=1.0, **options)
    with pytest.raises(NoRootError, match="there is no fixed point"):
        critical_line(plain, n_tokens=N_TOKENS, **{**options, "observable": "angle_exponent"})


def test_a_branch_that_does_nothing_is_no_critical_point(spec: Transformer) -> None:
    with pytest.raises(NoRootError, match="it is 0 at the low end and -"):
        critical_line(
            spec,
            x="residual_strength",
            y=("mlp_in", [0.5]),
            low=0.0,
            high=0.9,
            n_tokens=N_TOKENS,
            observable="gradient_exponent",
            q=1.0,
        )
