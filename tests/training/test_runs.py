"""Short training runs: they learn, they say when they diverge, and the grid of rates stops there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fathometer as fm
from fathometer.errors import DomainError
from fathometer.papers.apjn.sensitivity import Protocol, rank_correlation, run
from fathometer.training import PatchClassifier, Run, largest_stable_rate, load_digits, train

SPEC = fm.Transformer.uniform(
    n_layers=2,
    d_model=32,
    n_heads=4,
    norm=fm.LayerNorm(),
    scales=fm.Scales(query=0.55, key=0.55, value=0.55, output=0.55, mlp_in=0.55, mlp_out=1.1),
)


def test_a_small_model_learns_digits_and_a_large_rate_diverges() -> None:
    data = load_digits()
    assert data.train.shape == (1437, 16, 4) and len(data.test) == 360
    good = train(PatchClassifier(SPEC, seed=0), data, rate=0.1, steps=120)
    assert good.status == "ok" and good.accuracy > 0.5
    assert good.losses[0] == pytest.approx(math.log(10), rel=1e-5)
    bad = train(PatchClassifier(SPEC, seed=0), data, rate=1e4, steps=40)
    assert bad.status == "diverged" and math.isnan(bad.accuracy)


def test_a_rate_too_small_to_learn_is_stable() -> None:
    data = load_digits()
    for seed in range(6):
        slow = train(PatchClassifier(SPEC, seed=seed), data, rate=1e-6, steps=20, batch_size=32, seed=seed)
        assert slow.status == "ok", seed


def test_runs_repeat_exactly_and_leave_the_random_state_alone() -> None:
    data = load_digits()
    before = torch.get_rng_state()
    first = train(PatchClassifier(SPEC, seed=1), data, rate=0.05, steps=5, warmup=2, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert train(PatchClassifier(SPEC, seed=1), data, rate=0.05, steps=5, warmup=2, seed=3).losses == first.losses
    assert train(PatchClassifier(SPEC, seed=1), data, rate=0.05, steps=5, warmup=0, seed=3).losses != first.losses


def test_largest_stable_rate_stops_at_the_first_divergence() -> None:
    def attempt(rate: float) -> Run:
        return Run(losses=(1.0,), accuracy=1.0, status="ok" if rate < 0.3 else "diverged")

    best, tried = largest_stable_rate(attempt, low=1 / 16, high=8.0)
    assert best == 0.25 and [r.status for r in tried] == ["ok", "ok", "ok", "diverged"]
    assert largest_stable_rate(attempt, low=0.5, high=8.0)[0] == 0.0


def test_bad_input() -> None:
    with pytest.raises(DomainError, match="optimizer 'adam' is unknown; accepted: sgd, adamw"):
        train(PatchClassifier(SPEC, seed=0), load_digits(), rate=0.1, steps=2, optimizer="adam")
    with pytest.raises(DomainError, match="rate must be positive"):
        train(PatchClassifier(SPEC, seed=0), load_digits(), rate=0.0, steps=2)


def test_rank_correlation_and_its_interval() -> None:
    x = np.arange(20.0)
    rho, low, high = rank_correlation(x, -(x**3))
    assert (rho, low, high) == pytest.approx((-1.0, -1.0, -1.0), abs=1e-12)
    noise = np.random.default_rng(1).normal(size=20)
    rho, low, high = rank_correlation(x, noise)
    assert low < 0 < high and low < rho < high


def test_the_grid_of_a_protocol_has_its_shape() -> None:
    tiny = Protocol(
        norms=(fm.LayerNorm(), fm.Derf(alpha=2.0)), depths=(1, 2), warmups=(0,), d_model=16, steps=3, seeds=1
    )
    result = run(tiny)
    assert result.rates.shape == (2, 2, 1, 1)
    assert np.all(np.diff(result.amplification, axis=1) > 0)
    assert len(result.table().rows) == 4
    assert -1 <= result.correlation[0, 0] <= 1
