"""Rank collapse and entropy collapse: worked numbers of arXiv:2505.24333, refusals, and deep random networks.

The worked numbers were computed by independent code from the published asymptotic theory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

from fathometer.attention import Annealed, Closure, Exact, RandomEnergy
from fathometer.errors import DomainError, SpecError
from fathometer.observables import (
    MODES,
    Criteria,
    attention_beta,
    condensing_context,
    critical_skip_scale,
    failure_modes,
)
from fathometer.papers.failure_modes.architecture import TEXT_COSINE, network, simulated_cosines
from fathometer.papers.failure_modes.figure_1 import predicted
from fathometer.papers.failure_modes.finite_width import FiniteWidth
from fathometer.propagation import propagate
from fathometer.spec import MLP, Block, LayerNorm, SelfAttention, Sublayer, Transformer, with_field

N_TOKENS = 512
CRITICAL_SKIPS = {6: 0.27, 12: 0.469, 24: 0.738, 60: 1.281, 100: 1.738}


def stack(n_layers: int = 60, n_tokens: int = N_TOKENS, **changes: Any) -> Transformer:
    return network(**{"n_layers": n_layers, "d_model": 512, "n_tokens": n_tokens, "beta": 0.5} | changes)


# Worked numbers.


def test_critical_skips_do_not_depend_on_the_temperature_of_spread_attention() -> None:
    spec = stack(beta=np.array([0.1, 0.7, 1.43]))
    found = critical_skip_scale(spec, tuple(CRITICAL_SKIPS), n_tokens=N_TOKENS, closure="random_energy")
    np.testing.assert_allclose(found, np.tile([[c] for c in CRITICAL_SKIPS.values()], 3), rtol=0, atol=6e-4)
    np.testing.assert_allclose(found, np.tile(found[:, :1], 3), rtol=1e-6)
    at = with_field(stack(24), "attention.skip_scale", float(found[2, 0]))
    assert failure_modes(at, n_tokens=N_TOKENS, closure="random_energy").cosine == pytest.approx(0.99, abs=1e-6)


def test_true_averages_depend_on_temperature_and_need_a_little_more_skip() -> None:
    spread, sharp = critical_skip_scale(stack(beta=np.array([0.5, 3.0])), [60], n_tokens=N_TOKENS)[0]
    assert 1.281 < spread < 1.286
    assert 1.05 < sharp < 1.12


def test_condensed_attention_spreads_again_with_depth() -> None:
    found = failure_modes(stack(beta=3.0), n_tokens=N_TOKENS, closure="random_energy")
    assert found.mode == "entropy collapse" and found.condensed_layers == 33
    run = propagate(stack(beta=3.0), n_tokens=N_TOKENS, q=1.0, p=TEXT_COSINE, closure=RandomEnergy())
    condensed = run.attention["logit_variance"] > 2 * np.log(N_TOKENS)
    assert np.array_equal(np.flatnonzero(condensed), np.arange(33))
    arriving = run.p[run.borders[:-1]]  # of unit tokens: condensed up to the cosine 1 - 2/beta^2
    assert np.array_equal(condensed, arriving < 1 - 2 / 3.0**2)


def test_attention_condenses_with_depth_without_a_norm() -> None:
    spec = stack(20, beta=1.0, sigma_v=0.5**0.5, placement="none")
    run = propagate(spec, n_tokens=N_TOKENS, q=1.0, p=0.2, closure=RandomEnergy())
    condensed = np.flatnonzero(run.attention["logit_variance"] > 2 * np.log(N_TOKENS))
    assert np.array_equal(condensed, np.arange(5, 20))
    first, anywhere = (
        failure_modes(spec, n_tokens=N_TOKENS, cosine=0.2, closure="random_energy", criteria=Criteria(anywhere=flag))
        for flag in (False, True)
    )
    assert (first.mode, anywhere.mode) == ("trainable", "entropy collapse")
    assert first.condensed_layers == anywhere.condensed_layers == 15
    assert anywhere.condensation > 1 > first.condensation == pytest.approx(np.sqrt(0.4), rel=1e-12)
    assert anywhere.participation > first.participation and anywhere.entropy < first.entropy


@pytest.mark.parametrize(
    ("criterion", "closure", "beta"),
    [("participation", "exact", 1.054), ("entropy", "exact", 1.147), ("condensation", "random_energy", 1.436)],
)
def test_where_entropy_collapse_begins(criterion: str, closure: str, beta: float) -> None:
    def excess(at: float) -> float:
        found = failure_modes(stack(1, 1024, beta=at), n_tokens=1024, closure=closure)
        return float(getattr(found, criterion)) - Criteria(entropy=criterion).limit

    assert brentq(excess, 0.5, 2.5) == pytest.approx(beta, abs=6e-4)
    for step, expected in ((-0.01, "trainable"), (0.01, "entropy collapse")):
        spec = stack(6, 1024, beta=beta + step)
        found = failure_modes(spec, n_tokens=1024, closure=closure, criteria=Criteria(entropy=criterion))
        assert found.mode == expected


def test_the_context_below_which_attention_condenses() -> None:
    assert condensing_context(2 * np.log(100.0)) == pytest.approx(100.0)
    assert attention_beta(stack(beta=1.3).blocks[0].sublayers[0].branch, N_TOKENS) == pytest.approx(1.3)


# Options.


def test_a_grid_holds_what_single_specs_give() -> None:
    betas, skips = np.array([0.2, 1.2, 2.6]), np.array([0.3, 1.0, 2.0, 4.0])
    grid = failure_modes(
        stack(12, beta=betas[None, :], skip_scale=skips[:, None]),
        n_tokens=N_TOKENS,
        criteria=Criteria(entropy="participation"),
    )
    assert set(grid.mode.ravel().tolist()) == set(MODES)
    for i, skip in enumerate(skips):
        for j, beta in enumerate(betas):
            one = failure_modes(
                stack(12, beta=beta, skip_scale=skip),
                n_tokens=N_TOKENS,
                criteria=Criteria(entropy="participation"),
            )
            for name in ("mode", "condensed_layers", "trainable_depth", "status"):
                assert getattr(grid, name)[i, j] == getattr(one, name)
            for name in ("cosine", "condensation", "participation", "entropy", "log_gradient"):
                assert getattr(grid, name)[i, j] == pytest.approx(float(getattr(one, name)), rel=1e-9)


def test_tokens_may_be_a_grid_too() -> None:
    found = failure_modes(stack(6), n_tokens=64, q=np.array([[0.5], [2.0]]), cosine=np.array([0.1, 0.5, 0.995]))
    assert found.mode.shape == found.trainable_depth.shape == (2, 3)
    assert np.all(found.mode[:, 2] == "rank collapse") and np.all(found.trainable_depth[:, 2] == 0)


def test_thresholds() -> None:
    spec = stack(6, beta=1.2, skip_scale=2.0)
    known = failure_modes(spec, n_tokens=N_TOKENS)
    for criterion, value in (
        ("condensation", known.condensation),
        ("participation", known.participation),
        ("entropy", known.entropy),
    ):
        modes = [
            failure_modes(
                spec, n_tokens=N_TOKENS, criteria=Criteria(entropy=criterion, threshold=float(value) * factor)
            ).mode
            for factor in (0.99, 1.01)
        ]
        expected = ["entropy collapse", "trainable"]
        assert modes == (expected[::-1] if criterion == "entropy" else expected)
    cosine = float(known.cosine)
    near, far = (
        failure_modes(spec, n_tokens=N_TOKENS, criteria=Criteria(rank=rank, entropy="condensation"))
        for rank in (1 - cosine + 0.001, 1 - cosine - 0.001)
    )
    assert (near.mode, far.mode) == ("rank collapse", "trainable")
    assert (near.trainable_depth, far.trainable_depth) == (5, 6)


def test_causal_masks_are_dropped() -> None:
    spec = stack(6)
    causal = spec.map_sublayers(
        lambda s: (
            Sublayer.post_norm(SelfAttention(**vars(s.branch) | {"causal": True}), s.stream_norm)
            if isinstance(s.branch, SelfAttention)
            else s
        )
    )
    assert causal.is_causal
    plain, masked = (failure_modes(s, n_tokens=64) for s in (spec, causal))
    assert plain.cosine == masked.cosine
    assert critical_skip_scale(causal, [6], n_tokens=64) == critical_skip_scale(spec, [6], n_tokens=64)


def test_streams_that_overflow_are_judged_by_their_last_finite_block() -> None:
    spec = stack(2000, beta=1.0, sigma_v=1.0, placement="none")
    found = failure_modes(spec, n_tokens=N_TOKENS, cosine=0.2)
    assert found.status == "overflow" and np.isnan(found.cosine)
    assert found.mode == "rank collapse" and found.trainable_depth < 30


def test_critical_skips_of_other_placements_and_at_the_ends_of_the_range() -> None:
    for placement in ("pre", "none"):  # where a skip of 1e4 overflows
        spec = stack(60, placement=placement)
        (found,) = critical_skip_scale(spec, [60], n_tokens=N_TOKENS)
        cosine = failure_modes(with_field(spec, "attention.skip_scale", float(found)), n_tokens=N_TOKENS).cosine
        assert cosine == pytest.approx(0.99, abs=1e-6)
    assert critical_skip_scale(stack(beta=4.0), [2], n_tokens=N_TOKENS, low=1e-2) == [1e-2]
    alone = with_field(stack(), "mlp.skip_scale", 0.0)  # the MLP forgets its input
    assert critical_skip_scale(alone, [60], n_tokens=N_TOKENS) == [np.inf]
    bounded = critical_skip_scale(stack(), [6, 60], n_tokens=N_TOKENS, high=0.9)
    assert bounded[0] == pytest.approx(0.2708, abs=1e-3) and bounded[1] == np.inf
    with pytest.raises(DomainError, match="the stream overflows in 600 blocks"):
        critical_skip_scale(stack(1, placement="none"), [600], n_tokens=N_TOKENS, low=2.0)


# Refusals.


def test_refusals() -> None:
    spec = stack(2)
    for n_tokens in (1, 0):
        with pytest.raises(DomainError, match="attention over one token cannot fail"):
            failure_modes(spec, n_tokens=n_tokens)
    with pytest.raises(DomainError, match="Did you pass a cosine"):
        failure_modes(spec, n_tokens=8, cosine=1.5)
    perceptron = MLP(mlp_in=1.0, mlp_out=1.0)
    without = Transformer(blocks=(Block(sublayers=(Sublayer.post_norm(perceptron, LayerNorm()),)),), d_model=8)
    with pytest.raises(SpecError, match="this spec has no attention"):
        failure_modes(without, n_tokens=8)
    with pytest.raises(SpecError, match="there is no closure 'exat'; did you mean 'exact'"):
        failure_modes(spec, n_tokens=8, closure="exat")
    with pytest.raises(SpecError, match="there is no criterion 'entropie'; did you mean 'entropy'"):
        Criteria(entropy="entropie")
    for rank in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(DomainError, match=r"rank must lie in \(0, 1\)"):
            Criteria(rank=rank)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(DomainError, match="threshold must be positive"):
            Criteria(threshold=threshold)
    for low, high in ((1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, np.inf)):
        with pytest.raises(DomainError, match="the range must satisfy 0 < low < high"):
            critical_skip_scale(spec, [2], n_tokens=8, low=low, high=high)


def test_temperatures_are_refused() -> None:
    branch = SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0)
    with pytest.raises(DomainError, match="one key has no temperature"):
        attention_beta(branch, 1)
    with pytest.raises(DomainError, match="600 tokens exceed the model's 512 positions"):
        attention_beta(branch, 600, context=512)
    assert attention_beta(branch, 512, context=512) == pytest.approx(1 / np.sqrt(np.log(512)))
    with pytest.raises(SpecError, match="queries and keys are normalised"):
        attention_beta(SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, qk_norm=True), 8)


# Deep random networks.


def errors(width: int, n_layers: int, beta: float, *, draws: int, seed: int) -> tuple[dict[str, float], float]:
    """Return the largest error of every theory over the depth, and the largest standard error of networks."""
    spec = stack(n_layers, width, d_model=width, beta=beta)
    seen = simulated_cosines(spec, n_tokens=width, q=1.0, cosine=TEXT_COSINE, draws=draws, seed=seed)
    closures: tuple[Closure, ...] = (Exact(), RandomEnergy(), Annealed())
    found = {c.name: float(np.abs(predicted(spec, width, c) - seen.mean(axis=0)).max()) for c in closures}
    return found, float(seen.std(axis=0, ddof=1).max() / np.sqrt(draws))


def test_a_dozen_blocks_follow_true_averages() -> None:
    for beta in (0.5, 3.0):
        found, noise = errors(192, 12, beta, draws=16, seed=7)
        assert found["exact"] < 4 * noise + 0.01
    assert found["annealed"] > 10 * found["exact"]


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "asymptotic"), [(0.5, 0.0), (3.0, 0.05)])
def test_fifty_blocks_follow_true_averages(beta: float, asymptotic: float) -> None:
    found, noise = errors(512, 50, beta, draws=32, seed=int(1e7 * beta))
    assert noise < 0.01
    assert found["exact"] < 0.03
    assert found["random_energy"] >= asymptotic
    assert found["annealed"] > 0.5 or beta < 1


def test_finite_width_moves_moments_in_the_right_direction() -> None:
    spec = stack(1, 1024, d_model=128, beta=0.5)
    wide, narrow = (predicted(spec, 1024, closure)[-1] for closure in (Exact(), FiniteWidth(d_model=128)))
    far = predicted(spec, 1024, FiniteWidth(d_model=10**9))[-1]
    assert narrow < wide  # tokens stay apart along the direction that scores select
    assert far == pytest.approx(wide, rel=1e-6)
