r"""The moments that components map: of tokens on the way down, of gradients on the way back.

Per entry of the stream, with two different tokens a, b of one sequence and the same feature i,

.. math:: \text{mean} = E\,x_{ai}, \quad q = E\,x_{ai}^2, \quad p = E\,x_{ai} x_{bi}, \quad
          J = E\,g_{ai}^2, \quad K = E\,g_{ai} g_{bi} .

Expectations are over inputs and weights. Means matter inside an activation only: a zero-mean random matrix behind it
carries ``q`` and ``p`` on, so the correlation that survives is ``p / q``, not the centred one.

Source: A. Kedia et al., arXiv:2403.09635, whose centred variance, covariance and correlation are properties here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from fathometer.errors import DomainError, SpecError
from fathometer.propagation import Moments

#: ``"refined"``: the most accurate form known here; ``"reference"``: as published; ``"leading"``: its leading order.
Form: TypeAlias = Literal["refined", "reference", "leading"]

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class TokenState:
    """Moments of tokens: numbers, or arrays that broadcast.

    Args:
        q: Mean square of an entry; 0 for tokens of zeros, which have no cosine.
        p: Mean product of the same feature of two tokens, at most ``q``.
        mean: Mean of an entry.
    Raises:
        DomainError: for moments that no tokens can have.
    """

    q: Any
    p: Any
    mean: Any = 0.0

    def __post_init__(self) -> None:
        q, p, mean = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (self.q, self.p, self.mean)))
        _refuse("q must be finite and at least 0", q, np.isfinite(q) & (q >= 0))
        _refuse("mean must satisfy mean^2 <= q", mean, np.square(mean) <= q * (1 + _ROUNDING))
        spread = q - np.square(mean)
        good = np.abs(p - np.square(mean)) <= spread + _ROUNDING * q
        _refuse("p must satisfy |p - mean^2| <= q - mean^2 (is it a correlation?)", p, good)

    @classmethod
    def from_correlation(cls, *, variance: Any, correlation: Any, mean: Any = 0.0) -> TokenState:
        """Return the state with centred ``variance``, token ``correlation`` and ``mean``."""
        shift = np.square(mean)
        return cls(q=variance + shift, p=variance * correlation + shift, mean=mean)

    @property
    def variance(self) -> Any:
        """``q - mean^2``."""
        return self.q - np.square(self.mean)

    @property
    def covariance(self) -> Any:
        """``p - mean^2``, of two tokens."""
        return self.p - np.square(self.mean)

    @property
    def correlation(self) -> Any:
        """``covariance / variance``, centred; NaN for tokens without a variance."""
        return _cosine(self.variance, self.covariance)

    @property
    def cosine(self) -> Any:
        """``p / q``, what a zero-mean matrix behind sees; NaN for tokens of zeros."""
        return _cosine(self.q, self.p)

    @property
    def moments(self) -> Moments:
        """The pair the recursion carries."""
        return Moments(self.q, self.p)


@dataclass(frozen=True, kw_only=True)
class GradientState:
    """Moments of gradients, whose mean is zero.

    Args:
        J: Mean square of an entry.
        K: Mean product of the same feature at two tokens.
    """

    J: Any
    K: Any

    def __post_init__(self) -> None:
        own, shared = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (self.J, self.K)))
        _refuse("J must be finite and at least 0", own, np.isfinite(own) & (own >= 0))
        _refuse("K must satisfy |K| <= J (is it a correlation?)", shared, np.abs(shared) <= own * (1 + _ROUNDING))

    @property
    def alignment(self) -> Any:
        """``K / J``, the correlation of the gradients of two tokens."""
        return self.K / self.J


class Component(Protocol):
    """A map on token moments, and the map on gradient moments that goes with it."""

    def forward(self, x: TokenState) -> TokenState:
        """Return the moments of the output for inputs with moments ``x``."""
        ...

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """Return the moments of the gradient at the input, given those at the output and the input ``x``."""
        ...


def check_form(owner: object, form: str, accepted: tuple[str, ...] = ("refined", "reference")) -> None:
    """Refuse a form that a component does not have."""
    if form not in accepted:
        raise SpecError(f"{type(owner).__name__}.form must be one of {', '.join(accepted)}; got {form!r}")


def _cosine(own: Any, shared: Any) -> Any:
    """Return the ratio within [-1, 1], which rounding of admitted moments may leave."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.true_divide(shared, own), -1.0, 1.0)


def _refuse(rule: str, values: Any, good: Any) -> None:
    if not np.all(good):
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        value = float(values[index])
        where = f" at index {index}" if index else ""
        raise DomainError(f"{rule}; got {value:g}{where}", value=value, index=index or None)
