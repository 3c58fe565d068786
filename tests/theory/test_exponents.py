"""Fixed points, phases and exponents: worked numbers, exact identities, and edges of chaos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fathometer.attention import AlongCosine, Annealed, Exact, UniformLargeN, along_cosine
from fathometer.errors import DomainError, SpecError
from fathometer.kernels import activation_kernel
from fathometer.observables import (
    angle_rate,
    equal_token_gradients,
    exponents,
    fixed_points,
    gradient_exponent,
    growth,
    last_block,
    power_laws,
    predict,
    stable_state,
)
from fathometer.prescription import NoRootError, critical_line, edge_of_chaos
from fathometer.propagation import Moments, propagate_ends
from fathometer.spec import Derf, LayerNorm, Norm, Scales, Sublayer, Transformer, preset, with_field

ROOT_EIGHTH = 8**-0.5
MANY: dict[str, Any] = {"n_tokens": 10**12, "closure": UniformLargeN()}


def network(
    attention: Any, mlp: Any, width: Any, *, activation: str = "tanh", n_layers: int = 16, coupling: float = 1.0
) -> Transformer:
    """Return LayerNorm blocks with norm-preserving residuals."""
    scales = Scales(query=coupling, key=1.0, value=1.0, output=1.0, mlp_in=width, mlp_out=1.0)
    spec = Transformer.uniform(
        n_layers=n_layers, d_model=256, n_heads=1, norm=LayerNorm(), activation=activation, scales=scales
    )
    return with_field(with_field(spec, "attention.residual_strength", attention), "mlp.residual_strength", mlp)


@pytest.mark.parametrize(
    ("setting", "phase", "cosine", "q"),
    [
        ((ROOT_EIGHTH, ROOT_EIGHTH, 2.0), "collapsed", 1.0, 0.80547266),
        ((ROOT_EIGHTH, ROOT_EIGHTH, 8.0), "simplex", 0.85357, 0.87881),
        ((0.3, 0.8, 2.0), "simplex", 0.26946, 0.61763),
        ((0.1, 0.8, 2.0), "orthogonal", 0.0, None),
    ],
)
def test_stable_states(setting: tuple[float, ...], phase: str, cosine: float, q: float | None) -> None:
    spec = network(*setting)
    found = stable_state(spec, **MANY)
    assert str(found.phase) == phase
    assert float(found.cosine) == pytest.approx(cosine, abs=6e-6)
    if q is not None:
        assert float(found.q) == pytest.approx(q, abs=6e-6)
    attracting = [point for point in fixed_points(spec, **MANY) if point.is_stable]
    assert [point.kind for point in attracting] == [phase]
    assert attracting[0].cosine == pytest.approx(float(found.cosine), abs=1e-6)


def test_every_stable_state_attracts_a_long_run() -> None:
    widths, strengths = np.array([1.0, 3.0, 8.0])[:, None], np.array([0.2, 0.6, 0.9])
    grid = network(0.3, strengths, widths)
    found = stable_state(grid, n_tokens=128, closure="annealed")
    long = propagate_ends(grid.with_depth(3000), n_tokens=128, q=0.9, p=0.3, closure=Annealed())
    np.testing.assert_allclose(found.cosine, long.p / long.q, atol=2e-7)
    np.testing.assert_allclose(found.q, long.q, rtol=2e-7)
    assert set(found.phase.ravel()) == {"collapsed", "simplex", "orthogonal"}


def test_the_norm_rate_and_the_angle_rate_are_the_eigenvalues_at_collapse() -> None:
    norm, angle = fixed_points(network(0.3, 0.5, 2.0), n_tokens=64)[-1].rates
    assert norm == pytest.approx((1 - 0.09) * (1 - 0.25), abs=1e-9)
    assert angle == pytest.approx(float(np.exp(exponents(network(0.3, 0.5, 2.0), n_tokens=64).angle)), abs=1e-12)


def closed_angle_exponent(attention: float, mlp: float, width: float, activation: str) -> float:
    kernel = activation_kernel(activation)
    z = width**2
    kappa0, kappa1 = float(kernel.overlap(z, z, z)), z * float(kernel.slope_overlap(z, z, z))
    a, m = attention**2, mlp**2
    total = 1 - (1 - a) * (1 - m)
    return float(np.log((1 - a) * (1 - m + m * kappa1 * total / (a + (1 - a) * m * kappa0))))


@pytest.mark.parametrize("activation", ["tanh", "erf", "relu", "gelu", "silu"])
def test_angle_exponent_closed_form_and_finite_differences(activation: str) -> None:
    rng = np.random.default_rng(3)
    for attention, mlp, width in rng.uniform([0.1, 0.1, 0.5], [0.8, 0.9, 6.0], size=(6, 3)):
        spec = network(attention, mlp, width, activation=activation)
        found = exponents(spec, n_tokens=50)
        assert float(found.angle) == pytest.approx(closed_angle_exponent(attention, mlp, width, activation), abs=1e-12)
        if activation == "relu":  # its kink makes 1 - c' non-analytic: an extra (1 - c)^{3/2}
            continue
        block, q = last_block(spec, 50, Annealed()), float(found.q)
        slopes = []
        for step in (8e-5, 4e-5, 2e-5):
            after = block.forward(Moments(q, q * (1 - step)))
            slopes.append(float((1 - after.p / after.q) / step))
        coarse, fine = 2 * slopes[1] - slopes[0], 2 * slopes[2] - slopes[1]
        assert float(np.log((4 * fine - coarse) / 3)) == pytest.approx(float(found.angle), abs=1e-8)


def test_token_exponent_is_the_angle_exponent_and_the_coherent_identity() -> None:
    for activation in ("tanh", "erf", "gelu"):
        kernel = activation_kernel(activation)
        for attention, mlp, width in ((0.3, 0.8, 2.0), (0.6, 0.2, 5.0), (0.2, 0.4, 1.0)):
            found = exponents(network(attention, mlp, width, activation=activation), n_tokens=37)
            assert abs(float(found.token - found.angle)) < 1e-10
            z = width**2
            gap = z * float(kernel.slope_overlap(z, z, z)) - float(kernel.overlap(z, z, z))
            assert float(np.exp(found.coherent)) == pytest.approx(1 + mlp**2 * gap / float(found.q), abs=1e-10)


def test_exponents_at_an_interior_state_match_their_closed_forms() -> None:
    a, m, z = 0.09, 0.64, 4.0
    found = exponents(network(0.3, 0.8, 2.0), **MANY, state="stable")
    q, c, kernel = float(found.q), float(found.cosine), activation_kernel("tanh")
    q_a, p_a = (1 - a) * q + a * c, (1 - a) * q * c + a * c
    slopes = [z * float(kernel.slope_overlap(z, z, z * x)) for x in (1.0, p_a / q_a)]
    assert float(found.token) == pytest.approx(np.log((1 - a) * (1 - m + m * slopes[0] / q_a)), abs=1e-9)
    assert float(found.coherent) == pytest.approx(np.log(1 - a + a / q) + np.log(1 - m + m * slopes[1] / q_a), abs=1e-9)
    assert float(exponents(network(0.1, 0.8, 2.0), **MANY, state="stable").coherent) < 0  # why orthogonal attracts


def test_finite_depth_at_collapse_is_a_sum_of_two_modes() -> None:
    n_tokens, n_layers = 256, 40
    spec = network(0.3, 0.5, 2.0, n_layers=n_layers)
    found = exponents(spec, n_tokens=n_tokens)
    modes = [float(np.exp(n_layers * x)) for x in (found.token, found.coherent)]
    total = (1 - 1 / n_tokens) * modes[0] + modes[1] / n_tokens
    assert float(gradient_exponent(spec, n_tokens=n_tokens, cosine=1.0)) == pytest.approx(
        np.log(total) / n_layers, abs=1e-12
    )
    assert float(gradient_exponent(spec, n_tokens=n_tokens, cosine=1.0, readout="pooled")) == pytest.approx(
        float(found.coherent), abs=1e-12
    )
    depth = float(found.crossover_depth)
    ends = [np.log(x) * depth / n_layers for x in modes]
    assert ends[1] - ends[0] == pytest.approx(np.log(n_tokens))
    token, coherent = equal_token_gradients(spec, n_tokens=n_tokens, q=float(found.q))
    np.testing.assert_allclose([token[0], coherent[0]], np.log(modes), atol=1e-11)


def test_gradient_exponent_edges() -> None:
    basic = Annealed(score_path=False)
    for strength, width in ((0.3, 3.07013), (0.5, 1.70069), (0.7, 1.20422)):
        spec = network(strength, strength, width, n_layers=64)
        assert abs(float(gradient_exponent(spec, n_tokens=256, cosine=0.99, closure=basic))) < 2e-6
    line = critical_line(
        network(0.3, 0.3, 1.0, n_layers=64),
        x="mlp_in",
        y=("residual_strength", [0.3, 0.5, 0.7]),
        low=0.3,
        high=80,
        n_tokens=256,
        observable="gradient_exponent",
        closure=basic,
    )
    np.testing.assert_allclose(line.x_values, [3.07013, 1.70069, 1.20422], atol=6e-6)


def test_edges_of_chaos() -> None:
    spec = network(0.1, 0.1, 2.0)
    strengths = [0.1, 0.3, ROOT_EIGHTH, 0.5, 0.7]
    line = critical_line(spec, x="mlp_in", y=("residual_strength", strengths), low=0.3, high=80, n_tokens=64)
    np.testing.assert_allclose(line.x_values, [3.39850775, 3.58391977, 3.67500637, 4.06534342, 5.31812777], atol=1e-7)
    assert np.all(np.abs(line.residual) < 1e-14) and set(line.status) == {"ok"} and set(line.crossings) == {1}
    attention = [0.1, 0.3, 0.5, 0.8]
    line = critical_line(
        spec, x="mlp.residual_strength", y=("attention.residual_strength", attention), low=0, high=1, n_tokens=64
    )
    np.testing.assert_allclose(line.x_values[:3], [0.16123682, 0.50452465, 0.92623503], atol=1e-7)
    assert list(line.status) == ["ok"] * 3 + ["negative"] and np.isnan(line.x_values[3])
    closed = edge_of_chaos(attention, mlp_in=2.0)
    np.testing.assert_allclose(closed[:3], line.x_values[:3], atol=1e-12)
    assert closed[3] > 1
    assert np.isinf(edge_of_chaos(0.3, mlp_in=2.0, activation="relu"))


def test_a_relu_network_has_no_edge() -> None:
    spec = network(0.1, 0.1, 2.0, activation="relu")
    with pytest.raises(NoRootError, match=r"vanishes nowhere for mlp_in in \[0.3, 80\]") as caught:
        critical_line(spec, x="mlp_in", y=("residual_strength", [0.3]), low=0.3, high=80, n_tokens=64)
    assert all(value < 0 for value in caught.value.values)
    angle = exponents(network(0.4, 0.5, np.array([0.5, 2.0, 9.0]), activation="relu"), n_tokens=64)
    np.testing.assert_allclose(angle.angle, np.log(1 - 0.16 / (0.16 + 0.84 * angle_level(angle.q))), atol=1e-12)


def angle_level(q: Any) -> Any:
    """Return q_A - a over 1 - a, from q = (1 - m) q_A + m kappa0 and kappa0 = kappa1 of ReLU."""
    kappa0 = np.array([0.5, 2.0, 9.0]) ** 2 / 2
    return ((q - 0.25 * kappa0) / 0.75 - 0.16) / 0.84


def test_plain_sums_have_power_laws() -> None:
    spec = preset("vit")
    with pytest.raises(DomainError, match="norm of the stream grows"):
        fixed_points(spec, n_tokens=64)
    found = exponents(spec, n_tokens=64)
    assert str(found.status) == "no fixed point" and np.isnan(found.angle)
    laws = power_laws(spec)
    long = spec.with_depth(40_000)
    profile = predict(long, n_tokens=64, q=1.0, p=1 - 1e-6)
    gap = np.log(1 - profile.cosine)
    slope = (gap[40_000] - gap[4000]) / np.log(10)
    assert slope == pytest.approx(laws.angle, abs=2e-3)
    token, coherent = equal_token_gradients(long, n_tokens=64, q=1.0)
    # the gradient from the output to layer l grows like (L/l)^power
    assert (token[4000] - token[40_000]) / np.log(10) == pytest.approx(laws.token, abs=2e-3)
    assert (coherent[4000] - coherent[40_000]) / np.log(10) == pytest.approx(laws.coherent, abs=2e-3)
    collapsed = growth(spec, n_tokens=64, q=1.0, p=0.5).constants
    assert collapsed["zeta"] == pytest.approx(laws.token, abs=1e-3)  # this network collapses
    with pytest.raises(SpecError, match="LayerNorm or RMSNorm in front of every branch"):
        power_laws(network(0.3, 0.3, 1.0))


def test_a_stream_that_dies_out_has_no_exponents() -> None:
    scales = Scales(query=1.0, key=1.0, value=0.5, output=1.0, mlp_in=0.5, mlp_out=0.5)
    spec = Transformer.uniform(
        n_layers=4, d_model=64, n_heads=1, norm=Derf(alpha=0.5), activation="tanh", scales=scales
    )
    spec = with_field(spec, "residual_strength", 0.4)
    assert str(exponents(spec, n_tokens=8).status) == "no fixed point"
    assert str(stable_state(spec, n_tokens=8).phase) == "none"
    with pytest.raises(DomainError, match="the stream dies out"):
        fixed_points(spec, n_tokens=8)


@pytest.mark.parametrize("norm", [Derf(alpha=0.7), LayerNorm()])
@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm])
def test_general_norms(norm: Norm, placement: Any) -> None:
    """The exponent of any stack is the growth its own long run shows."""
    scales = Scales(query=1.0, key=1.0, value=1.5, output=1.0, mlp_in=2.5, mlp_out=2.0)
    spec = Transformer.uniform(
        n_layers=400, d_model=64, n_heads=1, norm=norm, activation="gelu", scales=scales, placement=placement
    )
    if placement == Sublayer.pre_norm:
        spec = with_field(spec, "residual_strength", 0.4)
    found = exponents(spec, n_tokens=30)
    block, q = last_block(spec, 30, Annealed()), float(found.q)
    assert float(block.forward(Moments(q, q)).q) == pytest.approx(q, rel=1e-9)
    assert float(angle_rate(block, q)) == pytest.approx(float(np.exp(found.angle)), rel=1e-12)
    curve = 1 - predict(spec, n_tokens=30, q=q, p=q * (1 - 1e-7)).cosine
    assert float(np.log(curve[3] / curve[1])) / 2 == pytest.approx(float(found.angle), abs=1e-5)


def test_ends_equal_the_layered_recursion() -> None:
    widths = np.linspace(0.5, 6.0, 5)[:, None, None]
    strengths = np.linspace(0.1, 0.9, 3)[:, None]
    cosines = np.array([-0.01, 0.2, 0.99])
    grid = network(0.4, strengths, widths, coupling=1.5, n_layers=7)
    ends = propagate_ends(grid, n_tokens=20, q=1.3, p=1.3 * cosines, closure=Annealed())
    for i, j, k in ((0, 0, 0), (2, 1, 1), (4, 2, 2), (3, 0, 1)):
        alone = network(0.4, float(strengths[j, 0]), float(widths[i, 0, 0]), coupling=1.5, n_layers=7)
        seen = predict(alone, n_tokens=20, q=1.3, p=1.3 * cosines[k], closure="annealed")
        at = (i, j, k)
        assert ends.q[at] == pytest.approx(seen.q[-1], rel=1e-8)
        assert ends.p[at] == pytest.approx(seen.p[-1], rel=1e-7)
        assert ends.gradient_log()[at] == pytest.approx(seen.apjn_log[0], abs=1e-7)
        assert ends.gradient_log(1.0)[at] == pytest.approx(seen.gradient_log[0], abs=1e-7)
    assert ends.status.shape == (5, 3, 3) and set(ends.status.ravel()) == {"ok"}


def test_ends_survive_a_range_no_float_holds() -> None:
    spec = network(0.2, 0.9, np.array([30.0, 60.0]), n_layers=600)
    ends = propagate_ends(spec, n_tokens=8, q=1.0, p=0.0, closure=Annealed())
    seen = predict(network(0.2, 0.9, 60.0, n_layers=600), n_tokens=8, q=1.0, p=0.0, closure="annealed")
    assert seen.apjn_log[0] > 800
    assert ends.gradient_log()[1] == pytest.approx(seen.apjn_log[0], rel=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponents(preset("vit"), n_tokens=1), "need n_tokens >= 2; got 1"),
        (lambda: exponents(preset("vit"), n_tokens=8, state="collapse"), "did you mean 'collapsed'"),
        (
            lambda: gradient_exponent(preset("vit"), n_tokens=8, cosine=0.5),
            "grows for ever or dies out: give the second moment",
        ),
        (lambda: gradient_exponent(network(0.1, 0.1, 1.0), n_tokens=8, cosine=1.5), "p must lie in"),
        (lambda: gradient_exponent(network(0.1, 0.1, 1.0), n_tokens=8, cosine=0, readout="mean"), "no read-out 'mean'"),
        (lambda: edge_of_chaos(1.0, mlp_in=2.0), r"attention_strength must lie in \[0, 1\)"),
        (
            lambda: critical_line(preset("vit"), x="mlp_im", y=("query", [1.0]), low=1, high=2, n_tokens=8),
            "did you mean 'mlp_in'",
        ),
        (
            lambda: critical_line(preset("vit"), x="mlp_in", y=("query", [1.0]), low=3, high=2, n_tokens=8),
            "must satisfy 0 <= low < high",
        ),
        (
            lambda: critical_line(
                preset("vit"), x="mlp_in", y=("query", [1.0]), low=1, high=2, n_tokens=8, observable="angle"
            ),
            "there is no exponent 'angle'",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises((DomainError, SpecError), match=message):
        call()


def test_a_closure_tabulated_over_the_cosine_is_the_closure() -> None:
    """A grid large enough for tables, with a gain on the norm, against single stacks without any."""
    widths, strengths = np.linspace(0.5, 6.0, 64)[:, None], np.linspace(0.1, 0.9, 64)
    grid = network(0.4, strengths, widths, coupling=2.5, n_layers=5)
    grid = with_field(grid, "gain", 1.3)
    seen = gradient_exponent(grid, n_tokens=30, cosine=0.2, q=1.1)
    for i, j in ((0, 0), (20, 63), (63, 31), (40, 5)):
        alone = with_field(
            network(0.4, float(strengths[j]), float(widths[i, 0]), coupling=2.5, n_layers=5), "gain", 1.3
        )
        expected = predict(alone, n_tokens=30, q=1.1, p=0.22)
        assert seen[i, j] == pytest.approx(expected.apjn_log[0] / 5, abs=1e-7)
    tabulated = along_cosine(Exact(), 30, 2.5**2)
    assert isinstance(tabulated, AlongCosine)
    cosine = np.linspace(-1 / 29, 1, 77)
    found, direct = (
        closure.statistics(30, 2.5**2 * (1 - cosine), cosine, entropy=False) for closure in (tabulated, Exact())
    )
    for name in ("y2", "y12", "score", "score_pair"):
        np.testing.assert_allclose(getattr(found, name), getattr(direct, name), rtol=1e-7, err_msg=name)
    assert along_cosine(Exact(), 30, 1e6) == Exact()  # too sharp for the finest table
