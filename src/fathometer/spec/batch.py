"""A spec whose numbers are arrays is a grid of specs: its shape, and parts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import SpecError
from fathometer.spec.arrays import FloatArray
from fathometer.spec.transformer import Transformer

_T = TypeVar("_T")


def batch_shape(spec: Transformer) -> tuple[int, ...]:
    """Return the shape to which all array fields of a spec broadcast; ``()`` for a single transformer.

    Raises:
        SpecError: if they do not broadcast, with the shape of each.
    """
    shapes = {where: array.shape for where, array in array_fields(spec)}
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        found = ", ".join(f"{where} {shape}" for where, shape in shapes.items())
        raise SpecError(f"the arrays of a spec must broadcast to one grid; got {found}") from None


def array_fields(value: Any, where: str = "spec") -> Iterator[tuple[str, FloatArray]]:
    """Yield the place and value of every array in a spec, or in any part of one."""
    if isinstance(value, np.ndarray):
        yield where, value
    elif isinstance(value, tuple):
        for i, entry in enumerate(value):
            yield from array_fields(entry, f"{where}[{i}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from array_fields(getattr(value, field.name), f"{where}.{field.name}")


def refuse_arrays(value: Any, what: str, where: str = "spec") -> None:
    """Refuse a spec, or a part of one, that is a grid.

    Args:
        value: The spec.
        what: Who needs single numbers, for the message.
        where: What the spec is called there.
    Raises:
        SpecError: naming the first array and its shape.
    """
    for place, array in array_fields(value, where):
        raise SpecError(f"{what} needs single numbers; {place} is an array of shape {array.shape}")


def at_point(spec: Transformer, shape: tuple[int, ...], place: tuple[Any, ...]) -> Transformer:
    """Return the single transformer at one point of a grid of the given shape."""
    return _mapped(spec, lambda array: float(np.broadcast_to(array, shape)[place]))


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


def _mapped(value: _T, change: Callable[[FloatArray], Any]) -> _T:
    if isinstance(value, np.ndarray):
        return cast(_T, change(value))
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
