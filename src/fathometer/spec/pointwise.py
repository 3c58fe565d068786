"""A user's own scalar function, used as an activation or in place of a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fathometer.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """An analytic function of one variable with its derivative.

    Both callables take and return float64 numpy arrays of any shape. Functions with kinks are refused by the
    quadrature (it checks its own convergence); write those as a combination of ReLU and identity instead.

    Args:
        name: How the function is called in tables and files. Needed to find it again after a round trip.
        value: The function.
        derivative: Its first derivative.
    """

    name: str
    value: Callable[[Any], Any]
    derivative: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"Pointwise.name must be an identifier; got {self.name!r}")
        for field in ("value", "derivative"):
            if not callable(getattr(self, field)):
                raise SpecError(f"Pointwise.{field} must be callable; got {getattr(self, field)!r}")
