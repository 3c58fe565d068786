"""Closures by name, and which one is the default."""

from __future__ import annotations

from fathometer.attention.closure import Annealed, Closure, Uniform, UniformLargeN
from fathometer.attention.exact import Exact
from fathometer.attention.random_energy import RandomEnergy
from fathometer.errors import SpecError, nearest

DEFAULT_CLOSURE: Closure = Exact()
CLOSURES: dict[str, Closure] = {
    closure.name: closure for closure in (Exact(), Annealed(), RandomEnergy(), Uniform(), UniformLargeN())
}


def as_closure(closure: Closure | str) -> Closure:
    """Return a closure given itself or its name.

    Raises:
        SpecError: naming the nearest one.
    """
    if not isinstance(closure, str):
        return closure
    if closure not in CLOSURES:
        raise SpecError(f"there is no closure {closure!r}{nearest(closure, CLOSURES)}")
    return CLOSURES[closure]
