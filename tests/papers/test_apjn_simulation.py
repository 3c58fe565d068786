"""Items of arXiv:2604.11890v3 that put whole theories to the test: photographs and approximations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fathometer.attention import Annealed, Uniform
from fathometer.papers.apjn import approximations, photographs
from fathometer.papers.apjn.approximations import METHODS, SETTINGS, Approximations
from fathometer.papers.apjn.photographs import NORMS, Photographs, swap_norms, vision_transformer
from fathometer.papers.apjn.sampled import Sampled
from fathometer.papers.item import SMALL, Size
from fathometer.plotting import apjn as pictures
from fathometer.plotting import to_png
from fathometer.spec import Derf, LayerNorm

Z = 4.5
TINY = Size(d_model=96, n_layers=8, n_heads=2, n_tokens=16, seeds=8, run_depth=1000, grid=20)
WIDTH_ALLOWANCE = 0.25


@pytest.fixture(scope="module")
def images() -> Photographs:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    return photographs(TINY)


@pytest.fixture(scope="module")
def judged() -> Approximations:
    wanted = ("few tokens, LN, n = 8", "σ²_QK = 2.86, LN")
    size = replace(SMALL, d_model=128, n_heads=4, seeds=3)
    return approximations(size, settings=[s for s in SETTINGS if s.name in wanted])


def test_gram_theory_explains_photographs(images: Photographs) -> None:
    allowance = WIDTH_ALLOWANCE * 2 * TINY.n_layers / TINY.d_model
    for curve in ("q", "p", "apjn_log"):
        folds = images.folds["Gram matrix"][curve]
        noise = images.noise[curve].mean(axis=1)
        assert np.all(folds[:, 0] < noise**Z * np.exp(allowance))
    # Tokens of unequal size: with LayerNorm the small ones amplify gradients, which their mean does not know.
    gram, equal = (images.folds[theory]["apjn_log"][0, 1] for theory in ("Gram matrix", "equal tokens"))
    assert gram < 1.15
    assert equal > 1.3


def test_every_norm_is_swapped_and_nothing_else_moves() -> None:
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    model = vision_transformer(TINY, 64)
    kept = {name: value.clone() for name, value in model.state_dict().items() if "norm" not in name}
    norm = next(norm for norm in NORMS if isinstance(norm, Derf))
    assert swap_norms(model, norm) == 2 * TINY.n_layers + 1
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(norm) for norm in NORMS].count(LayerNorm) == 1


def distance(result: Approximations, method: str) -> dict[str, float]:
    """Return the distance from simulation over its tolerance; agreement is below one."""
    out = {}
    for i, name in enumerate(result.settings):
        setting = next(s for s in SETTINGS if s.name == name)
        allowance = WIDTH_ALLOWANCE * 2 * setting.n_layers / result.about["size"]["d_model"]
        tolerance = Z * result.errors[i] + allowance * result.simulated[i]
        out[name] = float(abs(result.predicted[method][i] - result.simulated[i]) / tolerance)
    return out


def test_the_full_recursion_survives_everywhere(judged: Approximations) -> None:
    assert max(distance(judged, "full, sampled").values()) < 1


def test_dropped_terms_are_noticed(judged: Approximations) -> None:
    assert distance(judged, "single factor")["σ²_QK = 2.86, LN"] > 1
    assert distance(judged, "many tokens")["σ²_QK = 2.86, LN"] > 1
    few = judged.settings.index("few tokens, LN, n = 8")
    missing = np.abs(np.log(judged.level["many tokens"] / judged.level["full, sampled"]))
    assert missing[few] > 0.015
    assert missing[judged.settings.index("σ²_QK = 2.86, LN")] < 0.005


@pytest.mark.slow
def test_the_whole_table_at_small_size() -> None:
    result = approximations(SMALL)
    assert max(distance(result, "full, sampled").values()) < 1
    for method in set(METHODS) - {"full, sampled", "full, annealed"}:
        assert max(distance(result, method).values()) > 1, method
    strong = result.settings.index("σ²_QK = 2.86, LN")
    assert result.folds["full, sampled"][strong] < 1.1
    assert result.folds["full, annealed"][strong] > 1.2  # the closed form at a score variance above one


def test_sampled_scores_have_the_known_limits() -> None:
    flat, uniform = (closure.statistics(8, 0.0, 0.3) for closure in (Sampled(draws=10), Uniform()))
    np.testing.assert_allclose([flat.y2, flat.y12, flat.entropy], [uniform.y2, uniform.y12, uniform.entropy])
    np.testing.assert_allclose([flat.score, flat.score_pair], 1 / 8 * (1 - 1 / 8))
    variance = np.array([0.05, 0.1])
    sampled, annealed = Sampled().statistics(64, variance, 0.4), Annealed().statistics(64, variance, 0.4)
    for name in ("y2", "y12", "score", "score_pair", "entropy"):
        np.testing.assert_allclose(getattr(sampled, name), getattr(annealed, name), rtol=6e-3)
    sharp = Sampled(draws=500).statistics(16, 4.0, 1.0)
    assert sharp.y2 == pytest.approx(sharp.y12)  # perfectly correlated rows are the same row


def test_simulations_are_drawn_and_written(images: Photographs, judged: Approximations) -> None:
    for figure in (pictures.draw_photographs(images), pictures.draw_approximations(judged)):
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
    for result in (images, judged):
        json.dumps(result.to_dict(), allow_nan=False)
        assert all(len(row) == len(result.table().headings) for row in result.table().rows)
