"""Measuring signal propagation on real models."""

from fathometer.measurement.batches import Batch, as_batch, load_batch
from fathometer.measurement.exponents import MeasuredExponents, measure_exponents
from fathometer.measurement.measure import Measurement, measure, observe

__all__ = [
    "Batch",
    "MeasuredExponents",
    "Measurement",
    "as_batch",
    "load_batch",
    "measure",
    "measure_exponents",
    "observe",
]
