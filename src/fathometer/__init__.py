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
    from fathometer.application import emit, initialize, parameter_groups, read_encoder_decoder, write_spec
    from fathometer.attention import Annealed, Exact, RandomEnergy, Uniform, UniformLargeN
    from fathometer.diagnosis import Report, Thresholds, diagnose
    from fathometer.diagrams import Diagram, diagram, measured_diagram
    from fathometer.errors import BatchError, DomainError, FathometerError, ModelError, NotCoveredError, SpecError
    from fathometer.measurement import (
        load_batch,
        measure,
        measure_exponents,
        measure_moments,
        measure_tangent_kernel,
        tangent_slopes,
    )
    from fathometer.models import (
        equiangular_tokens,
        load_model,
        parameter_roles,
        reference_encoder_decoder,
        reference_network,
    )
    from fathometer.observables import (
        corpus_overlap,
        encoder_decoder_tangent_kernel,
        exponents,
        fixed_points,
        gradient_exponent,
        growth,
        moments,
        predict,
        predict_encoder_decoder,
        tangent_kernel,
        zipf_overlap,
    )
    from fathometer.prescription import apply_scheme, compare_schemes, critical_line, solve_field
    from fathometer.report import save_report
    from fathometer.results import ModelMoments, Profile
    from fathometer.spec import (
        MLP,
        Block,
        CrossAttention,
        Derf,
        DyT,
        EncoderDecoder,
        GatedMLP,
        Head,
        LayerNorm,
        Network,
        PatchStem,
        Pointwise,
        PointwiseNorm,
        RMSNorm,
        Scales,
        SelfAttention,
        Sublayer,
        TokenStem,
        Transformer,
        load,
        load_encoder_decoder,
        preset,
        with_field,
    )
    from fathometer.training import coordinate_check, train_language_model, transfer_check

_HOMES = {
    "fathometer.application": (
        "emit",
        "initialize",
        "parameter_groups",
        "read_encoder_decoder",
        "write_spec",
    ),
    "fathometer.attention": (
        "Annealed",
        "Exact",
        "RandomEnergy",
        "Uniform",
        "UniformLargeN",
    ),
    "fathometer.diagnosis": (
        "Report",
        "Thresholds",
        "diagnose",
    ),
    "fathometer.diagrams": (
        "Diagram",
        "diagram",
        "measured_diagram",
    ),
    "fathometer.errors": (
        "BatchError",
        "DomainError",
        "FathometerError",
        "ModelError",
        "NotCoveredError",
        "SpecError",
    ),
    "fathometer.measurement": (
        "load_batch",
        "measure",
        "measure_exponents",
        "measure_moments",
        "measure_tangent_kernel",
        "tangent_slopes",
    ),
    "fathometer.models": (
        "equiangular_tokens",
        "load_model",
        "parameter_roles",
        "reference_encoder_decoder",
        "reference_network",
    ),
    "fathometer.observables": (
        "corpus_overlap",
        "encoder_decoder_tangent_kernel",
        "exponents",
        "fixed_points",
        "gradient_exponent",
        "growth",
        "moments",
        "predict",
        "predict_encoder_decoder",
        "tangent_kernel",
        "zipf_overlap",
    ),
    "fathometer.prescription": (
        "apply_scheme",
        "compare_schemes",
        "critical_line",
        "solve_field",
    ),
    "fathometer.report": ("save_report",),
    "fathometer.results": (
        "ModelMoments",
        "Profile",
    ),
    "fathometer.spec": (
        "Block",
        "CrossAttention",
        "Derf",
        "DyT",
        "EncoderDecoder",
        "GatedMLP",
        "Head",
        "LayerNorm",
        "MLP",
        "Network",
        "PatchStem",
        "Pointwise",
        "PointwiseNorm",
        "RMSNorm",
        "Scales",
        "SelfAttention",
        "Sublayer",
        "TokenStem",
        "Transformer",
        "load",
        "load_encoder_decoder",
        "preset",
        "with_field",
    ),
    "fathometer.training": (
        "coordinate_check",
        "train_language_model",
        "transfer_check",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MLP",
    "Annealed",
    "BatchError",
    "Block",
    "CrossAttention",
    "Derf",
    "Diagram",
    "DomainError",
    "DyT",
    "EncoderDecoder",
    "Exact",
    "FathometerError",
    "GatedMLP",
    "Head",
    "LayerNorm",
    "ModelError",
    "ModelMoments",
    "Network",
    "NotCoveredError",
    "PatchStem",
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
    "TokenStem",
    "Transformer",
    "Uniform",
    "UniformLargeN",
    "__version__",
    "apply_scheme",
    "compare_schemes",
    "coordinate_check",
    "corpus_overlap",
    "critical_line",
    "diagnose",
    "diagram",
    "emit",
    "encoder_decoder_tangent_kernel",
    "equiangular_tokens",
    "exponents",
    "fixed_points",
    "gradient_exponent",
    "growth",
    "initialize",
    "load",
    "load_batch",
    "load_encoder_decoder",
    "load_model",
    "measure",
    "measure_exponents",
    "measure_moments",
    "measure_tangent_kernel",
    "measured_diagram",
    "moments",
    "parameter_groups",
    "parameter_roles",
    "predict",
    "predict_encoder_decoder",
    "preset",
    "read_encoder_decoder",
    "reference_encoder_decoder",
    "reference_network",
    "save_report",
    "solve_field",
    "tangent_kernel",
    "tangent_slopes",
    "train_language_model",
    "transfer_check",
    "with_field",
    "write_spec",
    "zipf_overlap",
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
