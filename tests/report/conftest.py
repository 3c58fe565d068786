"""Reports made from predictions and seeded noise: fast, and without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathometer.diagnosis.comparison import compare
from fathometer.diagnosis.criteria import CRITERIA
from fathometer.diagnosis.report import Finding, Remedy, Report
from fathometer.diagnosis.thresholds import DEFAULT_THRESHOLDS
from fathometer.observables import predict
from fathometer.results import Profile
from fathometer.spec import LayerNorm, Norm, Scales, Transformer, to_dict

SCALES = Scales(query=0.4, key=0.4, value=0.7, output=0.5, mlp_in=1.0, mlp_out=0.5)
REMEDY = Remedy(
    title="Scale what branches write to the stream by 0.144",
    cures=("signal_growth", "exploding_gradients"),
    before={"gradient amplification": 3.1e6, "final cosine": 0.91},
    after={"gradient amplification": 4.8, "final cosine": 0.62},
    snippet="with torch.no_grad():\n    for block in model.h:\n        block.mlp.c_proj.weight.mul_(0.144)",
    factor=0.144,
)


def make_report(
    *,
    n_layers: int = 24,
    norm: Norm | None = None,
    scales: Scales = SCALES,
    name: str = "made up",
    covered: bool = True,
    **changes: Any,
) -> Report:
    """Return a report on a uniform transformer, its measurement being the prediction with noise."""
    spec = Transformer.uniform(n_layers=n_layers, d_model=256, n_heads=4, norm=norm, scales=scales)
    theory = predict(spec, n_tokens=64, q=0.3, p=0.05)
    measured = noisy(theory)
    findings = []
    for criterion in CRITERIA:
        evidence = criterion.test(measured.curves, DEFAULT_THRESHOLDS, None)
        if evidence is not None:
            predicted = criterion.test(theory.curves, DEFAULT_THRESHOLDS, None) is not None
            findings.append(
                Finding(
                    name=criterion.name,
                    title=criterion.title,
                    evidence=evidence,
                    agreement=0.75,
                    predicted=predicted if covered else None,
                )
            )
    report = Report(
        name=name,
        measured=measured,
        predicted=theory if covered else None,
        not_covered=None if covered else "block 0: attention and MLP read the same tensor in parallel",
        comparison=compare(measured, theory, width=256) if covered else None,
        findings=tuple(findings),
        remedies=(REMEDY,) if findings else (),
        about={
            "n_tokens": 64,
            "samples": 2,
            "d_model": 256,
            "weight_draws": 4,
            "cotangents": 1,
            "seed": 0,
            "batch": "2 x 64 Gaussian tokens",
            "blocks": "h",
            "n_layers": n_layers,
            "closure": "annealed",
            "spec": to_dict(spec) if covered else None,
            "other_stacks": [],
            "notes": ["a remark"],
            "thresholds": {key: float(value) for key, value in vars(DEFAULT_THRESHOLDS).items()},
            "versions": {"fathometer": "0.1.0", "python": "3.11.2"},
        },
    )
    return replace(report, **changes)


def noisy(theory: Profile) -> Profile:
    """Return the theory's curves with one standard error of noise, growing with depth, and those errors."""
    rng = np.random.default_rng(0)
    curves, errors = {}, {}
    for name, curve in theory.curves.items():
        size = 0.03 * np.linspace(0.2, 1.0, len(curve)) * (1.0 if name.endswith("_log") else np.abs(curve))
        if name in ("cosine", "attention_entropy_relative"):
            size = size * (1 - np.clip(curve, 0, 1))
        errors[name] = size
        curves[name] = curve + size * rng.standard_normal(len(curve))
    return Profile(source="measurement", curves=curves, errors=errors, about={"weight_draws": 4})


@pytest.fixture(scope="session")
def healthy() -> Report:
    """A pre-norm transformer of 24 blocks."""
    return make_report(norm=LayerNorm(), name="healthy one")


@pytest.fixture(scope="session")
def broken() -> Report:
    """A transformer without norms whose signal explodes."""
    return make_report(n_layers=40, scales=replace(SCALES, value=1.6, output=1.2, mlp_out=1.4), name="broken one")


@pytest.fixture(scope="session")
def uncovered() -> Report:
    """A model the theory has no map for."""
    return make_report(norm=LayerNorm(), covered=False, name="uncovered one")


@pytest.fixture
def make() -> Callable[..., Report]:
    """The maker itself."""
    return make_report
