"""Recognising what a module computes from what it was seen to do, whatever it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathometer.models.trace import sampled
from fathometer.spec import Derf, DyT, LayerNorm, Norm, RMSNorm

_TOLERANCE = 2e-3
_EPSILONS = ("eps", "variance_epsilon", "epsilon")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "erf": torch.erf,
}


def identify_activation(before: Tensor, after: Tensor) -> str | None:
    """Return the activation that maps ``before`` to ``after`` elementwise, or ``None`` where none does."""
    before, after = sampled(before), sampled(after)
    errors = {name: _misfit(after, function(before)) for name, function in _ACTIVATIONS.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _TOLERANCE else None


def identify_gated(gate: Tensor, linear: Tensor, after: Tensor) -> str | None:
    """Return the activation f with ``after = f(gate) * linear``, or ``None``."""
    gate, linear, after = sampled(gate), sampled(linear), sampled(after)
    errors = {name: _misfit(after, function(gate) * linear) for name, function in _ACTIVATIONS.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _TOLERANCE else None


def identify_norm(module: nn.Module, before: Tensor, after: Tensor) -> Norm | None:
    """Return the norm ``module`` computes, or ``None`` if it is none that the theory knows.

    Each candidate is evaluated on the input and its output regressed on the module's, feature by feature: the slope
    is the gain. The shape parameters of DyT and Derf are the module's scalar parameters, in order.
    """
    if before.shape != after.shape or before.shape[-1] < 2:
        return None
    x, y = sampled(before), sampled(after)
    scalars = [float(p.detach()) for p in module.parameters() if p.numel() == 1]
    centred = x - x.mean(-1, keepdim=True)
    eps = next(
        (float(getattr(module, name)) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), 0.0
    )
    variance, square = centred.square().mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    # LayerNorm and RMSNorm agree when features have no mean; the smaller misfit decides. Epsilon lowers the gain.
    candidates: list[tuple[Tensor, Callable[[float], Norm]]] = [
        (centred * torch.rsqrt(variance + eps), lambda g: LayerNorm(gain=_snapped(g * _shrink(variance, eps)))),
        (x * torch.rsqrt(square + eps), lambda g: RMSNorm(gain=_snapped(g * _shrink(square, eps)))),
    ]
    if scalars and scalars[0] > 0:
        alpha = scalars[0]
        shift = scalars[1] if len(scalars) > 1 else 0.0
        candidates += [
            (torch.tanh(alpha * x), lambda g: DyT(alpha=alpha, gain=_snapped(g))),
            (torch.erf(alpha * x + shift), lambda g: Derf(alpha=alpha, shift=shift, gain=_snapped(g))),
        ]
    fits = []
    for shape, build in candidates:
        gain = feature_gain(shape, y)
        bias = y.mean(0) - shape.mean(0) * gain
        fits.append((_misfit(y, shape * gain + bias), float(gain.square().mean().sqrt()), build))
    misfit, gain_rms, build = min(fits, key=lambda fit: fit[0])
    return build(gain_rms) if misfit < _TOLERANCE else None


def feature_gain(x: Tensor, y: Tensor) -> Tensor:
    """Return the least-squares slope of ``y`` on ``x`` for every feature, over tokens, with an intercept."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    power = xc.square().sum(0)
    return (xc * yc).sum(0) / power.clamp_min(torch.finfo(power.dtype).tiny)


@dataclass(frozen=True)
class ResidualFit:
    """``target = skip * stream + scale * branch`` and its relative misfit."""

    skip: float
    scale: float
    misfit: float


def fit_residual(target: Tensor, stream: Tensor, branch: Tensor) -> ResidualFit | None:
    """Regress a stream tensor on the previous one and a branch, or return ``None`` where it is no such sum.

    The accepted misfit is the rounding of the tensors' dtype.
    """
    if not target.numel() == stream.numel() == branch.numel():
        return None
    t, s, b = (sampled(x).reshape(-1) for x in (target, stream, branch))
    ss, bb, sb = float(s @ s), float(b @ b), float(s @ b)
    ts, tb = float(t @ s), float(t @ b)
    determinant = ss * bb - sb * sb
    rounding = torch.finfo(target.dtype).eps
    if bb <= rounding**2 * ss:  # a branch too small to be seen in the sum
        skip, scale = ts / ss if ss else 0.0, 1.0
    elif determinant <= 1e-12 * ss * bb:
        return None
    else:
        skip, scale = (ts * bb - tb * sb) / determinant, (tb * ss - ts * sb) / determinant
    skip = 0.0 if abs(skip) < 1e-6 else _snapped(skip)
    scale = _snapped(scale)
    misfit = _misfit(t, skip * s + scale * b)
    if misfit > max(1e-4, 4 * rounding) or skip < 0:
        return None
    return ResidualFit(skip, abs(scale), misfit)


def rms(x: Tensor) -> float:
    """Return the root mean square of all entries, summed in double precision."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) / math.sqrt(x.numel())


def _snapped(value: float) -> float:
    """Snap float32 noise to the simple number it came from."""
    nearest_integer = round(value)
    return float(nearest_integer) if math.isclose(value, nearest_integer, rel_tol=1e-4) else value


def _shrink(power: Tensor, eps: float) -> float:
    """Return by how much epsilon lowers the output of a norm, root mean square over tokens."""
    return float((power / (power + eps)).mean().sqrt())


def _misfit(target: Tensor, candidate: Tensor) -> float:
    scale = float(target.square().mean().sqrt())
    error = float((target - candidate).square().mean().sqrt())
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
