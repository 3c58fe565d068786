"""Inverting the theory in one number: the alpha or branch scale that gives the gradients or growth one wants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import DomainError, FathometerError, SpecError
from fathometer.observables import profile_of
from fathometer.propagation import propagate
from fathometer.spec import LayerNorm, Sublayer, Transformer, with_field

FloatArray = NDArray[np.float64]
TARGETS = ("gradient", "pooled", "growth")


class NoRootError(FathometerError, ArithmeticError):
    """The wanted value is not reached in the range. Carries both ends and the values there."""

    def __init__(self, message: str, *, ends: tuple[float, float], values: tuple[float, float]) -> None:
        super().__init__(message)
        self.ends = ends
        self.values = values


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solved number.

    Attributes:
        field: What was varied.
        value: Its solution; NaN unless ``status`` is ``"ok"``.
        status: ``"ok"``, or ``"no root"``.
        steps: Predictions used, the first grid counted as one.
        target: What was matched, and the wanted value (natural log).
        reached: The value at the solution (natural log).
    """

    field: str
    value: float
    status: str
    steps: int
    target: tuple[str, float]
    reached: float


def solve_field(
    spec: Transformer,
    field: str,
    *,
    target: str,
    n_tokens: int,
    q: float,
    p: float,
    bound: float | None = None,
    low: float = 1e-3,
    high: float = 1e2,
    closure: Closure | str = DEFAULT_CLOSURE,
    collect: bool = False,
) -> Solution:
    """Return the ``field`` of ``spec`` at which ``target`` takes the wanted value.

    Args:
        spec: The transformer, at the depth in question.
        field: For instance ``"alpha"`` or ``"branch_scale"``.
        target: What to match, causal masks dropped: ``"gradient"`` (the APJN ``J^{L,0}``), ``"pooled"`` (gradient
            amplification of a mean-pooled loss) or ``"growth"`` (``q_L / q_0``).
        n_tokens, q, p: Tokens at the first block.
        bound: The wanted value of the target; by default, what the same spec reaches with LayerNorm in every input
            slot (and unscaled branches, where the branch scale is what is solved for).
        low, high: Range searched, logarithmically.
        closure: How the softmax is averaged.
        collect: Return a solution with status ``"no root"`` instead of raising.
    Returns:
        The solution. The whole range is first evaluated in one vectorised prediction of 64 values; where it crosses
        the wanted value more than once the smallest crossing is taken, then refined by Brent's method.
    Raises:
        NoRootError: naming the range and the target at both ends.
        DomainError, SpecError: for a bad range, bound, target or field.
    """
    if target not in TARGETS:
        raise SpecError(f"target {target!r} is unknown; accepted: {', '.join(TARGETS)}")
    if not 0 < low < high < np.inf:
        raise DomainError(f"the range must satisfy 0 < low < high; got [{low}, {high}]", value=(low, high))
    if bound is not None and not (np.isfinite(bound) and bound > 0):
        raise DomainError(f"bound must be positive and finite; got {bound}", value=bound)
    spec = spec.bidirectional()
    averaging = as_closure(closure)

    def log_target(described: Transformer) -> FloatArray:
        with np.errstate(over="ignore"):
            return _read(described, target, n_tokens, q, p, averaging)

    wanted = float(np.log(bound)) if bound is not None else float(log_target(_with_layer_norm(spec, field)))
    grid = np.geomspace(low, high, 64)
    values = log_target(with_field(spec, field, grid)) - wanted
    crossings = np.flatnonzero(np.isfinite(values[:-1]) & np.isfinite(values[1:]) & (values[:-1] * values[1:] <= 0))
    if crossings.size == 0:
        ends = (float(values[0] + wanted), float(values[-1] + wanted))
        message = (
            f"no {field} in [{low:g}, {high:g}] gives ln {target} = {wanted:.4g}: it is {ends[0]:.4g} at the low end "
            f"and {ends[1]:.4g} at the high end"
        )
        if not collect:
            raise NoRootError(message, ends=(low, high), values=ends)
        return Solution(
            field=field, value=float("nan"), status="no root", steps=1, target=(target, wanted), reached=float("nan")
        )
    i = int(crossings[0])
    steps = 1

    def excess(log_value: float) -> float:
        nonlocal steps
        steps += 1
        return float(log_target(with_field(spec, field, float(np.exp(log_value))))) - wanted

    root = brentq(excess, np.log(grid[i]), np.log(grid[i + 1]), xtol=1e-12, rtol=1e-12)
    value = float(np.exp(root))
    return Solution(
        field=field,
        value=value,
        status="ok",
        steps=steps,
        target=(target, wanted),
        reached=excess(root) + wanted,
    )


def _read(spec: Transformer, target: str, n_tokens: int, q: float, p: float, closure: Closure) -> FloatArray:
    curves = profile_of(propagate(spec, n_tokens=n_tokens, q=q, p=p, closure=closure)).curves
    if target == "growth":
        return np.asarray(np.log(curves["q"][-1] / curves["q"][0]))
    return np.asarray(curves["apjn_log" if target == "gradient" else "gradient_log"][0])


def _with_layer_norm(spec: Transformer, field: str) -> Transformer:
    def change(sublayer: Sublayer) -> Sublayer:
        scale = 1.0 if field.endswith("branch_scale") else sublayer.branch_scale
        return replace(sublayer, input_norm=LayerNorm(), branch_scale=scale)

    return spec.map_sublayers(change)
