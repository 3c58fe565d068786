"""Pictures: what is drawn is what was computed, and nothing global is touched."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fathometer.diagnosis.criteria import Evidence
from fathometer.diagnosis.report import Finding, Report
from fathometer.errors import FathometerError, MissingExtraError
from fathometer.plotting import (
    PANELS,
    draw_branches,
    draw_cosine,
    draw_fold_errors,
    draw_forward,
    draw_gradients,
    draw_overview,
    draw_stream,
    panels_of,
    to_png,
    to_svg,
)
from fathometer.plotting.scales import Scale, scale_for
from fathometer.plotting.subject import subject_of
from fathometer.results import Profile
from fathometer.spec import LayerNorm

Maker = Callable[..., Report]


def line(ax: Axes, label: str) -> Line2D:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


def drawn(ax: Axes, label: str) -> np.ndarray:
    return np.asarray(line(ax, label).get_ydata(), dtype=float)


def profile(source: str, **curves: list[float]) -> Profile:
    return Profile(source=source, curves={name: np.array(curve) for name, curve in curves.items()})


# What is drawn.


@pytest.mark.parametrize("n_layers", [6, 96, 1000])
def test_the_stream_panel_draws_the_curves_themselves(make: Maker, n_layers: int) -> None:
    report = make(n_layers=n_layers, norm=LayerNorm())
    assert report.predicted is not None
    ax = draw_stream(report)
    for name in ("q", "p"):
        np.testing.assert_array_equal(drawn(ax, f"{name} measured"), report.measured.curves[name])
        np.testing.assert_array_equal(drawn(ax, f"{name} theory"), report.predicted.curves[name])
    np.testing.assert_array_equal(line(ax, "q theory").get_xdata(), np.arange(n_layers + 1))


def test_theory_is_a_line_and_measurement_is_points(healthy: Report) -> None:
    ax = draw_stream(healthy)
    assert line(ax, "q theory").get_marker() == "None"
    assert line(ax, "q theory").get_linewidth() > 1
    assert line(ax, "q measured").get_marker() == "o"
    assert line(ax, "q measured").get_linewidth() == 0


def test_a_deep_model_shows_some_points_but_a_line_through_all(make: Maker) -> None:
    measured = line(draw_stream(make(n_layers=1000, norm=LayerNorm())), "q measured")
    assert measured.get_markevery() == 28
    assert measured.get_linewidth() > 0
    assert len(np.asarray(measured.get_ydata())) == 1001


def test_gradients_are_drawn_as_numbers_not_logarithms(healthy: Report) -> None:
    assert healthy.predicted is not None
    ax = draw_gradients(healthy)
    np.testing.assert_allclose(drawn(ax, "token (APJN) theory"), healthy.predicted.apjn, rtol=1e-14)
    np.testing.assert_allclose(drawn(ax, "pooled loss measured"), healthy.measured.gradient, rtol=1e-14)
    np.testing.assert_allclose(
        drawn(draw_forward(healthy), "forward APJN theory"), healthy.predicted.apjn_forward, rtol=1e-14
    )


def test_gradients_beyond_a_float_are_drawn_by_their_exponent() -> None:
    theory = profile("theory", q=[1.0, 1.0, 1.0], apjn_log=[3000.0, 1500.0, 0.0])
    ax = draw_gradients(theory)
    np.testing.assert_allclose(drawn(ax, "token (APJN) theory"), np.array([3000.0, 1500.0, 0.0]) / np.log(10))
    assert ax.get_yscale() == "linear"
    assert "log10" in ax.get_ylabel()


def test_the_band_is_one_standard_error(healthy: Report) -> None:
    ax = draw_stream(healthy)
    band = ax.collections[0].get_paths()[0].vertices
    q, error = healthy.measured.curves["q"], healthy.measured.errors["q"]
    assert np.max(band[:, 1]) == pytest.approx(np.max(q + error))
    assert np.min(band[:, 1]) == pytest.approx(np.min(q - error))


def test_collapsing_tokens_are_drawn_by_their_angle() -> None:
    near = draw_cosine(profile("theory", q=[1.0, 1.0, 1.0], cosine=[0.5, 0.99, 0.9999]))
    far = draw_cosine(profile("theory", q=[1.0, 1.0, 1.0], cosine=[0.1, 0.2, 0.3]))
    np.testing.assert_allclose(drawn(near, "cosine theory"), [0.5, 0.01, 0.0001], rtol=1e-9)
    np.testing.assert_array_equal(drawn(far, "cosine theory"), [0.1, 0.2, 0.3])
    assert (near.get_yscale(), far.get_yscale()) == ("log", "linear")
    assert (near.get_ylabel(), far.get_ylabel()) == ("1 − cosine", "cosine")


def test_fold_bars_have_the_heights_of_the_folds(healthy: Report) -> None:
    assert healthy.comparison is not None
    ax = draw_fold_errors(healthy)
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    folds = healthy.comparison.folds.values()
    expected = [fold.thirds[i] for i in range(3) for fold in folds]
    np.testing.assert_allclose(tops, expected, rtol=1e-12)


# Axes, limits and marks.


@pytest.mark.parametrize(
    ("curve", "scale"),
    [
        ([1.0, 2.0, 29.0], Scale.LINEAR),
        ([1.0, 2.0, 31.0], Scale.LOG),
        ([-1.0, 2.0, 31.0], Scale.LINEAR),
        ([np.inf, np.nan, 1.0], Scale.LINEAR),
    ],
)
def test_the_axis_is_logarithmic_beyond_a_factor_of_30(curve: list[float], scale: Scale) -> None:
    assert scale_for(subject_of(profile("theory", q=curve)), ["q"]) is scale


def test_values_a_logarithmic_axis_cannot_show_are_announced() -> None:
    ax = draw_stream(profile("theory", q=[1.0, 10.0, 100.0], p=[-0.1, 1.0, 10.0]))
    assert [text.get_text() for text in ax.texts] == ["values ≤ 0 not shown"]


def test_values_that_are_not_finite_are_announced() -> None:
    ax = draw_stream(profile("theory", q=[1.0, 2.0, np.inf]))
    assert [text.get_text() for text in ax.texts] == ["not finite from block 2 on"]


def test_the_limit_of_gradients_is_the_criterion(broken: Report) -> None:
    lines = [np.asarray(line.get_ydata()) for line in draw_gradients(broken).lines if line.get_label() == "limit"]
    (limit,) = [line for line in lines if len(line) > 2]
    q = broken.measured.curves["q"]
    with np.errstate(over="ignore"):
        expected = np.minimum(100 * q[-1] / q, 1e4)
    np.testing.assert_allclose(limit[1:], expected[1:], rtol=1e-12)


def test_where_gradients_vanish_the_part_that_vanishes_is_drawn(healthy: Report) -> None:
    curves = {**healthy.measured.curves, "gradient_alignment": np.linspace(0.99, 0.0, 25)}
    evidence = Evidence(value=0.03, limit=0.1, depth=20, text="")
    finding = Finding(
        name="vanishing_gradients", title="Vanishing gradients", evidence=evidence, agreement=1.0, predicted=None
    )
    report = replace(healthy, measured=replace(healthy.measured, curves=curves), findings=(finding,))
    ax = draw_gradients(report)
    expected = healthy.measured.apjn * (1 - curves["gradient_alignment"])
    np.testing.assert_allclose(drawn(ax, "apart (J − K) measured"), expected, rtol=1e-12)
    assert ax.get_yscale() == "log"
    assert not [line for line in draw_gradients(healthy).lines if str(line.get_label()).startswith("apart")]


def test_a_limit_far_away_does_not_squeeze_the_curves(healthy: Report) -> None:
    ax = draw_stream(healthy)
    assert [line for line in ax.lines if line.get_label() == "limit"] == []
    assert ax.get_ylim()[1] < 1e3


def test_findings_are_marked_where_they_bite(broken: Report) -> None:
    texts = {text.get_text() for ax in (draw_stream(broken), draw_gradients(broken)) for text in ax.texts}
    (growth,) = [f for f in broken.findings if f.name == "signal_growth"]
    (explosion,) = [f for f in broken.findings if f.name == "exploding_gradients"]
    last = broken.measured.n_layers - explosion.evidence.depth
    assert f"signal growth from block {growth.evidence.depth} on" in texts
    assert f"exploding gradients up to block {last}" in texts


def test_a_bare_profile_is_not_judged(healthy: Report) -> None:
    ax = draw_cosine(healthy.measured)
    assert [line for line in ax.lines if line.get_label() == "limit"] == []


def test_blocks_without_a_branch_are_left_out_where_blocks_are_one_or_the_other() -> None:
    added = {"attention_added_q": [1.0, 0.0, 3.0, 0.0], "mlp_added_q": [0.0, 2.0, 0.0, 4.0]}
    ax = draw_branches(profile("theory", q=[1.0] * 5, **added))
    np.testing.assert_array_equal(line(ax, "attention theory").get_xdata(), [0, 2])
    np.testing.assert_array_equal(drawn(ax, "MLP theory"), [2.0, 4.0])
    unmeasured = profile("measurement", q=[1.0] * 5)
    both = draw_branches((unmeasured, profile("theory", q=[1.0] * 5, **added)))
    np.testing.assert_array_equal(line(both, "attention theory").get_xdata(), [0, 2])
    silent = draw_branches(profile("theory", q=[1.0] * 5, **{**added, "mlp_added_q": [0.0] * 4}))
    np.testing.assert_array_equal(drawn(silent, "MLP theory"), [0.0] * 4)


def test_missing_curves_are_announced() -> None:
    theory = profile("theory", q=[1.0, 2.0])
    assert draw_branches(theory).texts[0].get_text() == "not predicted"
    assert [panel.name for panel in panels_of(theory)] == ["stream"]


# Input.


def test_given_axes_are_used_and_returned(healthy: Report) -> None:
    ax = Figure().add_subplot()
    assert draw_stream(healthy.measured, ax) is ax
    assert draw_stream((healthy.measured, healthy.predicted), ax=None) is not ax  # type: ignore[arg-type]


def test_two_profiles_of_one_source_are_refused(healthy: Report) -> None:
    with pytest.raises(FathometerError, match="one theory and one measured profile"):
        draw_stream((healthy.measured, healthy.measured))


def test_a_grid_is_refused() -> None:
    with pytest.raises(FathometerError, match="pick one point of the grid"):
        draw_stream(Profile(source="theory", curves={"q": np.ones((3, 2))}))


# Figures as bytes.


def test_every_panel_becomes_a_picture(healthy: Report, broken: Report) -> None:
    tokens = {"apjn_token_log": np.linspace(3.0, 1.0, 16)}
    whole = replace(healthy, measured=replace(healthy.measured, curves={**healthy.measured.curves, **tokens}))
    assert panels_of(whole) == PANELS
    assert [panel for panel in PANELS if panel not in panels_of(healthy)] == [
        panel for panel in PANELS if panel.name == "tokens"
    ]
    for report in (whole, broken):
        for panel in panels_of(report):
            assert to_png(panel.figure(report), dpi=40).startswith(b"\x89PNG")


def test_the_overview_has_six_panels_and_says_the_verdict(broken: Report) -> None:
    name = r"cost: $\frac{1}$ 日本"
    figure = draw_overview(replace(broken, name=name))
    head, body = figure.subfigs
    words = [text.get_text() for text in head.texts]
    assert len(body.axes) == 6
    assert words[0] == name
    assert words[2].replace("\n", " ") == broken.verdict
    assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_an_svg_is_deterministic_prefixed_and_free_of_addresses(healthy: Report) -> None:
    panel = PANELS[0]
    first, second = (to_svg(panel.figure(healthy), prefix="one") for _ in range(2))
    assert first == second
    assert first.startswith("<svg") and first.endswith("</svg>")
    assert "http" not in first and "<style" not in first and "<script" not in first
    identifiers = re.findall(r'\bid="([^"]+)"', first)
    assert identifiers and all(name.startswith("one-") for name in identifiers)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', first))
    assert used and used <= set(identifiers)
    assert "var(--plot-first)" in first


# Global state.

UNTOUCHED = """
import sys
import matplotlib
def settings():  # without the backend, which asking for would choose
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
from fathometer.plotting import PANELS, draw_overview, to_png, to_svg
from conftest import make_report
report = make_report(n_layers=4)
for panel in PANELS:
    to_svg(panel.figure(report), prefix="x")
to_png(draw_overview(report), dpi=30)
assert settings() == before, "rcParams changed"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
"""


def test_no_global_state_is_touched(request: pytest.FixtureRequest) -> None:
    folder = str(request.path.parent)
    code = f"import sys; sys.path.insert(0, {folder!r})\n{UNTOUCHED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_plotting_loads_neither_matplotlib_nor_torch() -> None:
    code = "import sys, fathometer.plotting; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_extra_is_named(healthy: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"fathometer\[viz\]"):
        draw_stream(healthy)
