"""Curves over depth of arXiv:2604.11890v3: every point within 4.5 standard errors and the declared width allowance."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fathometer.papers.apjn import backward, forward, pooled, vit_large
from fathometer.papers.apjn.architecture import NORMS
from fathometer.papers.apjn.overlay import Overlay, overlay
from fathometer.papers.item import Size, silent
from fathometer.plotting import apjn as pictures
from fathometer.plotting import to_png

Z = 4.5
TINY = Size(d_model=96, n_layers=8, n_heads=2, n_tokens=16, seeds=8, run_depth=1000, grid=20)
# Corrections of relative order sublayers / width; reference networks show 0.1 to 0.15 of it.
ALLOWANCE = 0.25 * 2 * TINY.n_layers / TINY.d_model

FloatArray = NDArray[np.float64]


def excess(result: Overlay, curve: str, theory: FloatArray | None = None) -> float:
    """Return the largest distance from theory over its tolerance; a comparison passes below one."""
    theory = result.theory[curve] if theory is None else theory
    seen, errors = result.simulated[curve], result.errors[curve]
    if curve == "p":  # an overlap may vanish: judged against q
        size = result.theory["q"]
    else:
        size = np.ones_like(theory) if curve.endswith("_log") else np.abs(theory)
    distance = np.abs(seen - theory) / (Z * errors + ALLOWANCE * size)
    return float(distance.max())


@pytest.fixture(scope="module")
def curves() -> Overlay:
    """Return everything three items show, from one set of networks."""
    return overlay(TINY, NORMS, ("q", "p", "cosine", "apjn_log", "gradient_log"), silent)


@pytest.mark.parametrize("curve", ["q", "p", "cosine", "apjn_log", "gradient_log"])
def test_curves_follow_theory(curves: Overlay, curve: str) -> None:
    assert curves.norms[0] == "LayerNorm" and len(curves.norms) == 10
    assert excess(curves, curve) < 1


def test_curves_of_the_wrong_norm_are_noticed(curves: Overlay) -> None:
    assert excess(curves, "q", np.roll(curves.theory["q"], 1, axis=0)) > 1
    assert excess(curves, "apjn_log", np.roll(curves.theory["apjn_log"], 1, axis=0)) > 1
    assert excess(curves, "q", curves.theory["p"]) > 1


def test_the_pooled_boundary_is_not_the_isotropic_one(curves: Overlay) -> None:
    assert excess(curves, "gradient_log", curves.theory["apjn_log"]) > 1
    assert excess(curves, "apjn_log", curves.theory["gradient_log"]) > 1
    assert np.all(curves.theory["gradient_log"][:, 0] > curves.theory["apjn_log"][:, 0])


def test_larger_alphas_amplify_more(curves: Overlay) -> None:
    alphas = np.array([alpha for alpha in curves.alphas if alpha is not None])
    ends = curves.theory["apjn_log"][[alpha is not None for alpha in curves.alphas], 0]
    assert np.all(np.diff(alphas) > 0) and np.all(np.diff(ends) > 0)


@pytest.mark.parametrize(
    ("item", "draw", "shown"),
    [
        (forward, pictures.draw_forward, {"q", "p", "cosine"}),
        (backward, pictures.draw_backward, {"apjn_log"}),
        (pooled, pictures.draw_pooled, {"gradient_log", "apjn_log"}),
    ],
)
def test_items_of_a_single_draw_have_no_errors(item: Any, draw: Any, shown: set[str]) -> None:
    few = replace(TINY, seeds=1, n_layers=3)
    result = item(few)
    assert set(result.theory) == shown and result.errors == {}
    assert to_png(draw(result), dpi=40).startswith(b"\x89PNG")
    assert all(len(row) == len(result.table().headings) for row in result.table().rows)


def test_vit_large_follows_theory() -> None:
    result = vit_large(TINY)
    assert result.norms == ("LayerNorm", "Derf 0.5")
    assert max(excess(result, curve) for curve in ("q", "cosine", "apjn_log")) < 1
    lines = pictures.draw_vit_large(result).axes[2].get_lines()
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    assert any(d.shape == (9,) and np.allclose(d, np.exp(result.theory["apjn_log"][1])) for d in drawn)


def test_curves_are_drawn_and_written(curves: Overlay) -> None:
    for draw in (pictures.draw_forward, pictures.draw_backward, pictures.draw_pooled):
        assert to_png(draw(curves), dpi=40).startswith(b"\x89PNG")
    assert json.loads(json.dumps(curves.to_dict(), allow_nan=False))["schema"] == 1
