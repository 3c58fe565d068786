"""Printed digits and an independent quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

from fathometer.kernels import FixedMomentKernel, PairKernel, activation_kernel, norm_kernel, tabulated
from fathometer.kernels.closed_forms import ErfKernel, GELUKernel, ReLUKernel
from fathometer.kernels.logistic import TanhKernel
from fathometer.kernels.tabulated import TOLERANCE
from fathometer.spec.norms import Derf, DyT

DIGITS = [
    (norm_kernel(Derf(alpha=0.8)), "0.3794768378 0.1811343562 0.4318819898 0.3723717646"),
    (norm_kernel(DyT(alpha=0.8)), "0.3149849207 0.1517886740 0.3495781686 0.3103239309"),
    (norm_kernel(Derf(alpha=0.8, shift=0.25)), "0.3977005597 0.2068702685 0.4169807341 0.3567675693"),
    (activation_kernel("relu"), "0.5000000000 0.3044988905 0.5000000000 0.3333333333"),
    (activation_kernel("gelu"), "0.4252214826 0.2272949150 0.4558508656 0.3422672425"),
    (activation_kernel("silu"), "0.3557755198 0.1831696631 0.3794823516 0.3122796153"),
    (activation_kernel("tanh"), "0.3942944904 0.1863244132 0.4644029024 0.3847470284"),
    (activation_kernel("erf"), "0.4645590544 0.2163468959 0.5694100347 0.4501581581"),
]
PAIRS = [
    (1.0, 1.0, 1.0),
    (1.0, 1.0, -1.0),
    (1.0, 1.0, 0.0),
    (0.3, 2.0, 0.5),
    (2.5, 0.4, -0.9),
    (1e-4, 3.0, 0.01),
    (4.0, 1.0, 2.0),
    (9.0, 1.0, -3.0),
]
BruteForce = Callable[[Any, float, float, float], float]


def distance(kernel: PairKernel, case: Any, brute_force: BruteForce, pair: tuple[float, float, float]) -> float:
    """Return the larger error of overlap and slope, each relative to its diagonal."""
    q_a, q_b, p = pair
    errors = []
    for function, expectation in ((case.value, kernel.overlap), (case.derivative, kernel.slope_overlap)):
        truth = brute_force(function, q_a, q_b, p)
        unit = np.sqrt(float(expectation(q_a, q_a, q_a)) * float(expectation(q_b, q_b, q_b)))
        errors.append(abs(float(expectation(q_a, q_b, p)) - truth) / unit)
    return max(errors)


@pytest.mark.parametrize(("kernel", "digits"), DIGITS, ids=lambda x: type(x).__name__)
def test_printed_digits_at_q_1_and_p_one_half(kernel: PairKernel, digits: str) -> None:
    found = [
        kernel.overlap(1.0, 1.0, 1.0),
        kernel.overlap(1.0, 1.0, 0.5),
        kernel.slope_overlap(1.0, 1.0, 1.0),
        kernel.slope_overlap(1.0, 1.0, 0.5),
    ]
    assert np.max(np.abs(np.array(found, dtype=float) - np.array(digits.split(), dtype=float))) < 0.51e-10


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_agrees_with_brute_force(case: Any, brute_force: BruteForce, pair: tuple[float, float, float]) -> None:
    assert distance(case.kernel, case, brute_force, pair) < 2e-12


@pytest.mark.parametrize("pair", [(60.0, 60.0, 60.0), (60.0, 60.0, 20.0), (60.0, 5.0, -12.0)], ids=str)
def test_agrees_with_brute_force_when_saturated(
    case: Any, brute_force: BruteForce, pair: tuple[float, float, float]
) -> None:
    assert distance(case.kernel, case, brute_force, pair) < 2e-12


@pytest.mark.parametrize("q", [1e-3, 0.5, 1.0, 7.0, 60.0])
def test_mean_agrees_with_brute_force(case: Any, brute_force_mean: Callable[[Any, float], float], q: float) -> None:
    truth = brute_force_mean(case.value, q)
    assert abs(float(case.kernel.mean(q)) - truth) < 1e-12 * max(1.0, float(np.sqrt(case.kernel.overlap(q, q, q))))


class _MissingHalf(ReLUKernel):
    def overlap(self, q_a: Any, q_b: Any, p: Any) -> Any:
        return 2.0 * ReLUKernel.overlap(self, q_a, q_b, p)


class _SwappedSecondMoment(GELUKernel):
    def overlap(self, q_a: Any, q_b: Any, p: Any) -> Any:
        return GELUKernel.overlap(self, q_a, q_a, p)


class _ShiftForgotten(ErfKernel):
    def overlap(self, q_a: Any, q_b: Any, p: Any) -> Any:
        return ErfKernel(alpha=self.alpha).overlap(q_a, q_b, p)


class _SlopeWithoutSquare(TanhKernel):
    def slope_overlap(self, q_a: Any, q_b: Any, p: Any) -> Any:
        return TanhKernel.slope_overlap(self, q_a, q_b, p) / self.alpha


@pytest.mark.parametrize(
    ("mutant", "of"),
    [
        (_MissingHalf(), "relu"),
        (_SwappedSecondMoment(), "gelu"),
        (_ShiftForgotten(alpha=0.8, shift=0.25), "derf 0.8 0.25"),
        (_SlopeWithoutSquare(alpha=0.8), "dyt 0.8"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_formulas_are_caught(mutant: PairKernel, of: str, cases: dict[str, Any], brute_force: BruteForce) -> None:
    pair = (0.3, 2.0, 0.5)
    assert distance(cases[of].kernel, cases[of], brute_force, pair) < 2e-12
    assert distance(mutant, cases[of], brute_force, pair) > 1e-3


@pytest.mark.parametrize("of", ["tanh", "erf"])
@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.0, -0.5])
def test_slope_keeps_its_digits_deep_in_saturation(of: str, cosine: float, cases: dict[str, Any]) -> None:
    """At q = 1e4 only a sliver of the Gaussian contributes; integrate there, in the plain coordinates."""
    q, kernel, derivative = 1e4, cases[of].kernel, cases[of].derivative
    step = 0.02 if cosine == 1.0 else 0.1
    x = np.arange(-25.0, 25.0 + step / 2, step)
    f = derivative(x)
    if cosine == 1.0:
        truth = np.sum(f * f * np.exp(-0.5 * x * x / q)) * step / np.sqrt(2 * np.pi * q)
    else:
        det = q * q * (1.0 - cosine**2)
        form = q * (x[:, None] ** 2 + x**2 - 2.0 * cosine * x[:, None] * x) / det
        truth = f @ np.exp(-0.5 * form) @ f * step**2 / (2 * np.pi * np.sqrt(det))
    assert float(kernel.slope_overlap(q, q, cosine * q)) == pytest.approx(truth, rel=1e-12)


def test_saturated_slope_tends_to_its_limit() -> None:
    """E f'^2 -> (2 pi q)^(-1/2) times the integral of f'^2: 4/3 for tanh."""
    q = 1e12
    limit = 4.0 / 3.0 / np.sqrt(2.0 * np.pi * q)
    assert float(activation_kernel("tanh").slope_overlap(q, q, q)) == pytest.approx(limit, rel=1e-11)


def test_relu_and_derf_are_exact_at_perfect_correlation() -> None:
    relu, derf = activation_kernel("relu"), norm_kernel(Derf(alpha=1.0, shift=0.3))
    for q in (1e-6, 0.1, 0.7, 3.3, 1e5):
        assert float(relu.overlap(q, q, q)) == pytest.approx(q / 2, rel=1e-15)
        assert float(relu.slope_overlap(q, q, q)) == 0.5
        assert float(relu.overlap(q, q, -q)) == 0.0
    assert float(derf.overlap(0.0, 0.0, 0.0)) == pytest.approx(float(erf(0.3)) ** 2, rel=1e-14)


@pytest.mark.parametrize("name", ["tanh", "silu", "gelu_tanh", "erf", "relu"])
@pytest.mark.parametrize("q", [np.geomspace(0.05, 100.0, 150)[:, None], np.array([[400.0]]), np.array([[0.3], [7.0]])])
def test_a_table_at_fixed_second_moments_keeps_its_tolerance(name: str, q: np.ndarray) -> None:
    kernel = activation_kernel(name)
    table = FixedMomentKernel(kernel, q)
    rng = np.random.default_rng(0)
    cosine = np.concatenate([rng.uniform(-1, 1, 60), 1 - np.geomspace(1e-12, 0.1, 20), [-1.0, 0.0, 1.0]])
    p = q * cosine
    full = np.broadcast_to(q, p.shape)
    diagonal = kernel.overlap(q, q, q), kernel.slope_overlap(q, q, q)
    np.testing.assert_array_less(
        np.abs(table.overlap(q, q, p) - kernel.overlap(full, full, p)) / diagonal[0], 3 * TOLERANCE
    )
    np.testing.assert_array_less(
        np.abs(table.slope_overlap(q, q, p) - kernel.slope_overlap(full, full, p)) / diagonal[1], 3 * TOLERANCE
    )
    np.testing.assert_array_equal(table.overlap(q, q, q), diagonal[0])
    part = table.part((slice(0, 1), slice(0, 1)))
    np.testing.assert_allclose(part.overlap(q, q, p[:1]), table.overlap(q, q, p)[:1], rtol=1e-14)


def test_a_table_that_is_too_coarse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabulated, "_INTERVALS", (8, 16))
    with pytest.raises(ArithmeticError, match="a table of 16 intervals errs by"):
        FixedMomentKernel(activation_kernel("tanh"), 40.0)
