r"""Averaged partial Jacobian norms and gradient amplification, read off transfer matrices in log space.

.. math:: J^{m,l} = \frac{1}{n d}\,\mathbb E \left\lVert \frac{\partial x^m}{\partial x^l} \right\rVert_F^2

is the J component at layer l of gradients that start at layer m as isotropic noise, (J, K) = (1, 0). Any other
read-out only changes the start: (1, 1) for a mean-pooled loss, (1, c) for gradients of mean cosine c between tokens.
A loss on one token has, averaged over tokens, the boundary (1, 0).

Source: the recursion, Alekseev, arXiv:2604.11890v3; boundaries and the forward-backward duality, derived in the
    documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import DomainError
from fathometer.propagation.trajectory import vanished_gradient

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradient moments along the depth.

    Attributes:
        log_norm: Natural log of J at every sublayer border; shape ``(n_half + 1, *batch)``.
        alignment: K/J, the mean cosine of the gradients of two tokens; same shape.
    """

    log_norm: FloatArray
    alignment: FloatArray


def backward(transfer: FloatArray, *, alignment: float | FloatArray = 0.0) -> Gradients:
    """Carry gradients from the output to every border.

    Args:
        transfer: Matrices of shape ``(n_half, 2, 2, *batch)``.
        alignment: Mean cosine between the output gradients of two tokens: 0 isotropic or one token, 1 pooled.
    Returns:
        ``log_norm[l] = ln J^{L,l}``. Cost O(n_half * batch); nothing overflows at any depth. On a grid, points where
        nothing passes a sublayer hold minus infinity.
    Raises:
        DomainError: for a single stack with a sublayer that lets no gradient through, naming it.
    """
    return _scan(transfer[::-1], alignment, reverse=True)


def forward(transfer: FloatArray, n_others: int) -> Gradients:
    r"""Carry an isotropic perturbation of the input to every border: ``log_norm[m] = ln J^{m,0}``.

    The forward matrix of a sublayer is the transpose of its backward matrix conjugated by ``diag(1, n_others)``;
    see :attr:`fathometer.propagation.Trajectory.n_others`.
    """
    dual = np.swapaxes(transfer, 1, 2).copy()
    dual[:, 0, 1] *= n_others
    dual[:, 1, 0] /= n_others
    return _scan(dual, 0.0, reverse=False)


def _scan(matrices: FloatArray, alignment: float | FloatArray, *, reverse: bool) -> Gradients:
    batch = matrices.shape[3:]
    ratio = np.broadcast_to(np.asarray(alignment, dtype=np.float64), batch).copy()
    if np.any(np.abs(ratio) > 1):
        raise DomainError(f"alignment is a mean cosine and must lie in [-1, 1]; got {alignment!r}", value=alignment)
    n_half = len(matrices)
    growth = np.empty((n_half, *batch))
    ratios = np.empty((n_half + 1, *batch))
    ratios[0] = ratio
    if batch == ():
        _scan_scalar(matrices, growth, ratios)
    else:
        for i, ((jj, jk), (kj, kk)) in enumerate(matrices):
            growth[i] = jj + jk * ratio
            ratio = (kj + kk * ratio) / np.where(growth[i] == 0, 1.0, growth[i])
            ratios[i + 1] = ratio
    if batch == () and np.any(growth == 0):
        first = int(np.argmax(growth == 0))
        raise vanished_gradient(n_half - 1 - first if reverse else first)
    with np.errstate(divide="ignore"):
        log_norm = np.concatenate([np.zeros((1, *batch)), np.cumsum(np.log(growth), axis=0)])
    if reverse:
        return Gradients(log_norm=log_norm[::-1], alignment=ratios[::-1])
    return Gradients(log_norm=log_norm, alignment=ratios)


def _scan_scalar(matrices: FloatArray, growth: FloatArray, ratios: FloatArray) -> None:
    """Run the recursion on Python floats, which is several times faster than on 0-d arrays."""
    ratio = float(ratios[0])
    gains, out = [], []
    for jj, jk, kj, kk in matrices.reshape(-1, 4).tolist():
        gain = jj + jk * ratio
        ratio = (kj + kk * ratio) / gain if gain else 0.0
        gains.append(gain)
        out.append(ratio)
    growth[:] = gains
    ratios[1:] = out
