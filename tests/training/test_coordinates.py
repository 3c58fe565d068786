"""How far features move in the first steps, against width."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fathometer._version import __version__
from fathometer.errors import DomainError, SpecError
from fathometer.papers.effective.models import trunk, vision_model
from fathometer.plotting.canvas import to_png
from fathometer.plotting.effective import draw_coordinates
from fathometer.training import PatchClassifier, load_digits
from fathometer.training.coordinates import CoordinateCheck, _distance, coordinate_check
from fathometer.training.families import Recipe, digits_task, recipe

PLACES = ["stem", "block 1", "block 2", "attention logits", "output"]


def check(scheme: Any, **more: Any) -> CoordinateCheck:
    options = {"lr": 1e-4, "base_width": 32, "steps": (1, 2), "seeds": 3, "optimizer": "adamw"} | more
    widths = options.pop("widths", [32, 64, 128, 256])
    task = digits_task(load_digits(), batch_size=4)
    return coordinate_check(vision_model, widths, task=task, scheme=scheme, **options)


@pytest.mark.parametrize("scheme", ["neural-tangent", "hybrid", "maximal-update"])
def test_one_step_moves_features_as_theory_says(scheme: str) -> None:
    """Within 4.5 standard errors and 0.08, the drift of a slope whose values have corrections of some units of 1/n."""
    found = check(scheme)
    assert set(found.changes) == set(PLACES)
    for place, (slope, error) in found.slopes(1).items():
        assert abs(slope - found.expected[place]) <= 4.5 * error + 0.08, (place, slope, error)
    hidden = {"neural-tangent": -0.5, "hybrid": -0.25, "maximal-update": 0.0}[scheme]
    assert found.expected["block 1"] == hidden and found.expected["output"] == 0.0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_rate_for_all_blows_features_and_output_up(optimizer: str) -> None:
    """Within 4.5 standard errors and 0.12: the narrowest models count half of their corrections of order n^(-1/2)."""
    found = check("uniform", lr=1e-6, steps=(1,), optimizer=optimizer)
    for place, (slope, error) in found.slopes(1).items():
        assert abs(slope - found.expected[place]) <= 4.5 * error + 0.12, (place, slope, error)
    assert found.expected["output"] == (1.5 if optimizer == "adamw" else 1.0)


def test_one_step_of_adam_moves_every_entry_of_the_stem_by_a_known_amount() -> None:
    """The sum of a map of four pixels and a position, each entry moved by the rate: exact up to signs."""
    found = check("maximal-update", widths=[32, 64], steps=(1,), lr=1e-5)
    changes = found.changes["stem"][:, 0]
    data = load_digits().train
    largest = 1e-5 * (1 + float(data.abs().sum(dim=-1).max()))
    assert (changes > 0.3e-5).all() and (changes < largest).all()


def two_heads(width: int, seed: int) -> nn.Module:
    """The vision model with heads that widen."""
    model = PatchClassifier(trunk(width, causal=False, d_head=width // 2), seed=seed, token_scale=2**0.5)
    with torch.no_grad():
        model.positions.mul_(0.5)
        model.head.weight.copy_(vision_model(width, seed).head.weight)
    return model


@pytest.mark.parametrize("scheme", ["neural-tangent", "maximal-update"])
def test_a_fixed_number_of_heads_moves_logits_by_half_a_power_more(scheme: str) -> None:
    """Within 4.5 standard errors and 0.08; blocks are on their way from one power to the other."""
    task = digits_task(load_digits(), batch_size=4)
    options: dict[str, Any] = {"lr": 1e-5, "base_width": 64, "steps": (1,), "seeds": 8, "fixed": "n_heads"}
    found = coordinate_check(two_heads, [64, 128, 256, 512], task=task, scheme=scheme, **options)
    features = {"neural-tangent": -0.5, "maximal-update": 0.0}[scheme]
    assert found.expected == {"stem": features, "attention logits": features + 0.5, "output": 0.0}
    slopes = found.slopes(1)
    for place, wanted in found.expected.items():
        slope, error = slopes[place]
        assert abs(slope - wanted) <= 4.5 * error + 0.08, (place, slope, error)
    for place in ("block 1", "block 2"):
        assert features < slopes[place][0] < features + 0.5
    assert to_png(draw_coordinates(found))[:4] == b"\x89PNG"


def test_a_recipe_with_rates_of_its_own_has_no_theory() -> None:
    scheme = recipe("hybrid").scheme
    options: dict[str, Any] = {"widths": [32, 64], "seeds": 2, "steps": (1,)}
    mine = check(Recipe(name="mine", scheme=scheme, rates={"query": 2.0}), **options)
    assert mine.expected == {} and mine.protocol["rates"] == {"query": 2.0}
    assert check(Recipe(name="none", scheme=scheme), **options).expected != {}
    remarks = [text.get_text() for ax in draw_coordinates(mine).axes for text in ax.texts]
    assert not any("theory" in text for text in remarks)


def test_masked_logits_do_not_count() -> None:
    """The mean is over what is visible; a logit that overflows is not taken for a masked one."""
    hidden = torch.tensor([[1.0, -math.inf], [2.0, 3.0]])
    after = torch.tensor([[2.0, -math.inf], [3.0, 4.0]])
    assert _distance([hidden], [after]) == 1.0
    assert math.isnan(_distance([hidden], [torch.tensor([[2.0, -math.inf], [3.0, -math.inf]])]))


def test_slopes_and_their_errors_over_seeds() -> None:
    widths = np.array([4, 8, 16])
    changes = np.stack([widths**power for power in (0.5, 1.0, 1.5)], axis=-1)[:, None]
    found = CoordinateCheck(
        scheme="x", s=0.0, uniform=False, widths=widths, steps=(1,), changes={"stem": changes}, protocol={}
    )
    assert found.slopes(1)["stem"] == pytest.approx((1.0, 0.5 / np.sqrt(3)))


def test_result_and_figure() -> None:
    before = torch.get_rng_state()
    told: list[tuple[int, int]] = []
    found = check(
        0.5, widths=[64, 32], seeds=2, steps=(2, 1, 2), progress=lambda _, done, all_: told.append((done, all_))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and torch.equal(before, torch.get_rng_state())
    assert found.widths.tolist() == [32, 64] and found.steps == (1, 2)
    assert found.changes["output"].shape == (2, 2, 2) and (found.changes["output"] > 0).all()
    data = json.loads(found.to_json())
    assert data["protocol"]["version"] == __version__ and data["protocol"]["model"].startswith("PatchClassifier, ")
    assert data["slopes"]["1"]["stem"] == list(found.slopes(1)["stem"])
    assert to_png(draw_coordinates([found, found]))[:4] == b"\x89PNG"
    again = check(0.5, widths=[32, 64], seeds=2, steps=(1, 2))
    np.testing.assert_array_equal(found.changes["stem"], again.changes["stem"])


def test_bad_input() -> None:
    for change, message in (
        ({"steps": ()}, "steps must be positive whole numbers; got 0"),
        ({"steps": (0, 1)}, "steps must be positive whole numbers; got 0"),
        ({"seeds": 1}, "at least 2 seeds"),
        ({"widths": [32]}, "at least two different widths"),
        ({"lr": -1.0}, "learning rates must be positive and finite"),
        ({"base_width": 12}, None),
    ):
        if message is None:
            with pytest.raises(SpecError):
                check("hybrid", **change)
        else:
            with pytest.raises(DomainError, match=message):
                check("hybrid", **change)
    with pytest.raises(SpecError, match="there is no recipe 'hybird'; did you mean 'hybrid'"):
        check("hybird")


@pytest.mark.slow
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
def test_three_steps_over_an_eightfold_width(s: float) -> None:
    found = check(s, widths=[64, 128, 256, 512], base_width=64, steps=(1, 3), seeds=4)
    for step in (1, 3):
        for place, (slope, error) in found.slopes(step).items():
            assert abs(slope - found.expected[place]) <= 4.5 * error + 0.06, (step, place, slope, error)
