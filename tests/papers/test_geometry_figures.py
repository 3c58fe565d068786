"""Figures 2 to 5 of arXiv:2403.02579: theory against networks within 4.5 standard errors and the width allowance."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fathometer import papers
from fathometer.attention import Annealed
from fathometer.observables import exponents, stable_state
from fathometer.papers.geometry import figure_2, figure_3, figure_4, figure_5
from fathometer.papers.geometry.architecture import NETWORKS, network
from fathometer.papers.geometry.figure_2 import STARTS, Flows
from fathometer.papers.geometry.figure_3 import (
    Recovery,
    decay_exponent,
    group_overlaps,
    grouped_gram,
    ratio_of_means,
)
from fathometer.papers.geometry.maps import Line, Map, Maps
from fathometer.papers.item import SMALL, Size
from fathometer.plotting import geometry as pictures
from fathometer.plotting import to_png
from fathometer.propagation import propagate_gram

FloatArray = NDArray[np.float64]

Z = 4.5
TINY = Size(d_model=96, n_layers=10, n_heads=1, n_tokens=32, seeds=4, run_depth=100, grid=5)
# Corrections of relative order sublayers / width, of which networks show a part.
ALLOWANCE = 0.25 * 2 * TINY.n_layers / TINY.d_model


@pytest.fixture(scope="module")
def flows() -> Flows:
    return figure_2(TINY)


@pytest.fixture(scope="module")
def recovery() -> Recovery:
    return figure_3(replace(TINY, seeds=6))


@pytest.fixture(scope="module")
def angles() -> Maps:
    return figure_4(TINY)


@pytest.fixture(scope="module")
def gradients() -> Maps:
    return figure_5(TINY)


def excess(seen: FloatArray, theory: FloatArray, error: FloatArray, allowance: FloatArray | float) -> float:
    """Return the largest distance from theory over its tolerance; agreement is below one."""
    return float(np.max(np.abs(seen - theory) / (Z * error + allowance + 1e-6)))


def at(line: Line, x: float) -> float:
    """Return a line where it was solved."""
    (index,) = np.flatnonzero(np.isclose(line.x, x))
    return float(line.y[index])


def test_networks_follow_the_flow(flows: Flows) -> None:
    ordered, chaotic = flows.flows
    assert [flow.sigma_w for flow in flows.flows] == [2.0, 8.0]
    for flow in flows.flows:
        assert flow.theory_q.shape == (len(STARTS), 11)
        assert excess(flow.simulated_q, flow.theory_q, flow.error_q, ALLOWANCE * flow.theory_q) < 1
        assert excess(flow.simulated_cosine, flow.theory_cosine, flow.error_cosine, ALLOWANCE) < 1
        np.testing.assert_allclose(flow.simulated_q[:, 0], [q for q, _ in STARTS], rtol=1e-4)
        np.testing.assert_allclose(flow.simulated_cosine[:, 0], [cosine for _, cosine in STARTS], rtol=1e-4)
    assert excess(ordered.simulated_q, chaotic.theory_q, ordered.error_q, ALLOWANCE * chaotic.theory_q) > 1


def test_fixed_points_are_where_the_field_vanishes(flows: Flows) -> None:
    found = {flow.name: [(s.kind, s.is_stable) for s in flow.rest_states] for flow in flows.flows}
    assert found == {"ordered": [("collapsed", True)], "chaotic": [("simplex", True), ("collapsed", False)]}
    ordered, chaotic = (flow.rest_states for flow in flows.flows)
    assert ordered[0].q == pytest.approx(0.80547266, abs=1e-7)
    assert chaotic[0].cosine == pytest.approx(0.85357, abs=2e-3)  # 96 tokens, and not infinitely many
    for flow in flows.flows:
        equal = flow.step_cosine[-1]
        np.testing.assert_allclose(equal, 0.0, atol=1e-12)  # equal tokens stay equal
        norm = flow.rest_states[-1].q
        assert np.all(np.sign(flow.step_q[-1]) == np.sign(norm - flow.field_q))


def test_networks_recover_permutation_symmetry(recovery: Recovery) -> None:
    assert recovery.simulated.shape == (2, 11) and recovery.theory.shape == (2, 21)
    seen, theory = recovery.simulated, recovery.theory[:, :11]
    np.testing.assert_allclose(seen[:, 0], 1.5, rtol=1e-5)
    assert excess(seen, theory, recovery.errors, 0.02) < 1
    assert np.all(recovery.largest_difference() < Z * recovery.errors[:, 8:].max(axis=1) + 0.01)
    np.testing.assert_allclose(recovery.annealed, theory, rtol=1e-4)  # scores of variance below one half
    assert np.all(np.diff(recovery.theory, axis=1) < 0) and np.all(recovery.theory > 1)


def test_ratios_of_the_paper_layout() -> None:
    reference = {"ordered": [1.136, 1.042, 1.015], "chaotic": [1.162, 1.059, 1.025]}
    for name, sigma_w in NETWORKS.items():
        run = propagate_gram(network(n_layers=24, d_model=64, sigma_w=sigma_w), grouped_gram(64), closure=Annealed())
        inside, across = group_overlaps(run.grams[run.borders])
        np.testing.assert_allclose((inside / across)[[8, 16, 24]], reference[name], atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_decay_exponent_is_that_of_a_small_difference(name: str) -> None:
    spec, n = network(n_layers=1, d_model=64, sigma_w=NETWORKS[name]), 64
    state = stable_state(spec, n_tokens=n)
    q, p = float(state.q), float(state.q * min(float(state.cosine), 1 - 1e-6))
    step = 1e-3 * (q - p)
    gram = np.where(grouped_gram(n) == 0.75, p + step, p - step)
    np.fill_diagonal(gram, q)
    run = propagate_gram(spec, gram, closure=Annealed())
    inside, across = group_overlaps(run.grams[-1])
    rate = float(np.log((inside - across) / (2 * step)))
    assert decay_exponent(spec, n) == pytest.approx(rate, abs=2e-3)  # attention adds terms in 1/n
    if name == "ordered":
        angle = float(exponents(spec, n_tokens=n).angle)
        assert decay_exponent(spec, n) == pytest.approx(angle, abs=1e-3)


def test_group_overlaps_and_jackknife_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    gram = generator.normal(size=(3, 8, 8))
    gram = gram + np.swapaxes(gram, -1, -2)
    group = np.arange(8) // 4
    same = (group[:, None] == group[None, :]) & ~np.eye(8, dtype=bool)
    inside, across = group_overlaps(gram)
    np.testing.assert_allclose(inside, gram[:, same].mean(axis=-1))
    np.testing.assert_allclose(across, gram[:, group[:, None] != group[None, :]].mean(axis=-1))
    above, below = generator.uniform(1, 2, size=(2, 6))
    ratio, error = ratio_of_means(above, below)
    left_out = [np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(6)]
    assert ratio == pytest.approx(above.sum() / below.sum())
    assert error == pytest.approx(np.sqrt(5 / 6 * np.sum((left_out - np.mean(left_out)) ** 2)))


def of_map(found: Map, predicted: FloatArray, layers: int) -> float:
    return excess(found.measured, predicted, found.errors, 2.0 / TINY.d_model * (1 + 4 / layers))


@pytest.mark.parametrize("which", ["angles", "gradients"])
def test_measured_maps_are_the_predicted_ones(which: str, request: pytest.FixtureRequest) -> None:
    result: Maps = request.getfixturevalue(which)
    assert [found.name for found in result.maps] == ["alpha, sigma_w", "alpha_A, alpha_M"]
    for found in result.maps:
        assert found.measured.shape == found.predicted.shape == found.theory.shape == (5, 5)
        assert of_map(found, found.predicted, result.about["n_layers"]) < 1
        assert of_map(found, found.predicted.T, result.about["n_layers"]) > 1
        assert np.any(found.predicted > 0) and np.any(found.predicted < 0)


def test_maps_tell_the_exponents_apart(angles: Maps, gradients: Maps) -> None:
    for angle, gradient in zip(angles.maps, gradients.maps, strict=True):
        assert of_map(gradient, angle.predicted, 10) > 1


def test_edges_of_chaos(angles: Maps) -> None:
    strength, branches = (found.lines[0] for found in angles.maps)
    assert at(strength, 0.3) == pytest.approx(3.58391977, abs=1e-6)
    assert at(strength, 0.7) == pytest.approx(5.31812777, abs=1e-6)
    assert at(branches, 0.1) == pytest.approx(0.16123682, abs=1e-7)
    assert at(branches, 0.5) == pytest.approx(0.92623503, abs=1e-7)
    assert np.isnan(at(branches, 0.9))


def test_zero_lines_of_the_gradient_exponent(gradients: Maps) -> None:
    own, angle, deep = gradients.maps[0].lines
    assert "L = 10, n = 32" in gradients.title and deep.label == "same at L = 64, n = 256"
    # Reference with attention weights that carry no gradient; those of the library do.
    assert [at(deep, x) for x in (0.3, 0.5, 0.7)] == pytest.approx([3.07013, 1.70069, 1.20422], rel=0.02)
    for x in (0.3, 0.5, 0.7):
        assert at(deep, x) < at(own, x) < at(angle, x)


@pytest.mark.parametrize(
    ("which", "draw"),
    [
        ("flows", pictures.draw_flows),
        ("recovery", pictures.draw_recovery),
        ("angles", pictures.draw_maps),
        ("gradients", pictures.draw_maps),
    ],
)
def test_figures_are_drawn_and_written(which: str, draw: Any, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(which)
    assert to_png(draw(result), dpi=40).startswith(b"\x89PNG")
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["about"]["paper"] == "arXiv:2403.02579" and data["schema"] == 1
    table = result.table()
    assert table.rows and all(len(row) == len(table.headings) for row in table.rows)
    numbers = [cell[0] if isinstance(cell, tuple) else cell for row in table.rows for cell in row]
    assert all(np.isfinite(number) for number in numbers if not isinstance(number, str))


def test_items_are_registered() -> None:
    names = [name for name in papers.ITEMS if name.startswith("geometry/figure")]
    assert names == [f"geometry/figure-{i}" for i in (2, 3, 4, 5)]
    assert papers.find_item("geometry/figure-4").draw is pictures.draw_maps


@pytest.mark.slow
def test_small_sizes_reproduce_the_paper() -> None:
    recovery = figure_3(SMALL)
    assert np.all(recovery.largest_difference() < 0.02)
    assert np.all(np.abs(recovery.last_slopes() - recovery.exponents) < 0.006)
    for found in figure_4(SMALL).maps:
        assert found.rms_difference < 1.5 * found.errors.mean()
