"""Figures of the effective theory: kernels and slopes against theory, tiny training runs, and pictures."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathometer import papers
from fathometer.papers.effective import kernels as kernels_of
from fathometer.papers.effective.models import language_spec
from fathometer.plotting.canvas import to_png

study: Any = importlib.import_module("fathometer.papers.effective.kernels")
training: Any = importlib.import_module("fathometer.papers.effective.ablation")

#: Relative corrections of order 1/n and, for queries and keys at 16 channels a head, 1/C, at width 256.
ALLOWANCE = 0.04


def run(name: str, **size: Any) -> Any:
    item = papers.find_item(name)
    told: list[tuple[int, int]] = []
    result = item.run(replace(papers.SMALL, **size), lambda label, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    json.dumps(result.to_dict(), allow_nan=False)
    assert to_png(item.draw(result))[:4] == b"\x89PNG"
    return result


def test_kernels_of_networks_are_those_of_theory() -> None:
    result = kernels_of(replace(papers.SMALL, seeds=2), lambda *_: None)
    assert set(result.measured) == set(study.factors(32))
    for role, values in result.measured.items():
        slack = 4.5 * result.error[role][-1] + ALLOWANCE * result.theory[role]
        assert abs(values[-1] - result.theory[role]) <= slack, role
    slack = 4.5 * result.output_error[-1] + ALLOWANCE * result.output
    assert (np.abs(result.measured_output[-1] - result.output) <= slack).all()
    assert result.output[1, 3] > 1.5 * result.output[0, 1]  # the same word twice
    assert len(result.table().rows) == len(result.measured)


def test_slopes_vanish_under_the_rules_and_are_one_for_matrices_without() -> None:
    result = run("effective/tangent-slopes", seeds=2)
    for role, (slope, error) in result.rules.items():
        assert abs(slope) <= 4.5 * error + 0.06, role
        uniform, _ = result.uniform[role]
        assert uniform - slope == pytest.approx(result.expected[role], abs=1e-9)
    matrices = {"query", "key", "value", "output", "mlp_in", "mlp_out", "head"}
    assert {role for role, slope in result.expected.items() if abs(slope - 1) < 1e-9} == matrices
    assert all(abs(result.expected[role]) < 1e-9 for role in set(result.expected) - matrices)


def test_items_are_listed_with_a_picture() -> None:
    names = {name for name in papers.ITEMS if name.startswith("effective/")}
    assert names == {
        f"effective/{name}"
        for name in ("kernels", "tangent-slopes", "transfer-language", "transfer-vision", "position-ablation")
    }
    assert next(iter(language_spec(64).trunk.layers())).sublayers[0].branch.n_heads == 8


def test_recipes_of_the_ablation_differ_where_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG2_RATES", range(-16, -14))
    result = run("effective/position-ablation", grid=10, seeds=1)
    factors = result.factors
    assert set(factors["uniform"].values()) == {1.0}
    rules = factors["neural-tangent"]
    assert rules["position_embedding"] == pytest.approx(64) and rules["patch_embedding"] == pytest.approx(16)
    assert rules["norm_gain"] == pytest.approx(64) and rules["value"] == 1.0
    changed = {role for role in rules if rules[role] != factors["neural-tangent, positions slow"][role]}
    assert changed == {"position_embedding"}
    changed = {role for role in rules if factors["uniform, positions fast"][role] != 1.0}
    assert changed == {"position_embedding"}
    assert result.gain("uniform") == (0.0, 0.0)


def test_the_best_rate_and_the_gain_of_planted_losses() -> None:
    losses = {
        "uniform": np.array([[2.0, 2.2], [1.0, 1.2], [np.inf, 0.1]]),
        "other": np.array([[0.9, 0.9], [0.6, 0.7], [2.0, 2.0]]),
    }
    rates = np.array([0.25, 0.5, 1.0])
    result = training.Ablation(
        rates=rates, losses=losses, accuracies=losses, factors={}, about={"width": 8, "steps": 5}
    )
    assert (result.best("uniform"), result.best("other")) == (1, 1)
    assert result.gain("other") == pytest.approx((0.45, 0.05))


def test_a_tiny_transfer_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("fathometer.papers.effective.transfer")
    monkeypatch.setattr(module, "LANGUAGE_RATES", range(-8, -5))
    result = run("effective/transfer-language", grid=8, seeds=1)
    assert result.check.losses["uniform"].shape == (4, 3, 3)
    assert [row[0] for row in result.table().rows] == list(result.check.schemes)


@pytest.mark.slow
def test_the_position_embedding_explains_the_gain() -> None:
    result = run("effective/position-ablation")
    for name in ("neural-tangent", "uniform, positions fast"):
        mean, error = result.gain(name)
        assert mean > 4.5 * error and mean > 0.3
    for name in ("neural-tangent, positions slow", "uniform, patches fast"):
        mean, _ = result.gain(name)
        assert mean < 0.1
