"""What a pointwise function, seen in infinite width, must know of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from fathometer.spec.arrays import FloatArray

Moment: TypeAlias = float | FloatArray
ScalarFunction: TypeAlias = Callable[[Any], Any]  # of one variable, on float64 arrays of any shape


class PairKernel(Protocol):
    r"""Expectations of a function f over a zero-mean Gaussian pair (u, v).

    The pair has second moments ``q_a = E u^2`` and ``q_b = E v^2`` and overlap ``p = E u v``. All arguments
    broadcast against each other; scalars are fast. The diagonal is ``overlap(q, q, q)``, and by Price's theorem

    .. math:: \frac{\partial}{\partial p}\, E f(u) f(v) = E f'(u) f'(v).

    Assumes: finite ``0 <= q < 1e150`` and ``|p| <= sqrt(q_a q_b)``. No method checks this, because a recursion over
    depth calls them at every half layer; ``check_pair`` does, once, where numbers enter.
    Norms that are not pointwise fit in by their action on random vectors in the limit of infinite width.
    """

    def overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f(u) f(v)."""
        ...

    def slope_overlap(self, q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
        """Return E f'(u) f'(v)."""
        ...

    def mean(self, q: Moment) -> FloatArray:
        """Return E f(u)."""
        ...
