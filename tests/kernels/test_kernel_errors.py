"""What is refused, and what the message says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathometer.errors import DomainError, QuadratureError, SpecError
from fathometer.kernels import activation_kernel, check_pair, norm_kernel
from fathometer.kernels.activations import _KERNELS, gelu_tanh, gelu_tanh_derivative
from fathometer.kernels.logistic import TanhKernel
from fathometer.spec.branches import ACTIVATIONS
from fathometer.spec.norms import Derf, LayerNorm, RMSNorm
from fathometer.spec.pointwise import Pointwise


def test_every_activation_of_the_spec_has_a_kernel() -> None:
    assert set(_KERNELS) == set(ACTIVATIONS)


def test_unknown_activation_names_the_closest() -> None:
    with pytest.raises(SpecError, match=r"'gleu' is unknown; did you mean 'gelu'\? Accepted: erf, gelu"):
        activation_kernel("gleu")


KINKED = [
    Pointwise(
        name="leaky", value=lambda x: np.where(x > 0, x, 0.1 * x), derivative=lambda x: np.where(x > 0, 1.0, 0.1)
    ),
    Pointwise(name="modulus", value=np.abs, derivative=np.sign),
    Pointwise(name="hardtanh", value=lambda x: np.clip(x, -1, 1), derivative=lambda x: 1.0 * (np.abs(x) < 1)),
    Pointwise(name="shifted_relu", value=lambda x: np.maximum(x - 0.3, 0), derivative=lambda x: 1.0 * (x > 0.3)),
]


@pytest.mark.parametrize("function", KINKED, ids=lambda f: f.name)
def test_kinks_are_refused_with_the_estimate(function: Pointwise) -> None:
    with pytest.raises(QuadratureError, match=rf"{function.name}.*does not converge.*probably has a kink") as caught:
        activation_kernel(function)
    assert np.isfinite(caught.value.estimate)
    assert 1e-8 < caught.value.error < 1.0


def test_overflow_is_refused() -> None:
    wild = Pointwise(name="wild", value=lambda x: np.exp(x**4), derivative=lambda x: 4 * x**3 * np.exp(x**4))
    with pytest.raises(QuadratureError, match="overflows") as caught:
        activation_kernel(wild)
    assert caught.value.error == np.finfo(np.float64).max or not np.isfinite(caught.value.error)


def test_wrong_derivative_is_refused() -> None:
    with pytest.raises(SpecError, match="'off': `derivative` is not the derivative of `value`; at x="):
        activation_kernel(Pointwise(name="off", value=np.tanh, derivative=lambda x: 2.0 / np.cosh(x) ** 2))


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 6.0])
def test_sharp_but_smooth_functions_get_a_finer_grid(sharpness: float) -> None:
    smooth = Pointwise(
        name="steep",
        value=lambda x: np.tanh(sharpness * x),
        derivative=lambda x: sharpness / np.cosh(np.minimum(np.abs(sharpness * x), 300.0)) ** 2,
    )
    exact, kernel = TanhKernel(alpha=sharpness), activation_kernel(smooth)
    for pair in ((1.0, 1.0, 0.5), (20.0, 3.0, -7.0)):
        assert float(kernel.overlap(*pair)) == pytest.approx(float(exact.overlap(*pair)), rel=1e-9)
        assert float(kernel.slope_overlap(*pair)) == pytest.approx(float(exact.slope_overlap(*pair)), rel=1e-9)


def test_strip_of_gelu_tanh_is_fine_enough() -> None:
    kernel: Any = activation_kernel("gelu_tanh")
    finer = replace(kernel, strip=kernel.strip / 2.0)
    coarser = replace(kernel, strip=kernel.strip * 4.0)
    pair = (20.0, 12.0, 3.0)
    assert float(kernel.overlap(*pair)) == pytest.approx(float(finer.overlap(*pair)), rel=1e-12)
    assert float(kernel.slope_overlap(*pair)) == pytest.approx(float(finer.slope_overlap(*pair)), rel=1e-12)
    assert float(coarser.slope_overlap(*pair)) != pytest.approx(float(finer.slope_overlap(*pair)), rel=1e-9)
    x = np.linspace(-4.0, 4.0, 33)
    numeric = (gelu_tanh(x + 1e-5) - gelu_tanh(x - 1e-5)) / 2e-5
    assert np.allclose(gelu_tanh_derivative(x), numeric, atol=1e-9)


def test_large_grids_are_tiled_and_huge_ones_refused() -> None:
    kernel = activation_kernel("gelu_tanh")
    relu = activation_kernel("relu")
    q = 600.0  # 900 by 900 points, more than one tile
    assert float(kernel.overlap(q, q, 0.3 * q)) == pytest.approx(float(relu.overlap(q, q, 0.3 * q)), rel=1e-2)
    single = float(kernel.overlap(q, q, 0.3 * q))
    assert float(kernel.overlap(np.array([q, 1.0]), q, 0.3 * np.sqrt(q * q))[0]) == pytest.approx(single, rel=1e-12)
    with pytest.raises(DomainError, match=r"'gelu_tanh' would need .* points per pair at a second moment of q=1e\+05"):
        kernel.overlap(1e5, 1e5, 0.0)


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm(gain=2.0)])
def test_projections_need_a_positive_second_moment(norm: LayerNorm | RMSNorm) -> None:
    kernel = norm_kernel(norm)
    with pytest.raises(DomainError, match=r"need a second moment q > 0; got q=0\. A stream of zeros") as scalar:
        kernel.overlap(0.0, 1.0, 0.0)
    assert scalar.value.index is None
    with pytest.raises(DomainError, match=r"got q=-1 at index \(1,\)") as element:
        kernel.slope_overlap(1.0, np.array([1.0, -1.0]), 0.0)
    assert (element.value.value, element.value.index) == (-1.0, (1,))
    with pytest.raises(DomainError, match="got q=nan"):
        kernel.overlap(float("nan"), 1.0, 0.0)


def test_a_name_is_no_norm() -> None:
    name: Any = "layer_norm"
    with pytest.raises(SpecError, match="'layer_norm' is no norm; use one of the classes"):
        norm_kernel(name)


def test_gain_may_be_an_array() -> None:
    gain = np.array([1.0, 2.0])
    for norm in (
        LayerNorm(gain=gain),
        Derf(alpha=0.7, gain=gain),
        Derf(alpha=0.7, shift=np.array([0.0, 0.0]), gain=gain),
    ):
        first, second = norm_kernel(norm).overlap(1.0, 1.0, 0.5)
        assert second == pytest.approx(4.0 * first, rel=1e-14)
        first, second = norm_kernel(norm).slope_overlap(1.0, 1.0, 0.5)
        assert second == pytest.approx(4.0 * first, rel=1e-14)


def test_check_pair_accepts_rounding_and_names_the_first_offender() -> None:
    check_pair(1.0, 1.0, 1.0 + 1e-10)
    check_pair(np.array([0.0, 2.0]), 2.0, 0.0)
    with pytest.raises(
        DomainError, match=r"`p` must satisfy .*; got p=1.2, q_a=1, q_b=1 at index \(1,\)\. Did you pass"
    ):
        check_pair(1.0, 1.0, np.array([0.5, 1.2, 1.3]))
    with pytest.raises(DomainError, match=r"`q_b` must be finite and >= 0; got q_b=-1\. It is") as caught:
        check_pair(1.0, -1.0, 0.0)
    assert (caught.value.value, caught.value.index) == (-1.0, None)
    with pytest.raises(DomainError, match=r"got q_a=inf at index \(0,\)"):
        check_pair(np.array([np.inf]), 1.0, 0.0)
    with pytest.raises(DomainError, match="got p=nan"):
        check_pair(1.0, 1.0, float("nan"))
