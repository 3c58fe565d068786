"""Fathometer: a depth sounder for transformers.

Describe an architecture or hand over a real model; predict, measure and compare how tokens travel down it and
gradients back; learn whether it will train, why not, and what to change.

    import fathometer as fm
    report = fm.diagnose(model, batch)

Names load on first use: importing this package imports neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fathometer._version import __version__

if TYPE_CHECKING:
    from fathometer.attention import Annealed, Exact, RandomEnergy, Uniform, UniformLargeN
    from fathometer.diagnosis import Report, Thresholds, diagnose
    from fathometer.diagrams import Diagram, diagram, measured_diagram
    from fathometer.errors import BatchError, DomainError, FathometerError, ModelError, NotCoveredError, SpecError
    from fathometer.measurement import load_batch, measure, measure_exponents
    from fathometer.models import equiangular_tokens, load_model, reference_network
    from fathometer.observables import exponents, fixed_points, gradient_exponent, growth, predict
    from fathometer.prescription import critical_line, solve_field
    from fathometer.report import save_report
    from fathometer.results import Profile
    from fathometer.spec import (
        MLP,
        Block,
        Derf,
        DyT,
        GatedMLP,
        LayerNorm,
        Pointwise,
        PointwiseNorm,
        RMSNorm,
        Scales,
        SelfAttention,
        Sublayer,
        Transformer,
        load,
        preset,
        with_field,
    )

_HOMES = {
    "fathometer.attention": ("Annealed", "Exact", "RandomEnergy", "Uniform", "UniformLargeN"),
    "fathometer.diagnosis": ("Report", "Thresholds", "diagnose"),
    "fathometer.diagrams": ("Diagram", "diagram", "measured_diagram"),
    "fathometer.errors": ("BatchError", "DomainError", "FathometerError", "ModelError", "NotCoveredError", "SpecError"),
    "fathometer.measurement": ("load_batch", "measure", "measure_exponents"),
    "fathometer.models": ("equiangular_tokens", "load_model", "reference_network"),
    "fathometer.observables": ("exponents", "fixed_points", "gradient_exponent", "growth", "predict"),
    "fathometer.prescription": ("critical_line", "solve_field"),
    "fathometer.report": ("save_report",),
    "fathometer.results": ("Profile",),
    "fathometer.spec": (
        "MLP",
        "Block",
        "Derf",
        "DyT",
        "GatedMLP",
        "LayerNorm",
        "Pointwise",
        "PointwiseNorm",
        "RMSNorm",
        "Scales",
        "SelfAttention",
        "Sublayer",
        "Transformer",
        "load",
        "preset",
        "with_field",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MLP",
    "Annealed",
    "BatchError",
    "Block",
    "Derf",
    "Diagram",
    "DomainError",
    "DyT",
    "Exact",
    "FathometerError",
    "GatedMLP",
    "LayerNorm",
    "ModelError",
    "NotCoveredError",
    "Pointwise",
    "PointwiseNorm",
    "Profile",
    "RMSNorm",
    "RandomEnergy",
    "Report",
    "Scales",
    "SelfAttention",
    "SpecError",
    "Sublayer",
    "Thresholds",
    "Transformer",
    "Uniform",
    "UniformLargeN",
    "__version__",
    "critical_line",
    "diagnose",
    "diagram",
    "equiangular_tokens",
    "exponents",
    "fixed_points",
    "gradient_exponent",
    "growth",
    "load",
    "load_batch",
    "load_model",
    "measure",
    "measure_exponents",
    "measured_diagram",
    "predict",
    "preset",
    "reference_network",
    "save_report",
    "solve_field",
    "with_field",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fathometer' has no attribute {name!r}")
    home = _HOME_OF[name]
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            from fathometer.errors import MissingExtraError

            raise MissingExtraError("torch", "torch") from None
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
