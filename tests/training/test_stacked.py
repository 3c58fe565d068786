"""Training together: every network trains as it would alone, and a failing one takes nobody with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fathometer as fm
from fathometer.errors import DomainError
from fathometer.training import PatchClassifier, StackedClassifier, load_digits, train, train_together
from fathometer.training.runs import diverged

DATA = load_digits()


def build(mlp_in: Any = 0.55, **changes: Any) -> fm.Transformer:
    arguments: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "norm": fm.LayerNorm(),
        "scales": fm.Scales(query=0.55, key=0.55, value=0.55, output=0.55, mlp_in=mlp_in, mlp_out=1.1),
    }
    return fm.Transformer.uniform(**arguments | changes)


GRID = build(np.array([0.3, 0.9, 2.0]))


@pytest.mark.parametrize("spec", [GRID, build(np.array([0.3, 0.9, 2.0]), norm=fm.Derf(alpha=0.7, shift=0.1))])
def test_a_stacked_classifier_is_its_patch_classifiers(spec: fm.Transformer) -> None:
    model = StackedClassifier(spec, seed=1, token_scale=[0.5, 1.0, 2.0])
    with torch.no_grad():
        for parameter in (model.norm_weight, model.norm_bias, model.head, model.head_bias):
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    logits = model(DATA.train[:7])
    assert logits.shape == (3, 7, 10)
    for index in range(3):
        torch.testing.assert_close(model.single(index)(DATA.train[:7]), logits[index], rtol=1e-5, atol=2e-5)


def test_tokens_have_their_scale_and_heads_start_at_zero() -> None:
    model = StackedClassifier(build(), n_copies=400, token_scale=np.linspace(0.1, 40, 400))
    for parameter, fan_in in ((model.embed, 4), (model.positions, 1)):
        unit = parameter.detach()[[9, 399]].square().mean(dim=(1, 2)).sqrt() * (2 * fan_in) ** 0.5
        np.testing.assert_allclose(unit, [1.0, 40.0], rtol=5 / 128**0.5)
    assert not model(DATA.train[:2]).any()
    assert model.n_networks == 400


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_together_is_one_after_another(optimizer: str) -> None:
    model = StackedClassifier(GRID)
    rates = [0.1, 0.2, 0.5] if optimizer == "sgd" else [3e-3, 5e-3, 1e-2]
    options: dict[str, Any] = {"steps": 25, "warmup": 3, "batch_size": 32, "optimizer": optimizer, "seed": 4}
    networks = [model.single(index) for index in range(3)]
    together = train_together(model, DATA, rate=rates, **options)
    assert together.losses.shape == (25, 3)
    assert together.losses[0] == pytest.approx(math.log(10), rel=1e-5)
    assert np.ptp(together.losses, axis=0).min() > 0.05
    assert (together.status == "ok").all() and (together.frozen_at == -1).all()
    for index, network in enumerate(networks):
        alone = train(network, DATA, rate=rates[index], **options)
        np.testing.assert_allclose(together.losses[:, index], alone.losses, rtol=0, atol=1e-4)
        assert together.accuracy[index] == pytest.approx(alone.accuracy, abs=1 / len(DATA.test) + 1e-9)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(network(DATA.test), DATA.test_labels)
        assert together.test_loss[index] == pytest.approx(float(loss), abs=1e-3)


def test_a_stack_of_three_is_three_stacks_of_one() -> None:
    model = StackedClassifier(GRID, seed=2)
    single = [StackedClassifier(build(mlp_in), seed=2) for mlp_in in (0.3, 0.9, 2.0)]
    with torch.no_grad():
        for index, one in enumerate(single):
            for mine, theirs in zip(one.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs[index : index + 1])
    options: dict[str, Any] = {"rate": 0.05, "steps": 10, "clip": 0.5}
    together = train_together(model, DATA, **options)
    alone = np.concatenate([train_together(one, DATA, **options).losses for one in single], axis=1)
    np.testing.assert_allclose(together.losses, alone, rtol=0, atol=1e-4)


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    """Two small steps with momentum 0.9 move a network by rate * 2.9 * norm of its gradient, clipped or not."""

    def norms(clip: float | None) -> torch.Tensor:
        model = StackedClassifier(GRID)
        with torch.no_grad():
            model.head.normal_(generator=torch.Generator().manual_seed(0))
            model.head.mul_(torch.tensor([0.03, 0.3, 1.0]).view(3, 1, 1))
        before = [p.detach().clone() for p in model.parameters()]
        train_together(model, DATA, rate=1e-4, steps=2, batch_size=1437, clip=clip)
        moved = [(p.detach() - q).flatten(1) for p, q in zip(model.parameters(), before, strict=True)]
        return torch.cat(moved, dim=1).norm(dim=1) / 2.9e-4

    free, clipped = norms(None), norms(0.2)
    assert free[0] < 0.2 < free[1] < free[2]
    torch.testing.assert_close(clipped, free.clamp(max=0.2), rtol=2e-2, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_diverging_network_leaves_the_others_untouched(optimizer: str, clip: float | None) -> None:
    grid = build(np.array([0.55, 0.55, 0.55]), norm=None)
    rate = 0.02 if optimizer == "sgd" else 1e-3
    options: dict[str, Any] = {"steps": 12, "optimizer": optimizer, "clip": clip}
    calm = train_together(StackedClassifier(grid), DATA, rate=rate, **options)
    wild_model = StackedClassifier(grid)
    start = [p.detach().clone() for p in wild_model.parameters()]
    wild = train_together(wild_model, DATA, rate=[rate, 1e38, rate], **options)
    for name in ("losses", "test_loss", "accuracy", "frozen_at"):
        np.testing.assert_array_equal(getattr(calm, name)[..., [0, 2]], getattr(wild, name)[..., [0, 2]])
    assert wild.status.tolist() == ["ok", "diverged", "ok"]
    step = int(wild.frozen_at[1])
    assert 0 <= step < 11
    assert np.isnan(wild.losses[step + 1 :, 1]).all() and np.isfinite(wild.losses[:step, 1]).all()
    assert wild.test_loss[1] == np.inf and np.isnan(wild.accuracy[1])
    assert all(torch.isfinite(p[[0, 2]]).all() for p in wild_model.parameters())
    assert any(not torch.equal(p[0], q[0]) for p, q in zip(wild_model.parameters(), start, strict=True))


def test_a_network_that_ends_above_its_start_has_diverged() -> None:
    run = train_together(StackedClassifier(build(), n_copies=2), DATA, rate=[0.05, 3e3], steps=10)
    assert run.status.tolist() == ["ok", "diverged"]
    losses = np.array([[1.0, 1.0, 1.0], [1.04, 1.06, np.nan]]).repeat([1, 4], axis=0)
    assert diverged(losses).tolist() == [False, True, True]


def test_progress_and_the_random_state() -> None:
    calls: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    train_together(StackedClassifier(build()), DATA, rate=0.1, steps=3, progress=lambda *call: calls.append(call))
    assert calls == [("training together", done, 3) for done in (1, 2, 3)]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown; accepted: sgd, adamw"),
        ({"steps": 1}, "steps must be >= 2 and warmup >= 0; got 1 and 0"),
        ({"warmup": -1}, "steps must be >= 2 and warmup >= 0; got 2 and -1"),
        ({"batch_size": 1438}, r"batch_size must lie in \[1, 1437\]; got 1438"),
        ({"rate": 0.0}, "rate must be positive and finite; got 0.0"),
        ({"rate": [0.1, math.nan, 0.1]}, "rate must be positive and finite"),
        ({"rate": [0.1, 0.1]}, r"rate must be one number or have shape \(3,\); got shape \(2,\)"),
        ({"clip": 0.0}, "clip must be positive; got 0.0"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        train_together(StackedClassifier(GRID), DATA, **{"rate": 0.1, "steps": 2} | changes)


def test_bad_token_scales_and_networks() -> None:
    with pytest.raises(DomainError, match=r"token_scale must be one number or have shape \(3,\)"):
        StackedClassifier(GRID, token_scale=[1.0, 2.0])
    with pytest.raises(DomainError, match=r"index must lie in \[0, 2\]; got 3"):
        StackedClassifier(GRID).single(3)
    assert isinstance(StackedClassifier(GRID).single(2), PatchClassifier)
