"""Identities of the recursion that hold to rounding, and laws that hold for every spec."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fathometer.attention import (
    CLOSURES,
    Annealed,
    AnnealedMixing,
    Closure,
    FixedMixing,
    Mixing,
    ScorePath,
    Uniform,
    UniformMixing,
    Visibility,
)
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.observables import backward, predict
from fathometer.propagation import GramTrajectory, propagate, propagate_gram
from fathometer.spec import (
    ACTIVATIONS,
    MLP,
    Block,
    Derf,
    DyT,
    LayerNorm,
    Norm,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    Transformer,
    scaled_field,
    with_field,
)

FloatArray = NDArray[np.float64]
NORMS: dict[str, Norm | None] = {
    "none": None,
    "layer_norm": LayerNorm(gain=1.2),
    "rms_norm": RMSNorm(),
    "dyt": DyT(alpha=0.7),
    "derf": Derf(alpha=0.6, gain=1.1),
    "derf_shift": Derf(alpha=0.6, shift=0.2),
}
PLACEMENTS = {"pre": Sublayer.pre_norm, "post": Sublayer.post_norm, "sandwich": Sublayer.sandwich}
SCALES = Scales(query=0.6, key=0.7, value=0.9, output=1.1, mlp_in=0.8, mlp_out=1.2)
GATED = dataclasses.replace(SCALES, gate=0.9)


def build(**changes: Any) -> Transformer:
    arguments: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 64,
        "n_heads": 4,
        "norm": LayerNorm(),
        "scales": SCALES,
    } | changes
    return Transformer.uniform(**arguments)


def random_gram(n: int, seed: int, scatter: float = 0.5) -> FloatArray:
    """Return the Gram matrix of tokens with a common part and unequal norms."""
    rng = np.random.default_rng(seed)
    tokens = (0.6 * rng.normal(size=(1, 3 * n)) + rng.normal(size=(n, 3 * n))) * np.exp(
        scatter * rng.normal(size=(n, 1))
    )
    return np.asarray(tokens @ tokens.T / (3 * n))


def random_symmetric(n: int, seed: int) -> FloatArray:
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    return np.asarray(matrix + matrix.T)


# Forward and backward are adjoint.


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("closure", [*CLOSURES.values(), Annealed(score_path=False)], ids=lambda c: c.name)
def test_jacobian_is_the_same_from_either_end(closure: Closure, norm: str, placement: str) -> None:
    profile = predict(
        build(norm=NORMS[norm], placement=PLACEMENTS[placement], scales=GATED),
        n_tokens=7,
        q=1.3,
        p=0.4,
        closure=closure,
    )
    assert profile.apjn_forward_log[-1] == pytest.approx(profile.apjn_log[0], abs=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("closure", ["uniform", "annealed"])
def test_jacobian_of_a_gram_matrix_is_the_same_from_either_end(closure: str, norm: str, causal: bool) -> None:
    spec = build(norm=NORMS[norm], causal=causal, placement=Sublayer.sandwich)
    profile = predict(spec, gram=random_gram(6, 1), closure=closure)
    assert profile.apjn_forward_log[-1] == pytest.approx(profile.apjn_log[0], abs=1e-10)


def test_normalised_queries_and_keys_keep_the_adjoint() -> None:
    spec = with_qk_norm(build(norm=Derf(alpha=0.9)))
    profile = predict(spec, gram=random_gram(6, 2), closure="annealed")
    assert profile.apjn_forward_log[-1] == pytest.approx(profile.apjn_log[0], abs=1e-10)


def mixings(n: int, causal: bool) -> list[Mixing]:
    visible = Visibility(n, causal=causal)
    weights = np.random.default_rng(5).dirichlet(np.ones(n), size=n)
    return [
        UniformMixing(visible),
        FixedMixing(weights),
        AnnealedMixing(visible, random_gram(n, 3), 0.2),
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", range(3))
def test_mixings_are_adjoint(kind: int, causal: bool) -> None:
    n = 9
    mixing = mixings(n, causal)[kind]
    x, y = random_symmetric(n, 10), random_symmetric(n, 11)
    assert np.sum(mixing.forward(x) * y) == pytest.approx(np.sum(x * mixing.backward(y)), rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_score_path_is_adjoint(causal: bool) -> None:
    path = ScorePath(Visibility(9, causal=causal), random_gram(9, 3), random_gram(9, 4))
    x, y = random_symmetric(9, 10), random_symmetric(9, 11)
    assert np.sum(path.forward(x) * y) == pytest.approx(np.sum(x * path.backward(y)), rel=1e-12)


# Fast code against its literal twin.


def literal_annealed(score_gram: FloatArray, coupling: float, x: FloatArray, *, causal: bool) -> FloatArray:
    """Return the annealed average of the attention-averaged Gram matrix, one sum over key pairs for each query pair."""
    n = len(x)
    out = np.empty((n, n))
    for a in range(n):
        for b in range(n):
            keys_a, keys_b = (range(a + 1), range(b + 1)) if causal else (range(n), range(n))
            weights = np.array(
                [[math.exp(coupling * score_gram[a, b] * score_gram[c, d]) for d in keys_b] for c in keys_a]
            )
            values = np.array([[x[c, d] for d in keys_b] for c in keys_a])
            out[a, b] = np.sum(weights * values) / np.sum(weights)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("coupling", [0.0, 0.1, 1.0, 3.0])
def test_annealed_mixing_is_the_literal_sum(coupling: float, causal: bool) -> None:
    gram, x = random_gram(6, 8), random_symmetric(6, 9)
    fast = AnnealedMixing(Visibility(6, causal=causal), gram, coupling).forward(x)
    np.testing.assert_allclose(fast, literal_annealed(gram, coupling, x, causal=causal), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 15.0, 59.0])
def test_annealed_mixing_at_its_worst(spread: float) -> None:
    """Two opposite clusters: for purely imaginary couplings the denominator comes closest to zero."""
    sign = np.array([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    gram, x = 0.05 * np.eye(6) + 0.95 * np.outer(sign, sign), random_symmetric(6, 9)
    coupling = spread / (np.max(gram) * np.ptp(gram))
    fast = AnnealedMixing(Visibility(6, causal=True), gram, coupling).forward(x)
    np.testing.assert_allclose(fast, literal_annealed(gram, coupling, x, causal=True), rtol=0, atol=1e-9)


def test_annealed_mixing_of_a_batch_is_that_of_its_members() -> None:
    grams = np.stack([random_gram(6, 1), 2.0 * random_gram(6, 2)])
    x = np.stack([random_symmetric(6, 3), random_symmetric(6, 4)])
    visible = Visibility(6, causal=True)
    batch = AnnealedMixing(visible, grams, 0.2).forward(x)
    for i in range(2):
        np.testing.assert_allclose(batch[i], AnnealedMixing(visible, grams[i], 0.2).forward(x[i]), rtol=0, atol=1e-9)


def test_annealed_mixing_refuses_scores_it_cannot_describe() -> None:
    with pytest.raises(NotCoveredError, match=r"spread over .* nats"):
        AnnealedMixing(Visibility(6, causal=False), 10 * random_gram(6, 1), 5.0)


def literal_score_path(gradient: FloatArray, values: FloatArray, scores: FloatArray, *, causal: bool) -> FloatArray:
    """Return the key and query paths of gradients by their definition, with uniform weights."""
    n = len(gradient)
    attention = np.tril(np.ones((n, n))) if causal else np.ones((n, n))
    attention /= attention.sum(axis=1, keepdims=True)
    mean_left = np.einsum("ac,cd->ad", attention, values)  # mean over the keys of a
    mean_both = np.einsum("ac,bd,cd->ab", attention, attention, values)
    centred = (
        np.broadcast_to(values[None, :, None, :], (n, n, n, n))
        - mean_left.T[None, :, :, None]  # index c, mean over the keys d of b
        - mean_left[:, None, None, :]  # mean over the keys c of a, index d
        + mean_both[:, None, :, None]
    )
    weighted = np.einsum("ac,bd,ab,acbd->acbd", attention, attention, gradient, centred)
    key = np.einsum("acbd,ab->cd", weighted, scores)
    query = np.einsum("acbd,cd->ab", weighted, scores)
    return np.asarray(key + query)


@pytest.mark.parametrize("causal", [False, True])
def test_score_path_is_the_literal_sum(causal: bool) -> None:
    values, scores, gradient = random_gram(6, 3), random_gram(6, 4), random_symmetric(6, 5)
    fast = ScorePath(Visibility(6, causal=causal), values, scores).backward(gradient)
    np.testing.assert_allclose(fast, literal_score_path(gradient, values, scores, causal=causal), rtol=0, atol=1e-12)


# Two representations of one theory.


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("closure", "tolerance"), [(Uniform(), 1e-12), (Annealed(score_path=False), 1e-10)], ids=["uniform", "annealed"]
)
def test_equal_tokens_are_a_special_case(closure: Closure, tolerance: float, norm: str, placement: str) -> None:
    spec = with_biases(build(norm=NORMS[norm], placement=PLACEMENTS[placement], activation="gelu", branch_scale=0.7))
    n, q, p = 6, 1.3, 0.4
    pair = predict(spec, n_tokens=n, q=q, p=p, closure=closure)
    full = predict(spec, gram=p + (q - p) * np.eye(n), closure=closure)
    assert set(full.curves) - set(pair.curves) == {"apjn_token_log"}
    np.testing.assert_allclose(full.apjn_token_log, full.apjn_log[0], rtol=0, atol=1e-10)
    for name, curve in pair.curves.items():
        np.testing.assert_allclose(full.curves[name], curve, rtol=tolerance, atol=tolerance, err_msg=name)


def test_equal_tokens_are_a_special_case_of_gated_mlps() -> None:
    spec = build(scales=GATED, activation="silu", norm=DyT(alpha=0.8))
    pair = predict(spec, n_tokens=5, q=0.8, p=-0.1, closure="uniform")
    full = predict(spec, gram=-0.1 + 0.9 * np.eye(5), closure="uniform")
    np.testing.assert_allclose(full.apjn_log, pair.apjn_log, atol=1e-12)
    np.testing.assert_allclose(full.p, pair.p, atol=1e-12)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "derf"])
def test_score_paths_agree_for_weak_scores(norm: str, qk_norm: bool) -> None:
    """To first order in the score variance the weights of the score path are uniform, in either representation."""
    weak = 1e-4
    spec = with_field(build(norm=NORMS[norm], n_layers=1), "score_multiplier", weak)
    spec = with_qk_norm(spec) if qk_norm else spec
    n, q, p = 5, 1.4, 0.5
    gram = p + (q - p) * np.eye(n)

    def share(**start: Any) -> float:
        with_path, without = (
            predict(spec, closure=Annealed(score_path=on), **start).apjn_log[0] for on in (True, False)
        )
        return float(with_path - without) / weak**2

    assert share(n_tokens=n, q=q, p=p) > 1e-3
    assert share(gram=gram) == pytest.approx(share(n_tokens=n, q=q, p=p), rel=1e-5)


def test_causal_attention_to_one_token_is_its_copy() -> None:
    spec = build(causal=True, scales=dataclasses.replace(SCALES, mlp_out=0.0))
    trajectory = propagate_gram(spec, random_gram(5, 3), closure=Uniform())
    first = trajectory.grams[:, 0, 0]
    gain = (SCALES.value * SCALES.output) ** 2
    np.testing.assert_allclose(np.diff(first)[::2], gain, rtol=1e-12)


def test_relabelling_tokens_changes_nothing() -> None:
    gram, order = random_gram(6, 4), np.array([3, 0, 5, 1, 4, 2])
    spec = build(norm=Derf(alpha=0.7))
    one, other = (propagate_gram(spec, g, closure=Annealed()) for g in (gram, gram[np.ix_(order, order)]))
    np.testing.assert_allclose(one.grams[-1][np.ix_(order, order)], other.grams[-1], rtol=1e-10)
    np.testing.assert_allclose(one.backward(None)[0][0], other.backward(None)[0][0], atol=1e-10)


# What must not matter, and what is a rescaling.


@pytest.mark.parametrize("closure", CLOSURES)
def test_heads_do_not_matter(closure: str) -> None:
    one, eight, grouped = (
        predict(build(**heads), n_tokens=9, q=1.0, p=0.2, closure=closure).apjn_log
        for heads in ({"n_heads": 1}, {"n_heads": 8}, {"n_heads": 8, "n_kv_heads": 2})
    )
    np.testing.assert_array_equal(one, eight)
    np.testing.assert_array_equal(one, grouped)


@pytest.mark.parametrize("norm", NORMS)
def test_branch_scale_rescales_the_output_matrices(norm: str) -> None:
    spec = build(norm=NORMS[norm], activation="silu")
    scaled = scaled_field(scaled_field(spec, "output", 0.6), "mlp_out", 0.6)
    one, other = (predict(s, n_tokens=9, q=1.0, p=0.2) for s in (with_field(spec, "branch_scale", 0.6), scaled))
    for name, curve in one.curves.items():
        np.testing.assert_allclose(other.curves[name], curve, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("branch", [0, 1])
def test_skip_scale_factors_out_of_one_sublayer(branch: int) -> None:
    mu, tau = 0.8, 1.3
    sublayer = build(norm=Derf(alpha=0.9)).blocks[0].sublayers[branch]

    def run(skip: float, weight: float) -> tuple[FloatArray, FloatArray]:
        step = dataclasses.replace(sublayer, skip_scale=skip, branch_scale=weight)
        spec = Transformer(blocks=(Block(sublayers=(step,)),), d_model=64)
        trajectory = propagate(spec, n_tokens=5, q=1.2, p=0.3, closure=Annealed())
        return np.array([trajectory.q[1], trajectory.p[1]]), trajectory.transfer

    moments, transfer = run(mu, tau)
    unit_moments, unit_transfer = run(1.0, tau / mu)
    np.testing.assert_allclose(moments, mu**2 * unit_moments, rtol=1e-13)
    np.testing.assert_allclose(transfer, mu**2 * unit_transfer, rtol=1e-13)


def test_scale_equivariance_without_norms() -> None:
    spec = build(norm=None, activation="relu")
    small, large = (predict(spec, n_tokens=5, q=s, p=0.3 * s, closure="uniform") for s in (1.0, 7.0))
    np.testing.assert_allclose(large.q, 7 * small.q, rtol=1e-13)
    np.testing.assert_allclose(large.apjn_log, small.apjn_log, atol=1e-13)


def test_gain_of_the_output_norm_is_a_branch_scale() -> None:
    base = build(norm=RMSNorm(), placement=Sublayer.sandwich)
    one = base.map_sublayers(lambda s: dataclasses.replace(s, output_norm=RMSNorm(gain=0.5)))
    profile, other = (predict(spec, n_tokens=5, q=1.0, p=0.3) for spec in (one, with_field(base, "branch_scale", 0.5)))
    np.testing.assert_allclose(profile.q, other.q, rtol=1e-13)
    np.testing.assert_allclose(profile.apjn_log, other.apjn_log, atol=1e-13)


# Known limits.


def test_one_token_has_no_partner() -> None:
    spec = build(norm=DyT(alpha=0.5), activation="gelu")
    pair = predict(spec, n_tokens=1, q=1.0, p=0.7)
    full = predict(spec, gram=np.array([[1.0]]))
    np.testing.assert_allclose(pair.q, full.q, rtol=1e-12)
    np.testing.assert_allclose(pair.apjn_log, full.apjn_log, atol=1e-12)
    np.testing.assert_allclose(pair.gradient_log, pair.apjn_log, atol=1e-12)
    np.testing.assert_array_equal(pair.gradient_alignment, 0.0)
    np.testing.assert_array_equal((pair.p, pair.cosine), np.zeros((2, len(pair.q))))
    np.testing.assert_array_equal(full.p, pair.p)
    np.testing.assert_array_equal(predict(spec, n_tokens=1, q=1.0, p=-0.3).q, pair.q)


def test_equal_tokens_stay_equal() -> None:
    profile = predict(build(norm=Derf(alpha=0.7), activation="gelu_tanh"), n_tokens=5, q=1.5, p=1.5)
    np.testing.assert_allclose(profile.cosine, 1.0, rtol=1e-12)


def test_a_network_of_zeros_is_the_identity() -> None:
    zeros = Scales(query=1.0, key=1.0, value=0.0, output=1.0, mlp_in=1.0, mlp_out=0.0)
    profile = predict(build(scales=zeros), n_tokens=5, q=1.5, p=0.5)
    np.testing.assert_array_equal(profile.q, 1.5)
    np.testing.assert_array_equal(profile.p, 0.5)
    np.testing.assert_array_equal(profile.apjn_log, 0.0)


def test_linear_mlp_in_closed_form() -> None:
    mlp = MLP(mlp_in=0.8, mlp_out=0.9, activation="identity")
    spec = Transformer(blocks=(Block(sublayers=(Sublayer.pre_norm(mlp, None),), repeat=6),), d_model=8)
    profile = predict(spec, n_tokens=3, q=1.0, p=0.25)
    growth = np.log1p((0.8 * 0.9) ** 2)
    np.testing.assert_allclose(np.log(profile.q), growth * np.arange(7), atol=1e-13)
    np.testing.assert_allclose(profile.apjn_log, growth * np.arange(6, -1, -1), atol=1e-13)
    np.testing.assert_allclose(profile.cosine, 0.25, rtol=1e-13)


def test_layer_norm_with_relu_has_its_exponent() -> None:
    """ln J against ln q has slope A / (A + sOV2) with A = s21 / 2, here 2/3, in deep networks with many tokens."""
    scale, width = 0.02 * math.sqrt(768), 4
    spec = build(
        n_layers=20_000,
        activation="relu",
        scales=Scales(query=0, key=0, value=scale, output=scale, mlp_in=scale, mlp_out=scale * math.sqrt(width)),
    )
    profile = predict(spec, n_tokens=10_000_000, q=0.27, p=0.11)
    slope = (profile.apjn_log[2_000] - profile.apjn_log[-1]) / np.log(profile.q[-1] / profile.q[2_000])
    assert slope == pytest.approx(2 / 3, abs=0.03)


def test_saturating_norm_has_its_length() -> None:
    """ln J grows by sqrt(depth / lambda) with 1/sqrt(lambda) = 0.5002 for Derf(1) in this vision transformer."""
    scale = 0.02 * math.sqrt(768)
    spec = build(
        n_layers=40_000,
        norm=Derf(alpha=1.0),
        activation="relu",
        scales=Scales(query=0, key=0, value=scale, output=scale, mlp_in=scale, mlp_out=2 * scale),
    )
    logs = predict(spec, n_tokens=196, q=0.27, p=0.11, closure="uniform").apjn_forward_log
    slope = (logs[-1] - logs[10_000]) / (math.sqrt(40_000) - math.sqrt(10_000))
    assert slope == pytest.approx(0.5002, rel=5e-3)


def test_chaos_a_hundred_thousand_blocks_deep() -> None:
    """A stream that stays bounded while gradients grow exponentially: no overflow, and a constant rate."""
    chaotic = Scales(query=0.5, key=0.5, value=0.3, output=0.3, mlp_in=3.0, mlp_out=1.0)
    spec = build(n_layers=100_000, norm=None, activation="erf", skip_scale=0.8, scales=chaotic)
    profile = predict(spec, n_tokens=8, q=1.0, p=0.5)
    assert np.all(np.isfinite(profile.apjn_log))
    rates = -np.diff(profile.apjn_log)
    assert rates[-1000:].min() > 0.01
    assert profile.apjn_log[0] == pytest.approx(100_000 * rates[50_000], rel=1e-3)
    assert profile.apjn_forward_log[-1] == pytest.approx(profile.apjn_log[0], rel=1e-10)
    with pytest.raises(OverflowError, match=r"use profile\.apjn_log instead"):
        _ = profile.apjn


def test_depth_is_a_prefix() -> None:
    long = build(n_layers=7)
    short = long.with_depth(3)
    assert short.n_layers == 3 and short == build(n_layers=3)
    deep, shallow = (predict(spec, n_tokens=5, q=1.0, p=0.3) for spec in (long, short))
    np.testing.assert_array_equal(deep.q[:4], shallow.q)
    np.testing.assert_allclose(deep.apjn_forward_log[:4], shallow.apjn_forward_log, atol=1e-14)


def test_jacobians_of_one_boundary_are_linear_in_it() -> None:
    trajectory = propagate(build(), n_tokens=5, q=1.0, p=0.3, closure=Annealed())
    isotropic, pooled, half = (np.exp(backward(trajectory.transfer, alignment=c).log_norm) for c in (0.0, 1.0, 0.5))
    np.testing.assert_allclose(half, (isotropic + pooled) / 2, rtol=1e-13)


# A spec of arrays is many specs.


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("field", ["mlp_in", "output", "query", "branch_scale", "mlp.skip_scale", "alpha", "shift"])
def test_a_grid_is_its_points(field: str, closure: str) -> None:
    spec = build(norm=Derf(alpha=0.8, shift=0.1), activation="gelu")
    values = np.array([0.3, 0.9, 1.4])
    p = np.array([[0.1], [0.6]])
    grid = predict(with_field(spec, field, values), n_tokens=6, q=1.0, p=p, closure=closure)
    for i, start in enumerate(p[:, 0]):
        for j, value in enumerate(values):
            point = predict(with_field(spec, field, float(value)), n_tokens=6, q=1.0, p=float(start), closure=closure)
            for name, curve in point.curves.items():
                whole = np.broadcast_to(grid.curves[name], (len(curve), 2, 3))
                np.testing.assert_allclose(whole[:, i, j], curve, rtol=1e-11, atol=1e-12, err_msg=name)


# Laws.

norms = st.one_of(
    st.none(),
    st.just(LayerNorm()),
    st.just(RMSNorm()),
    st.builds(lambda alpha: DyT(alpha=alpha), st.floats(0.05, 2.0)),
    st.builds(lambda alpha, shift: Derf(alpha=alpha, shift=shift), st.floats(0.05, 2.0), st.floats(-1.0, 1.0)),
)


@st.composite
def specs(draw: st.DrawFn) -> Transformer:
    names = ("query", "key", "value", "output", "mlp_in", "mlp_out")
    norm = draw(norms)
    # Without a norm the stream grows by the product of all scales, soon beyond what a quadrature resolves.
    scale = st.floats(0.05, 3.0 if norm else 1.2)
    drawn = {name: draw(scale) for name in names}
    return Transformer.uniform(
        n_layers=draw(st.integers(1, 4)),
        d_model=64,
        n_heads=4,
        norm=norm,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        scales=Scales(**drawn, gate=draw(st.one_of(st.none(), scale))),
    )


@settings(max_examples=150, deadline=None)
@given(
    spec=specs(),
    n=st.integers(2, 300),
    q=st.floats(0.05, 5.0),
    position=st.floats(0.0, 1.0),
    closure=st.sampled_from([*CLOSURES.values(), Annealed(score_path=False)]),
)
def test_laws_of_plain_residual_streams(spec: Transformer, n: int, q: float, position: float, closure: Closure) -> None:
    low = 0.0 if closure.name in ("uniform_large_n", "random_energy") else -q / (n - 1)  # of infinitely many tokens
    profile = predict(spec, n_tokens=n, q=q, p=low + position * (q - low), closure=closure)
    assert np.all(np.isfinite(profile.apjn_log))
    assert np.all(np.abs(profile.p) <= profile.q * (1 + 1e-9))
    assert np.all(np.diff(profile.q) >= -1e-12 * profile.q[1:])
    assert np.all(profile.apjn_log >= -1e-12)
    assert np.all(np.diff(profile.apjn_log) <= 1e-12)
    assert np.all(np.abs(profile.gradient_alignment) <= 1 + 1e-9)
    assert np.all(profile.gradient_alignment >= -1 / (n - 1) - 1e-9)
    assert profile.apjn_forward_log[-1] == pytest.approx(profile.apjn_log[0], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), causal=st.booleans(), norm=norms)
def test_gram_matrices_stay_gram_matrices(seed: int, causal: bool, norm: Norm | None) -> None:
    """For uniform attention; the annealed average is not one over a distribution, and may leave the cone slightly."""
    spec = build(norm=norm, causal=causal, n_layers=2)
    trajectory = propagate_gram(spec, random_gram(5, seed, scatter=0.2), closure=Uniform())
    for grams in (trajectory.grams, trajectory.added, trajectory.backward(None)[0][1]):
        values = np.linalg.eigvalsh(grams)
        assert np.all(values >= -1e-9 * values[..., -1:])


# Refusals.


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            {"n_tokens": 5, "q": 1.0, "p": 1.2},
            r"p must lie in .*got q=1, p=1\.2 with n_tokens=5\. Did you pass a cos",
        ),
        ({"n_tokens": 5, "q": 1.0, "p": -0.3}, r"p must lie in"),
        ({"n_tokens": 5, "q": 0.0, "p": 0.0}, r"q must be positive"),
        ({"n_tokens": 5, "q": float("nan"), "p": 0.0}, r"q must be positive"),
        ({"n_tokens": 5, "q": np.array([1.0, 1.0]), "p": np.array([0.5, 1.5])}, r"at index \(1,\)"),
        ({"n_tokens": 0, "q": 1.0, "p": 0.5}, r"n_tokens must be an integer >= 1; got 0"),
        ({"n_tokens": True, "q": 1.0, "p": 0.5}, r"n_tokens must be an integer >= 1; got True"),
        ({"gram": np.ones(3)}, r"gram must have shape"),
        ({"gram": np.array([[1.0, np.inf], [np.inf, 1.0]])}, r"gram must be finite"),
        ({"gram": np.diag([1.0, 0.0])}, r"positive mean square; got 0 at index \(1,\)"),
        ({"gram": np.array([[1.0, 0.2], [0.3, 1.0]])}, r"must be symmetric; it differs from its transpose by 0.1"),
        ({"gram": np.array([[1.0, 2.0], [2.0, 1.0]])}, r"positive semidefinite; its lowest eigenvalue is -1"),
    ],
)
def test_impossible_starts_are_refused(start: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        predict(build(), **start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_tokens": 5, "q": 1.0}, "either gram, or all of n_tokens, q and p"),
        ({"n_tokens": 5, "gram": np.eye(5)}, "either gram, or n_tokens, q and p; not both"),
        ({"n_tokens": 5, "q": 1.0, "p": 0.5, "closure": "anealed"}, "no closure 'anealed'; did you mean 'annealed'"),
    ],
)
def test_contradictory_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        predict(build(), **arguments)


def test_causal_grids_are_refused() -> None:
    with pytest.raises(SpecError, match="give scalar q and p"):
        predict(build(causal=True), n_tokens=5, q=np.ones(2), p=0.5)


def test_alignments_are_cosines() -> None:
    trajectory = propagate(build(), n_tokens=5, q=1.0, p=0.3, closure=Uniform())
    with pytest.raises(DomainError, match="must lie in \\[-1, 1\\]; got 2"):
        backward(trajectory.transfer, alignment=2.0)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.eye(3), r"attention must have shape \(4, 4\); got \(3, 3\)"),
        (np.eye(4) - 0.1, "must be finite and non-negative; lowest is -0.1"),
        (np.full((4, 4), 0.3), "attention rows must sum to 1; row 0 sums to 1.2"),
    ],
)
def test_matrices_that_are_no_attention_are_refused(attention: FloatArray, message: str) -> None:
    with pytest.raises(DomainError, match=message):
        propagate_gram(build(), np.eye(4), closure=Uniform(), attention=attention)


@pytest.mark.parametrize("coupling", [0.3, 2.5])
def test_the_exact_closure_on_a_gram_matrix_of_equal_tokens_is_itself(coupling: float) -> None:
    spec = with_field(build(norm=LayerNorm(), n_layers=3), "query", coupling)
    for cosine in (0.0, 0.4, 0.95):
        equal = predict(spec, n_tokens=12, q=1.3, p=1.3 * cosine, closure="exact")
        full = predict(spec, gram=1.3 * (cosine + (1 - cosine) * np.eye(12)), closure="exact")
        for name in ("q", "p", "apjn_log", "gradient_log", "apjn_forward_log", "gradient_alignment"):
            # Orthogonal rows take their score path from rows of correlation 1e-3.
            rtol = 1e-8 if name in ("q", "p") else 1e-4
            np.testing.assert_allclose(full.curves[name], equal.curves[name], rtol=rtol, atol=1e-9, err_msg=name)


def test_late_rows_of_causal_attention_are_those_of_full_attention() -> None:
    spec = with_field(build(norm=LayerNorm(), n_layers=1), "query", 2.0)
    gram = 0.3 + 0.7 * np.eye(64)
    full, causal = (
        propagate_gram(described, gram, closure=CLOSURES["exact"]) for described in (spec, with_field_causal(spec))
    )
    np.testing.assert_allclose(full.added[0][-1, -1], causal.added[0][-1, -1], rtol=1e-6)
    np.testing.assert_allclose(full.added[0][-1, -2], causal.added[0][-1, -2], rtol=2e-3)


def with_field_causal(spec: Transformer) -> Transformer:
    def mask(sublayer: Sublayer) -> Sublayer:
        if isinstance(sublayer.branch, SelfAttention):
            return dataclasses.replace(sublayer, branch=dataclasses.replace(sublayer.branch, causal=True))
        return sublayer

    return spec.map_sublayers(mask)


def test_fixed_attention_is_the_closure_it_equals() -> None:
    trajectory: list[GramTrajectory] = [
        propagate_gram(build(), random_gram(4, 1), closure=Uniform(), attention=a)
        for a in (None, np.full((4, 4), 0.25))
    ]
    np.testing.assert_allclose(trajectory[0].grams, trajectory[1].grams, rtol=1e-13)
    assert [t.closure for t in trajectory] == ["uniform", "fixed"]


def with_qk_norm(spec: Transformer) -> Transformer:
    def change(sublayer: Sublayer) -> Sublayer:
        if not isinstance(sublayer.branch, SelfAttention):
            return sublayer
        return dataclasses.replace(sublayer, branch=dataclasses.replace(sublayer.branch, qk_norm=True))

    return spec.map_sublayers(change)


def with_biases(spec: Transformer) -> Transformer:
    biases = {"in_bias": 0.2, "out_bias": 0.3, "value_bias": 0.1, "output_bias": 0.4}
    for name, value in biases.items():
        spec = with_field(spec, name, value)
    return spec


def test_overflow_is_said_and_marked_on_a_grid() -> None:
    spec = Transformer.uniform(n_layers=3000, d_model=64, n_heads=1, norm=None, scales=SCALES, activation="relu")
    with pytest.raises(DomainError, match=r"the stream overflows at sublayer \d+ of 6000: q is"):
        predict(spec, n_tokens=8, q=1.0, p=0.5)
    with pytest.raises(DomainError, match=r"the stream overflows at sublayer"), np.errstate(all="ignore"):
        predict(spec, gram=0.5 + 0.5 * np.eye(4), closure="uniform")
    with np.errstate(all="ignore"):
        grid = propagate(
            with_field(spec, "branch_scale", np.array([1e-3, 1.0])), n_tokens=8, q=1.0, p=0.5, closure=Uniform()
        )
    assert grid.status.tolist() == ["ok", "overflow"]


def test_rows_of_a_fixed_attention_are_its_own() -> None:
    attention = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    gram = 0.4 + 0.6 * np.eye(3)
    rows = propagate_gram(build(), gram, closure=Uniform(), attention=attention).attention
    np.testing.assert_allclose(rows["inverse_participation"][0], [1.0, 0.5, 0.38])
    np.testing.assert_allclose(
        rows["attention_entropy"][0], [0.0, np.log(2), -(attention[2] * np.log(attention[2])).sum()]
    )
    np.testing.assert_array_equal(rows["visible_keys"][0], [1, 2, 3])
