"""Items of arXiv:2505.24333, at sizes that take seconds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fathometer.papers import ITEMS
from fathometer.papers.failure_modes import diagram, figure_1, figure_3, figure_4, figure_12
from fathometer.papers.failure_modes.architecture import simulated_cosines, weight_draws
from fathometer.papers.failure_modes.diagram import Trainability
from fathometer.papers.failure_modes.figure_1 import CosineCurves
from fathometer.papers.failure_modes.figure_3 import QueryGradients
from fathometer.papers.failure_modes.figure_4 import RowStatistics
from fathometer.papers.failure_modes.figure_12 import VARIANTS, Placements, notebook
from fathometer.papers.item import FULL, SMALL, Size
from fathometer.plotting import failure_modes as pictures
from fathometer.plotting import to_png

Z = 4.5
TINY = Size(d_model=96, n_layers=8, n_heads=1, n_tokens=16, seeds=2, run_depth=1000, grid=24)


@pytest.fixture(scope="module")
def curves() -> CosineCurves:
    return figure_1(TINY, betas=(0.5, 3.0), skip_scales=(1.0,))


@pytest.fixture(scope="module")
def gradients() -> QueryGradients:
    return figure_3(TINY)


@pytest.fixture(scope="module")
def rows() -> RowStatistics:
    return figure_4(TINY, counts=(16, 64), exponents=(3, 6))


@pytest.fixture(scope="module")
def placements() -> Placements:
    return figure_12(TINY)


@pytest.fixture(scope="module")
def plane() -> Trainability:
    return diagram(TINY, networks=((0.4, 2.6), (0.6, 2.6)))


def test_networks_decide_between_the_theories(curves: CosineCurves) -> None:
    assert curves.simulated.shape == (2, 1, 51) and np.all(curves.errors[..., 1:] > 0)
    np.testing.assert_allclose(curves.simulated[..., 0], 0.03, rtol=1e-5)
    # In 50 blocks of width 96 the mean cosine drifts by about half of depth over width; over the first ten by little.
    early = np.s_[..., :11]
    for i in range(2):
        distance = np.abs(curves.theory["exact"][i] - curves.simulated[i])
        assert np.all(distance[early] < Z * curves.errors[i][early] + 0.03)
    annealed, exact = (curves.largest_errors(name)[1, 0] for name in ("annealed", "exact"))
    assert annealed > 3 * exact
    np.testing.assert_allclose(curves.theory["annealed"][0], curves.theory["exact"][0], rtol=0, atol=0.01)
    np.testing.assert_allclose(curves.theory["finite_width"], curves.theory["exact"], rtol=0, atol=0.02)


def test_query_gradients_need_no_fitted_constant(gradients: QueryGradients) -> None:
    ratio = gradients.simulated / gradients.expected
    allowance = 4 / np.array(gradients.d_model)[None, :, None]
    assert np.all(np.abs(ratio - 1) < Z * gradients.errors / gradients.expected + allowance)
    assert np.all(gradients.theory["random_energy"][..., gradients.betas < 2**0.5] == 0)
    sharp = gradients.betas > 2**0.5
    limit = (2**0.5 / 3) * (1 - 2**0.5 / gradients.betas[sharp])
    np.testing.assert_allclose(gradients.theory["random_energy"][0, 0, sharp], limit, rtol=1e-12)
    weak = gradients.simulated[:, :, 0]
    assert np.all(weak[:, 0] > 1.5 * weak[:, 1])  # the floor is one over the width


def test_sampled_rows_agree_with_true_averages(rows: RowStatistics) -> None:
    for name, sampled in rows.sampled.items():
        expected = np.stack([np.interp(rows.at, rows.b, values) for values in rows.theory["exact"][name]])
        assert np.all(np.abs(sampled - expected) < Z * rows.errors[name]), name
        annealed = np.stack([np.interp(rows.at, rows.b, values) for values in rows.theory["annealed"][name]])
        assert np.any(np.abs(sampled - annealed) > 10 * rows.errors[name]), name


def test_the_map_of_closed_forms(rows: RowStatistics) -> None:
    few, many = (int(np.argmin(np.abs(rows.map_counts - n))) for n in (16, 64))
    assert 0.4 < rows.reach(rows.mean_square["annealed"], few) < 0.6
    assert rows.reach(rows.mean_square["random_energy"], few) == 0.0
    assert rows.reach(rows.cosine["random_energy"], few) < rows.reach(rows.cosine["random_energy"], many)
    assert rows.reach(np.ones_like(rows.cosine["annealed"]), few) == float("inf")


def test_placements_of_the_norm(placements: Placements) -> None:
    worked = {("post-LN", 5): 0.892555, ("post-LN", 20): 0.999996, ("pre-LN", 5): 0.755969}
    worked |= {("pre-LN", 20): 0.949666, ("pre-LN", 100): 0.990856}
    worked |= {("post-LN, gain control", 100): 0.524991, ("pre-LN, gain control", 100): 0.409638}
    for (variant, layer), printed in worked.items():
        row = placements.variants.index(variant)
        assert placements.theory["random_energy"][row, layer] == pytest.approx(printed, abs=5.1e-7)
    distance = np.abs(placements.theory["exact"] - placements.simulated)[:, :11]
    assert np.all(distance < Z * placements.errors[:, :11] + 0.04)
    without = placements.variants.index("no LN")
    condensed = placements.condensation["exact"]
    assert condensed[without, 15] > 1 and np.nanmax(np.delete(condensed, without, axis=0)) < 1
    assert np.isnan(condensed[without, -1])
    # Networks side with true averages where the limit of many tokens stops short of collapse.
    ends = {name: 1 - curves[without, -1] for name, curves in placements.theory.items()}
    assert ends["random_energy"] > 5e-4 and max(ends["exact"], 1 - placements.simulated[without, -1]) < 1e-6


def test_the_diagram(plane: Trainability) -> None:
    assert plane.about["n_tokens"] == plane.about["d_model"] == 2 * TINY.d_model
    assert all(set(np.unique(codes)) == {0, 1, 2} for codes in plane.labels.values())
    condensed = plane.betas > plane.crossovers["condensation"]
    assert np.all((plane.labels["asymptotic"] == 2) == condensed[None, :])
    assert plane.crossovers["participation"] < plane.crossovers["entropy"] < plane.crossovers["condensation"]
    weak = plane.skip_scales[:, None] < plane.critical["random_energy"][0]
    assert np.all((plane.labels["asymptotic"][:, :5] == 1) == weak)
    asymptotic = plane.critical_over_depth["random_energy"][[plane.depths.index(n) for n in (6, 12, 24, 60, 100)], 0]
    np.testing.assert_allclose(asymptotic, [0.27, 0.469, 0.738, 1.281, 1.738], rtol=0, atol=6e-4)
    assert plane.critical_over_depth["exact"][0, 1] == 0  # three condensed blocks need no skip
    assert plane.points.shape == (4, 3)
    assert np.all(np.abs(plane.points[:, 2] - plane.predicted["exact"]) < 0.25)
    assert np.all((plane.points[:, 2] > 0.99) == (plane.predicted["exact"] > 0.99))


def test_networks_are_drawn_afresh() -> None:
    spec = notebook("post-LN", d_model=32, n_tokens=16).with_depth(2)
    seen = simulated_cosines(spec, n_tokens=16, q=1.0, cosine=0.2, draws=6, seed=0)
    assert seen.shape == (6, 3) and len(np.unique(seen[:, 2])) == 6
    again = simulated_cosines(spec, n_tokens=16, q=1.0, cosine=0.2, draws=6, seed=0)
    np.testing.assert_array_equal(seen, again)
    assert weight_draws(SMALL, 4) == 24 and weight_draws(FULL, 4) == 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_place_the_norm(variant: str) -> None:
    attention, mlp = notebook(variant, d_model=32, n_tokens=16).blocks[0].sublayers
    for sublayer in (attention, mlp):
        assert (sublayer.stream_norm is not None) == variant.startswith("post")
        assert (sublayer.input_norm is not None) == variant.startswith("pre")
    assert attention.branch.centred == variant.endswith("gain control")


@pytest.mark.parametrize("name", ["figure-1", "figure-3", "figure-4", "figure-12", "diagram"])
def test_items_are_drawn_and_written(name: str, request: pytest.FixtureRequest) -> None:
    fixtures = {
        "figure-1": ("curves", pictures.draw_figure_1),
        "figure-3": ("gradients", pictures.draw_figure_3),
        "figure-4": ("rows", pictures.draw_figure_4),
        "figure-12": ("placements", pictures.draw_figure_12),
        "diagram": ("plane", pictures.draw_diagram),
    }
    fixture, draw = fixtures[name]
    result: Any = request.getfixturevalue(fixture)
    assert ITEMS[f"failure-modes/{name}"].draw is draw
    assert to_png(draw(result), dpi=40).startswith(b"\x89PNG")
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["schema"] == 1
    table = result.table()
    assert table.rows and all(len(row) == len(table.headings) for row in table.rows)
