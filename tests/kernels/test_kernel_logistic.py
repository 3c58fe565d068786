"""The logistic function as a mixture of Gaussian distribution functions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf, expit, ndtr
from scipy.stats import kstwobign

from fathometer.kernels import logistic
from fathometer.kernels.logistic import TanhKernel, kolmogorov_density, logistic_mixture
from fathometer.spec.arrays import FloatArray

X = np.concatenate([np.geomspace(1e-8, 60.0, 4001), np.linspace(0.0, 20.0, 2001)[1:]])


def tanh_error(weights: FloatArray, scales: FloatArray) -> float:
    mixture = weights @ erf(np.sqrt(2.0) * X / scales[:, None])
    return float(np.max(np.abs(mixture / np.tanh(X) - 1.0)))


def test_kolmogorov_density_is_scipys() -> None:
    x = np.linspace(0.3, 4.0, 75)
    assert np.allclose(kolmogorov_density(x), kstwobign.pdf(x), rtol=2e-8)  # which is as far as scipy's digits go


def test_both_forms_of_the_density_meet() -> None:
    below, above = kolmogorov_density(np.array([1.0, np.nextafter(1.0, 2.0)]))
    assert below == pytest.approx(above, rel=1e-14)


def test_the_mixture_is_exact_before_it_is_discretised() -> None:
    for x in (0.1, 1.0, 4.0):
        value, _ = quad(
            lambda k, x=x: float(ndtr(x / (2 * k)) * kolmogorov_density(np.array(k))[0]), 0.05, 8.0, limit=200
        )
        assert value == pytest.approx(float(expit(x)), abs=1e-8)


def test_default_nodes_reproduce_tanh_and_its_derivative() -> None:
    weights, scales = logistic_mixture()
    assert len(weights) == 23
    assert np.all(weights > 0.0)
    assert weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert tanh_error(weights, scales) < 5e-14
    a = np.sqrt(2.0) / scales[:, None]
    derivative = weights @ (2.0 / np.sqrt(np.pi) * a * np.exp(-np.square(a * X)))
    assert np.max(np.abs(derivative - 1.0 / np.cosh(X) ** 2)) < 1e-13


def test_error_falls_exponentially_with_the_step() -> None:
    errors = [tanh_error(*logistic_mixture(n_nodes=round(3.4 / h), first=-1.1, step=h)) for h in (0.4, 0.3, 0.2, 0.15)]
    assert errors[0] > 1e-6
    assert all(finer < coarser / 10.0 for coarser, finer in itertools.pairwise(errors))


def test_equal_second_moments_take_a_shorter_sum_with_the_same_value(cases: dict[str, Any]) -> None:
    q, p, nudged = np.array([0.3, 4.0]), np.array([0.1, -2.0]), np.array([0.3, 4.0]) * (1.0 + 1e-15)
    for name in ("tanh", "silu"):
        kernel = cases[name].kernel
        for expectation in (kernel.overlap, kernel.slope_overlap):
            assert np.allclose(expectation(q, q, p), expectation(q, nudged, p), rtol=1e-13)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, cases: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    q_a, q_b = rng.uniform(0.1, 5.0, (2, 40))
    p = rng.uniform(-1.0, 1.0, 40) * np.sqrt(q_a * q_b)
    for name in ("tanh", "silu"):
        whole = cases[name].kernel.overlap(q_a, q_b, p)
        monkeypatch.setattr(logistic, "_CHUNK_DOUBLES", 7 * 529)
        assert np.allclose(cases[name].kernel.overlap(q_a, q_b, p), whole, rtol=1e-14)
        monkeypatch.undo()


def test_alpha_and_gain_may_be_arrays() -> None:
    alpha, gain = np.array([0.5, 1.0, 2.0]), np.array([1.0, 3.0, 0.5])
    kernel = TanhKernel(alpha=alpha, gain=gain)
    for k in range(3):
        one = TanhKernel(alpha=float(alpha[k]), gain=float(gain[k]))
        assert float(kernel.overlap(1.0, 2.0, 0.5)[k]) == pytest.approx(float(one.overlap(1.0, 2.0, 0.5)), rel=1e-13)
        slopes = kernel.slope_overlap(1.0, 2.0, 0.5)
        assert float(slopes[k]) == pytest.approx(float(one.slope_overlap(1.0, 2.0, 0.5)), rel=1e-13)
    assert kernel.mean(1.0).shape == (3,)
