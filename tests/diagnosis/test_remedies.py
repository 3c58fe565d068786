"""A remedy's lines, pasted, do what its prediction says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fathometer as fm
from fathometer.diagnosis import DEFAULT_THRESHOLDS
from tests.diagnosis.planted import UNHEALTHY

CURABLE = (
    "DyT with alpha 4, 128 deep",
    "gate and output both scaled with depth",
    "queries and keys thirty times too large",
)


@pytest.mark.parametrize("name", CURABLE)
def test_pasted_lines_cure(name: str) -> None:
    case = next(case for case in UNHEALTHY if case.name == name)
    model, batch = case.build()
    before = fm.diagnose(model, batch, seeds=1, forward=False)
    assert before.remedies, before.verdict
    remedy = before.remedies[0]
    weights = copy.deepcopy(model.state_dict())
    exec(remedy.snippet, {"torch": torch, "model": model})
    after = fm.diagnose(model, batch, seeds=1, forward=False)
    assert not {f.name for f in after.findings} & set(remedy.cures), (remedy.title, after.verdict)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert changed and all(any(piece.isdigit() for piece in key.split(".")) for key in changed)


def test_copied_layers_are_cured_by_the_printed_lines() -> None:
    case = next(case for case in UNHEALTHY if "copied" in case.name)
    model, batch = case.build()
    report = fm.diagnose(model, batch, seeds=1, forward=False)
    exec(report.remedies[0].snippet, {"torch": torch, "model": model})
    assert fm.diagnose(model, batch, seeds=1, forward=False).healthy


def test_margins_are_stricter_than_limits() -> None:
    strict = DEFAULT_THRESHOLDS.with_margin()
    for name, value in vars(DEFAULT_THRESHOLDS).items():
        tighter = getattr(strict, name)
        assert tighter <= value if name.endswith("high") else tighter >= value


def test_curves_of_a_report_are_finite_where_it_is_healthy() -> None:
    spec = fm.preset("vit", n_layers=4, d_model=128)
    tokens = fm.equiangular_tokens(n_tokens=16, d_model=128, q=0.05, p=0.02, batch=1, seed=0)
    report = fm.diagnose(fm.reference_network(spec, seed=0), tokens, seeds=2, closure="uniform")
    assert report.healthy
    assert all(np.all(np.isfinite(curve)) for curve in report.measured.curves.values())


def test_a_point_where_the_stream_overflows_is_no_remedy() -> None:
    """A norm-free stack: large factors overflow to infinity, which no criterion may take for healthy."""
    case = next(case for case in UNHEALTHY if case.name == "no norm at all")
    model, batch = case.build()
    report = fm.diagnose(model, batch, seeds=1, forward=False)
    assert report.remedies
    for remedy in report.remedies:
        assert all(np.isfinite(value) for value in remedy.after.values())
        assert remedy.after["final mean square"] < report.measured.q[-1]
