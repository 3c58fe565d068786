"""Measuring signal propagation on real models."""

from fathometer.measurement.batches import Batch, as_batch, load_batch
from fathometer.measurement.measure import Measurement, measure, observe

__all__ = ["Batch", "Measurement", "as_batch", "load_batch", "measure", "observe"]
