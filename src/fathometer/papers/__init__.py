"""Figures and tables of papers, theory beside simulation, as functions that return data."""

from __future__ import annotations

from fathometer.errors import SpecError, nearest
from fathometer.papers import apjn, effective, failure_modes, geometry, moments
from fathometer.papers.item import FULL, SIZES, SMALL, Item, Result, Size, Table

#: Every item by name.
ITEMS: dict[str, Item] = {
    item.name: item for item in (*apjn.ITEMS, *geometry.ITEMS, *failure_modes.ITEMS, *moments.ITEMS, *effective.ITEMS)
}


def find_item(name: str) -> Item:
    """Return an item by name.

    Raises:
        SpecError: naming the closest one.
    """
    if name not in ITEMS:
        raise SpecError(f"there is nothing to reproduce called {name!r}{nearest(name, ITEMS)}")
    return ITEMS[name]


__all__ = ["FULL", "ITEMS", "SIZES", "SMALL", "Item", "Result", "Size", "Table", "find_item"]
