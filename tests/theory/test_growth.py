"""Growth classes and solvers: closed-form constants against long recursions, and a wrong constant that fails."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fathometer as fm
from fathometer.attention import Uniform
from fathometer.errors import DomainError, SpecError
from fathometer.observables import backward, forward
from fathometer.observables.growth import closed_form, growth
from fathometer.prescription import NoRootError, solve_field
from fathometer.propagation import propagate


def _vit(norm: object, n_layers: int = 1, d_model: int = 768, activation: str = "relu") -> fm.Transformer:
    return fm.Transformer.uniform(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=4,
        norm=norm,  # type: ignore[arg-type]
        activation=activation,
        scales=fm.Scales.from_std(0.02, d_model=d_model, d_mlp=4 * d_model),
    )


@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 16.07), (1.0, 4.018), (2.0, 1.004)])
def test_stretched_exponential_constant(alpha: float, lam: float) -> None:
    """ln J against sqrt(l): the slope over the last half of 2e4 blocks is 1/sqrt(lambda_n)."""
    spec = _vit(fm.Derf(alpha=alpha))
    constants = closed_form(spec.blocks[-1], 196)
    assert constants["lambda_infinite"] == pytest.approx(lam, rel=1e-3)
    assert constants["cosine"] == pytest.approx(0.65983, abs=1e-5)
    depth = 20_000
    trajectory = propagate(spec.with_depth(depth), n_tokens=196, q=0.27, p=0.11, closure=Uniform())
    logs = forward(trajectory.transfer, trajectory.n_others).log_norm[trajectory.borders]
    slope = (logs[depth] - logs[depth // 2]) / (math.sqrt(depth) - math.sqrt(depth // 2))
    assert slope == pytest.approx(1 / math.sqrt(constants["lambda"]), rel=4e-3)
    assert slope != pytest.approx(1 / math.sqrt(2 * constants["lambda"]), rel=0.1)


@pytest.mark.parametrize(("activation", "d_model"), [("relu", 768), ("gelu", 768), ("tanh", 768), ("relu", 1024)])
def test_power_law_exponent(activation: str, d_model: int) -> None:
    """The local exponent, extrapolated in the distance of the cosine from its limit, is zeta."""
    spec = _vit(fm.LayerNorm(), d_model=d_model, activation=activation)
    constants = closed_form(spec.blocks[-1])
    n_tokens, depth = 10**9, 20_000
    trajectory = propagate(spec.with_depth(depth), n_tokens=n_tokens, q=1.0, p=0.4, closure=Uniform())
    at = trajectory.borders
    logs = backward(trajectory.transfer).log_norm[at]
    levels, cosine = trajectory.q[at], (trajectory.p / trajectory.q)[at]
    points = np.unique(np.geomspace(50, depth, 24).astype(int))
    middle = (points[1:] + points[:-1]) // 2
    local = -np.diff(logs[points]) / np.diff(np.log(levels[points]))
    gap = np.sqrt(np.abs(constants["cosine"] - cosine[middle]))
    fitted = float(np.polyfit(gap[-14:], local[-14:], 3)[-1])
    assert fitted == pytest.approx(constants["zeta"], abs=0.02)
    assert fitted != pytest.approx(1.2 * constants["zeta"], abs=0.02)
    if activation == "relu":
        assert constants["zeta"] == pytest.approx(2 / 3, abs=1e-12)


def test_classes() -> None:
    kinds = {
        "critical": _vit(fm.RMSNorm()),
        "subcritical": _vit(fm.DyT(alpha=1.0)),
        "chaotic": _vit(None),
    }
    for kind, spec in kinds.items():
        found = growth(spec, n_tokens=64, q=1.0, p=0.4, depth=300 if kind == "chaotic" else 2000)
        assert found.kind == kind
        assert kind in found.sentence
    ordered = fm.Transformer.uniform(
        n_layers=1,
        d_model=64,
        n_heads=1,
        norm=None,
        activation="tanh",
        scales=fm.Scales(query=0.1, key=0.1, value=0.1, output=0.1, mlp_in=0.3, mlp_out=0.3),
        skip_scale=0.9,
    )
    found = growth(ordered, n_tokens=64, q=1.0, p=0.4, depth=300)
    assert found.kind == "ordered" and found.constants["chi"] < 1


@pytest.mark.parametrize(("depth", "alpha"), [(12, 1.33), (24, 1.00), (64, 0.66), (128, 0.49)])
def test_alpha_that_matches_layer_norm(depth: int, alpha: float) -> None:
    spec = _vit(fm.Derf(alpha=1.0), n_layers=depth)
    found = solve_field(spec, "alpha", target="gradient", n_tokens=196, q=0.27, p=0.11)
    assert found.status == "ok"
    assert found.value == pytest.approx(alpha, abs=6e-3)
    solved = fm.predict(fm.with_field(spec, "alpha", found.value), n_tokens=196, q=0.27, p=0.11)
    norm = fm.predict(_vit(fm.LayerNorm(), n_layers=depth), n_tokens=196, q=0.27, p=0.11)
    assert solved.apjn_log[0] == pytest.approx(norm.apjn_log[0], abs=1e-9)


def test_branch_scale_and_bounds() -> None:
    spec = _vit(fm.Derf(alpha=2.0), n_layers=64)
    found = solve_field(spec, "branch_scale", target="pooled", bound=10.0, n_tokens=196, q=0.27, p=0.11)
    assert math.exp(found.reached) == pytest.approx(10.0, rel=1e-9)
    with pytest.raises(NoRootError, match=r"no alpha in \[0.001, 0.1\] gives ln gradient = 11.5"):
        solve_field(spec, "alpha", target="gradient", bound=1e5, high=0.1, n_tokens=196, q=0.27, p=0.11)
    missed = solve_field(
        spec, "alpha", target="gradient", bound=1e5, high=0.1, n_tokens=196, q=0.27, p=0.11, collect=True
    )
    assert missed.status == "no root"
    with pytest.raises(SpecError, match="target 'J' is unknown"):
        solve_field(spec, "alpha", target="J", n_tokens=196, q=0.27, p=0.11)
    with pytest.raises(DomainError, match="bound must be positive"):
        solve_field(spec, "alpha", target="gradient", bound=-1.0, n_tokens=196, q=0.27, p=0.11)


@pytest.mark.parametrize("norm", [fm.LayerNorm, fm.RMSNorm])
def test_a_norm_gain_is_a_scale_of_what_reads_it(norm: type) -> None:
    _same_constants(norm(gain=2.0), norm())


@pytest.mark.parametrize("norm", [fm.DyT, fm.Derf])
def test_the_gain_of_a_saturating_norm_too(norm: type) -> None:
    _same_constants(norm(alpha=0.7, gain=2.0), norm(alpha=0.7))


def _same_constants(gained: object, plain: object) -> None:
    def constants(norm: object, scale: float) -> dict[str, float]:
        scales = fm.Scales(query=0.1, key=0.1, value=scale, output=0.7, mlp_in=scale, mlp_out=0.9)
        spec = fm.Transformer.uniform(
            n_layers=1,
            d_model=64,
            n_heads=1,
            norm=norm,
            activation="gelu",
            scales=scales,  # type: ignore[arg-type]
        )
        return closed_form(spec.blocks[-1], 50)

    assert constants(gained, 1.0) == pytest.approx(constants(plain, 2.0), rel=1e-12)
    assert constants(gained, 1.0) != pytest.approx(constants(plain, 1.0), rel=1e-2)


def test_biases_have_no_closed_form() -> None:
    spec = _vit(fm.LayerNorm())
    assert closed_form(fm.with_field(spec, "out_bias", 0.5).blocks[-1]) == {}
