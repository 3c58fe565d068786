"""From the name of an activation to its kernel."""

from __future__ import annotations

from functools import lru_cache
from math import pi, sqrt
from typing import Any

import numpy as np
from scipy.special import erf, expit, ndtr

from fathometer.errors import SpecError, nearest
from fathometer.kernels.closed_forms import ErfKernel, GELUKernel, IdentityKernel, ReLUKernel
from fathometer.kernels.logistic import SiLUKernel, TanhKernel
from fathometer.kernels.protocol import PairKernel, ScalarFunction
from fathometer.kernels.quadrature import QuadratureKernel, pointwise_kernel
from fathometer.spec.arrays import FloatArray
from fathometer.spec.branches import Activation
from fathometer.spec.pointwise import Pointwise

_SLOPE = sqrt(2.0 / pi)
_CUBIC = 0.044715


def gelu_tanh(x: FloatArray) -> FloatArray:
    """Return GELU in the tanh approximation, ``x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2``."""
    half: FloatArray = 0.5 * x
    return half + half * np.tanh(_SLOPE * x * (1.0 + _CUBIC * (x * x)))


def gelu_tanh_derivative(x: FloatArray) -> FloatArray:
    """Return the derivative of :func:`gelu_tanh`."""
    square = x * x
    tanh = np.tanh(_SLOPE * x * (1.0 + _CUBIC * square))
    value: FloatArray = 0.5 * (1.0 + tanh) + (0.5 * _SLOPE) * x * (1.0 - tanh * tanh) * (1.0 + 3.0 * _CUBIC * square)
    return value


def normal_density(x: Any) -> Any:
    """Return the density of a standard Gaussian."""
    return np.exp(-0.5 * x * x) / sqrt(2 * pi)


_FUNCTIONS: dict[str, tuple[ScalarFunction, ScalarFunction]] = {
    "relu": (lambda x: np.maximum(x, 0.0), lambda x: (x > 0) + 0.5 * (x == 0)),
    "gelu": (lambda x: x * ndtr(x), lambda x: ndtr(x) + x * normal_density(x)),
    "gelu_tanh": (gelu_tanh, gelu_tanh_derivative),
    "silu": (lambda x: x * expit(x), lambda x: expit(x) * (1 + x * expit(-x))),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "erf": (erf, lambda x: 2 / sqrt(pi) * np.exp(-x * x)),
    "identity": (lambda x: x, np.ones_like),
}


def activation_functions(activation: Activation) -> tuple[ScalarFunction, ScalarFunction]:
    """Return an activation and its derivative as functions of arrays; at a kink, the mean of both sides.

    Raises:
        SpecError: if the name is unknown.
    """
    if isinstance(activation, Pointwise):
        return activation.value, activation.derivative
    if activation not in _FUNCTIONS:
        raise SpecError(f"activation {activation!r} is unknown{nearest(str(activation), _FUNCTIONS)}")
    return _FUNCTIONS[activation]


_KERNELS: dict[str, PairKernel] = {
    "relu": ReLUKernel(),
    "gelu": GELUKernel(),
    "silu": SiLUKernel(),
    "tanh": TanhKernel(alpha=1.0),
    "erf": ErfKernel(alpha=1.0),
    "identity": IdentityKernel(),
    # the nearest poles of the tanh sit at x = +-0.63 +- 2.75i
    "gelu_tanh": QuadratureKernel(name="gelu_tanh", value=gelu_tanh, derivative=gelu_tanh_derivative, strip=2.75),
}


@lru_cache(maxsize=64)
def activation_kernel(activation: Activation) -> PairKernel:
    """Return the kernel of an activation.

    Args:
        activation: One of the names accepted by an MLP, or a user's :class:`Pointwise`.
    Raises:
        SpecError: if the name is unknown, or a ``Pointwise`` is given a wrong derivative.
        QuadratureError: if a ``Pointwise`` is not smooth.

    >>> round(float(activation_kernel("relu").overlap(1.0, 1.0, 1.0)), 4)
    0.5
    """
    if isinstance(activation, Pointwise):
        return pointwise_kernel(activation)
    if activation not in _KERNELS:
        raise SpecError(f"activation {activation!r} is unknown{nearest(str(activation), _KERNELS)}")
    return _KERNELS[activation]
