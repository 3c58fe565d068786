"""Theory against simulation, component by component, and that wrong formulas fail the same comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fathometer.attention import Annealed
from fathometer.errors import DomainError, NotCoveredError
from fathometer.measurement.components import Input, attention, correlated, linear, norm, simulate, simulate_tokens
from fathometer.models.seeding import named_generator
from fathometer.observables.components import (
    ActivationMap,
    Attention,
    GatedUnit,
    GradientState,
    NormMap,
    TokenState,
    attention_block,
    relu_of_mean,
)
from fathometer.papers.item import SMALL, Size
from fathometer.papers.moments.component_accuracy import Comparison, ComponentAccuracy, compare, component_accuracy
from fathometer.papers.moments.component_case import Case, scored_attention, values_of
from fathometer.papers.moments.component_cases import cases
from fathometer.plotting import to_png
from fathometer.plotting.moments.component_accuracy import draw_component_accuracy
from fathometer.spec import CrossAttention, DyT, LayerNorm, SelfAttention

TINY = replace(SMALL, d_model=128, n_tokens=32)
DRAWS = 24


def case(component: str, setting: str = "", size: Size = TINY) -> Case:
    """Return the first case of a component whose setting contains these words."""
    return next(one for one in cases(size) if one.component == component and setting in one.setting)


def wrong(comparisons: list[Comparison]) -> list[Any]:
    return [(one.setting, one.quantity, one.refined, one.simulated, one.error) for one in comparisons if not one.agrees]


@pytest.mark.parametrize("component", list(dict.fromkeys(one.component for one in cases(TINY))))
def test_components_agree_with_simulation(component: str) -> None:
    """At half the width of the published table: 64 to 256."""
    found = [one for known in cases(TINY) if known.component == component for one in compare(known, DRAWS)]
    assert found and wrong(found) == []


@pytest.mark.slow
def test_every_component_agrees_with_simulation_at_the_small_size() -> None:
    result = component_accuracy(SMALL)
    settings = {(one.component, one.setting) for one in result.comparisons}
    assert len(settings) >= 40 and len(result.components()) >= 19
    assert wrong(list(result.comparisons)) == []
    published = {
        (one.component, one.quantity): one.deviation(published=True)
        for one in result.comparisons
        if one.deviation(published=True) is not None
    }
    assert published["multi-head attention", "J"] < -0.4 < published["single-head attention", "K"]


def _mutants() -> dict[str, tuple[str, str, Callable[[TokenState, GradientState], dict[str, float]]]]:
    """Return wrong theories by name: the component and setting they belong to, and what they claim."""
    d, n, heads = TINY.d_model, TINY.n_tokens, TINY.n_heads
    four = ("q", "p", "J", "K")

    def of(component: Any, names: tuple[str, ...] = four) -> Callable[[TokenState, GradientState], dict[str, float]]:
        return lambda x, g: values_of(x, g, names, component)

    sharp = scored_attention(1.0, heads, value=1.1, attention_dropout=0.1)
    given = {"n_tokens": n, "d_model": d, "projected": False}
    self_attention = ("multi-head attention", "S 1, r 0.2, dropout 0.1")
    return {
        "no path through the scores": (
            *self_attention,
            of(Attention(branch=sharp, closure=Annealed(score_path=False), **given)),
        ),
        "no dropout on the weights": (
            *self_attention,
            of(Attention(branch=replace(sharp, attention_dropout=0.0), **given)),
        ),
        "a value scale that is not squared": (
            *self_attention,
            of(Attention(branch=replace(sharp, value=1.1**0.5), **given)),
        ),
        "the published gradient": (*self_attention, of(Attention(branch=sharp, form="reference", **given))),
        "output dropout left out": (
            "attention block",
            "S 1",
            of(
                attention_block(
                    scored_attention(1.0, heads, value=0.9, output=1.2, attention_dropout=0.1), n_tokens=n, d_model=d
                )
            ),
        ),
        "the published norm": ("LayerNorm", "d 32", of(NormMap(norm=LayerNorm(), d_model=32, form="reference"))),
        "the mean in front of ReLU left out": (
            "ReLU",
            "mean 0.7",
            lambda x, g: values_of(
                TokenState(q=x.variance, p=x.covariance), g, ("mean", *four), ActivationMap(activation="relu")
            ),
        ),
        "slopes in place of values": (
            "ReLU",
            "mean 0.7",
            lambda x, g: {"q": float(relu_of_mean(x)[1][0]), "p": float(relu_of_mean(x)[1][1])},
        ),
        "a gate without its slope": (
            "gated unit",
            "silu",
            lambda x, g: {"J": 2.42 * GatedUnit(gate=1.0, mlp_in=1.0).forward(x).q},
        ),
    }


@pytest.mark.parametrize("name", list(_mutants()))
def test_a_wrong_formula_fails(name: str) -> None:
    component, setting, claims = _mutants()[name]
    known = case(component, setting)
    x, g = known.refined.args[:2]  # type: ignore[attr-defined]
    simulated = known.simulate(seeds=2 * DRAWS)
    known = replace(known, simulate=lambda seeds: simulated)
    assert wrong(compare(known, DRAWS)) == []
    assert wrong(compare(replace(known, refined=partial(claims, x, g)), DRAWS))


def test_a_small_run_is_tabulated_and_drawn() -> None:
    found = [one for known in (case("linear"), case("LayerNorm"), case("softmax")) for one in compare(known, 12)]
    found.append(replace(found[-1], component="cross-attention", quantity="J_memory", refined=5.0, reference=0.01))
    result = ComponentAccuracy(comparisons=tuple(found), draws=12, about={"size": {}})
    table = result.table()
    assert [row[0] for row in table.rows] == [
        "linear", "LayerNorm", "  published", "softmax", "  published", "cross-attention", "  published",
    ]  # fmt: skip
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert [row[-1] for row in table.rows] == ["yes", "yes", "", "yes", "", "NO", ""]
    json.dumps(result.to_dict(), allow_nan=False)
    figure = draw_component_accuracy(result)
    labels = [text.get_text().strip() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "linear" and f"{found[-1].setting}, at memory" in labels
    assert to_png(figure)[:4] == b"\x89PNG"


def test_simulations_are_reproducible_and_refuse_what_they_cannot_draw() -> None:
    one = [Input(4, 16, 1.0, 0.3)]
    draw = linear(1.0, fan_out=16, fan_in=16)
    first, again = (simulate(draw, one, J=1.0, K=0.2, seeds=3) for _ in range(2))
    assert first == again
    assert first != simulate(draw, one, J=1.0, K=0.2, seeds=3, stream="other")
    with pytest.raises(DomainError, match="at least 2 seeds; got 1"):
        simulate(draw, one, J=1.0, K=0.2, seeds=1)
    with pytest.raises(DomainError, match="at least 2 seeds; got 1"):
        simulate_tokens(lambda generator: torch.ones(1, 2, 3), seeds=1)
    given = {"query": 1.0, "key": 1.0, "value": 1.0, "output": 1.0, "n_heads": 2}
    for field in (
        {"value_bias": 0.1},
        {"output_bias": 0.1},
        {"qk_norm": True},
        {"centred": True},
        {"n_kv_heads": 1},
    ):
        with pytest.raises(NotCoveredError, match=f"simulated attention with {next(iter(field))}="):
            attention(SelfAttention(**given, **field), width=8)
    with pytest.raises(NotCoveredError, match="d_memory=4"):
        attention(CrossAttention(**given, d_memory=4), width=8)
    with pytest.raises(DomainError, match="simulated norms are LayerNorm and RMSNorm; got DyT"):
        norm(DyT(alpha=1.0), 8)
    with pytest.raises(DomainError, match=r"mean\^2 <= p <= q; got mean=0.9, p=0.3, q=1"):
        correlated(1, 4, 16, 1.0, 0.3, named_generator(0, "x"), mean=0.9)
