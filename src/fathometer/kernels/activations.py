"""From the name of an activation to its kernel."""

from __future__ import annotations

from functools import lru_cache
from math import pi, sqrt

import numpy as np

from fathometer.errors import SpecError, nearest
from fathometer.kernels.closed_forms import ErfKernel, GELUKernel, IdentityKernel, ReLUKernel
from fathometer.kernels.logistic import SiLUKernel, TanhKernel
from fathometer.kernels.protocol import PairKernel
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
