"""Maps measured on stacks of networks against the theory's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fathometer.diagrams import MEASURED, diagram, measured_diagram
from fathometer.errors import DomainError, SpecError
from fathometer.spec import LayerNorm, Scales, Transformer, with_field

SCALES = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)


def architecture(d_model: int, n_layers: int = 4) -> Transformer:
    spec = Transformer.uniform(
        n_layers=n_layers, d_model=d_model, n_heads=1, norm=LayerNorm(), activation="tanh", scales=SCALES
    )
    return with_field(spec, "attention.residual_strength", 0.35)


def test_maps_agree_within_their_errors() -> None:
    x, y = ("mlp_in", [1.0, 3.0, 6.0]), ("mlp.residual_strength", [0.2, 0.7])
    spec = architecture(96)
    for name in MEASURED:
        seen = measured_diagram(spec, x=x, y=y, observable=name, n_tokens=16, seeds=6)
        theory = diagram(spec, x=x, y=y, observable=name, n_tokens=16).values[name]
        allowance = 0.25 * 8 / 96 * (1 if name in ("q", "cosine") else 1 / 4)  # of sublayers / width, per block
        assert np.all(np.abs(seen.values[name] - theory) < 4.5 * seen.errors[name] + allowance), name
        assert seen.source == "measurement" and set(seen.status[name].ravel()) == {"ok"}
        swapped = theory[::-1]
        assert not np.all(np.abs(seen.values[name] - swapped) < 4.5 * seen.errors[name] + allowance), name


def test_parts_of_a_grid_do_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from fathometer.diagrams import measured

    x, y = ("mlp_in", [1.0, 3.0]), ("mlp.residual_strength", [0.2, 0.7])
    calls: list[int] = []
    whole = measured_diagram(architecture(16), x=x, y=y, n_tokens=8, seeds=2)
    monkeypatch.setattr(measured, "_WEIGHTS", 1)
    parts = measured_diagram(
        architecture(16), x=x, y=y, n_tokens=8, seeds=2, progress=lambda label, done, total: calls.append(done)
    )
    assert calls == [1, 2, 3, 4]
    assert np.all(np.abs(whole.values["angle_exponent"] - parts.values["angle_exponent"]) < 1)


def test_angle_exponents_at_24_points_to_a_hundredth() -> None:
    x = ("mlp_in", np.linspace(1.0, 6.0, 6))
    y = ("mlp.residual_strength", np.array([0.1, 0.3, 0.5, 0.7]))
    spec = architecture(256)
    seen = measured_diagram(spec, x=x, y=y, n_tokens=32, seeds=12).values["angle_exponent"]
    theory = diagram(spec, x=x, y=y, n_tokens=32).values["angle_exponent"]
    assert np.sqrt(np.mean((seen - theory) ** 2)) <= 0.01


def test_bad_input() -> None:
    x, y = ("mlp_in", [1.0]), ("mlp.residual_strength", [0.2])
    with pytest.raises(SpecError, match="a measured diagram has no observable 'phase'"):
        measured_diagram(architecture(16), x=x, y=y, observable="phase")
    with pytest.raises(DomainError, match="seeds must be a positive integer; got 0"):
        measured_diagram(architecture(16), x=x, y=y, seeds=0)
    with pytest.raises(DomainError, match="d_model >= n_tokens"):
        measured_diagram(architecture(16), x=x, y=y, observable="q", n_tokens=32)
    plain = replace(architecture(16)).map_sublayers(lambda s: replace(s, skip_scale=1.0, branch_scale=1.0))
    with pytest.raises(DomainError, match="give the second moment q"):
        measured_diagram(plain, x=x, y=("query", [1.0]), observable="q")
