"""A map over two fields as plain data, and as a file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import DomainError, MissingExtraError

if TYPE_CHECKING:
    import xarray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a diagram: a field of a spec and its values."""

    name: str
    values: FloatArray

    @classmethod
    def of(cls, axis: tuple[str, Any]) -> Axis:
        """Check ``(field, values)``.

        Raises:
            DomainError: unless the values are one-dimensional, finite and not empty.
        """
        try:
            name, raw = axis
            values = np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError):
            raise DomainError(f"an axis is a pair (field, values); got {axis!r}", value=axis) from None
        if not isinstance(name, str):
            raise DomainError(f"an axis is a pair (field, values); got {axis!r}", value=axis)
        if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
            raise DomainError(f"the values of axis {name!r} must be a finite, one-dimensional, non-empty array")
        return cls(name=name, values=values)


@dataclass(frozen=True, kw_only=True)
class Diagram:
    """Observables over a grid of two fields.

    Attributes:
        x, y: The axes.
        values: Observable to array of shape ``(len(y), len(x))``; phases are strings.
        errors: Standard errors over weight draws where measured.
        status: Observable to ``"ok"``, ``"overflow"``, ``"vanished"``, ``"infinite"`` or ``"no fixed point"``, same
            shape; only where it is ``"ok"`` does the value mean something.
        source: ``"theory"`` or ``"measurement"``.
        about: Spec, tokens, closure, versions.
    """

    x: Axis
    y: Axis
    values: Mapping[str, NDArray[Any]]
    status: Mapping[str, NDArray[np.str_]]
    source: str
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become ``None``."""
        return {
            "schema": 1,
            "source": self.source,
            "axes": {axis.name: axis.values.tolist() for axis in (self.y, self.x)},
            "values": {name: _plain(array) for name, array in self.values.items()},
            "errors": {name: _plain(array) for name, array in self.errors.items()},
            "status": {name: array.tolist() for name, array in self.status.items()},
            "about": dict(self.about),
        }

    def to_json(self) -> str:
        """Return the diagram as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_dataset(self) -> xarray.Dataset:
        """Return an ``xarray.Dataset`` with the axes as coordinates.

        Raises:
            MissingExtraError: if xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise MissingExtraError("xarray", "grid") from None
        axes = (self.y.name, self.x.name)
        columns: dict[str, Any] = {name: (axes, array) for name, array in self.values.items()}
        columns |= {f"{name}_error": (axes, array) for name, array in self.errors.items()}
        columns |= {f"{name}_status": (axes, array.astype(str)) for name, array in self.status.items()}
        attributes = {"schema": 1, "source": self.source, "about": json.dumps(dict(self.about))}
        return xarray.Dataset(columns, {axis.name: axis.values for axis in (self.y, self.x)}, attributes)

    def save(self, path: str | Path) -> Path:
        """Write netCDF-4, by a temporary file and a rename; return the path.

        Raises:
            MissingExtraError: if xarray, h5netcdf or h5py is not installed.
        """
        target = Path(path)
        dataset = self.to_dataset()
        for package in ("h5netcdf", "h5py"):
            if find_spec(package) is None:
                raise MissingExtraError(package, "grid")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            dataset.to_netcdf(temporary, engine="h5netcdf")
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return target


def _plain(array: NDArray[Any]) -> Any:
    if array.dtype.kind != "f":
        return array.tolist()
    return [[value if np.isfinite(value) else None for value in row] for row in array.tolist()]
