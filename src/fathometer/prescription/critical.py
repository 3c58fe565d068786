"""Edges of chaos: lines in the space of a spec along which an exponent vanishes, computed instead of searched for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure
from fathometer.errors import DomainError, SpecError, nearest
from fathometer.kernels import activation_kernel
from fathometer.observables import exponents, gradient_exponent
from fathometer.prescription.solving import NoRootError
from fathometer.spec import Activation, Transformer, batch_shape, with_field

FloatArray = NDArray[np.float64]

EXPONENTS = ("angle_exponent", "token_exponent", "coherent_exponent", "gradient_exponent")

_POINTS = 96  # of the first search along the solved field
_LOWEST = -100.0  # stands for the exponent of a block that wipes out everything, so that brackets stay finite
_STEPS = 40  # of the refinement: regula falsi of Illinois type, bracket kept


@dataclass(frozen=True, kw_only=True)
class CriticalLine:
    """Where an exponent vanishes.

    Attributes:
        observable: Name of the exponent.
        x, y: Names of the solved field and of the one given.
        x_values: The solution at every ``y_values``; NaN where ``status`` is not ``"ok"``.
        y_values: As given.
        status: ``"ok"``, ``"negative"`` or ``"positive"`` (the sign of the exponent all over the range), or ``"no fixed
            point"`` (no change of sign seen, and no state to have an exponent somewhere in the range).
        residual: The exponent at the solution.
        crossings: How often the sign changes in the range; the smallest solution is returned.
    """

    observable: str
    x: str
    y: str
    x_values: FloatArray
    y_values: FloatArray
    status: NDArray[np.str_]
    residual: FloatArray
    crossings: NDArray[np.int64]


def critical_line(
    spec: Transformer,
    *,
    x: str,
    y: tuple[str, Any],
    low: float,
    high: float,
    n_tokens: int,
    observable: str = "angle_exponent",
    cosine: float = 0.99,
    q: float | None = None,
    readout: str = "isotropic",
    closure: Closure | str = DEFAULT_CLOSURE,
) -> CriticalLine:
    """Return the field ``x`` at which an exponent vanishes, for every value of the field ``y``.

    Args:
        spec: The transformer, scalar in both fields.
        x: The field solved for, searched between ``low`` and ``high``.
        y: The other field and its values.
        low, high: Range of ``x``; logarithmic steps where ``low`` is positive.
        n_tokens: Number of tokens.
        observable: ``"angle_exponent"``, ``"token_exponent"`` or ``"coherent_exponent"`` of the collapsed state, or the
            ``"gradient_exponent"`` of the spec at its depth, from tokens of mutual ``cosine``.
        cosine, q, readout: Of the gradient exponent only, as in :func:`fathometer.observables.gradient_exponent`.
        closure: How the softmax is averaged.
    Returns:
        The line. Cost: one vectorised evaluation on 96 values of ``x`` for all ``y``, then 40 of the line.
    Raises:
        DomainError, SpecError: for a bad range, field or observable, or if setting ``x`` leaves nothing of ``y``.
        NoRootError: if the exponent vanishes nowhere in the range, naming its values at the ends.
    """
    if observable not in EXPONENTS:
        raise SpecError(f"there is no exponent {observable!r}{nearest(observable, EXPONENTS)}")
    if not 0 <= low < high < np.inf:
        raise DomainError(f"the range of {x!r} must satisfy 0 <= low < high; got [{low}, {high}]", value=(low, high))
    name, values = y[0], np.atleast_1d(np.asarray(y[1], dtype=np.float64))
    if values.ndim != 1:
        raise DomainError(f"the values of {name!r} must be one-dimensional; got shape {values.shape}")
    if batch_shape(with_field(with_field(spec, name, values), x, high)) != values.shape:
        raise SpecError(f"setting {x!r} overwrites {name!r} everywhere: nothing would depend on its values")

    def excess(at: FloatArray) -> FloatArray:
        described = with_field(with_field(spec, name, values), x, at)
        if observable == "gradient_exponent":
            value = gradient_exponent(
                described, n_tokens=n_tokens, cosine=cosine, q=q, readout=readout, closure=closure
            )
        else:
            found = exponents(described, n_tokens=n_tokens, closure=closure)
            value = getattr(found, observable.removesuffix("_exponent"))
        return np.maximum(value, _LOWEST)

    grid = np.geomspace(low, high, _POINTS) if low > 0 else np.linspace(low, high, _POINTS)
    seen = np.broadcast_to(excess(grid[:, None]), (_POINTS, len(values)))
    # A zero counts where it is reached, not where it is left: not at the low end, where a branch may do nothing at all.
    changes = (np.sign(seen[:-1]) * np.sign(seen[1:]) < 0) | ((seen[1:] == 0) & (np.abs(seen[:-1]) > 0))
    crossings = np.count_nonzero(changes, axis=0)
    found = crossings > 0
    if not np.any(found):
        ends = (float(seen[0, 0]), float(seen[-1, 0]))
        why = f"at {name} = {values[0]:g} it is {ends[0]:.4g} at the low end and {ends[1]:.4g} at the high end"
        raise NoRootError(
            f"{observable} vanishes nowhere for {x} in [{low:g}, {high:g}]: "
            + ("there is no fixed point" if np.all(np.isnan(seen)) else why),
            ends=(low, high),
            values=ends,
        )
    first = np.where(found, np.argmax(changes, axis=0), 0)
    columns = np.arange(len(values))
    root = _refined(excess, grid[first], grid[first + 1], seen[first, columns], seen[first + 1, columns], found)
    exists = np.all(np.isfinite(seen), axis=0)
    sign = np.where(np.any(seen > 0, axis=0), "positive", "negative")
    return CriticalLine(
        observable=observable,
        x=x,
        y=name,
        x_values=np.where(found, root, np.nan),
        y_values=values,
        status=np.where(found, "ok", np.where(exists, sign, "no fixed point")),
        residual=np.where(found, excess(root), np.nan),
        crossings=crossings,
    )


def edge_of_chaos(
    attention_strength: Any, *, mlp_in: Any, activation: Activation = "tanh", value: float = 1.0, mlp_out: float = 1.0
) -> FloatArray:
    r"""Return the residual strength of the MLP at which the angle exponent vanishes, in closed form.

    For LayerNorm in front of both branches and norm-preserving residuals,

    .. math:: \alpha_M^2 = \frac{\alpha_A^2\, \sigma_{OV}^2}{(1 - \alpha_A^2)(\kappa_1 - \kappa_0)}

    with kappa_0 = E f^2 and kappa_1 = E f'^2 of the MLP, weights included. Derived in the documentation.

    Args:
        attention_strength: alpha_A in [0, 1).
        mlp_in, mlp_out, activation: Scales and activation of the MLP.
        value: Product of value and output scales.
    Returns:
        alpha_M; infinite where every MLP is ordered (kappa_1 <= kappa_0), above one where this needs more than the
        branch alone.
    Raises:
        DomainError: for a strength outside [0, 1).

    >>> round(float(edge_of_chaos(0.1, mlp_in=2.0)), 8)
    0.16123682
    """
    strength = np.asarray(attention_strength, dtype=np.float64)
    if not np.all((strength >= 0) & (strength < 1)):
        raise DomainError(
            f"attention_strength must lie in [0, 1); got {attention_strength!r}", value=attention_strength
        )
    kernel, q = activation_kernel(activation), np.square(np.asarray(mlp_in, dtype=np.float64))
    gap = mlp_out**2 * (q * kernel.slope_overlap(q, q, q) - kernel.overlap(q, q, q))
    with np.errstate(divide="ignore", invalid="ignore"):
        square = (strength * value) ** 2 / ((1 - strength**2) * np.maximum(gap, 0.0))
    return np.asarray(np.where(strength == 0, 0.0, np.sqrt(square)))


def _refined(
    excess: Callable[[FloatArray], FloatArray],
    left: FloatArray,
    right: FloatArray,
    at_left: FloatArray,
    at_right: FloatArray,
    found: NDArray[np.bool_],
) -> FloatArray:
    """Narrow all brackets together by the Illinois variant of regula falsi."""
    kept = np.zeros(len(left))  # +1: the left end stayed last time, -1: the right one
    for _ in range(_STEPS):
        span = np.where(found, at_right - at_left, 1.0)
        root = np.where(found & (span != 0), right - at_right * (right - left) / np.where(span == 0, 1.0, span), left)
        value = excess(root)
        goes_left = value * at_right > 0  # the root lies left of the new point
        at_left = np.where(goes_left & (kept > 0), at_left / 2, at_left)
        at_right = np.where(~goes_left & (kept < 0), at_right / 2, at_right)
        kept = np.where(goes_left, 1.0, -1.0)
        left, at_left = np.where(goes_left, left, root), np.where(goes_left, at_left, value)
        right, at_right = np.where(goes_left, root, right), np.where(goes_left, value, at_right)
        if np.all(~found | (value == 0) | (np.abs(right - left) <= 4e-15 * np.abs(right))):
            break
    return np.where(np.abs(at_left) < np.abs(at_right), left, right)
