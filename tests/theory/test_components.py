"""Component moments: worked numbers, identities between components, simulations of single formulas, bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fathometer.attention import Exact, Uniform, row_averages
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.observables.components import (
    ActivationMap,
    Attention,
    Chain,
    CrossAttentionMoments,
    Dropout,
    FeedForward,
    GatedUnit,
    GradientState,
    HeadWidth,
    Linear,
    NormMap,
    Pooling,
    Residual,
    Softmax,
    TokenState,
    attention_block,
    feed_forward_block,
    head_map,
    sample_correlation,
)
from fathometer.observables.components.finite_width import over_tokens
from fathometer.observables.embeddings import corpus_overlap, count_overlap, stem_state, zipf_overlap
from fathometer.propagation import Memory, Moments
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import (
    MLP,
    CrossAttention,
    Derf,
    GatedMLP,
    Head,
    LayerNorm,
    PatchStem,
    RMSNorm,
    SelfAttention,
    Sublayer,
    TokenStem,
)

UNIT = GradientState(J=1.0, K=1.0)
STATE = TokenState(q=1.5, p=0.6)
GRADIENT = GradientState(J=0.7, K=0.2)
DIGITS = 1.1e-10  # a unit of the tenth decimal


def close(found: Any, expected: Any, **tolerance: float) -> None:
    assert found == pytest.approx(expected, **tolerance)


@dataclass(frozen=True)
class LogNormal(Exact):
    """True row averages; two rows overlap as with log-normal weights, ``n Y12 = e^{c v}``. For the worked numbers."""

    def statistics(self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True) -> Any:
        known = super().statistics(n_tokens, variance, correlation, entropy=entropy)
        overlap = np.exp(variance * correlation) / n_tokens
        return known._replace(y12=overlap, score_pair=overlap)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("relu", (0.5641895835, 0.6816901138, 0.1644343977, 0.4827442838, 0.5, 0.2984933420)),
        ("gelu", (0.4606588660, 0.7098762813, 0.1671066457, 0.3793132365, 0.4895119378, 0.3074654648)),
    ],
)
def test_worked_activations(name: str, printed: tuple[float, ...]) -> None:
    unit, x = ActivationMap(activation=name), TokenState.from_correlation(variance=2.0, correlation=0.3)
    out, back = unit.forward(x), unit.backward(UNIT, x)
    found = (out.mean, out.variance, out.covariance, out.p, back.J, back.K)
    np.testing.assert_allclose(found, printed, rtol=0, atol=DIGITS)


def test_worked_numbers_of_relu_norm_and_softmax() -> None:
    unit, x = ActivationMap(activation="relu"), TokenState(q=1.0, p=0.3)
    assert unit.forward(x).p * 2 == pytest.approx(0.4827442838, abs=DIGITS)
    close(unit.backward(UNIT, x).K * 2, 0.5969866841, abs=DIGITS)
    assert sample_correlation(0.3, 48) == pytest.approx(0.2970993498, abs=DIGITS)
    for variance, printed in (
        (0.7, (0.0195795332, 0.0007178221, 0.0004000882)),
        (6.0, (0.1981744186, 0.0883591804, 0.0629488077)),
    ):
        row, softmax = row_averages(100, variance), Softmax(n_keys=100)
        np.testing.assert_allclose((row.y2, row.y3, row.y2_squared), printed, rtol=0, atol=DIGITS)
        logits = TokenState(q=variance / 0.6, p=variance * 0.4 / 0.6)
        assert softmax.forward(logits).q * 100 == pytest.approx(printed[0], abs=DIGITS)
        back = softmax.backward(GradientState(J=1.0, K=0.25), logits)
        close(back.J * 100, 0.75 * (printed[0] - 2 * printed[1] + printed[2]), abs=2e-10)


def test_worked_attention() -> None:
    """n = 100, d = 192, heads of 48, S = 1.5, r = 0.3, dropout 0.1, gradient correlation 0.25."""
    branch = SelfAttention(query=1.5**0.25, key=1.5**0.25, value=1.0, output=1.0, n_heads=4, attention_dropout=0.1)
    x = TokenState(q=1.0, p=0.3)
    attention = Attention(branch=branch, n_tokens=100, d_model=192, closure=LogNormal())
    rows = HeadWidth(LogNormal(), 48, 192).statistics(100, 1.05, 0.3)
    np.testing.assert_allclose((100 * rows.y2, 100 * rows.y12), (2.7084672, 1.3962317), rtol=2e-7)
    out, back = attention.forward(x), attention.backward(GradientState(J=1.0, K=0.25), x)
    np.testing.assert_allclose((out.q, out.p), (0.32559224, 0.31086069), rtol=2e-7)
    close(back.J, 0.37566142 + 0.02430009 + 0.1383916, rel=2e-7)
    value, query, key = 0.37566142, 0.02430009, 0.1383916
    own_path = 2.7084672 / 100 + 0.25 * 0.99 * 1.3962317
    apart = 1.5 * 0.7**2 * 0.25 * ((1 - 2.7084672 / 100) ** 2 / 192 + 1.3962317 / 100)
    assert value == pytest.approx(own_path + 2.7084672 / 900, rel=1e-7)
    close(back.K, (1 + 0.25 * 99 - own_path) / 99 - key / 99 + apart, rel=1e-6)
    assert query < key


def test_worked_input_correlations() -> None:
    stem = TokenStem(token=1.0, position=1.0, segment=1.0)
    assert stem_state(stem, token_overlap=zipf_overlap(30522)).cosine == pytest.approx(0.2268, abs=5e-5)
    published = stem_state(stem, token_overlap=zipf_overlap(30522, published=True)).cosine
    assert published == pytest.approx(0.2274, abs=5e-5)
    assert published == pytest.approx(np.pi**2 / (18 * np.log(30522) ** 2) + 2 / 9, rel=1e-12)
    assert 0.006 < stem_state(TokenStem(token=1.0, position=1.0), token_overlap=zipf_overlap(30522)).cosine < 0.008


@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "gelu_tanh", "tanh", "erf", "identity"])
def test_a_vanishing_mean_is_no_mean(name: str, correlation: float) -> None:
    unit = ActivationMap(activation=name)
    near, at = (TokenState.from_correlation(variance=1.3, correlation=correlation, mean=m) for m in (1e-9, 0.0))
    for a, b in ((unit.forward(near), unit.forward(at)), (unit.backward(UNIT, near), unit.backward(UNIT, at))):
        np.testing.assert_allclose(list(vars(a).values()), list(vars(b).values()), atol=3e-9)


@pytest.mark.parametrize("mean", [-0.8, 0.5, 2.0])
@pytest.mark.parametrize("correlation", [-0.5, 0.4])
def test_a_relu_of_a_mean_against_summation(mean: float, correlation: float) -> None:
    x = TokenState.from_correlation(variance=0.9, correlation=correlation, mean=mean)
    u = np.linspace(-8, 8, 3201)
    weights = np.exp(-0.5 * u * u)
    weights /= weights.sum()
    first = (mean + 0.9**0.5 * u)[:, None]
    second = mean + 0.9**0.5 * (correlation * u[:, None] + np.sqrt(1 - correlation**2) * u)
    mass = np.outer(weights, weights)
    moment = np.sum(mass * np.maximum(first, 0) * np.maximum(second, 0))
    slope = np.sum(mass * (first > 0) * (second > 0))
    unit = ActivationMap(activation="relu")
    assert unit.forward(x).p == pytest.approx(moment, rel=1e-4)
    close(unit.backward(UNIT, x).K, slope, rel=3e-3)
    assert unit.forward(x).mean == pytest.approx(np.sum(weights * np.maximum(first[:, 0], 0)), rel=1e-4)


def test_a_shifted_identity_and_arrays() -> None:
    x = TokenState.from_correlation(variance=np.array([1.0, 2.0]), correlation=np.array([0.2, -0.3]), mean=0.7)
    out = ActivationMap(activation="identity").forward(x)
    np.testing.assert_allclose((out.q, out.p, out.mean), (x.q, x.p, [0.7, 0.7]), rtol=1e-12)


def test_linear_weight_gradient() -> None:
    n, d, draws = 5, 40, 6000
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(draws):
        x, g = (
            np.sqrt(p) * rng.normal(size=(1, d)) + np.sqrt(q - p) * rng.normal(size=(n, d))
            for q, p in ((1.5, 0.6), (0.7, 0.2))
        )
        squares.append(np.mean((g.T @ x) ** 2))
    expected = Linear(scale=1.0).weight_gradient(GRADIENT, STATE, n)
    assert abs(np.mean(squares) - expected) < 4.5 * np.std(squares) / draws**0.5
    assert 4.5 * np.std(squares) / draws**0.5 < 0.03 * expected


@pytest.mark.parametrize(("norm", "removed"), [(LayerNorm(gain=1.2), True), (RMSNorm(gain=1.2), False)])
def test_norms_of_few_features(norm: LayerNorm | RMSNorm, removed: bool) -> None:
    """Twelve features, by drawing pairs of tokens; the traces of the Jacobians are exact."""
    d, r, draws = 12, 0.6, 400_000
    rng = np.random.default_rng(1)
    shared = np.sqrt(r) * rng.normal(size=(draws, d))
    pair = [2.0**0.5 * (shared + np.sqrt(1 - r) * rng.normal(size=(draws, d))) for _ in range(2)]
    pair = [x - x.mean(axis=1, keepdims=True) if removed else x for x in pair]
    size = [np.sqrt(np.mean(x * x, axis=1)) for x in pair]
    cosine = np.mean(pair[0] * pair[1], axis=1) / (size[0] * size[1])
    kept = d - 1 - removed
    own = 1.44 * (kept / d) / size[0] ** 2
    both = 1.44 * (kept - 1 + cosine**2) / d / (size[0] * size[1])
    x, unit = TokenState(q=2.0, p=1.2), NormMap(norm=norm, d_model=d)
    back = unit.backward(UNIT, x)
    for values, theory, bias in ((1.44 * cosine, unit.forward(x).p, 0), (own, back.J, 0), (both, back.K, 0.3 / d**2)):
        assert abs(values.mean() - theory) < 4.5 * values.std() / draws**0.5 + bias * theory
    published = NormMap(norm=norm, d_model=d, form="reference").backward(UNIT, x)
    assert abs(own.mean() - published.J) > 20 * own.std() / draws**0.5


def test_wide_norms_are_those_of_the_recursion() -> None:
    x = TokenState(q=1.5, p=0.6)
    for norm in (LayerNorm(gain=0.8), RMSNorm(gain=0.8), Derf(alpha=0.7)):
        sublayer = Sublayer(branch=MLP(mlp_in=1.0, mlp_out=1.0, activation="relu"), input_norm=norm, skip_scale=0.0)
        step = HalfLayer(sublayer, 8, Exact())
        stream, _, record = step.forward(x.moments)
        chain = Chain((NormMap(norm=norm, d_model=10**7), feed_forward_block(sublayer.branch)))
        out, back = chain.forward(x), chain.backward(GRADIENT, x)
        np.testing.assert_allclose((out.q, out.p), stream, rtol=1e-6)
        np.testing.assert_allclose((back.J, back.K), step.transfer(record) @ (0.7, 0.2), rtol=1e-6)


@pytest.mark.parametrize(
    "branch",
    [
        SelfAttention(query=1.1, key=1.0, value=0.9, output=1.2, n_heads=2, attention_dropout=0.3, output_bias=0.2),
        MLP(mlp_in=1.2, mlp_out=0.9, activation="gelu", in_bias=0.3, out_bias=0.2),
        GatedMLP(gate=1.1, mlp_in=0.9, mlp_out=1.2),
    ],
    ids=lambda branch: branch.kind,
)
def test_composed_components_are_a_sublayer_of_the_recursion(branch: SelfAttention | MLP | GatedMLP) -> None:
    n, norm = 9, LayerNorm()
    sublayer = Sublayer(branch=branch, input_norm=norm, skip_scale=0.8, branch_scale=0.6, dropout=0.25)
    step = HalfLayer(sublayer, n, Exact())
    stream, _, record = step.forward(Moments(1.5, 0.6))
    if isinstance(branch, SelfAttention):
        block = attention_block(branch, n_tokens=n, d_model=64, dropout=0.25, finite_width=False)
    else:
        block = feed_forward_block(branch, dropout=0.25)
    whole = Residual(branch=Chain((NormMap(norm=norm, d_model=10**7), block)), skip_scale=0.8, branch_scale=0.6)
    out, back = whole.forward(STATE), whole.backward(GRADIENT, STATE)
    np.testing.assert_allclose((out.q, out.p), stream, rtol=1e-6)
    np.testing.assert_allclose((back.J, back.K), step.transfer(record) @ (0.7, 0.2), rtol=1e-6)


@pytest.mark.parametrize("finite_width", [False, True])
def test_cross_attention_to_tokens_like_the_queries_is_self_attention(finite_width: bool) -> None:
    branch = SelfAttention(query=1.2, key=1.0, value=0.9, output=1.1, n_heads=4, attention_dropout=0.2)
    given = {"d_model": 64, "finite_width": finite_width}
    alone = Attention(branch=branch, n_tokens=20, **given)
    across = CrossAttention(query=1.2, key=1.0, value=0.9, output=1.1, n_heads=4, attention_dropout=0.2)
    cross = CrossAttentionMoments(branch=across, memory=STATE, n_queries=20, n_memory=20, **given)
    a, b = alone.forward(STATE), cross.forward(STATE)
    np.testing.assert_allclose((a.q, a.p), (b.q, b.p), rtol=1e-12)
    asked, read = cross.backward(GRADIENT, STATE), cross.memory_backward(GRADIENT, STATE)
    total = alone.backward(GRADIENT, STATE)
    np.testing.assert_allclose((asked.J + read.J, asked.K + read.K), (total.J, total.K), rtol=1e-10)


def test_cross_attention_is_that_of_the_recursion() -> None:
    """Without corrections, biases and a memory of another width included; a single memory token is read as it is."""
    branch = CrossAttention(
        query=1.2, key=1.1, value=0.9, output=0.8, n_heads=4, value_bias=0.3, output_bias=0.2, d_memory=32
    )
    for n_memory, q, p in ((9, 1.2, 0.3), (1, 1.2, 0.3)):
        memory, x = TokenState(q=q, p=p), TokenState(q=0.9, p=0.2)
        cross = CrossAttentionMoments(
            branch=branch, memory=memory, n_queries=5, n_memory=n_memory, d_model=64, finite_width=False
        )
        step = HalfLayer(
            Sublayer(branch=branch, skip_scale=0.0), 5, Exact(), memory=Memory(memory.moments, n_memory, 2)
        )
        out, _, record = step.forward(x.moments)
        np.testing.assert_allclose((cross.forward(x).q, cross.forward(x).p), out, rtol=1e-12)
        back, sent = cross.backward(GRADIENT, x), cross.memory_backward(GRADIENT, x)
        start = (GRADIENT.J, GRADIENT.K)
        np.testing.assert_allclose((back.J, back.K), step.transfer(record) @ start, rtol=1e-12)
        np.testing.assert_allclose((sent.J, sent.K), step.to_memory(record) @ start, rtol=1e-12)
    assert cross.forward(x).q == pytest.approx((0.9 * 0.8) ** 2 * 1.2 + (0.3 * 0.8) ** 2 + 0.2**2)
    close((sent.J, sent.K), (2 * (0.9 * 0.8) ** 2 * 5 * (GRADIENT.J + 4 * GRADIENT.K), 0.0))


def test_cross_attention_stands_in_a_chain() -> None:
    branch = CrossAttention(query=1.2, key=1.0, value=0.9, output=1.1, n_heads=4)
    cross = CrossAttentionMoments(branch=branch, memory=STATE, n_queries=20, n_memory=10, d_model=64)
    block = Residual(branch=Chain((cross, Dropout(rate=0.1))))
    assert block.forward(STATE).q == pytest.approx(STATE.q + cross.forward(STATE).q / 0.9)
    passed = cross.backward(GradientState(J=GRADIENT.J / 0.9, K=GRADIENT.K), STATE)
    close(block.backward(GRADIENT, STATE).J, GRADIENT.J + passed.J)


def test_rows_of_cross_attention_sum_to_one() -> None:
    """Without dropout the sum of all gradients at the memory is that at the output, whatever the scores."""
    n, m = 12, 30
    branch = CrossAttention(query=2.0, key=1.0, value=0.9, output=1.0)
    cross = CrossAttentionMoments(
        branch=branch, memory=TokenState(q=1.0, p=0.2), n_queries=n, n_memory=m, d_model=64, projected=False, d_head=16
    )
    memory = cross.memory_backward(GRADIENT, STATE)
    arrived, sent = m * (memory.J + (m - 1) * memory.K), n * (GRADIENT.J + (n - 1) * GRADIENT.K)
    assert arrived == pytest.approx(0.81 * 16 / 64 * sent, rel=1e-12)


def test_causal_attention_of_equal_weights_counts_keys() -> None:
    """Means over positions and their pairs of averages over prefixes."""
    n = 16
    branch = SelfAttention(query=0.0, key=0.0, value=1.0, output=1.0, causal=True)
    attention = Attention(branch=branch, n_tokens=n, d_model=64, closure=Uniform())
    harmonic = np.sum(1 / np.arange(1, n + 1))
    out, back = attention.forward(TokenState(q=1.0, p=0.3)), attention.backward(GRADIENT, TokenState(q=1.0, p=0.3))
    assert out.q == pytest.approx(0.3 + 0.7 * harmonic / n, rel=1e-12)
    assert out.p == pytest.approx(0.3 + 0.7 * 2 * (n - harmonic) / (n * (n - 1)), rel=1e-12)
    close(back.J, 0.7 * harmonic / n + 0.2 * 2 * (1 - harmonic / n), rel=1e-12)


def test_published_attention() -> None:
    branch = SelfAttention(query=1.0, key=1.0, value=0.8, output=1.0, n_heads=2, attention_dropout=0.1)
    x, n, d = TokenState(q=1.0, p=0.3), 10, 50
    given = {"branch": branch, "n_tokens": n, "d_model": d, "d_head": 20, "projected": False}
    reference, leading = (Attention(form=form, **given) for form in ("reference", "leading"))
    out, back = reference.forward(x), reference.backward(GRADIENT, x)
    tail = (0.49 * 9 / 50 + np.exp(0.7) / 0.9 * (4 * 0.49 / 50 + 0.7)) / 10
    assert out.q == pytest.approx(0.64 * (0.3 + tail), rel=1e-12)
    assert out.p == pytest.approx(0.64 * (0.3 + (2 * 0.49 / 50 + 0.7) / 10), rel=1e-12)
    gain = 0.64 * 2 * 20 / 50
    close(back.J, gain * 0.7 * (1 + 9 * (2 / 7) * 0.9) / (10 * 0.9), rel=1e-12)
    close(back.K, gain * (0.7 + 9 * 0.2) / 10, rel=1e-12)
    assert leading.forward(x).q == leading.forward(x).p == pytest.approx(0.64 * 0.3)
    assert leading.backward(GRADIENT, x).J == leading.backward(GRADIENT, x).K == pytest.approx(gain * 0.2)


def test_published_softmax_and_relu_are_near_where_they_are_meant_to_be() -> None:
    logits = TokenState(q=0.5, p=0.0)
    exact = Softmax(n_keys=5000)
    for form in ("reference", "full"):
        published = Softmax(n_keys=5000, form=form)
        assert published.forward(logits).variance == pytest.approx(exact.forward(logits).variance, rel=0.01)
        close(published.backward(UNIT, logits).J, np.exp(0.5) / 5000**2, rel=0.01)
    x = TokenState(q=1.0, p=np.linspace(0, 1, 9))
    near, true = (ActivationMap(activation="relu", form=form).forward(x) for form in ("reference", "refined"))
    assert 0.001 < np.max(np.abs(near.p - true.p)) < 0.008 * 0.5


def test_overlaps_of_gaussian_tokens() -> None:
    """A polynomial of the overlaps whose mean over Wishart matrices is known."""
    q, p, d = 1.3, 0.4, 50
    assert over_tokens(lambda a, b, o: a * b, q, p, d) == pytest.approx(q * q + 2 * p * p / d, rel=1e-12)
    assert over_tokens(lambda a, b, o: o * o, q, p, d) == pytest.approx(p * p + (q * q + p * p) / d, rel=1e-12)
    assert over_tokens(lambda a, b, o: a * o, q, p, d) == pytest.approx(q * p * (1 + 2 / d), rel=1e-12)
    assert over_tokens(lambda a, b, o: a * a, q, p, None) == q * q
    wide, narrow = (GatedUnit(gate=1.0, mlp_in=1.0, d_model=width).forward(STATE).q for width in (None, 32))
    assert narrow > 1.03 * wide


def test_heads() -> None:
    given = {"d_model": 64, "n_outputs": 256, "n_tokens": 8}
    mean = head_map(Head(scale=2.0, pooling="mean", norm=None), **given)
    assert mean.forward(STATE).q == pytest.approx(4 * (1.5 + 7 * 0.6) / 8)
    back = mean.backward(UNIT, STATE)
    assert back.J == back.K == pytest.approx(4 * 4 / 64)
    first = head_map(Head(pooling="first", norm=None), **given).backward(UNIT, STATE)
    assert first.K == 0
    close(first.J, 4 / 8)
    tied = head_map(Head(tied=True, multiplier=0.5), stem=TokenStem(token=0.25), **given)
    assert tied.forward(STATE).q == pytest.approx(0.25 * 64 * 0.25**2)
    with pytest.raises(SpecError, match="needs the stem whose token table"):
        head_map(Head(tied=True), **given)


def test_dropout_lowers_the_input_correlation() -> None:
    for stem in (TokenStem(token=1.0, segment=0.5), TokenStem(token=1.0, segment=0.5, dropout=0.2)):
        state = stem_state(stem, token_overlap=0.1)
        assert state.cosine == pytest.approx((1 - stem.dropout) * (0.1 + 0.25 * 2 / 3) / 1.25)
    patches = TokenState(q=2.0, p=1.0, mean=0.3)
    plain = stem_state(PatchStem(patch=0.5, position=0.5), patches=patches)
    assert (plain.q, plain.p) == pytest.approx((0.75, 0.25))
    classed = stem_state(PatchStem(patch=0.5, position=0.5, class_token=1.0), patches=patches, n_tokens=5)
    assert (classed.q, classed.p) == pytest.approx(((4 * 0.5 + 1) / 5 + 0.25, 0.25 * 12 / 20))


def test_overlaps_of_a_corpus() -> None:
    assert corpus_overlap([[1, 2, 1], [3, 3]]) == pytest.approx((2 + 2) / (6 + 2))
    assert corpus_overlap(np.array([[4, 4, 5, 6]])) == corpus_overlap([4, 4, 5, 6]) == pytest.approx(2 / 12)
    assert count_overlap([2, 1, 1, 0]) == pytest.approx(2 / 12)
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1.0, 101)
    words = rng.choice(100, size=(4000, 50), p=frequencies / frequencies.sum())
    assert corpus_overlap(words) == pytest.approx(zipf_overlap(100), rel=0.02)
    assert count_overlap(np.bincount(words.ravel())) == pytest.approx(zipf_overlap(100), rel=0.03)
    assert zipf_overlap(7, 0.0) == pytest.approx(1 / 7)
    assert zipf_overlap(1000, 1.5) > zipf_overlap(1000) > zipf_overlap(1000, 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dropout(rate=1.0), SpecError, r"Dropout.rate must lie in \[0, 1\); got 1"),
        (lambda: zipf_overlap(1), DomainError, "vocabulary must be an integer >= 2, or all tokens are equal"),
        (lambda: zipf_overlap(100, -1.0), DomainError, "exponent must be finite and >= 0; got -1"),
        (lambda: zipf_overlap(100, 2.0, published=True), SpecError, "published overlap is that of exponent 1; got 2"),
        (lambda: corpus_overlap([[7, 7, 7], [7, 7]]), DomainError, "every token of the corpus is 7"),
        (lambda: corpus_overlap([[1], [2]]), DomainError, "a sequence of at least two tokens"),
        (lambda: corpus_overlap([["a", "b"]]), DomainError, "tokens must be integers"),
        (lambda: count_overlap([5, 0, 0]), DomainError, "fewer than two words occur"),
        (lambda: count_overlap([1.5, 2]), DomainError, "counts must be integers >= 0"),
        (lambda: TokenState(q=1.0, p=1.2), DomainError, r"p must satisfy \|p - mean\^2\| .* got 1.2"),
        (
            lambda: TokenState(q=[1.0, -1.0], p=0.0),
            DomainError,
            r"q must be finite and at least 0; got -1 at index \(1,",
        ),
        (lambda: TokenState(q=1.0, p=0.0, mean=2.0), DomainError, "mean must satisfy"),
        (lambda: TokenState(q=1.0, p=0.1, mean=0.9), DomainError, "p must satisfy"),
        (lambda: GradientState(J=1.0, K=1.5), DomainError, r"K must satisfy \|K\| <= J .* got 1.5"),
        (lambda: GradientState(J=-1.0, K=0.0), DomainError, "J must be finite and at least 0; got -1"),
        (lambda: ActivationMap(activation="rleu"), SpecError, "did you mean 'relu'"),
        (lambda: NormMap(norm=LayerNorm(), d_model=4), SpecError, "must be at least 5"),
        (
            lambda: NormMap(norm=LayerNorm(), d_model=64, form="published"),
            SpecError,
            "form must be one of refined, ref",
        ),
        (lambda: Softmax(n_keys=1), SpecError, "n_keys must be at least 2; got 1"),
        (lambda: Pooling(kind="max", n_tokens=3), SpecError, "must be 'mean' or 'first'; got 'max'"),
        (lambda: stem_state(TokenStem(token=1.0)), SpecError, "needs token_overlap"),
        (lambda: stem_state(TokenStem(token=1.0), token_overlap=1.0), DomainError, r"must lie in \[0, 1\); got 1"),
        (lambda: stem_state(PatchStem(patch=1.0)), SpecError, "needs the moments of its patches"),
        (
            lambda: stem_state(PatchStem(patch=1.0, class_token=1.0), patches=STATE),
            SpecError,
            "with a class token needs n_tokens >= 2; got None",
        ),
        (
            lambda: Attention(
                branch=SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, n_heads=3), n_tokens=4, d_model=64
            ),
            SpecError,
            "d_model must be a multiple of n_heads; got 64 and 3",
        ),
        (
            lambda: CrossAttentionMoments(
                branch=CrossAttention(query=1.0, key=1.0, value=1.0, output=1.0, d_memory=32),
                memory=STATE,
                n_queries=4,
                n_memory=4,
                d_model=64,
            ),
            NotCoveredError,
            "a memory of width 32 from tokens of width 64",
        ),
        (
            lambda: Chain((Linear(scale=0.0), NormMap(norm=LayerNorm(), d_model=64))).forward(STATE),
            DomainError,
            "LayerNorm has nothing to divide by",
        ),
        (
            lambda: NormMap(norm=RMSNorm(), d_model=64).backward(GRADIENT, TokenState(q=0.0, p=0.0)),
            DomainError,
            "RMSNorm has nothing to divide by",
        ),
        (
            lambda: Attention(
                branch=SelfAttention(query=1.0, key=1.0, value=np.ones(2), output=1.0, causal=True),
                n_tokens=4,
                d_model=64,
            ).forward(STATE),
            SpecError,
            r"a causal mask needs single numbers; branch.value is an array of shape \(2,\)",
        ),
        (
            lambda: Attention(
                branch=SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0), n_tokens=4, d_model=64
            ).forward(TokenState(q=1.0, p=-0.5)),
            DomainError,
            "got q=1, p=-0.5 with n_tokens=4",
        ),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_feed_forward_is_exact_for_one_norm() -> None:
    """ReLU: the closed block table, forward ``F kappa_1(r)`` and backward ``F kappa_0(r)``."""
    branch, x = MLP(mlp_in=1.1, mlp_out=0.9, activation="relu"), TokenState(q=1.0, p=0.3)
    out, back = FeedForward(branch=branch).forward(x), FeedForward(branch=branch).backward(UNIT, x)
    gain = (1.1 * 0.9) ** 2 / 2
    assert (out.q, out.p) == pytest.approx((gain, gain * 0.4827442838), rel=1e-9)
    close((back.J, back.K), (gain, gain * 0.5969866841), rel=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scales", [{"output": 0.0}, {"value": 0.0}, {"value": 0.0, "output_bias": 0.5}])
def test_branches_of_zero_scale_add_nothing(causal: bool, scales: dict[str, float]) -> None:
    """As Fixup, ReZero and SkipInit start: the stream and its gradients pass unchanged."""
    given = {"query": 1.0, "key": 1.0, "value": 1.0, "output": 1.0, **scales}
    attention = Attention(branch=SelfAttention(**given, n_heads=4, causal=causal), n_tokens=8, d_model=64)
    bias = given.get("output_bias", 0.0) ** 2
    assert (attention.forward(STATE).q, attention.forward(STATE).p) == (bias, bias)
    assert attention.backward(GRADIENT, STATE) == GradientState(J=0.0, K=0.0)
    for branch in (Chain((attention, Dropout(rate=0.1))), feed_forward_block(MLP(mlp_in=1.0, mlp_out=0.0))):
        silent = Residual(branch=branch, branch_scale=0.0)
        assert silent.forward(STATE).moments == STATE.moments and silent.backward(GRADIENT, STATE) == GRADIENT
    assert np.isnan(attention.forward(STATE).cosine) or bias


def test_moments_equal_up_to_rounding_have_correlation_one() -> None:
    state = TokenState(q=1.0, p=1.0 + 4e-16)
    assert state.cosine == state.correlation == 1.0
    one = NormMap(norm=LayerNorm(), d_model=64).forward(state)
    assert (one.q, one.p) == pytest.approx((1.0, 1.0), abs=1e-12)


def test_a_single_segment_is_the_ordinary_case() -> None:
    stem = TokenStem(token=0.5, segment=0.4)
    assert stem_state(stem, token_overlap=0.1, segment_overlap=1.0).p == pytest.approx(0.025 + 0.16)
    with pytest.raises(DomainError, match=r"segment_overlap must lie in \[0, 1\]; got 1.1"):
        stem_state(stem, token_overlap=0.1, segment_overlap=1.1)
