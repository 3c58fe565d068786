"""Averages over finite softmax rows: against themselves, random rows, worked numbers, and their limits."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

from fathometer.attention.closure import Annealed, AttentionStatistics, Uniform
from fathometer.attention.corrections import cosine_heterogeneity, few_head_average, tilted
from fathometer.attention.exact import Exact
from fathometer.attention.random_energy import (
    RandomEnergy,
    condensation,
    critical_beta,
    poisson_dirichlet_moment,
)
from fathometer.attention.softmax_rows import Resolution, RowAverages, pair_averages, row_averages
from fathometer.errors import DomainError

COUNTS = (2, 4, 64, 4096, 10**8, 10**12)
HALVED = Resolution(step=0.1, digits=60.0, order=2)
SHARES = (0.0, 1e-6, 0.02, 0.2, 0.6, 1.0, 2.0, 8.0)  # of the variance in ln n; up to twice the critical b


@pytest.mark.parametrize("n", COUNTS)
def test_a_row_is_normalised_and_the_quadrature_converged(n: int) -> None:
    variance = np.array(SHARES) * math.log(n)
    row, finer = row_averages(n, variance), row_averages(n, variance, resolution=HALVED)
    np.testing.assert_allclose(row.norm, 1.0, rtol=1e-12)
    for value, reference in zip(row, finer, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 64, 10**6])
@pytest.mark.parametrize("share", [0.02, 1.0, 8.0])
def test_a_pair_is_converged(n: int, share: float) -> None:
    correlation = [-1 / (n - 1), 0.001, 0.3, 0.99]
    pair = pair_averages(n, share * math.log(n), correlation)
    finer = pair_averages(n, share * math.log(n), correlation, resolution=HALVED)
    for value, reference in zip(pair, finer, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-10)


@pytest.mark.parametrize("n", [2, 4, 64, 10**6])
@pytest.mark.parametrize("variance", [0.3, 5.0, 40.0])
def test_pairs_join_rows_at_the_ends(n: int, variance: float) -> None:
    """Equal rows are one row; independent rows factorise; two keys of opposite rows swap."""
    row = row_averages(n, variance)
    same, apart = pair_averages(n, variance, 1.0), pair_averages(n, variance, 0.0)
    for value, reference in (
        (same.y12, row.y2),
        (same.z12, row.y3),
        (same.y2_y2, row.y2_squared),
        (same.score_pair, row.score),
        (apart.y12, 1 / n),
        (apart.z12, row.y2 / n),
        (apart.y2_y12, row.y2 / n),
        (apart.y2_y2, row.y2**2),
        (apart.score_pair, (1 - row.y2) ** 2 / (n - 1)),
    ):
        assert value == pytest.approx(float(reference), rel=1e-10)
    if n == 2:
        assert pair_averages(2, variance, -1.0).y12 == pytest.approx(1 - row.y2, rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Against random rows

AVERAGES = ("y2", "y3", "y12", "score", "score_pair", "entropy")
POINTS = [
    (n, share * math.log(n), c)
    for n in (4, 16, 64, 512, 4096)
    for share in (0.1, 0.5, 2.0, 8.0)
    for c in (0.0, 0.5, 0.95)
    if (n, c) != (4096, 0.0)  # such rows overlap too rarely for a standard error
]
Seen = dict[str, tuple[float, float]]


@lru_cache(maxsize=128)
def sampled(n: int, variance: float, correlation: float, weights: int = 4_000_000) -> Seen:
    """Return mean and standard error of every average over random pairs of rows."""
    generator = np.random.default_rng([n, round(10 * variance), round(100 * correlation)])
    draws = min(weights // n, 40_000)
    shared, first, second = generator.normal(size=(3, draws, n))
    rows = []
    for own in (first, second):
        scores = math.sqrt(variance) * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)
        weight = np.exp(scores - scores.max(axis=1, keepdims=True))
        rows.append(weight / weight.sum(axis=1, keepdims=True))
    a, b = rows
    y2, y3, y12 = (a**2).sum(1), (a**3).sum(1), (a * b).sum(1)
    values = {
        "y2": y2,
        "y3": y3,
        "y12": y12,
        "score": y2 - 2 * y3 + y2**2,
        "score_pair": y12 - (a**2 * b).sum(1) - (a * b**2).sum(1) + y12**2,
        "entropy": -(a * np.log(np.maximum(a, 1e-300))).sum(1),
    }
    return {name: (float(x.mean()), float(x.std(ddof=1)) / math.sqrt(draws)) for name, x in values.items()}


def deviations(predicted: dict[str, Any], seen: Seen) -> dict[str, float]:
    """Return the distances in standard errors."""
    return {name: abs(float(value) - seen[name][0]) / seen[name][1] for name, value in predicted.items()}


def by_quadrature(n: int, variance: float, correlation: float) -> dict[str, Any]:
    row, pair = row_averages(n, variance), pair_averages(n, variance, correlation)
    both = row._asdict() | pair._asdict()
    return {name: both[name] for name in AVERAGES}


def by_table(n: int, variance: float, correlation: float) -> dict[str, Any]:
    return Exact().statistics(n, variance, correlation)._asdict()


@pytest.mark.parametrize(("n", "variance", "correlation"), POINTS)
def test_averages_against_random_rows(n: int, variance: float, correlation: float) -> None:
    seen = sampled(n, variance, correlation)
    for predicted in (by_quadrature(n, variance, correlation), by_table(n, variance, correlation)):
        for name, distance in deviations(predicted, seen).items():
            assert distance <= 4.5, name


def annealed(n: int, variance: float, correlation: float) -> dict[str, Any]:
    return Annealed().statistics(n, variance, correlation)._asdict()


def without_third_moments(n: int, variance: float, correlation: float) -> dict[str, Any]:
    pair = pair_averages(n, variance, correlation)
    return {"score_pair": pair.y12 + pair.y12_squared}


def with_one_third_moment(n: int, variance: float, correlation: float) -> dict[str, Any]:
    return {
        "score_pair": pair_averages(n, variance, correlation).score_pair + pair_averages(n, variance, correlation).z12
    }


def uncorrelated(n: int, variance: float, _: float) -> dict[str, Any]:
    return {name: x for name, x in by_quadrature(n, variance, 0.0).items() if name in ("y12", "score_pair")}


def squared_mean(n: int, variance: float, _: float) -> dict[str, Any]:
    """Take Y2 for self-averaging."""
    row = row_averages(n, variance)
    return {"score": row.y2 - 2 * row.y3 + row.y2**2}


def half_variance(n: int, variance: float, correlation: float) -> dict[str, Any]:
    return by_quadrature(n, variance / 2, correlation)


@pytest.mark.parametrize(
    "wrong", [annealed, without_third_moments, with_one_third_moment, uncorrelated, squared_mean, half_variance]
)
def test_wrong_theories_fail_the_same_comparison(wrong: Any) -> None:
    for n, variance, correlation in ((16, 0.5 * math.log(16), 0.5), (64, 2.0 * math.log(64), 0.5)):
        found = deviations(wrong(n, variance, correlation), sampled(n, variance, correlation))
        assert all(distance > 4.5 for distance in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 64, 1024])
@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("correlation", [0.1, 0.8, 0.99])
def test_averages_against_many_random_rows(n: int, share: float, correlation: float) -> None:
    variance = share * math.log(n)
    seen = sampled(n, variance, correlation, 40_000_000)
    for name, distance in deviations(by_quadrature(n, variance, correlation), seen).items():
        assert distance <= 4.5, name


# ---------------------------------------------------------------------------------------------------------------------
# Worked numbers


def test_worked_numbers() -> None:
    assert row_averages(64, 4.0).y2 == pytest.approx(0.161, abs=5e-4)
    assert Annealed().statistics(64, 4.0, 0.0).y2 == pytest.approx(0.464, abs=5e-4)
    assert row_averages(256, 9.0).y2 == pytest.approx(0.216, abs=5e-4)
    for n, excess in ((1e3, 0.112), (4e3, 0.098), (1e12, 0.039)):
        assert row_averages(n, 2 * 1.5**2 * math.log(n)).y2 - (1 - 1 / 1.5) == pytest.approx(excess, abs=1e-3)


def test_crossovers_of_a_finite_sequence() -> None:
    """At n = 1024 and mean cosine 0.03, far below the critical 1.436."""

    def variance(beta: float) -> float:
        return beta**2 * math.log(1024) * 0.97

    assert critical_beta(1.0, 0.03) == pytest.approx(1.436, abs=1e-3)
    assert brentq(lambda x: row_averages(1024, variance(x)).y2 - 0.1, 0.5, 2) == pytest.approx(1.05, abs=0.01)
    half = math.log(1024) / 2
    assert brentq(lambda x: row_averages(1024, variance(x)).entropy - half, 0.5, 2) == pytest.approx(1.15, abs=0.01)


@pytest.mark.parametrize(("b", "ratio"), [(0.3, 1.01), (0.4, 1.09), (0.5, 1.46), (0.7, 5.5), (1.0, 4.2)])
def test_the_error_of_annealing(b: float, ratio: float) -> None:
    variance = 2 * b**2 * math.log(1024)
    found = Annealed().statistics(1024, variance, 0.0).y2 / row_averages(1024, variance).y2
    assert found == pytest.approx(ratio, rel=0.01)


def test_condensed_attention_explodes_gradients() -> None:
    variance = 2.5**2 * math.log(1024) * 0.8
    row = row_averages(1024, variance)
    assert row.y2 + variance * 1.8 * row.score == pytest.approx(6.3, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The closure

TABLES = [2, 5, 64, 1024, pytest.param(10**6, marks=pytest.mark.slow), pytest.param(10**12, marks=pytest.mark.slow)]


def assert_close(table: AttentionStatistics, n: Any, row: RowAverages, pair: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(table.y2, row.y2, rtol=rtol)
    np.testing.assert_allclose(table.score, row.score, rtol=rtol)
    np.testing.assert_allclose(table.entropy, row.entropy, atol=1e-6 * np.log(n), rtol=0)
    np.testing.assert_allclose(table.y12, pair.y12, rtol=rtol)
    np.testing.assert_allclose(table.score_pair, pair.score_pair, rtol=rtol)


@pytest.mark.parametrize("n", TABLES)
def test_tables_reproduce_the_quadrature(n: int) -> None:
    generator = np.random.default_rng(n)
    variance = 8 * math.log(n) * generator.random(60) ** 2
    correlation = generator.random(60)
    correlation[:15] = 1 - 10 ** generator.uniform(-5, 0, 15)
    correlation[15:20] = -generator.random(5) / (n - 1)
    correlation[20:23] = -1 / (n - 1), 1.0, 0.0
    table = Exact().statistics(n, variance, correlation)
    assert_close(table, n, row_averages(n, variance), pair_averages(n, variance, correlation))


@pytest.mark.parametrize("n", [2, 64, 1024])
def test_beyond_the_tables(n: int) -> None:
    edge = 8 * math.log(n) + 40
    correlation = np.array([0.05, 0.3, 0.7, 0.95, 0.999])
    for factor, rtol in ((1.5, 2e-3), (4.0, 1.2e-2)):
        table, row = Exact().statistics(n, factor * edge, correlation), row_averages(n, factor * edge)
        pair = pair_averages(n, factor * edge, correlation)
        np.testing.assert_allclose(table.y2, row.y2, rtol=1e-5)
        np.testing.assert_allclose(table.score, row.score, rtol=1e-5)
        np.testing.assert_allclose(table.y12, pair.y12, rtol=rtol)
        np.testing.assert_allclose(table.score_pair, pair.score_pair, rtol=rtol)
    far = Exact().statistics(n, 1e12, correlation)
    assert far.y2[0] == pytest.approx(1.0, abs=1e-4) and 0 < far.score[0] < 1e-4
    assert np.all(np.diff(far.y12) > 0) and np.all((far.y12 > 1 / n) & (far.y12 < 1))


def test_small_variance_is_uniform_and_joined() -> None:
    for n in (2, 64):
        level = 1 / n
        for variance, tolerance in ((0.0, 0.0), (1e-10, 0.0), (1.01e-10, 1e-6), (1e-8, 1e-6)):
            found = Exact().statistics(n, variance, 0.3)
            expected = (level, level, level - level**2, level - level**2, math.log(n))
            assert tuple(found) == pytest.approx(expected, rel=tolerance, abs=0.0)
        uniform = Uniform().statistics(n, 0.0, 0.3)
        assert Exact().statistics(n, 0.0, 0.3)[:2] == (uniform.y2, uniform.y12)


def test_scalars_agree_with_arrays() -> None:
    variance, correlation = np.array([[0.0], [1e-3], [1.0], [7.0], [300.0]]), np.array([-0.01, 0.0, 0.4, 1.0])
    together = Exact().statistics(16, variance, correlation)
    alone = [[Exact().statistics(16, float(v), float(c)) for c in correlation] for v in variance[:, 0]]
    assert isinstance(alone[2][2].y12, float)
    for closure in (Exact(), RandomEnergy()):
        with_entropy, without = closure.statistics(16, 7.0, 0.4), closure.statistics(16, 7.0, 0.4, entropy=False)
        assert without == with_entropy._replace(entropy=None)
    np.testing.assert_allclose(np.moveaxis(np.array(together), 0, -1), alone, rtol=1e-12)
    many = Exact().statistics(16, np.full(50_000, 7.0), 0.4)  # several chunks, the recurrence instead of cosines
    np.testing.assert_allclose(np.array(many)[:, [0, 8191, 8192, -1]].T, [alone[3][2]] * 4, rtol=1e-11)


def test_counts_by_position() -> None:
    """Every query of a causal mask sees another number of keys."""
    counts, variance = np.arange(1.0, 40.0), np.linspace(0.0, 30.0, 39)
    found = Exact().statistics(counts, variance, 0.0 * variance)
    row = row_averages(counts, variance)
    others = np.maximum(counts - 1, 1)
    np.testing.assert_allclose(found.y2, row.y2, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, row.entropy, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.score, row.score, rtol=1e-5)
    np.testing.assert_array_equal(found.y12, 1 / counts)
    np.testing.assert_allclose(found.score_pair, (1 - row.y2) ** 2 / others, rtol=1e-5)
    assert tuple(np.array(found)[:, 0]) == (1.0, 1.0, 0.0, 0.0, 0.0)
    some = Exact().statistics(np.array([[1.0], [2.0], [64.0]]), 3.0, np.array([0.0, 0.5]))
    for i, n in enumerate((1, 2, 64)):
        for j, c in enumerate((0.0, 0.5)):
            np.testing.assert_allclose(np.array(some)[:, i, j], Exact().statistics(n, 3.0, c), rtol=1e-5)


def test_the_value_path_is_that_of_normalised_rows() -> None:
    statistics = Exact().statistics(64, 3.0, 0.4)
    path = Exact().value_path(64, statistics)
    assert (path.jj, path.kk) == (statistics.y2, 1 - statistics.y12)
    assert path.jj + 63 * path.kj == pytest.approx(1.0) and path.jk + 63 * path.kk == pytest.approx(63.0)
    assert (Exact().others(64), Exact().others(1)) == (63, 1)


@pytest.mark.parametrize(
    ("n", "variance", "correlation", "value"),
    [
        (0, 1.0, 0.1, 0.0),
        (8, -1.0, 0.1, -1.0),
        (8, math.inf, 0.1, math.inf),
        (8, 1.0, 1.1, 1.1),
        (8, 1.0, -1.1, -1.1),
    ],
)
def test_bad_input_names_the_value(n: int, variance: float, correlation: float, value: float) -> None:
    for function in (pair_averages, Exact().statistics, RandomEnergy().statistics):
        with pytest.raises(DomainError, match=f"got {value:g}") as error:
            function(n, variance, correlation)
        assert error.value.value == value


def test_bad_elements_are_located() -> None:
    with pytest.raises(DomainError) as error:
        row_averages(8, [[1.0, 2.0], [3.0, math.nan]])
    assert error.value.index == (1, 1)
    with pytest.raises(DomainError, match="1e\\+12"):
        Exact().statistics(1e13, 1.0, 0.1)
    with pytest.raises(DomainError, match="memory"):
        pair_averages(64, 1e7, 0.9999)
    with pytest.raises(DomainError, match="memory"):
        pair_averages(64, 1e12, 1.0)


def test_a_correlation_above_one_by_rounding_is_one() -> None:
    assert Exact().statistics(64, 2.0, 1 + 1e-12) == Exact().statistics(64, 2.0, 1.0)
    assert Exact().statistics(64, 2.0, 1.0).y12 == pytest.approx(row_averages(64, 2.0).y2, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Corrections


@pytest.mark.parametrize(("n", "variance", "correlation"), [(8, 2.0, 0.5), (32, 4.0, 0.3)])
def test_the_tilt_against_random_keys(n: int, variance: float, correlation: float) -> None:
    """Keys in the plane of two rows carry all that finite width adds."""
    draws = 100_000
    keys: NDArray[np.float64] = np.random.default_rng(n).normal(size=(draws, n, 2))
    along = np.array([[1.0, 0.0], [correlation, math.sqrt(1 - correlation**2)]])
    weights = np.exp(math.sqrt(variance) * keys @ along.T)
    weights /= weights.sum(axis=1, keepdims=True)
    selected = np.einsum("dbr,dbk->drk", weights, keys)
    row, pair = row_averages(n, variance), pair_averages(n, variance, correlation)
    y2, y12 = tilted(row, pair, variance, correlation, d_model=2)
    for found, expected in (
        ((selected[:, 0] ** 2).sum(1) / 2, y2),
        ((selected[:, 0] * selected[:, 1]).sum(1) / 2, y12),
    ):
        assert abs(found.mean() - expected) <= 4.5 * found.std() / math.sqrt(draws)
    assert abs((weights[..., 0] ** 2).sum(1).mean() - y2) > 0.05  # without the tilt


def test_the_tilt_of_equal_rows_is_that_of_one() -> None:
    y2, y12 = tilted(row_averages(64, 4.0), pair_averages(64, 4.0, 1.0), 4.0, 1.0, d_model=128)
    assert y12 == pytest.approx(y2, rel=1e-10)
    uniform = tilted(row_averages(64, 1e-9), pair_averages(64, 1e-9, 0.3), 1e-9, 0.3, d_model=128)
    assert (uniform[0] - row_averages(64, 1e-9).y2) / 1e-9 * 128 == pytest.approx(1 - 1 / 64, rel=1e-6)


def test_heterogeneous_norms_against_random_rows() -> None:
    """To second order: exact as the fluctuations get small."""
    scores = 2.0 * np.random.default_rng(3).normal(size=(100_000, 64))
    weights = np.exp(scores)
    y2 = (weights**2).sum(1) / weights.sum(1) ** 2
    for gain, heads, tolerance in ((0.1, 1, 0.05), (0.5, 1, 0.15), (0.5, 4, 0.05)):
        level = 1.0 + gain * y2.reshape(-1, heads).mean(1)
        found = np.mean(level**-0.5) ** 2 * level.mean() - 1
        factor = cosine_heterogeneity(row_averages(64, 4.0), gain, 1.0, level.mean(), heads)
        assert factor - 1 == pytest.approx(found, rel=tolerance)


def test_few_heads_dimensions_average_the_variance() -> None:
    for d_head in (1, 8, 32):
        average = few_head_average(lambda v: np.exp(-v), np.array([0.3, 3.0]), d_head)
        np.testing.assert_allclose(average, (1 + 2 * np.array([0.3, 3.0]) / d_head) ** (-d_head / 2), rtol=2e-3)
    y2 = few_head_average(lambda v: row_averages(512, v).y2, 3.0, 16)
    variance = 3.0 * np.random.default_rng(0).chisquare(16, 4000) / 16
    samples = Exact().statistics(512, variance, 0.0).y2
    assert abs(samples.mean() - y2) <= 4.5 * samples.std() / math.sqrt(4000)
    assert y2 / row_averages(512, 3.0).y2 - 1 > 0.05
    with pytest.raises(DomainError):
        few_head_average(lambda v: v, 1.0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The random energy model


def test_many_keys_approach_the_random_energy_model() -> None:
    """Every distance shrinks with n; slowly, as 1/ln n."""
    for b in (0.5, 1.7, 2.5):
        distances = []
        for n in (1e3, 1e6, 1e12):
            variance = 2 * b**2 * math.log(n)
            row, limit = row_averages(n, variance), RandomEnergy().statistics(n, variance, 0.3)
            scale = math.log(n) if b < 1 else 1.0
            distances.append(
                [
                    abs(row.y2 - limit.y2),
                    abs(row.score - limit.score),
                    abs(row.entropy - limit.entropy) / scale,
                    float(row.y2_squared) if b < 1 else abs(row.y3 - poisson_dirichlet_moment(3, 1 / b)),
                ]
            )
        assert np.all(np.diff(distances, axis=0) < 0), (b, distances)


def test_entropy_of_the_random_energy_model_is_joined() -> None:
    for n in (2, 64, 10**6, 10**12):
        variance = 2 * math.log(n) * np.linspace(0.0, 3.0, 400) ** 2
        entropy = RandomEnergy().statistics(n, variance, 0.0).entropy
        assert entropy[0] == pytest.approx(math.log(n))
        assert np.all(np.diff(entropy) <= 1e-12) and np.max(-np.diff(entropy)) < 0.05 * math.log(n) + 0.05
    for n in (64, 10**6, 10**12):
        found = RandomEnergy().statistics(n, 2 * math.log(n), 0.0).entropy
        assert found == pytest.approx(float(row_averages(n, 2 * math.log(n)).entropy), rel=0.09)


def test_random_energy_by_formula() -> None:
    assert critical_beta(1.0, 0.0) == pytest.approx(math.sqrt(2))
    assert list(critical_beta(1.0, np.array([0.5, 1.0, 1.0 + 1e-15]))) == [2.0, math.inf, math.inf]
    assert condensation(2 * math.log(50), 50) == pytest.approx(1.0)
    assert condensation(1.0, 1) == math.inf
    m = 0.4
    assert poisson_dirichlet_moment(1, m) == pytest.approx(1.0)
    assert poisson_dirichlet_moment(2, m) == pytest.approx(1 - m)
    assert poisson_dirichlet_moment(3, m) == pytest.approx((1 - m) * (2 - m) / 2)
    statistics = RandomEnergy().statistics(50, 2 * math.log(50) / m**2, 0.5)
    assert statistics.y2 == pytest.approx(1 - m) and statistics.score == pytest.approx(m * (1 - m) / 3)
    assert statistics.y12 == statistics.score_pair == 0
    for bad in (lambda: critical_beta(0.0, 0.0), lambda: poisson_dirichlet_moment(2, 1.0)):
        with pytest.raises(DomainError):
            bad()


@pytest.mark.parametrize("b", [0.5, 1.5])
def test_the_value_path_of_the_random_energy_model(b: float) -> None:
    n, closure = 64, RandomEnergy()
    statistics = closure.statistics(n, 2 * b**2 * math.log(n), 0.4)
    path = closure.value_path(n, statistics)
    assert path.jj + (n - 1) * path.kj == pytest.approx(1.0) and path.jk + (n - 1) * path.kk == pytest.approx(n - 1)
    if b < 1:
        uniform = Uniform().value_path(n, Uniform().statistics(n, 0.0, 0.4))
        assert tuple(path) == pytest.approx(tuple(uniform))
    alone = closure.value_path(1, closure.statistics(1, 3.0, 0.4))
    assert tuple(alone) == (1.0, 0.0, 0.0, 0.0)
