"""Numbers of a spec: one float, or an array that makes the spec a grid of specs."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import SpecError

FloatArray: TypeAlias = NDArray[np.float64]
Scale: TypeAlias = float | FloatArray


def checked(owner: object, name: str, *, low: float | None = 0.0, strict: bool = False) -> None:
    """Validate the numeric field ``name`` of a frozen dataclass and store it as float or float64 array.

    Args:
        owner: The dataclass instance under construction.
        name: Field to check.
        low: Smallest accepted value, or ``None`` for no bound.
        strict: Whether ``low`` itself is refused.
    Raises:
        SpecError: if the value is no real number, is not finite, or lies below the bound.
    """
    raw = getattr(owner, name)
    where = f"{type(owner).__name__}.{name}"
    if isinstance(raw, (bool, str)) or raw is None:
        raise SpecError(f"{where} must be a number or an array of numbers; got {raw!r}")
    try:
        array = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError):
        raise SpecError(f"{where} must be a number or an array of numbers; got {raw!r}") from None
    if not np.all(np.isfinite(array)):
        raise SpecError(f"{where} must be finite; got {first_bad(array, ~np.isfinite(array))}")
    if low is not None:
        bad = array <= low if strict else array < low
        if np.any(bad):
            bound = f"> {low:g}" if strict else f">= {low:g}"
            raise SpecError(f"{where} must be {bound}; got {first_bad(array, bad)}")
    object.__setattr__(owner, name, float(array) if array.ndim == 0 else array)


def checked_rate(owner: object, name: str) -> None:
    """Validate that the field ``name`` is a dropout rate, or an array of them, in ``[0, 1)``."""
    checked(owner, name)
    rate = np.asarray(getattr(owner, name))
    if np.any(rate >= 1):
        raise SpecError(f"{type(owner).__name__}.{name} must lie in [0, 1); got {first_bad(rate, rate >= 1)}")


def first_bad(array: FloatArray, bad: NDArray[np.bool_]) -> str:
    """Describe the first element of ``array`` marked in ``bad``, with its index when it is not a scalar."""
    if array.ndim == 0:
        return f"{float(array):g}"
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{float(array[index]):g} at index {index}"


def checked_count(owner: object, name: str, *, low: int = 1, high: int = 10_000_000) -> None:
    """Validate that the field ``name`` is an integer within ``[low, high]``."""
    value = getattr(owner, name)
    where = f"{type(owner).__name__}.{name}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise SpecError(f"{where} must be an integer; got {value!r}")
    if not low <= int(value) <= high:
        raise SpecError(f"{where} must lie in [{low}, {high}]; got {int(value)}")
    object.__setattr__(owner, name, int(value))


def checked_flag(owner: object, name: str) -> None:
    """Validate that the field ``name`` is a boolean; a truthy string from a file would silently switch it on."""
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise SpecError(f"{type(owner).__name__}.{name} must be true or false; got {value!r}")
