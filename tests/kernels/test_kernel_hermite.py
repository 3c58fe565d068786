"""The Hermite series of large arrays of pairs, against the methods it replaces and an independent quadrature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from math import factorial
from typing import Any

import numpy as np
import pytest

from fathometer.kernels import hermite
from fathometer.kernels.hermite import Coefficients, HermiteGrid, HermiteSeries, Worth
from fathometer.kernels.quadrature import QuadratureKernel
from fathometer.spec.arrays import FloatArray

NAMES = ["gelu_tanh", "silu", "tanh", "dyt 2.0", "softplus"]
ALWAYS = Worth(n_pairs=1, sharing=1, n_terms=1000, reach=0.0)
FINE = HermiteGrid(step=0.05, strip=0.32, n_terms=300)
EVERYWHERE = np.ones(1, dtype=np.bool_)
BruteForce = Callable[[Any, float, float, float], float]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
        warnings.simplefilter("error")
        yield


def gram(n: int, low: float, high: float, *, closest: float = 1e-3, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Return second moments and overlaps; half of the cosines approach +-1, down to a distance ``closest``."""
    rng = np.random.default_rng(seed)
    q = np.exp(rng.uniform(np.log(low), np.log(high), n))
    near = rng.choice([-1.0, 1.0], (n, n)) * (1.0 - closest ** rng.uniform(0.0, 1.0, (n, n)))
    cosine = np.where(rng.random((n, n)) < 0.5, rng.uniform(-1.0, 1.0, (n, n)), near)
    p = cosine * np.sqrt(q[:, None] * q)
    np.fill_diagonal(p, q)
    return q, p


def distance(expectation: Any, q_a: FloatArray, q_b: FloatArray, p: FloatArray) -> FloatArray:
    """Return how far the array differs from its elements taken one by one, relative to the diagonals."""
    value = expectation(q_a, q_b, p)
    single = [expectation(float(a), float(b), float(c)) for a, b, c in np.broadcast(q_a, q_b, p)]
    unit = [
        np.sqrt(float(expectation(float(a), float(a), float(a))) * float(expectation(float(b), float(b), float(b))))
        for a, b in np.broadcast(q_a, q_b)
    ]
    units = np.broadcast_to(np.reshape(unit, np.broadcast_shapes(q_a.shape, q_b.shape)), value.shape)
    return np.asarray(np.abs(value - np.reshape(single, value.shape)) / units)


class Spy:
    """Counts the pairs a kernel leaves to its slower method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.summed = 0, 0
        fill = hermite._fill

        def counting(out: Any, moments: Any, coefficients: Any, reach: float, otherwise: Any) -> None:
            def counted(q_a: Any, q_b: Any, p: Any) -> Any:
                self.left += np.size(p)
                return otherwise(q_a, q_b, p)

            self.summed += out.size
            fill(out, moments, coefficients, reach, counted)

        monkeypatch.setattr(hermite, "_fill", counting)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("span", [(1e-3, 1.0), (0.3, 4.0), (1.0, 30.0)], ids=str)
@pytest.mark.parametrize("closest", [1e-2, 1e-9])
def test_arrays_equal_their_elements(
    name: str, span: tuple[float, float], closest: float, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, p = gram(17, *span, closest=closest)
    spy = Spy(monkeypatch)
    for expectation in (cases[name].kernel.overlap, cases[name].kernel.slope_overlap):
        assert np.max(distance(expectation, q[:, None], q, p)) < 2e-12
    assert spy.summed == 2 * 17**2


@pytest.mark.parametrize("name", NAMES)
def test_arrays_agree_with_brute_force(name: str, cases: dict[str, Any], brute_force: BruteForce) -> None:
    case = cases[name]
    rng = np.random.default_rng(3)
    q_a, q_b = rng.uniform(0.1, 5.0, 18), rng.uniform(0.1, 5.0, 18)
    p = rng.uniform(-1.0, 1.0, (18, 18)) * np.sqrt(q_a[:, None] * q_b)
    for function, expectation in ((case.value, case.kernel.overlap), (case.derivative, case.kernel.slope_overlap)):
        value = expectation(q_a[:, None], q_b, p)
        for i, j in rng.integers(0, 18, (12, 2)):
            unit = np.sqrt(expectation(q_a[i], q_a[i], q_a[i]) * expectation(q_b[j], q_b[j], q_b[j]))
            assert abs(value[i, j] - brute_force(function, q_a[i], q_b[j], p[i, j])) < 3e-12 * unit


def test_coefficients_of_an_exponential() -> None:
    r"""Exactly, E exp(t sqrt(q) x) h_k(x) = exp(t^2 q / 2) (t sqrt(q))^k / sqrt(k!)."""
    for grid in hermite._GRIDS:
        found = Coefficients.of(lambda x: np.exp(0.5 * x), np.array([1.2]), EVERYWHERE, grid)
        t = 0.5 * 1.2
        for terms in found.parts:
            orders = 2 * np.arange(20) + terms.parity
            exact = np.exp(t * t / 2) * np.array([t**k / np.sqrt(float(factorial(k))) for k in orders])
            assert np.max(np.abs(terms.coefficients[:20, 0] - exact)) < 1e-14
        assert found.square == pytest.approx(np.exp(2 * t * t), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slope", [False, True])
def test_the_bound_is_a_bound_and_is_reached(name: str, slope: bool, cases: dict[str, Any]) -> None:
    """Against 300 terms. At c = 1 and equal second moments Cauchy-Schwarz is an equality."""
    function = cases[name].derivative if slope else cases[name].value
    q = np.array([0.2, 1.0, 3.0])
    at = Coefficients.of(function, np.sqrt(q), np.ones(3, dtype=np.bool_), FINE)
    reached = 0
    for terms in at.parts:
        for cosine in (1.0, -0.95, 0.6, 0.1):
            a, b = terms.coefficients[:, :, None], terms.coefficients[:, None, :]
            orders = 2 * np.arange(len(a))[:, None, None] + terms.parity
            missing = np.cumsum((a * b * cosine**orders)[::-1], axis=0)[::-1]
            unit = np.sqrt(at.square[:, None] * at.square)
            first, second = (terms.reshaped(shape) for shape in ((3, 1), (1, 3)))
            for n in (0, 1, 2, 5, 10, 20, 40):
                bound = first.bound(second, n, np.full((3, 3), cosine))
                error = np.abs(missing[n]) / unit
                assert np.all(error <= bound + 1e-15)
                if cosine == 1.0:
                    diagonal = np.diagonal(bound)
                    assert np.allclose(np.diagonal(error), diagonal, rtol=1e-4, atol=5e-15)  # 300 terms leave 5e-6
                    reached += int(np.sum(diagonal > 1e-8))
    assert reached >= 5


def test_fewest_terms_meet_the_tolerance_and_one_less_does_not(cases: dict[str, Any]) -> None:
    std = np.sqrt(np.array([0.5, 3.0]))
    even, odd = Coefficients.of(cases["softplus"].value, std, np.ones(2, dtype=np.bool_), FINE).parts
    for terms, largest in ((even, 1.0), (even, 0.8), (odd, 0.8)):
        n = terms.needed(terms, largest)
        assert n is not None
        cosine = np.full(2, largest)
        assert np.max(terms.bound(terms, n, cosine)) <= hermite.TOLERANCE / 2
        assert n == 0 or np.max(terms.bound(terms, n - 1, cosine)) > hermite.TOLERANCE / 2


@pytest.mark.parametrize("name", ["gelu_tanh", "tanh"])
def test_pairs_out_of_reach_are_left_to_the_other_method(
    name: str, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token is too large for the finest grid, and for tanh some converge too slowly."""
    q, p = gram(17, 0.5, 20.0, closest=1e-6)
    q[3], p[3], p[:, 3] = 400.0, p[3] * np.sqrt(400.0 / q[3]), p[:, 3] * np.sqrt(400.0 / q[3])
    p[3, 3] = 400.0
    spy = Spy(monkeypatch)
    assert np.max(distance(cases[name].kernel.slope_overlap, q[:, None], q, p)) < 2e-12
    assert 33 <= spy.left < 17**2
    assert (spy.left > 40) == (name == "tanh")


@pytest.mark.parametrize(("name", "left"), [("tanh", 17**2), ("gelu_tanh", 0)])
def test_a_fast_method_keeps_an_array_of_which_little_is_in_reach(
    name: str, left: int, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    q = rng.uniform(5.0, 20.0, 17)
    p = 0.999 * np.sqrt(q[:, None] * q)
    spy = Spy(monkeypatch)
    assert np.max(distance(cases[name].kernel.overlap, q[:, None], q, p)) < 2e-12
    assert spy.left == left


def test_where_nothing_is_resolved_the_other_method_is_called_once_with_its_own_arguments() -> None:
    q, p, seen = np.full((20, 1), 1e4), np.zeros(20), []

    def otherwise(*moments: Any) -> Any:
        seen.append(moments)
        return np.zeros((20, 20))

    HermiteSeries(function=np.tanh, strip=1.5, worth=ALWAYS).expectation(q, q, p, otherwise=otherwise)
    assert len(seen) == 1
    assert seen[0][0] is q
    assert seen[0][2] is p


@pytest.mark.parametrize("name", NAMES)
def test_the_diagonal_is_the_mean_square(name: str, cases: dict[str, Any]) -> None:
    kernel = cases[name].kernel
    q = np.linspace(0.0, 6.0, 20)
    p = np.full((20, 20), 0.0)
    np.fill_diagonal(p, q)
    for expectation in (kernel.overlap, kernel.slope_overlap):
        exact = [float(expectation(float(x), float(x), float(x))) for x in q]
        assert np.allclose(np.diagonal(expectation(q[:, None], q, p)), exact, rtol=3e-13, atol=1e-16)


def _refuse(*moments: Any) -> Any:
    raise AssertionError(f"left to the other method: {moments}")


def test_any_shapes_broadcast_and_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    series = HermiteSeries(function=np.tanh, strip=1.5, worth=ALWAYS)
    kernel = QuadratureKernel(name="tanh", value=np.tanh, derivative=np.tanh, strip=1.5)
    rng = np.random.default_rng(2)
    q = rng.uniform(0.2, 1.0, (3, 7))
    cosine = rng.uniform(-0.9, 0.9, (3, 7, 7))
    half = np.sqrt(q[0, :, None] * q[0])
    calls: list[tuple[Any, Any, Any]] = [
        (q[:, :, None], q[:, None, :], cosine * np.sqrt(q[:, :, None] * q[:, None, :])),
        (q[0, :, None], q[0], cosine * half),
        (np.broadcast_to(q[0, :, None], (3, 7, 7)), np.broadcast_to(q[0], (3, 7, 7)), cosine * half),
        (q[0, :, None], 0.4, cosine * np.sqrt(q[0, :, None] * 0.4)),
        (0.4, 0.9, cosine * 0.6),
        (q[0, :, None], q[0], 0.1),
        (q, q[::-1], cosine[0, :3] * np.sqrt(q * q[::-1])),
        (1, 1, cosine),
    ]
    expected = [kernel._expect(np.tanh, *call) for call in calls]
    for coefficients, pairs in ((1 << 21, 1 << 15), (600, 1 << 15), (1 << 21, 5), (1, 1)):
        monkeypatch.setattr(hermite, "_COEFFICIENTS", coefficients)
        monkeypatch.setattr(hermite, "_TILE_PAIRS", pairs)
        for call, truth in zip(calls, expected, strict=True):
            value = series.expectation(*call, otherwise=_refuse)
            assert value.shape == truth.shape
            assert np.max(np.abs(value - truth)) < 1e-12


def test_symmetric_arrays_give_exactly_symmetric_ones(cases: dict[str, Any]) -> None:
    q, p = gram(20, 0.3, 3.0, closest=0.1)
    p = np.tril(p) + np.tril(p, -1).T
    value = cases["gelu_tanh"].kernel.overlap(q[:, None], q, p)
    assert np.array_equal(value, value.T)


def test_functions_too_large_at_the_ends_of_the_grid_are_not_expanded() -> None:
    """exp(x) at a standard deviation of 4 weighs most at x = 8, where the grid ends soon; and nothing may warn."""
    std, resolved = np.array([0.5, 4.0]), np.ones(2, dtype=np.bool_)
    assert Coefficients.of(np.exp, std, resolved, FINE).usable.tolist() == [True, False]
    wild = Coefficients.of(lambda x: np.cosh(100.0 * x) * np.exp(-x), std, resolved, FINE)
    assert not wild.usable.any()
    assert np.all(np.isfinite(wild.parts[0].coefficients))
    seen = []

    def otherwise(q_a: Any, q_b: Any, p: Any) -> Any:
        seen.append(np.size(p))
        return np.exp(0.5 * (q_a + q_b) + p)

    q, p = std * std, np.array([[0.25, 1.0], [1.0, 16.0]])
    series = HermiteSeries(function=np.exp, strip=40.0, worth=ALWAYS)
    value = series.expectation(q[:, None], q, p, otherwise=otherwise)
    assert np.allclose(value, np.exp(0.5 * (q[:, None] + q) + p), rtol=1e-11)
    assert seen == [3]


def test_the_function_is_evaluated_for_second_moments_and_not_for_pairs() -> None:
    points = 0

    def counted(x: Any) -> Any:
        nonlocal points
        points += np.size(x)
        return np.tanh(x)

    q, p = gram(64, 0.3, 2.0)
    kernel = QuadratureKernel(name="tanh", value=counted, derivative=counted, strip=1.5)
    kernel.overlap(q[:, None], q, p)
    assert points <= 64 * 2 * 127 * 1.3  # the grid of step 0.1, and no more than a padded block


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.001, True), (-1.0, True)])
def test_a_wrong_normalisation_is_caught(
    factor: float, wrong: bool, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale or flip the even orders of one side; coefficients are shared, hence q_a and q_b must differ."""
    weights_of, expand = hermite._rule, Coefficients.of

    def scaled(function: Any, std: Any, resolved: Any, grid: Any) -> Any:
        side = factor if std.shape[0] == 1 else 1.0
        weights, even, odd = weights_of(grid)
        monkeypatch.setattr(hermite, "_rule", lambda grid: (weights, side * even, odd))
        return expand(function, std, resolved, grid)

    monkeypatch.setattr(Coefficients, "of", scaled)
    q, p = gram(17, 0.3, 2.0, closest=0.2)
    error = np.max(distance(cases["softplus"].kernel.overlap, q[:, None], q[None, ::-1] * 1.01, 0.9 * p))
    assert (error > 1e-4) == wrong
    assert wrong or error < 2e-12


@pytest.mark.parametrize(("tolerance", "wrong"), [(1e-12, False), (1e-3, True)])
def test_a_lax_bound_is_caught(
    tolerance: float, wrong: bool, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hermite, "TOLERANCE", tolerance)
    q, p = gram(17, 0.3, 4.0)
    assert (np.max(distance(cases["tanh"].kernel.overlap, q[:, None], q, p)) > 1e-10) == wrong
