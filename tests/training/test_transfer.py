"""Loss against learning rate at several widths: the optimum on planted losses, the journal, and small real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fathometer._version import __version__
from fathometer.errors import BatchError, DomainError, ModelError, SpecError
from fathometer.papers.effective.models import language_model, vision_model
from fathometer.plotting.canvas import to_png
from fathometer.plotting.effective import draw_transfer
from fathometer.training import load_digits
from fathometer.training.families import Family, Recipe, Task, digits_task, language_task, recipe, train_steps
from fathometer.training.text import byte_text, text_of_bytes
from fathometer.training.transfer import TransferCheck, transfer_check

RATES = [2.0**power for power in range(-8, -3)]


def planted(best: list[float], *, noise: float = 0.0, seeds: int = 3, curvature: float = 0.1) -> TransferCheck:
    """Return parabolas in log2 of the rate with given minima; the noise is one constant a seed and rate."""
    x = np.log2(RATES)
    rng = np.random.default_rng(0)
    losses = np.stack([curvature * (x - at) ** 2 + 1 for at in best])[:, :, None] + noise * rng.normal(
        size=(len(best), len(x), seeds)
    )
    return TransferCheck(
        schemes=("one",),
        widths=np.array([8 * 2**i for i in range(len(best))]),
        rates=np.array(RATES),
        losses={"one": losses},
        status={"one": np.full(losses.shape, "ok")},
        protocol={"base_width": 8, "steps": 10},
    )


def test_the_optimum_of_a_parabola_is_found_between_grid_points() -> None:
    check = planted([-5.7, -6.2])
    first, last = check.optima("one")
    assert math.log2(first.rate) == pytest.approx(-5.7, abs=1e-9) and first.grid_rate == 2.0**-6
    assert math.log2(last.rate) == pytest.approx(-6.2, abs=1e-9) and last.status == "ok"
    shift = check.shift("one")
    assert (shift.grid, shift.fitted) == pytest.approx((0.0, -0.5), abs=1e-9)
    assert first.error == pytest.approx(0.0, abs=1e-9) and shift.error == pytest.approx(0.0, abs=1e-9)


def test_errors_are_those_of_repeated_experiments() -> None:
    """The vertex of (f-, f0, f+) moves by about (f- - f+) / (4 curvature): noise / (sqrt(8) curvature sqrt(seeds))."""
    noise, seeds = 0.01, 12
    expected = noise / (8**0.5 * 0.1 * seeds**0.5)
    found = [one.error for one in planted([-6.0] * 40, noise=noise, seeds=seeds).optima("one")]
    assert np.mean(found) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("best", "status", "shown"),
    [
        ([-9.0, -10.0], "edge", "+0 (edge)"),  # both at the lower end: where the optima are is not known
        ([-6.0, -2.0], "edge", "+2 (edge)"),
        ([-6.0, -6.0], "ok", "+0 (+0.00 +- 0.00)"),
    ],
)
def test_an_optimum_at_an_end_of_the_grid_proves_nothing(best: list[float], status: str, shown: str) -> None:
    check = planted(best, noise=1e-6)
    shift = check.shift("one")
    assert shift.status == status and math.isnan(shift.error) == (status != "ok")
    assert str(shift).replace("-0.00", "+0.00") == shown
    assert [math.isnan(one.error) for one in check.optima("one")] == [one.status != "ok" for one in check.optima("one")]
    remarks = [text.get_text() for ax in draw_transfer(check).axes for text in ax.texts]
    assert any("stays" in text for text in remarks) == (status == "ok")
    assert any("is not known" in text for text in remarks) == (status == "edge")
    assert json.loads(check.to_json())["shifts"]["one"]["status"] == status


def test_runs_that_diverge_are_seen() -> None:
    check = planted([-6.0, -4.1])
    losses = check.losses["one"].copy()
    losses[1, -1, 0] = np.inf  # one of three seeds, at the rate beside the optimum's
    losses[0] = np.inf
    mixed = TransferCheck(**{**vars(check), "losses": {"one": losses}})
    first, last = mixed.optima("one")
    assert first.status == "diverged" and math.isnan(first.rate)
    assert last.status == "cliff" and last.rate == last.grid_rate == 2.0**-5
    assert mixed.shift("one").status == "diverged" and str(mixed.shift("one")) == "diverged"
    assert planted([-2.0, -9.0]).optima("one")[0].status == "edge"
    beside = TransferCheck(**{**vars(check), "losses": {"one": np.concatenate([check.losses["one"][:1], losses[1:]])}})
    assert beside.shift("one").status == "cliff" and math.isnan(beside.shift("one").error)
    data = json.loads(json.dumps(mixed.to_dict(), allow_nan=False))
    assert data["losses"]["one"][1][-1][0] is None and data["optima"]["one"][0]["rate"] is None
    assert to_png(draw_transfer(mixed))[:4] == b"\x89PNG"


class Narrow(nn.Module):
    """Two residual blocks with attention around a table and a head, with a random bias in the head."""

    def __init__(self, width: int, seed: int, n_layers: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(5, width)
            layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.encoder(self.embed(tokens)))}


def copying(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(5, (4, 6), generator=generator)
        yield tokens, tokens


COPY = Task(name="copying", batches=copying)
QUICK: dict[str, Any] = {"task": COPY, "rates": [1e-3, 1e-2, 1e-1], "base_width": 8, "steps": 6, "seeds": 2}


def test_rates_follow_the_scheme_and_all_recipes_agree_at_the_base_width() -> None:
    family = Family(Narrow, COPY, base_width=8, fixed="n_heads")
    states = []
    for name in ("uniform", "neural-tangent", "hybrid", "maximal-update"):
        model, updater = family.start(recipe(name), width=8, seed=3, rate=1e-2)
        assert {group["lr"] for group in updater.param_groups} == {1e-2}
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.equal(state, states[0]) for state in states)
    model, updater = family.start(recipe("neural-tangent"), width=32, seed=0, rate=1e-2)
    rates = {group["role"]: group["lr"] for group in updater.param_groups}
    assert rates["mlp_in"] == pytest.approx(1e-2 / 8) and rates["token_embedding"] == pytest.approx(1e-2 / 2)
    assert rates["head"] == pytest.approx(1e-2 / 4) and rates["head_bias"] == 1e-2
    assert torch.equal(model.head.bias, Narrow(32, 0).head.bias)
    slow = Recipe(name="slow", scheme=recipe("neural-tangent").scheme, rates={"token_embedding": 0.125})
    rates = {g["role"]: g["lr"] for g in family.start(slow, width=32, seed=0, rate=1e-2)[1].param_groups}
    assert rates["token_embedding"] == pytest.approx(1e-2 / 8) and rates["mlp_in"] == pytest.approx(1e-2 / 8)
    uniform = family.start(recipe("uniform"), width=32, seed=0, rate=1e-2)[1]
    assert {group["lr"] for group in uniform.param_groups} == {1e-2}
    heads = {
        name: float(family.start(recipe(name), width=128, seed=0, rate=1)[0].head.weight.detach().std())
        for name in ("uniform", "maximal-update")
    }
    assert heads["maximal-update"] == pytest.approx(heads["uniform"] / 4, rel=1e-5)


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    told: list[int] = []

    def stop(label: str, done: int, total: int) -> None:
        told.append(total)
        if done == 5:
            raise KeyboardInterrupt

    check = partial(transfer_check, Narrow, [8, 16], fixed="n_heads", schemes=("uniform", "hybrid"), **QUICK)
    with pytest.raises(KeyboardInterrupt):
        check(journal=path, progress=stop)
    first = json.loads(path.read_text())["runs"]
    assert len(first) == 3  # recipes share the runs at the base width
    kept = dict.fromkeys(first, 0.125)  # what a journal holds is believed, not computed again
    path.write_text(json.dumps({**json.loads(path.read_text()), "runs": kept}))
    result = check(journal=path)
    assert told[0] == 24 and len(json.loads(path.read_text())["runs"]) == 6 + 2 * 6
    assert (result.losses["uniform"][0, :, 0] == 0.125).all() and (result.losses["hybrid"][0, :, 0] == 0.125).all()
    plain = check()
    np.testing.assert_array_equal(result.losses["hybrid"][1], plain.losses["hybrid"][1])
    np.testing.assert_array_equal(plain.losses["uniform"][0], plain.losses["hybrid"][0])
    assert (plain.losses["uniform"][1] != plain.losses["hybrid"][1]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]
    with pytest.raises(SpecError, match="holds runs of another protocol: steps is 6 there and 7 here"):
        transfer_check(Narrow, [8, 16], fixed="n_heads", journal=path, **{**QUICK, "steps": 7})
    path.write_text("{")
    with pytest.raises(SpecError, match=r"runs\.json' is no journal of a transfer check"):
        check(journal=path)
    with pytest.raises(SpecError, match="cannot write the journal"):
        check(journal=tmp_path / "nowhere" / "runs.json")
    path.write_text(json.dumps({"schema": 2, "protocol": [], "runs": {}}))
    with pytest.raises(SpecError, match="holds runs of another protocol: model is None there and 'Narrow, "):
        check(journal=path)
    for content in ({"schema": 2, "protocol": 1, "runs": {}}, {"protocol": {}, "runs": {}}, []):
        path.write_text(json.dumps(content))
        with pytest.raises(SpecError, match="is no journal of a transfer check"):
            check(journal=path)
    path.write_text(json.dumps({"schema": 1, "protocol": {}, "runs": {}}))
    with pytest.raises(SpecError, match=r"runs\.json' has schema 1; accepted: 2; name another file"):
        check(journal=path)


def wider_tables(width: int, seed: int) -> nn.Module:
    model = Narrow(width, seed)
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    return model


def one_head(width: int, seed: int) -> nn.Module:
    model = Narrow(width, seed)
    for layer in model.encoder.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dim = 1, width
    return model


@pytest.mark.parametrize(
    ("build", "more", "message"),
    [
        (partial(Narrow, n_layers=4), {}, r"model is 'Narrow, \d+ parameters at width 8, \w{12}' there and 'Narrow, "),
        (wider_tables, {}, "model is "),
        (one_head, {}, "model is "),
        (Narrow, {"overrides": {"head.weight": "head"}}, "overrides is {} there and {'head.weight': 'head'} here"),
    ],
)
def test_a_journal_does_not_serve_other_models(tmp_path: Path, build: Any, more: dict[str, Any], message: str) -> None:
    options = {"fixed": "n_heads", "schemes": ("uniform",), "journal": tmp_path / "runs.json", **QUICK}
    transfer_check(Narrow, [8, 16], **options)
    with pytest.raises(SpecError, match=f"holds runs of another protocol: {message}"):
        transfer_check(build, [8, 16], **options, **more)


def test_a_journal_tells_rates_apart_and_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.json"
    options = {**QUICK, "rates": [1e-3, float(np.nextafter(1e-3, 1)), 1e-2]}
    found = transfer_check(Narrow, [8, 16], fixed="n_heads", schemes=("hybrid",), journal=path, **options)
    assert len(json.loads(path.read_text())["runs"]) == 2 * 2 * 3
    assert found.protocol["version"] == __version__

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    before = path.read_bytes()
    with pytest.raises(SpecError, match=r"cannot write the journal .*No space left"):
        transfer_check(Narrow, [8, 32], fixed="n_heads", schemes=("hybrid",), journal=path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"] and path.read_bytes() == before


def test_a_task_is_named_for_what_is_read() -> None:
    texts = [
        text_of_bytes(content * 100, name="mine.txt", held_out=share)
        for content, share in ((b"abcd", 0.2), (b"abce", 0.2), (b"abcd", 0.3))
    ]
    assert len({language_task(text, n_tokens=4, batch_size=2).name for text in texts}) == 3
    assert len({digits_task(load_digits(n_test=n), batch_size=2).name for n in (100, 200)}) == 2


def test_a_run_that_explodes_is_recorded_as_diverged() -> None:
    found = transfer_check(
        Narrow,
        [8, 16],
        fixed="n_heads",
        schemes=("uniform",),
        optimizer="sgd",
        **{**QUICK, "rates": [1e-2, 1e-1, 1e25]},
    )
    assert (found.status["uniform"][:, -1] == "diverged").all() and (found.status["uniform"][:, 0] == "ok").all()
    assert np.isinf(found.losses["uniform"][:, -1]).all()


def test_dropout_is_seeded_and_the_random_state_left_alone() -> None:
    def build(width: int, seed: int) -> nn.Module:
        model = Narrow(width, seed)
        model.encoder.layers[0].dropout1.p = 0.5
        return model

    check = partial(transfer_check, build, [8, 16], fixed="n_heads", schemes=("hybrid",), **QUICK)
    before = torch.get_rng_state()
    first = check()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    np.testing.assert_array_equal(first.losses["hybrid"], check().losses["hybrid"])
    without = transfer_check(Narrow, [8, 16], fixed="n_heads", schemes=("hybrid",), **QUICK)
    assert (first.losses["hybrid"] != without.losses["hybrid"]).all()


def test_training_learns() -> None:
    model, updater = Family(Narrow, COPY, base_width=8, fixed="n_heads").start(
        recipe("hybrid"), width=16, seed=0, rate=3e-2
    )
    losses = list(train_steps(model, updater, copying(0), steps=60, warmup=5))
    assert len(losses) == 60 and losses[-1] < 0.3 and losses[0] > 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rates": [1e-3, 1e-2]}, DomainError, "at least three different rates"),
        ({"rates": [1e-3, 1e-2, math.nan]}, DomainError, "learning rates must be positive and finite"),
        ({"rates": [1e-3, 1e-2, 0.0]}, DomainError, "learning rates must be positive and finite"),
        ({"steps": 4}, DomainError, "steps must be at least 5"),
        ({"warmup": -1}, DomainError, "warmup not negative"),
        ({"seeds": 1}, DomainError, "an error bar needs at least 2 seeds"),
        ({"base_width": 0}, DomainError, "base_width must be positive whole numbers; got 0"),
        ({"schemes": ("unifrom",)}, SpecError, "there is no recipe 'unifrom'; did you mean 'uniform'"),
        ({"schemes": (1.5,)}, DomainError, r"s must lie in \[0, 1\]"),
        ({"schemes": ("hybrid", "hybrid")}, SpecError, "schemes must be different"),
        ({"optimizer": "adam"}, SpecError, "optimizer must be 'sgd' or 'adamw'; got 'adam'"),
        ({"fixed": "heads"}, SpecError, "fixed must be 'd_head' or 'n_heads'; got 'heads'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transfer_check(Narrow, [8, 16], **{"fixed": "n_heads", **QUICK, **change})


def test_models_and_tasks_that_do_not_fit() -> None:
    for widths in ([8], [8, 8], [8, 0]):
        with pytest.raises(DomainError, match=r"widths"):
            transfer_check(Narrow, widths, **QUICK)
    with pytest.raises(ModelError, match=r"build\(8, seed\) returned a model whose stream is 16 wide"):
        transfer_check(lambda width, seed: Narrow(16, seed), [8, 16], fixed="n_heads", **QUICK)
    pooled = Task(name="one target", batches=lambda seed: ((x, y[:, 0]) for x, y in copying(seed)))
    with pytest.raises(BatchError, match=r"targets of shape \(4,\) do not go with outputs of shape \(4, 6, 5\)"):
        transfer_check(Narrow, [8, 16], fixed="n_heads", **{**QUICK, "task": pooled})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["language", "digits"])
def test_the_best_rate_stays_under_the_rules_and_runs_away_without(task: str) -> None:
    """Over an 8-fold width: at most one factor of two under every scheme, at least two for one rate for all."""
    text = byte_text()
    if task == "language":
        build: Any = partial(language_model, log_frequencies=text.log_frequencies, n_tokens=16)
        data = language_task(text, n_tokens=16, batch_size=8)
    else:
        build, data = vision_model, digits_task(load_digits(), batch_size=8)
    found = transfer_check(
        build, [16, 128], task=data, rates=[2.0**power for power in range(-11, -3)], base_width=16, steps=100, seeds=3
    )
    for name in ("neural-tangent", "hybrid", "maximal-update"):
        assert abs(found.shift(name).grid) <= 1, name
    assert found.shift("uniform").grid <= -2
