"""Pictures of maps: cells where they belong, colours that mean what they say, and no number where there is none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from fathometer.diagrams import Axis, Diagram, diagram
from fathometer.errors import MissingExtraError, SpecError
from fathometer.plotting import to_png
from fathometer.plotting.diagram import draw_diagram
from fathometer.prescription import CriticalLine, critical_line
from fathometer.spec import preset, with_field

X = np.array([1.0, 2.0, 4.0, 8.0])
Y = np.array([0.0, 0.5, 2.0])
SIGNED = np.array([[-2.0, -1.0, 0.5, 1.0], [-1.0, -0.5, 0.5, 1.0], [-0.5, 0.5, 1.0, 2.0]])


def made(**values: Any) -> Diagram:
    """A diagram of given numbers, 3 by 4; ``status`` marks points of all observables."""
    status = values.pop("status", np.full((3, 4), "ok"))
    axes = {"x": Axis.of(("mlp_in", X)), "y": Axis.of(("attention.branch_scale", Y)), **values.pop("axes", {})}
    return Diagram(
        values={name: np.asarray(value) for name, value in values.items()},
        status=dict.fromkeys(values, status),
        source="theory",
        about={"n_tokens": 64, "closure": "annealed"},
        **axes,
    )


def only_panel(figure: Figure) -> Axes:
    return figure.axes[0]


def mesh(ax: Axes) -> QuadMesh:
    (found,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
    return found


def key(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_cells_lie_at_their_coordinates_on_the_scale_of_their_spacing() -> None:
    ax = only_panel(draw_diagram(made(angle_exponent=SIGNED)))
    borders = np.asarray(mesh(ax).get_coordinates())
    np.testing.assert_allclose(borders[0, :, 0], [2**-0.5, 2**0.5, 2**1.5, 2**2.5, 2**3.5])
    np.testing.assert_allclose(borders[:, 0, 1], [-0.25, 0.25, 1.25, 2.75])
    np.testing.assert_array_equal(np.asarray(mesh(ax).get_array()).reshape(3, 4), SIGNED)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MLP input scale", "branch scale of attention")
    assert ax.get_title(loc="left") == "Angle exponent"


def test_values_in_any_order_are_put_in_order() -> None:
    turned = made(angle_exponent=SIGNED[:, ::-1], axes={"x": Axis.of(("mlp_in", X[::-1]))})
    np.testing.assert_array_equal(np.asarray(mesh(only_panel(draw_diagram(turned))).get_array()).reshape(3, 4), SIGNED)


def test_single_points_are_drawn() -> None:
    single = {"x": Axis.of(("mlp_in", [2.0])), "y": Axis.of(("mlp_out", [0.0]))}
    point = made(q=[[1.0]], angle_exponent=[[0.0]], phase=[["simplex"]], status=np.full((1, 1), "ok"), axes=single)
    assert to_png(draw_diagram(point), dpi=30).startswith(b"\x89PNG")


def test_colours_of_a_signed_observable_are_symmetric_about_zero_with_a_contour_there() -> None:
    figure = draw_diagram(made(angle_exponent=SIGNED))
    ax, bar = figure.axes
    norm = mesh(ax).norm
    assert (norm.vmin, norm.vmax) == (-2.0, 2.0)
    low, middle, high = (np.asarray(mesh(ax).cmap(norm(value))[:3]) for value in (-1.0, 0.0, 1.0))
    assert low[2] > low[0] and high[0] > high[2] and np.ptp(middle) < 0.03  # blue, vermilion, nearly white
    (contour,) = [artist for artist in ax.collections if isinstance(artist, ContourSet)]
    assert contour.levels.tolist() == [0.0] and contour.get_paths()[0].vertices.size > 0
    assert key(ax) == ["zero"]
    assert bar.get_ylabel() == "nats per block"


def test_without_a_change_of_sign_there_is_no_contour() -> None:
    ax = only_panel(draw_diagram(made(angle_exponent=np.abs(SIGNED))))
    assert mesh(ax).norm.vmin == -2.0
    assert key(ax) == []


def test_numbers_beyond_the_colours_are_announced() -> None:
    values = np.concatenate([np.linspace(-0.01, 0.01, 198), [-0.4, 5.0]]).reshape(10, 20)
    axes = {"x": Axis.of(("mlp_in", np.linspace(1, 2, 20))), "y": Axis.of(("mlp_out", np.linspace(1, 2, 10)))}
    figure = draw_diagram(made(angle_exponent=values, axes=axes, status=np.full((10, 20), "ok")))
    assert mesh(figure.axes[0]).norm.vmax < 0.02
    assert figure.axes[1].get_ylabel() == "nats per block, down to −0.4, up to 5"
    assert figure.axes[0].collections[0].colorbar.extend == "both"


def test_a_weak_sign_keeps_its_colour_beside_a_strong_one() -> None:
    values = np.full((3, 4), -0.01)
    values[0, 0], values[2, 3] = -1.0, 0.01
    assert mesh(only_panel(draw_diagram(made(angle_exponent=values)))).norm.vmax == pytest.approx(0.03)


@pytest.mark.parametrize(("values", "is_log"), [(np.linspace(1, 2, 12), False), (np.geomspace(1, 1e6, 12), True)])
def test_colours_of_other_observables_are_logarithmic_over_a_wide_range(values: np.ndarray, is_log: bool) -> None:
    figure = draw_diagram(made(crossover_depth=values.reshape(3, 4)))
    norm = mesh(figure.axes[0]).norm
    assert isinstance(norm, LogNorm) is is_log
    assert (norm.vmin, norm.vmax) == (values[0], values[-1])
    assert figure.axes[1].get_ylabel() == "blocks"


def test_phases_are_fills_named_in_the_key() -> None:
    phases = np.array([["collapsed"] * 4, ["collapsed", "simplex", "simplex", "simplex"], ["simplex"] * 4])
    figure = draw_diagram(made(phase=phases))
    (ax,) = figure.axes  # no colour bar
    assert key(ax) == ["collapsed", "simplex"]
    codes = np.asarray(mesh(ax).get_array()).reshape(3, 4)
    np.testing.assert_array_equal(codes == codes[0, 0], phases == "collapsed")
    handles = ax.get_legend().legend_handles
    shown = mesh(ax).cmap(mesh(ax).norm(codes))
    np.testing.assert_allclose(shown[0, 0], handles[0].get_facecolor())
    np.testing.assert_allclose(shown[2, 3], handles[1].get_facecolor())


def test_points_without_a_number_are_hatched_and_named() -> None:
    status = np.full((3, 4), "ok", dtype="<U14")
    status[0, 1:3], status[2, 3] = "no fixed point", "overflow"
    values = np.where(status == "ok", SIGNED, np.nan)
    values[1, 0], values[1, 1] = -np.inf, np.nan
    phases = np.where(status == "ok", "simplex", "none")
    number, phase = (ax for ax in draw_diagram(made(angle_exponent=values, phase=phases, status=status)).axes[:2])
    masked = np.ma.getmaskarray(mesh(number).get_array()).reshape(3, 4)
    np.testing.assert_array_equal(masked, (status != "ok") | ~np.isfinite(values))
    assert key(number) == ["zero", "infinite", "no fixed point", "not a number", "overflow"]
    assert key(phase) == ["simplex", "no fixed point", "overflow"]
    hatched = {patch.get_hatch(): patch for patch in phase.patches if isinstance(patch, PathPatch)}
    assert len(hatched) == 2
    box = hatched["////"].get_path().get_extents()
    np.testing.assert_allclose(box.get_points(), [[2**2.5, 1.25], [2**3.5, 2.75]])  # one cell, the last


def test_a_diagram_without_any_number_is_drawn() -> None:
    nothing = made(
        angle_exponent=np.full((3, 4), np.nan),
        q=np.full((3, 4), np.nan),
        phase=np.full((3, 4), "none"),
        status=np.full((3, 4), "no fixed point"),
    )
    figure = draw_diagram(nothing)
    assert [key(ax) for ax in figure.axes] == [["no fixed point"]] * 3
    assert to_png(figure, dpi=30).startswith(b"\x89PNG")


# Lines.


@pytest.fixture(scope="module")
def solved() -> CriticalLine:
    return CriticalLine(
        observable="angle_exponent",
        x="attention.branch_scale",
        y="mlp_in",
        x_values=np.array([1.5, np.nan, 0.7, 7.0]),
        y_values=np.array([8.0, 1.0, 2.0, 4.0]),
        status=np.array(["ok", "negative", "ok", "positive"]),
        residual=np.zeros(4),
        crossings=np.ones(4, dtype=np.int64),
    )


def drawn(ax: Axes) -> np.ndarray:
    (line,) = [line for line in ax.lines if line.get_label() == "angle_exponent"]
    return np.array(line.get_data())


def test_a_line_is_drawn_where_it_exists_whichever_axis_was_solved_for(solved: CriticalLine) -> None:
    expected = [[1.0, 2.0, 4.0, 8.0], [np.nan, 0.7, np.nan, 1.5]]
    ax = only_panel(draw_diagram(made(angle_exponent=SIGNED), lines=[solved]))
    np.testing.assert_array_equal(drawn(ax), expected)
    assert key(ax) == ["zero", "angle exponent = 0, solved"]
    measured = replace(made(angle_exponent=SIGNED), source="measurement")
    assert key(only_panel(draw_diagram(measured, lines=[solved]))) == ["zero", "angle exponent = 0, theory"]
    swapped = Diagram(
        x=Axis.of(("attention.branch_scale", Y)),
        y=Axis.of(("mlp_in", X)),
        values={"angle_exponent": SIGNED.T},
        status={"angle_exponent": np.full((4, 3), "ok")},
        source="theory",
    )
    np.testing.assert_array_equal(drawn(only_panel(draw_diagram(swapped, lines=[solved]))), expected[::-1])


def test_a_line_belongs_to_its_observable_or_to_all(solved: CriticalLine) -> None:
    both = made(angle_exponent=SIGNED, q=np.abs(SIGNED))
    angle, q = draw_diagram(both, lines=[solved]).axes[:2]
    assert len(angle.lines) == 2 and len(q.lines) == 0  # the line and its casing
    assert len(only_panel(draw_diagram(both, observable="q", lines=[solved])).lines) == 2
    nowhere = replace(solved, status=np.full(4, "negative"))
    assert len(only_panel(draw_diagram(both, lines=[nowhere])).lines) == 0


def test_the_contour_of_a_fine_map_is_the_solved_line() -> None:
    spec = with_field(with_field(preset("bert"), "mlp_out", 1.0), "output", 0.5)
    x, y = np.linspace(0.5, 6.0, 80), np.linspace(0.05, 1.0, 80)
    found = diagram(spec, x=("mlp_in", x), y=("value", y))
    line = critical_line(spec, x="value", y=("mlp_in", x), low=0.05, high=1.0, n_tokens=256)
    ax = only_panel(draw_diagram(found, lines=[line]))
    (contour,) = [artist for artist in ax.collections if isinstance(artist, ContourSet)]
    across, up = contour.get_paths()[0].vertices.T
    np.testing.assert_allclose(up, np.interp(across, *drawn(ax)), atol=0.5 * (y[1] - y[0]))


# Words and input.


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"weight_draws": 8, "n_tokens": 64}, "Measured, 8 weight draws per point, 64 tokens"),
        ({"weight_draws": 1}, "Measured, 1 weight draw per point"),
        ({}, "Measured"),
    ],
)
def test_a_measured_diagram_says_so(about: dict[str, Any], says: str) -> None:
    measured = replace(made(angle_exponent=SIGNED), source="measurement", about=about)
    assert draw_diagram(measured).get_suptitle() == says


def test_theory_names_depth_only_where_it_matters() -> None:
    found = diagram(
        preset("bert"),
        x=("mlp_in", [1.0, 2.0]),
        y=("value", [0.5, 1.0]),
        observable=["phase", "q"],
        closure="annealed",
    )
    assert draw_diagram(found).get_suptitle() == "Theory, 12 blocks, 256 tokens of cosine 0.5, annealed closure"
    assert draw_diagram(found, observable="phase").get_suptitle() == "Theory, 256 tokens, annealed closure"


def test_observables_not_known_here_are_drawn_by_their_name() -> None:
    ax = only_panel(draw_diagram(made(test_accuracy=np.abs(SIGNED))))
    assert ax.get_title(loc="left") == "Test accuracy"


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_there_is_a_panel_for_each_observable(count: int) -> None:
    values = {f"number_{i}": np.abs(SIGNED) for i in range(count)}
    figure = draw_diagram(made(**values))
    assert sum(ax.get_title(loc="left").startswith("Number") for ax in figure.axes) == count


def test_mistakes_are_named(solved: CriticalLine) -> None:
    with pytest.raises(SpecError, match="the diagram has no observable 'angle_exponnt'; did you mean 'angle_exponent'"):
        draw_diagram(made(angle_exponent=SIGNED), observable="angle_exponnt")
    with pytest.raises(SpecError, match="a line over 'value' and 'mlp_in' does not fit a diagram over 'mlp_in' and"):
        draw_diagram(made(angle_exponent=SIGNED), lines=[replace(solved, x="value")])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"fathometer\[viz\]"):
        draw_diagram(made(angle_exponent=SIGNED))


def test_no_global_state_is_touched() -> None:
    code = """
import sys
import fathometer.plotting.diagram
assert not {'matplotlib', 'torch', 'xarray'} & set(sys.modules)
import matplotlib
settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
from fathometer.diagrams import diagram
from fathometer.plotting import to_png
from fathometer.spec import preset
found = diagram(preset("bert"), x=("mlp_in", [1.0, 2.0]), y=("value", [0.5, 1.0]), observable=["phase", "q"])
to_png(fathometer.plotting.diagram.draw_diagram(found), dpi=30)
assert settings() == before and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
