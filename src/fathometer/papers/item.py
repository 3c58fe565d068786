"""What a reproduced figure or table is: a function of a size, its picture and one line about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import SpecError
from fathometer.results.plain import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FULL",
    "SIZES",
    "SMALL",
    "Cell",
    "FloatArray",
    "Item",
    "Progress",
    "Result",
    "Size",
    "Table",
    "plain",
    "silent",
]

FloatArray: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[str, int, int], None]
#: Text, a number, or a number with its standard error (``None`` where there is none).
Cell: TypeAlias = "str | float | tuple[float, float | None]"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the networks and runs of an item are; an item uses the numbers that concern it.

    Args:
        d_model, n_layers, n_heads, n_tokens: The simulated network.
        seeds: Weight draws.
        run_depth: Blocks of a run of the recursion alone, where a limit of large depth is read off.
        grid: Points along each swept axis.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_tokens: int
    seeds: int
    run_depth: int
    grid: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"Size.{field.name} must be a positive integer; got {value!r}")
        if self.d_model % self.n_heads or self.n_tokens > self.d_model:
            raise SpecError(
                "a size needs d_model to be a multiple of n_heads and no smaller than n_tokens; got "
                f"d_model={self.d_model}, n_heads={self.n_heads}, n_tokens={self.n_tokens}"
            )


#: Minutes or less on two cores.
SMALL = Size(d_model=256, n_layers=48, n_heads=4, n_tokens=64, seeds=6, run_depth=30_000, grid=160)
#: The widths of the papers: 6.4 GB of float32 weights a network.
FULL = Size(d_model=1024, n_layers=128, n_heads=16, n_tokens=197, seeds=2, run_depth=200_000, grid=400)
SIZES = {"small": SMALL, "full": FULL}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to print."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Result(Protocol):
    """Plain data of an item."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it; numbers that are not finite become ``None``."""
        ...

    def table(self) -> Table:
        """Return the numbers worth printing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Item:
    """A figure or table of a paper.

    Attributes:
        name: ``"paper/figure"``.
        run: Computes the result at a size, reporting ``(label, done, total)`` on the way.
        draw: Draws it and computes nothing.
        about: One line.
    """

    name: str
    run: Callable[[Size, Progress], Result]
    draw: Callable[[Any], Figure]
    about: str


def silent(label: str, done: int, total: int) -> None:
    """Report no progress."""
