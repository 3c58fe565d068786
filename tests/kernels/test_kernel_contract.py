"""Laws that every kernel obeys. A kernel listed in conftest is subjected to all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PAIRS = [(1.0, 1.0, 0.5), (0.3, 2.0, -0.4), (5.0, 0.7, 1.2), (2.0, 2.0, 0.0)]
second_moments = st.floats(1e-3, 40.0)
cosines = st.floats(-1.0, 1.0)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_slope_is_the_derivative_of_overlap(any_case: Any, pair: tuple[float, float, float]) -> None:
    """Price's theorem, by a five-point difference."""
    q_a, q_b, p = pair
    step = 1e-2 * np.sqrt(q_a * q_b)
    overlap = [float(any_case.kernel.overlap(q_a, q_b, p + k * step)) for k in (-2, -1, 1, 2)]
    numeric = (overlap[0] - 8.0 * overlap[1] + 8.0 * overlap[2] - overlap[3]) / (12.0 * step)
    assert float(any_case.kernel.slope_overlap(q_a, q_b, p)) == pytest.approx(numeric, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(q_a=second_moments, q_b=second_moments, cosine=cosines)
def test_symmetry_and_cauchy_schwarz(any_case: Any, q_a: float, q_b: float, cosine: float) -> None:
    p = cosine * float(np.sqrt(q_a * q_b))
    for expectation in (any_case.kernel.overlap, any_case.kernel.slope_overlap):
        value = float(expectation(q_a, q_b, p))
        bound = float(np.sqrt(expectation(q_a, q_a, q_a) * expectation(q_b, q_b, q_b)))
        assert float(expectation(q_b, q_a, p)) == pytest.approx(value, rel=1e-12, abs=1e-13 * bound)
        assert abs(value) <= bound * (1.0 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(q=second_moments)
def test_variance_is_not_negative(any_case: Any, q: float) -> None:
    kernel = any_case.kernel
    assert float(kernel.mean(q)) ** 2 <= float(kernel.overlap(q, q, q)) * (1.0 + 1e-12)


def test_broadcasts_and_scalars_equal_elements(any_case: Any) -> None:
    rng = np.random.default_rng(1)
    q_a, q_b = rng.uniform(0.2, 3.0, (3, 1)), rng.uniform(0.2, 3.0, 4)
    p = rng.uniform(-1.0, 1.0, (2, 1, 1)) * np.sqrt(q_a * q_b)
    kernel = any_case.kernel
    for expectation in (kernel.overlap, kernel.slope_overlap):
        value = expectation(q_a, q_b, p)
        assert value.shape == (2, 3, 4)
        assert value.dtype == np.float64
        single = [expectation(float(a), float(b), float(c)) for a, b, c in np.broadcast(q_a, q_b, p)]
        assert np.allclose(value.ravel(), np.array(single, dtype=float), rtol=1e-12, atol=1e-14)
    mean = kernel.mean(q_a)
    assert mean.shape == q_a.shape
    assert np.allclose(mean.ravel(), [float(kernel.mean(float(q))) for q in q_a.ravel()], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shapes", [((), (), (5,)), ((5,), (), ()), ((), (5,), ()), ((), (), ())], ids=str)
def test_any_argument_may_be_the_array(any_case: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    arrays = [np.full(shape, x) for shape, x in zip(shapes, (1.0, 2.0, 0.5), strict=True)]
    expected = np.broadcast_shapes(*shapes)
    for expectation in (any_case.kernel.overlap, any_case.kernel.slope_overlap):
        value = expectation(*arrays)
        assert np.shape(value) == expected
        assert np.allclose(value, float(expectation(1.0, 2.0, 0.5)), rtol=1e-12)


def test_accepts_empty_arrays_and_integers(any_case: Any) -> None:
    empty = np.empty((0, 3))
    for expectation in (any_case.kernel.overlap, any_case.kernel.slope_overlap):
        assert expectation(empty, empty, empty).shape == (0, 3)
        assert float(expectation(1, 1, 1)) == pytest.approx(float(expectation(1.0, 1.0, 1.0)), rel=1e-13)
    assert any_case.kernel.mean(empty).shape == (0, 3)


@pytest.mark.parametrize("other", [0.0, 2.0])
def test_zero_second_moment_is_the_function_at_zero(case: Any, other: float) -> None:
    zero, at_zero = np.float64(0.0), float(case.value(np.zeros(1))[0])
    expected = at_zero * float(case.kernel.mean(other))
    assert float(case.kernel.overlap(zero, np.float64(other), zero)) == pytest.approx(expected, abs=1e-15)
    assert float(case.kernel.overlap(np.zeros(2), np.full(2, other), np.zeros(2))[1]) == pytest.approx(
        expected, abs=1e-15
    )
    assert float(case.kernel.mean(zero)) == pytest.approx(at_zero, abs=1e-15)
    assert np.isfinite(case.kernel.slope_overlap(zero, np.float64(other), zero))
    tiny = 1e-12
    assert float(case.kernel.slope_overlap(0.0, 0.0, 0.0)) == pytest.approx(
        float(case.kernel.slope_overlap(tiny, tiny, tiny)), rel=1e-5
    )


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_rounding_beyond_perfect_correlation_is_harmless(any_case: Any, cosine: float) -> None:
    q_a, q_b = 0.3, 1.7  # tolerances: the angle between u and v is the root of what rounding leaves of 1 - |c|
    edge = cosine * float(np.sqrt(q_a * q_b))
    for expectation in (any_case.kernel.overlap, any_case.kernel.slope_overlap):
        values = [float(expectation(q_a, q_b, edge * (1.0 + k * 2.3e-16))) for k in (-2, 0, 2)]
        assert np.allclose(values, values[1], rtol=1e-7, atol=1e-8)
