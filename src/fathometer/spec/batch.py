"""A spec whose numbers are arrays is a grid of specs: its shape, and parts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fathometer.spec.arrays import FloatArray
from fathometer.spec.transformer import Transformer

_T = TypeVar("_T")


def batch_shape(spec: Transformer) -> tuple[int, ...]:
    """Return the shape to which all array fields of a spec broadcast; ``()`` for a single transformer."""
    return np.broadcast_shapes(*(array.shape for array in _arrays(spec)))


def sliced(spec: Transformer, index: tuple[slice, ...]) -> Transformer:
    """Return a part of a grid of specs.

    Args:
        spec: The grid.
        index: One slice for each axis of the whole batch.
    """
    return _mapped(spec, lambda array: cut_aligned(array, index))


def cut_aligned(array: NDArray[Any], index: tuple[slice, ...]) -> NDArray[Any]:
    """Index an array that broadcasts with a grid: axes align from the right, and those of length one stay."""
    slices = index[len(index) - array.ndim :]
    return array[tuple(s if size > 1 else slice(None) for s, size in zip(slices, array.shape, strict=True))]


def _arrays(value: Any) -> Iterator[FloatArray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _arrays(entry)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))


def _mapped(value: _T, change: Callable[[FloatArray], FloatArray]) -> _T:
    if isinstance(value, np.ndarray):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(_mapped(entry, change) for entry in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            new = _mapped(old, change)
            if new is not old:
                changed[field.name] = new
        return dataclasses.replace(value, **changed) if changed else value
    return value
