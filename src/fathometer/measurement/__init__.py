"""Measuring signal propagation on real models."""

from fathometer.measurement.batches import Batch, as_batch, load_batch
from fathometer.measurement.exponents import MeasuredExponents, measure_exponents
from fathometer.measurement.measure import Measurement, measure, observe
from fathometer.measurement.moments import measure_moments
from fathometer.measurement.tangent import MeasuredTangentKernel, measure_tangent_kernel
from fathometer.measurement.tangent_slopes import TangentSlopes, tangent_slopes
from fathometer.measurement.weight_gradients import MeasuredWeightGradients, measure_weight_gradients

__all__ = [
    "Batch",
    "MeasuredExponents",
    "MeasuredTangentKernel",
    "MeasuredWeightGradients",
    "Measurement",
    "TangentSlopes",
    "as_batch",
    "load_batch",
    "measure",
    "measure_exponents",
    "measure_moments",
    "measure_tangent_kernel",
    "measure_weight_gradients",
    "observe",
    "tangent_slopes",
]
