"""Theory for every point of a grid in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fathometer._version import __version__
from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.diagrams.grid import Axis, Diagram
from fathometer.diagrams.observables import OBSERVABLES, Tokens
from fathometer.errors import SpecError, nearest
from fathometer.spec import Transformer, batch_shape, to_dict, with_field


def diagram(
    spec: Transformer,
    *,
    x: tuple[str, Any],
    y: tuple[str, Any],
    observable: str | Sequence[str] = "angle_exponent",
    n_tokens: int = 256,
    cosine: float = 0.5,
    q: float | None = None,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> Diagram:
    """Map observables over two fields of a spec. Causal masks are dropped: late positions obey the same theory.

    Args:
        spec: The transformer; its own numbers in the two fields do not matter.
        x, y: ``(field, values)``, for instance ``("mlp_in", np.linspace(0.5, 8, 400))``.
        observable: Name or names, see :data:`fathometer.diagrams.OBSERVABLES`.
        n_tokens: Number of tokens.
        cosine: p/q of the tokens at the first block, for observables of a finite stack.
        q: Their second moment; by default the one that the last block preserves for equal tokens, at every point.
        closure: How the softmax is averaged.
    Returns:
        The map, arrays of shape ``(len(y), len(x))``. Cost at 400 x 400, one core: 0.1 s for exponents at collapse, 1 s
        for stable states, 30 ms for every block of a finite stack.
    Raises:
        SpecError: for a field or observable that does not exist (the nearest is suggested), or the same field twice.
        DomainError: for numbers outside the domain.

    >>> from fathometer.spec import preset
    >>> found = diagram(preset("vit"), x=("mlp_in", [1.0, 2.0]), y=("residual_strength", [0.1, 0.3, 0.5]))
    >>> found.values["angle_exponent"].shape
    (3, 2)
    """
    names = (observable,) if isinstance(observable, str) else tuple(observable)
    if not names:
        raise SpecError("a diagram needs at least one observable")
    for name in names:
        if name not in OBSERVABLES:
            raise SpecError(f"a diagram has no observable {name!r}{nearest(name, OBSERVABLES)}")
    axes = Axis.of(x), Axis.of(y)
    grid = on_grid(spec, *axes)
    tokens = Tokens(n_tokens=n_tokens, cosine=cosine, q=q, closure=closure)
    shape = (axes[1].values.size, axes[0].values.size)
    fields = {name: OBSERVABLES[name].compute(grid, tokens) for name in names}
    return Diagram(
        x=axes[0],
        y=axes[1],
        values={name: np.broadcast_to(found.values, shape) for name, found in fields.items()},
        status={name: np.broadcast_to(found.status, shape) for name, found in fields.items()},
        source="theory",
        about={
            "spec": to_dict(spec),
            "n_tokens": int(n_tokens),
            "cosine": cosine,
            "q": q,
            "closure": as_closure(closure).name,
            "version": __version__,
        },
    )


def on_grid(spec: Transformer, x: Axis, y: Axis) -> Transformer:
    """Return the grid of specs of shape ``(len(y), len(x))``.

    Raises:
        SpecError: if the fields do not exist, are the same, or if setting ``x`` leaves nothing of ``y``.
    """
    if x.name == y.name:
        raise SpecError(f"the axes of a diagram must be two fields; got {x.name!r} twice")
    grid = with_field(with_field(spec, y.name, y.values[:, None]), x.name, x.values[None, :])
    if batch_shape(grid) != (y.values.size, x.values.size):
        raise SpecError(f"setting {x.name!r} overwrites {y.name!r} everywhere: nothing would depend on its values")
    return grid
