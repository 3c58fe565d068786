"""Maps of an exponent over two pairs of fields, theory beside networks at every point: the form of two figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.diagrams import diagram
from fathometer.diagrams.measured import measured_diagram
from fathometer.papers.geometry.architecture import NETWORKS
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain
from fathometer.prescription import critical_line, edge_of_chaos
from fathometer.spec import Transformer

SIGMA_W, BOTH = "mlp_in", "residual_strength"
ATTENTION, PERCEPTRON = "attention.residual_strength", "mlp.residual_strength"
#: Field to the range that is mapped.
RANGES = {SIGMA_W: (0.5, 10.0), BOTH: (0.05, 0.95), ATTENTION: (0.05, 0.95), PERCEPTRON: (0.05, 0.95)}
#: Name of each pair to its horizontal and vertical field. The second has the sigma_w of the ordered network.
PAIRS = {"alpha, sigma_w": (BOTH, SIGMA_W), "alpha_A, alpha_M": (ATTENTION, PERCEPTRON)}
_LINE_POINTS = 181
_LINES_END = {SIGMA_W: 12.0, PERCEPTRON: 1.0}  # a little above the map, so that lines run out of it


@dataclass(frozen=True, kw_only=True)
class Line:
    """A zero line: ``y`` over ``x``, NaN where there is none."""

    label: str
    x: FloatArray
    y: FloatArray


@dataclass(frozen=True, kw_only=True)
class Map:
    """One pair of fields.

    Attributes:
        name, x, y: The pair and its fields.
        fine_x, fine_y, theory: Prediction on a fine grid, shape ``(len(fine_y), len(fine_x))``.
        coarse_x, coarse_y: The points at which networks were measured, in the middle of equal cells.
        measured, errors, predicted: Mean and standard error over networks, and theory, there.
        lines: Zero lines, that of the exponent itself first.
        seconds: Wall time of the measurement.
    """

    name: str
    x: str
    y: str
    fine_x: FloatArray
    fine_y: FloatArray
    theory: FloatArray
    coarse_x: FloatArray
    coarse_y: FloatArray
    measured: FloatArray
    errors: FloatArray
    predicted: FloatArray
    lines: tuple[Line, ...]
    seconds: float

    @property
    def rms_difference(self) -> float:
        """Root mean square of measurement minus theory."""
        return float(np.sqrt(np.mean((self.measured - self.predicted) ** 2)))


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Both pairs.

    Attributes:
        observable: What is mapped.
        title: What it is called, with what it depends on.
        maps: One for each pair of fields.
        about: Sizes of the networks.
    """

    observable: str
    title: str
    maps: tuple[Map, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return how far measurement is from theory."""
        rows: list[tuple[Cell, ...]] = []
        for found in self.maps:
            difference = found.measured - found.predicted
            rows.append(
                (
                    found.name,
                    f"{difference.size}",
                    found.rms_difference,
                    float(np.abs(difference).max()),
                    float(found.errors.mean()),
                    f"{np.mean((found.measured > 0) == (found.predicted > 0)):.1%}",
                    found.seconds,
                )
            )
        return Table(
            title=f"{self.title}: measurement minus theory, nats per block",
            headings=("fields", "points", "rms", "largest", "mean SE", "same sign", "seconds"),
            rows=tuple(rows),
        )


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What is measured at every point.

    Args:
        spec: The network.
        n_tokens, cosine: Number of tokens and their cosine at the first block.
        draws: Weight draws.
        points: Points along each axis.
    """

    spec: Transformer
    n_tokens: int
    cosine: float
    draws: int
    points: int


def network_width(size: Size) -> int:
    """Return the width of the thousands of networks of a map: 128 for small sizes, 256 for large ones."""
    return min(size.d_model, 128 if size.d_model <= 256 else 256)


def coarse_points(size: Size) -> int:
    """Return the number of measured points along an axis: 12 for small sizes, 24 for large ones."""
    return min(size.grid, 12 if size.d_model <= 256 else 24)


def compute_maps(
    networks: Networks,
    observable: str,
    lines: Callable[[str, str], tuple[Line, ...]],
    *,
    fine: int,
    progress: Progress,
) -> tuple[Map, ...]:
    """Predict and measure an observable over both pairs.

    Args:
        networks: What is measured; theory has the same depth and tokens.
        observable: Its name in :data:`fathometer.diagrams.OBSERVABLES`.
        lines: From the two fields of a pair to its zero lines.
        fine: Points of the theory along each axis.
        progress: Told about measured points.
    """
    out = []
    tokens: dict[str, Any] = {"n_tokens": networks.n_tokens, "cosine": networks.cosine}
    for k, (name, (x, y)) in enumerate(PAIRS.items()):

        def report(label: str, done: int, total: int, before: int = k) -> None:
            progress("measured points", before * total + done, len(PAIRS) * total)

        cells: dict[str, Any] = {
            axis: (field, _centres(field, networks.points)) for axis, field in (("x", x), ("y", y))
        }
        dense: dict[str, Any] = {
            axis: (field, np.linspace(*RANGES[field], fine)) for axis, field in (("x", x), ("y", y))
        }
        theory = diagram(networks.spec, **dense, observable=observable, **tokens)
        predicted = diagram(networks.spec, **cells, observable=observable, **tokens)
        start = time.perf_counter()
        measured = measured_diagram(
            networks.spec,
            **cells,
            observable=observable,
            seeds=networks.draws,
            seed=10_000 * k,
            progress=report,
            **tokens,
        )
        seconds = time.perf_counter() - start
        out.append(
            Map(
                name=name,
                x=x,
                y=y,
                fine_x=theory.x.values,
                fine_y=theory.y.values,
                theory=theory.values[observable],
                coarse_x=measured.x.values,
                coarse_y=measured.y.values,
                measured=measured.values[observable],
                errors=measured.errors[observable],
                predicted=predicted.values[observable],
                lines=lines(x, y),
                seconds=seconds,
            )
        )
    return tuple(out)


def _centres(field: str, points: int) -> FloatArray:
    low, high = RANGES[field]
    return low + (high - low) * (np.arange(points) + 0.5) / points


def angle_line(spec: Transformer, x: str, y: str, n_tokens: int) -> Line:
    """Return the edge of chaos: solved for sigma_w, and in closed form for alpha_M."""
    at = np.linspace(*RANGES[x], _LINE_POINTS)
    if y == SIGMA_W:
        return zero_line(spec, x, y, n_tokens=n_tokens, observable="angle_exponent", label="angle exponent = 0")
    closed = edge_of_chaos(at, mlp_in=NETWORKS["ordered"])
    return Line(label="angle exponent = 0", x=at, y=np.where(closed <= _LINES_END[y], closed, np.nan))


def zero_line(spec: Transformer, x: str, y: str, *, label: str, **what: Any) -> Line:
    """Return where an exponent vanishes, as :func:`fathometer.prescription.critical_line` finds it."""
    at = np.linspace(*RANGES[x], _LINE_POINTS)
    found = critical_line(spec, x=y, y=(x, at), low=RANGES[y][0], high=_LINES_END[y], **what)
    return Line(label=label, x=at, y=found.x_values)
