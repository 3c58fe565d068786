"""A second opinion on every kernel: Gauss-Legendre panels in plain, unrotated coordinates, split at kinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.special import erf, expit, ndtr

from fathometer.kernels import PairKernel, activation_kernel, norm_kernel
from fathometer.spec.norms import Derf, DyT, LayerNorm, PointwiseNorm, RMSNorm
from fathometer.spec.pointwise import Pointwise

Function = Callable[[Any], Any]
BruteForce = Callable[[Function, float, float, float], float]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def _count(length: float, std: float) -> int:
    """Return how many panels resolve both the function (width 0.6) and the Gaussian."""
    return int(np.ceil(max(length / 0.6, 1.2 * length / std)))


def _panels(low: Any, high: Any, count: int) -> tuple[Any, Any]:
    """Return nodes and weights on ``count`` equal panels of ``[low, high]``, appended as a last axis."""
    width = np.asarray((high - low) / count)[..., None, None]
    nodes = np.asarray(low)[..., None, None] + width * (np.arange(count)[:, None] + 0.5 * (_NODES + 1.0))
    weights = np.broadcast_to(0.5 * width * _WEIGHTS, nodes.shape)
    shape = (*nodes.shape[:-2], -1)
    return nodes.reshape(shape), weights.reshape(shape)


def _split(low: Any, high: Any, count: int) -> tuple[Any, Any]:
    middle = np.clip(0.0, low, high)
    left, right = _panels(low, middle, count), _panels(middle, high, count)
    return np.concatenate([left[0], right[0]], axis=-1), np.concatenate([left[1], right[1]], axis=-1)


def _density(x: Any, std: float) -> Any:
    return np.exp(-0.5 * (x / std) ** 2) / (std * np.sqrt(2.0 * np.pi))


def _expectation(function: Function, q: float) -> float:
    std = np.sqrt(q)
    u, w = _split(np.float64(-9.5 * std), np.float64(9.5 * std), _count(9.5 * std, std))
    return float(np.sum(w * _density(u, std) * function(u)))


def _pair_expectation(function: Function, q_a: float, q_b: float, p: float) -> float:
    std, rest = np.sqrt(q_a), q_b - p * p / q_a
    u, w_u = _split(np.float64(-9.5 * std), np.float64(9.5 * std), _count(9.5 * std, std))
    w_u = w_u * _density(u, std)
    if rest <= 1e-12 * q_b:
        return float(np.sum(w_u * function(u) * function(p / q_a * u)))
    tau = float(np.sqrt(rest))
    total = 0.0
    for chunk in np.array_split(np.arange(len(u)), max(1, len(u) // 256)):
        mean = p / q_a * u[chunk]
        v, w_v = _split(mean - 9.5 * tau, mean + 9.5 * tau, _count(19.0 * tau, tau))
        inner = np.sum(w_v * _density(v - mean[:, None], tau) * function(v), axis=1)
        total += float(np.sum(w_u[chunk] * function(u[chunk]) * inner))
    return total


@pytest.fixture(scope="session")
def brute_force() -> BruteForce:
    return _pair_expectation


@pytest.fixture(scope="session")
def brute_force_mean() -> Callable[[Function, float], float]:
    return _expectation


@dataclass(frozen=True)
class Case:
    """A kernel together with the function it claims to be the kernel of."""

    name: str
    kernel: PairKernel
    value: Function
    derivative: Function


def _phi(x: Any) -> Any:
    return np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def _derf(alpha: float, shift: float, gain: float) -> Case:
    return Case(
        f"derf {alpha} {shift}",
        norm_kernel(Derf(alpha=alpha, shift=shift, gain=gain)),
        lambda x: gain * erf(alpha * x + shift),
        lambda x: gain * alpha * 2.0 / np.sqrt(np.pi) * np.exp(-((alpha * x + shift) ** 2)),
    )


def _dyt(alpha: float, gain: float) -> Case:
    return Case(
        f"dyt {alpha}",
        norm_kernel(DyT(alpha=alpha, gain=gain)),
        lambda x: gain * np.tanh(alpha * x),
        lambda x: gain * alpha / np.cosh(alpha * x) ** 2,
    )


def _gelu_tanh(x: Any) -> Any:
    return x * expit(2.0 * np.sqrt(2.0 / np.pi) * (x + 0.044715 * x * x * x))


def _gelu_tanh_derivative(x: Any) -> Any:
    y = 2.0 * np.sqrt(2.0 / np.pi) * (x + 0.044715 * x * x * x)
    return expit(y) + x * expit(y) * expit(-y) * 2.0 * np.sqrt(2.0 / np.pi) * (1.0 + 3 * 0.044715 * x**2)


def softplus(x: Any) -> Any:
    return np.logaddexp(0.0, x)


SOFTPLUS = Pointwise(name="softplus", value=softplus, derivative=expit)

POINTWISE = [
    Case("identity", norm_kernel(None), lambda x: x, np.ones_like),
    Case("relu", activation_kernel("relu"), lambda x: np.maximum(x, 0.0), lambda x: 0.5 + 0.5 * np.sign(x)),
    Case("gelu", activation_kernel("gelu"), lambda x: x * ndtr(x), lambda x: ndtr(x) + x * _phi(x)),
    Case("gelu_tanh", activation_kernel("gelu_tanh"), _gelu_tanh, _gelu_tanh_derivative),
    Case(
        "silu",
        activation_kernel("silu"),
        lambda x: x * expit(x),
        lambda x: expit(x) + x * expit(x) * expit(-x),
    ),
    Case("tanh", activation_kernel("tanh"), np.tanh, lambda x: 1.0 / np.cosh(x) ** 2),
    Case("erf", activation_kernel("erf"), erf, lambda x: 2.0 / np.sqrt(np.pi) * np.exp(-x * x)),
    Case("softplus", norm_kernel(PointwiseNorm(function=SOFTPLUS)), softplus, expit),
    _dyt(0.8, 1.0),
    _dyt(2.0, 1.3),
    _derf(0.8, 0.0, 1.0),
    _derf(0.8, 0.25, 1.0),
    _derf(2.0, -0.7, 0.9),
]
PROJECTIONS = [
    Case(f"{norm.kind} {norm.gain}", norm_kernel(norm), lambda x: x, np.ones_like)
    for norm in (LayerNorm(), RMSNorm(gain=1.3))
]


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return {case.name: case for case in POINTWISE + PROJECTIONS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Subject every registered kernel to every test that asks for ``case`` or ``any_case``."""
    for fixture, cases in (("case", POINTWISE), ("any_case", POINTWISE + PROJECTIONS)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, cases, ids=lambda case: str(case.name))
