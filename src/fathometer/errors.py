"""Every error a user can meet, each carrying the data needed to act on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FathometerError(Exception):
    """Base of all errors raised on purpose. The command line prints these in one line and exits with code 2."""


class DomainError(FathometerError, ValueError):
    """A number lies outside the set where the theory is defined.

    Attributes:
        value: The offending value.
        index: Where it was found in an array, or ``None`` for a scalar.
    """

    def __init__(self, message: str, *, value: object = None, index: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.value = value
        self.index = index


class SpecError(FathometerError, ValueError):
    """A description of a transformer is inconsistent, incomplete or has unknown fields."""


class QuadratureError(FathometerError, ArithmeticError):
    """A Gaussian expectation did not converge. Carries the estimate and its error."""

    def __init__(self, message: str, *, estimate: float, error: float) -> None:
        super().__init__(message)
        self.estimate = estimate
        self.error = error


class NotCoveredError(FathometerError, NotImplementedError):
    """The model does something the theory has no map for. ``reason`` says what."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ModelError(FathometerError):
    """A model cannot be read or measured: no blocks, weights that are not finite, no randomness."""


class BatchError(FathometerError, ValueError):
    """A batch does not fit the model, or is not finite."""


class MissingExtraError(FathometerError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}; install it with: pip install 'fathometer[{extra}]'")
        self.package = package
        self.extra = extra


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a phrase ``"; did you mean 'x'?"`` naming the closest choice, followed by all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Accepted: {', '.join(known)}."
