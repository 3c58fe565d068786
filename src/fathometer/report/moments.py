"""Measured moments beside predicted ones, in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fathometer.report.numbers import with_error
from fathometer.results.moments import ModelMoments

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = {"q": "q", "correlation": "correlation", "gradient_log": "ln gradient", "gradient_alignment": "alignment"}


def render_moments(console: Console, measured: ModelMoments, predicted: ModelMoments, layer: int) -> None:
    """Print every component of one layer: the second moment, the correlation and the gradient, both ways."""
    from rich.table import Table

    seen, wanted = measured.rows(layer), predicted.rows(layer)
    table = Table(title=f"layer {layer}: measured ± SE, and theory", title_justify="left")
    table.add_column("component")
    for heading in _SHOWN.values():
        table.add_column(heading, justify="right")
        table.add_column("theory", justify="right")
    for name, row in seen.items():
        cells = []
        for quantity in _SHOWN:
            cells.append(_measured(measured, name, layer, quantity, row[quantity]))
            value = wanted[name][quantity] if name in wanted else math.nan
            cells.append("-" if math.isnan(value) else f"{value:.4g}")
        table.add_row(name, *cells)
    console.print(table)


def _measured(moments: ModelMoments, name: str, layer: int, quantity: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    component = moments[name]
    if quantity not in component.errors:
        return f"{value:.4g}"
    return with_error(value, float(component.errors[quantity][np.flatnonzero(component.layers == layer)[0]]))
