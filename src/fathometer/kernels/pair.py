"""A Gaussian pair: is it one, and how far is it from being perfectly correlated."""

from __future__ import annotations

import numpy as np

from fathometer.errors import DomainError
from fathometer.kernels.protocol import Moment
from fathometer.spec.arrays import FloatArray

_ROUNDING = 1e-9


def determinant(q_a: Moment, q_b: Moment, p: Moment) -> FloatArray:
    """Return ``q_a q_b - p^2`` of a valid pair, exactly 0 on the diagonal and never below it by rounding.

    The factors ``(r - p)(r + p)`` with ``r = sqrt(q_a q_b)`` keep the digits that the difference of squares loses
    near ``|p| = r``; for equal second moments ``r`` is exact.
    """
    root = np.sqrt(q_a * q_b)
    gap: FloatArray = np.maximum((root - p) * (root + p), 0.0)
    return gap


def check_pair(q_a: Moment, q_b: Moment, p: Moment) -> None:
    """Refuse numbers that are no second moments and overlap of a Gaussian pair.

    Args:
        q_a, q_b: Second moments, any shapes that broadcast.
        p: Overlap, same unit.
    Raises:
        DomainError: if a second moment is negative or not finite, or if ``|p| > sqrt(q_a q_b)`` by more than
            rounding. Carries the first offending value and its index in the broadcast shape.

    >>> check_pair(1.0, 1.0, 0.5)
    """
    first, second, overlap = np.broadcast_arrays(
        np.asarray(q_a, dtype=np.float64), np.asarray(q_b, dtype=np.float64), np.asarray(p, dtype=np.float64)
    )
    for name, moment in (("q_a", first), ("q_b", second)):
        bad = ~(np.isfinite(moment) & (moment >= 0.0))
        if bad.any():
            index = _first(bad)
            value = float(moment[index])
            raise DomainError(
                f"`{name}` must be finite and >= 0; got {name}={value:g}{_where(index)}. "
                "It is a mean square per coordinate, not a mean.",
                value=value,
                index=index or None,
            )
    bad = ~(np.abs(overlap) <= np.sqrt(first) * np.sqrt(second) * (1.0 + _ROUNDING))
    if bad.any():
        index = _first(bad)
        value = float(overlap[index])
        raise DomainError(
            f"`p` must satisfy |p| <= sqrt(q_a q_b); got p={value:g}, q_a={first[index]:g}, q_b={second[index]:g}"
            f"{_where(index)}. Did you pass a correlation? An overlap is p = cosine * sqrt(q_a q_b).",
            value=value,
            index=index or None,
        )


def _first(bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])


def _where(index: tuple[int, ...]) -> str:
    return f" at index {index}" if index else ""
