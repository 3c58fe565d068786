"""Loss after training against exponents: the statistics on planted data, and a tiny run."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathometer import papers
from fathometer.plotting.canvas import to_png

study: Any = importlib.import_module("fathometer.papers.geometry.trainability")  # also the name of its function


def planted(noise: float, strength_only: bool) -> Any:
    rng = np.random.default_rng(0)
    setting = {name: np.exp(rng.uniform(-3, 0, 60)) for name in ("attention", "mlp", "width")}
    seen = {name: rng.normal(size=60) * setting["mlp"] for name in ("angle", "gradient")}
    cause = np.hypot(setting["attention"], setting["mlp"]) if strength_only else np.abs(seen["gradient"])
    losses = cause + noise * rng.normal(size=(4, 60))
    return study._correlate(setting, seen, losses)


def test_a_cause_is_found_and_the_control_is_not_mistaken_for_it() -> None:
    found = planted(0.02, strength_only=False)
    mean, low, high = found.partial["gradient"]
    assert low > 0.5 and low < mean < high
    assert found.spearman["gradient"][0] > found.spearman["strength"][0] + 0.2
    control = planted(0.02, strength_only=True)
    assert control.spearman["strength"][0] > 0.95
    assert control.partial["gradient"][1] < 0.3  # correlated with strength, and nothing beyond it


def test_partial_rank_correlation_of_independent_causes() -> None:
    rng = np.random.default_rng(1)
    x, given = rng.normal(size=(2, 4000))
    assert study._partial(x, x + given, given) == pytest.approx(1.0, abs=0.1)
    assert study._partial(given + 0.1 * x, given, given + 0.1 * rng.normal(size=4000)) == pytest.approx(0, abs=0.8)
    assert abs(study._partial(x, given, given)) < 1e-6 or np.isnan(study._partial(x, given, given))


def test_a_tiny_run_is_complete() -> None:
    size = replace(papers.SMALL, grid=20, seeds=3)
    told: list[int] = []
    result = study.trainability(size, lambda label, done, total: told.append(done))
    assert told == list(range(1, 61))
    for name in ("fixed", "random"):
        assert result.losses[name].shape == (3, 12)
        strength = np.hypot(result.settings[name]["attention"], result.settings[name]["mlp"])
        assert (np.ptp(strength) < 1e-12) == (name == "fixed")
    assert result.correlations["fixed"].partial == {}
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.table().rows) == 7
    assert to_png(papers.find_item("geometry/trainability").draw(result))[:4] == b"\x89PNG"
