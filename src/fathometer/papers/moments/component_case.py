"""One component in one setting: what theories say of it, and how it is simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from fathometer.observables.components import Component, GradientState, TokenState
from fathometer.papers.item import Size
from fathometer.spec import SelfAttention

if TYPE_CHECKING:
    from fathometer.measurement.components import Draw

Values: TypeAlias = dict[str, float]
Estimates: TypeAlias = dict[str, tuple[float, float]]

FEW, MANY = 4, 16  # sequences a draw of weights: where attention or wide matrices cost time, and elsewhere


@dataclass(frozen=True, kw_only=True)
class Case:
    """One component in one setting.

    Attributes:
        component, setting: What it is called.
        refined: Theory, by quantity.
        reference: The published theory where it is another one.
        simulate: From a number of ``seeds`` to means and standard errors by quantity.
        allowance: Declared bias of the refined theory relative to each quantity; ``*`` stands for all others.
    """

    component: str
    setting: str
    refined: Callable[[], Values]
    reference: Callable[[], Values] | None = None
    simulate: Callable[..., Estimates]
    allowance: dict[str, float]

    def bias(self, quantity: str) -> float:
        """Return the declared relative bias of a quantity."""
        return self.allowance.get(quantity, self.allowance["*"])


def component_case(
    size: Size,
    component: str,
    setting: str,
    theory: Component,
    draw: Draw,
    *,
    x: TokenState,
    width: int | None = None,
    n_tokens: int | None = None,
    g: tuple[float, float] = (1.0, 0.3),
    reference: Component | None = None,
    names: tuple[str, ...] = ("q", "p", "J", "K"),
    sequences: int = MANY,
    allowance: dict[str, float] | None = None,
) -> Case:
    """Return the case of a component of one input.

    Args:
        size: Gives the width and number of tokens where those are not stated.
        component, setting: What it is called.
        theory, reference: The refined component and the published one.
        draw: Its simulation.
        x: Moments of the input.
        width, n_tokens: Of the input.
        g: J and K of the gradient at the output.
        names: Quantities to compare.
        sequences: Sequences a draw of weights.
        allowance: Declared relative biases by quantity.
    """
    from fathometer.measurement.components import Input, simulate

    n, d = n_tokens or size.n_tokens, width or size.d_model
    values = partial(values_of, x, GradientState(J=g[0], K=g[1]), names)
    one = Input(n, d, float(x.q), float(x.p), float(x.mean))
    return Case(
        component=component,
        setting=setting,
        refined=partial(values, theory),
        reference=None if reference is None else partial(values, reference),
        simulate=partial(simulate, draw, [one], J=g[0], K=g[1], sequences=sequences, stream=f"{component}, {setting}"),
        allowance={"*": 0.0, **(allowance or {})},
    )


def values_of(x: TokenState, g: GradientState, names: tuple[str, ...], theory: Component) -> Values:
    """Return what a component says of these quantities for an input and a gradient at its output."""
    out, back = theory.forward(x), theory.backward(g, x)
    found = {"mean": out.mean, "q": out.q, "p": out.p, "J": back.J, "K": back.K}
    return {name: float(found[name]) for name in names}


def scored_attention(variance: float, n_heads: int, **more: Any) -> SelfAttention:
    """Return attention whose scores have this variance on unit tokens."""
    given = {"value": 1.0, "output": 1.0, **more}
    return SelfAttention(query=variance**0.25, key=variance**0.25, n_heads=n_heads, **given)
