"""Measuring signal propagation on real models."""

from fathometer.measurement.batches import Batch, as_batch, load_batch
from fathometer.measurement.exponents import MeasuredExponents, measure_exponents
from fathometer.measurement.measure import Measurement, measure, observe
from fathometer.measurement.weight_gradients import MeasuredWeightGradients, measure_weight_gradients

__all__ = [
    "Batch",
    "MeasuredExponents",
    "MeasuredWeightGradients",
    "Measurement",
    "as_batch",
    "load_batch",
    "measure",
    "measure_exponents",
    "measure_weight_gradients",
    "observe",
]
