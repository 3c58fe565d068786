"""Items of arXiv:2604.11890v3 that are theory alone: growth laws and the plane of depth and alpha."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fathometer.observables import predict
from fathometer.observables.growth import TAIL_CONSTANT, closed_form
from fathometer.papers.apjn import depth_alpha, growth
from fathometer.papers.apjn.architecture import VIT_BASE, network
from fathometer.papers.apjn.depth_alpha import N_TOKENS, P_IMAGE, Q_IMAGE, DepthAlpha
from fathometer.papers.apjn.growth import MANY, LongRun, long_run
from fathometer.papers.item import SMALL, Size
from fathometer.plotting import apjn as pictures
from fathometer.plotting import to_png
from fathometer.spec import Derf, DyT, LayerNorm

TINY = replace(SMALL, run_depth=3000, grid=60)
LONG = replace(SMALL, run_depth=100_000)
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def runs() -> dict[str, LongRun]:
    """Return runs of 1e5 blocks."""
    chosen = ((LayerNorm(), MANY), (Derf(alpha=0.5), 196), (Derf(alpha=1.0), 196), (DyT(alpha=1.0), 196))
    return {run.norm: run for run in (long_run(LONG, norm, n_tokens) for norm, n_tokens in chosen)}


@pytest.fixture(scope="module")
def plane() -> DepthAlpha:
    return depth_alpha(TINY)


def off(value: float, limit: float) -> float:
    return abs(value / limit - 1)


def test_layer_norm_is_a_power_law(runs: dict[str, LongRun]) -> None:
    run = runs["LayerNorm"]
    assert run.limit == pytest.approx(2 / 3, rel=1e-12)
    assert off(run.extrapolated, run.limit) < TOLERANCE
    assert off(run.last, run.limit) > TOLERANCE  # the run alone, a hundred thousand blocks, is not there yet
    assert off(run.extrapolated, 1.0) > TOLERANCE  # an attention of no gain


@pytest.mark.parametrize("name", ["Derf 1", "DyT 1"])
def test_saturating_norms_are_stretched_exponentials(runs: dict[str, LongRun], name: str) -> None:
    run = runs[name]
    assert off(run.last, run.limit) < TOLERANCE  # between 5e4 and 1e5 blocks
    assert off(run.extrapolated, run.limit) < TOLERANCE


def test_small_alpha_arrives_later(runs: dict[str, LongRun]) -> None:
    """At alpha = 0.5 the last octave is 1.2e-3 away; the gap of the cosine carries the rest."""
    run = runs["Derf 0.5"]
    assert TOLERANCE < off(run.last, run.limit) < 1.5 * TOLERANCE
    assert off(run.extrapolated, run.limit) < TOLERANCE


def test_wrong_constants_are_noticed(runs: dict[str, LongRun]) -> None:
    block = network(TINY, Derf(alpha=1.0), VIT_BASE).blocks[0]
    without_tokens = closed_form(block)["lambda"] ** -0.5  # n -> infinity, as published
    wrong = {
        "Derf 1": [without_tokens, runs["Derf 1"].limit * TAIL_CONSTANT[DyT] / TAIL_CONSTANT[Derf]],
        "DyT 1": [runs["DyT 1"].limit * TAIL_CONSTANT[Derf] / TAIL_CONSTANT[DyT]],
        "LayerNorm": [1 / 2, 0.668],
    }
    for name, limits in wrong.items():
        for limit in limits:
            assert off(runs[name].extrapolated, limit) > TOLERANCE
            assert off(runs[name].last, limit) > TOLERANCE


def test_each_law_is_straight_on_its_own_axes_only(runs: dict[str, LongRun]) -> None:
    for run in runs.values():
        tail = run.depths > 1000
        residuals = {}
        for law, axis in (("power", np.log), ("stretched", np.sqrt)):
            x, y = axis(run.depths[tail]), run.log_apjn[tail]
            residuals[law] = float(np.std(y - np.polyval(np.polyfit(x, y, 1), x)) / np.ptp(y))
        other = "power" if run.law == "stretched" else "stretched"
        assert residuals[run.law] < 0.003
        assert residuals[other] > 0.03


def test_the_alpha_that_matches_layer_norm(plane: DepthAlpha) -> None:
    solved = dict(zip(plane.solved_depths, plane.solved, strict=True))
    assert [round(solved[depth], 2) for depth in (12, 24, 64, 128)] == [1.33, 1.0, 0.66, 0.49]
    on_grid = plane.contour[np.array(plane.solved_depths) - 1]
    np.testing.assert_allclose(on_grid, plane.solved, rtol=2e-3)
    assert np.all(np.diff(plane.contour) < 0)


def test_the_plane_is_monotone_and_equals_backward_curves(plane: DepthAlpha) -> None:
    assert np.all(np.diff(plane.log_apjn, axis=1) > 0) and np.all(np.diff(plane.log_apjn, axis=0) > 0)
    depth, k = 40, 25
    spec = network(TINY, Derf(alpha=float(plane.alphas[k])), VIT_BASE).with_depth(depth)
    profile = predict(spec, n_tokens=N_TOKENS, q=Q_IMAGE, p=P_IMAGE)
    assert plane.log_apjn[depth - 1, k] == pytest.approx(float(profile.curves["apjn_log"][0]), rel=1e-10)


def test_theory_is_drawn_and_written(plane: DepthAlpha) -> None:
    short = growth(TINY)
    for figure in (pictures.draw_growth(short), pictures.draw_depth_alpha(plane)):
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
    for result in (short, plane):
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["about"]["paper"] == "arXiv:2604.11890v3"
        assert len(result.table().rows[0]) == len(result.table().headings)


def test_a_size_is_checked() -> None:
    with pytest.raises(ValueError, match="no smaller than n_tokens; got d_model=8"):
        Size(d_model=8, n_layers=2, n_heads=2, n_tokens=16, seeds=1, run_depth=10, grid=2)
    with pytest.raises(ValueError, match=r"Size.seeds must be a positive integer; got 0"):
        replace(SMALL, seeds=0)
