"""Which axis a set of curves needs, and the numbers that go onto it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from fathometer.plotting.subject import Subject
from fathometer.results import Profile

FloatArray = NDArray[np.float64]

#: Largest over smallest value from which an axis is logarithmic.
LOG_RANGE = 30.0
_LARGEST_EXPONENT = 600.0


class Scale(Enum):
    """How numbers are put on an axis."""

    LINEAR = "linear"
    LOG = "log"
    #: The axis carries log10 of numbers too large for a float.
    EXPONENT = "exponent"


@dataclass(frozen=True)
class Series:
    """A curve ready to draw: values, and the ends of one standard error either way; ``only`` picks layers, in order."""

    values: FloatArray
    low: FloatArray
    high: FloatArray
    only: NDArray[np.int64] | None = None

    @property
    def layers(self) -> NDArray[np.int64]:
        """The layers that are drawn."""
        return np.arange(len(self.values)) if self.only is None else self.only


def series(profile: Profile, name: str, scale: Scale) -> Series:
    """Return a curve in the numbers of the axis; the error of a ``_log`` curve is a factor either way."""
    values = np.asarray(profile.curves[name], dtype=np.float64)
    errors = np.asarray(profile.errors.get(name, np.zeros_like(values)), dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        bounds = [values, values - errors, values + errors]
        if name.endswith("_log") and scale is Scale.EXPONENT:
            bounds = [np.asarray(bound / math.log(10)) for bound in bounds]
        elif name.endswith("_log"):
            bounds = [np.exp(bound) for bound in bounds]
    return Series(bounds[0], bounds[1], bounds[2])


def scale_for(subject: Subject, names: Sequence[str]) -> Scale:
    """Choose the axis for these curves of the subject: logarithmic where they span more than a factor of 30.

    Only curves that are positive everywhere count. Should another curve share a logarithmic axis, its values that are
    not positive are left out, and the panel says so.
    """
    logs = []
    for profile in subject.profiles:
        for name in names:
            if name in profile.curves:
                curve = np.asarray(profile.curves[name], dtype=np.float64)
                curve = curve[np.isfinite(curve)]
                if name.endswith("_log"):
                    logs.append(curve)
                elif np.all(curve > 0):
                    logs.append(np.log(curve))
    everything = np.concatenate(logs) if logs else np.zeros(0)
    if everything.size == 0:
        return Scale.LINEAR
    if max(abs(everything.max()), abs(everything.min())) > _LARGEST_EXPONENT and any(n.endswith("_log") for n in names):
        return Scale.EXPONENT
    return Scale.LOG if everything.max() - everything.min() > math.log(LOG_RANGE) else Scale.LINEAR
