"""Byte-level language models: the text, the model, single runs, stacks of runs and comparisons of schemes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fathometer as fm
from fathometer.errors import BatchError, DomainError, SpecError
from fathometer.prescription import apply_scheme
from fathometer.spec import Network, Sublayer, TokenStem
from fathometer.training import language
from fathometer.training.comparison import RepeatedRuns, TrainingComparison, compare_training
from fathometer.training.language import LanguageModel, LanguageRun, language_network, train_language_model
from fathometer.training.language_stack import StackedLanguageModel, stacked_trunk, train_together
from fathometer.training.text import byte_text, held_out_batches, text_of_bytes, training_batches

TEXT = byte_text()
SCALES = fm.Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)


def trunk(n_layers: int = 2, d_model: int = 16, **changes: Any) -> fm.Transformer:
    options: dict[str, Any] = {"causal": True, "placement": Sublayer.post_norm, "activation": "relu"}
    return fm.Transformer.uniform(
        n_layers=n_layers, d_model=d_model, n_heads=2, norm=fm.LayerNorm(), scales=SCALES, **options | changes
    )


def deepscalelm(spec: fm.Transformer, n_tokens: int = 32) -> fm.Transformer:
    return apply_scheme(spec, "deepscalelm", r0=TEXT.input_collision("causal") / 2, n_tokens=n_tokens).spec


def model_of(network: Network, **options: Any) -> LanguageModel:
    return LanguageModel(network, log_frequencies=TEXT.log_frequencies, n_tokens=16, **{"seed": 0} | options)


RUN: dict[str, Any] = {"objective": "causal", "steps": 8, "n_tokens": 16, "batch_size": 8, "held_out_windows": 16}


def train(network: Network, **options: Any) -> LanguageRun:
    return train_language_model(network, TEXT, **{"rate": 1e-3} | RUN | options)


# The text


def test_a_text_is_its_bytes_and_their_frequencies(tmp_path: Path) -> None:
    content = (b"abcab" * 60) + bytes(range(40, 60)) * 4
    (tmp_path / "mine.txt").write_bytes(content)
    text = byte_text(tmp_path / "mine.txt", held_out=0.25)
    back = bytes(text.alphabet[i] for i in torch.cat([text.train, text.held_out]).tolist())
    assert back == content and text.n_symbols == 23 and len(text.held_out) == 95
    counts = np.unique(list(content[:285]), return_counts=True)[1] / 285
    assert text.unigram_entropy == pytest.approx(-(counts * np.log(counts)).sum(), rel=1e-12)
    assert text.collision == pytest.approx((counts**2).sum(), rel=1e-12)
    raised = {byte: (content[:285].count(byte) + 1) / (285 + 23) for byte in set(content)}
    assert text.unigram_loss == pytest.approx(-np.mean([math.log(raised[byte]) for byte in content[285:]]), rel=1e-12)
    assert text.input_collision("masked") == pytest.approx(0.85**2 * text.collision + 0.15**2)


def test_the_default_text_is_prose() -> None:
    assert len(TEXT.train) > 200_000 and 2.8 < TEXT.unigram_entropy < 3.6
    assert abs(TEXT.unigram_loss - TEXT.unigram_entropy) < 0.15


def test_batches_ask_for_what_the_text_says() -> None:
    inputs, targets, scored = next(training_batches(TEXT, "causal", n_tokens=20, batch_size=3, seed=1))
    assert inputs.shape == targets.shape == (3, 20) and scored.all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    source = training_batches(TEXT, "masked", n_tokens=200, batch_size=50, seed=1)
    inputs, targets, scored = next(source)
    assert torch.equal(inputs[~scored], targets[~scored]) and (inputs[scored] == TEXT.n_symbols).all()
    assert float(scored.float().mean()) == pytest.approx(0.15, abs=4.5 * (0.15 * 0.85 / 10_000) ** 0.5)
    assert int(targets.max()) < TEXT.n_symbols
    again = next(training_batches(TEXT, "masked", n_tokens=200, batch_size=50, seed=1))
    assert all(torch.equal(a, b) for a, b in zip((inputs, targets, scored), again, strict=True))
    assert not torch.equal(next(source).targets, targets)
    held = held_out_batches(TEXT, "causal", n_tokens=20, batch_size=3, n_batches=2)
    assert len(held) == 2 and not torch.equal(held[0].inputs, held[1].inputs)


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"the text 'x' is the byte b'a' repeated: there is nothing to learn"):
        text_of_bytes(b"a" * 2000, name="x")
    with pytest.raises(BatchError, match="the text 'x' has 100 bytes, 90 to train on and 10 held out; each part needs"):
        text_of_bytes(b"ab" * 50, name="x")
    with pytest.raises(BatchError, match=r"cannot read '.*nowhere': No such file"):
        byte_text(tmp_path / "nowhere")
    with pytest.raises(DomainError, match=r"held_out must lie strictly between 0 and 1; got 1\.0"):
        byte_text(held_out=1.0)
    with pytest.raises(DomainError, match="objective 'casual' is unknown; did you mean 'causal'"):
        next(training_batches(TEXT, "casual", n_tokens=8, batch_size=1, seed=0))
    with pytest.raises(BatchError, match="fit into the 419576 bytes of its part of the text; got 500000"):
        next(training_batches(TEXT, "causal", n_tokens=500_000, batch_size=1, seed=0))
    with pytest.raises(DomainError, match="batch_size must be positive; got 0"):
        next(training_batches(TEXT, "causal", n_tokens=8, batch_size=0, seed=0))


# The model


@pytest.mark.parametrize("tied", [False, True])
def test_stem_and_logits_start_at_their_size(tied: bool) -> None:
    """Logits around their bias have the deviation asked for; with a tied head, those of other symbols' rows."""
    spec = deepscalelm(trunk(n_layers=4, d_model=256, placement=Sublayer.pre_norm))
    network = language_network(spec, tied=tied, logit_std=0.5)
    symbols = next(training_batches(TEXT, "causal", n_tokens=16, batch_size=8, seed=0)).inputs
    sizes, tokens = [], []
    for seed in range(6):
        model = model_of(network, seed=seed)
        with torch.no_grad():
            logits = model(symbols) - model.head_bias
            embedded = model.token_embedding[symbols] + model.position_embedding
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(2, symbols.unsqueeze(2), False)
        sizes.append(float(logits[others].square().mean()) ** 0.5)
        tokens.append(float(embedded.square().mean()))
    assert np.mean(sizes) == pytest.approx(0.5, abs=4.5 * np.std(sizes, ddof=1) / 6**0.5 + 0.01)
    assert np.mean(tokens) == pytest.approx(1.0, abs=4.5 * np.std(tokens, ddof=1) / 6**0.5)


def test_a_faster_head_starts_as_the_plain_one_does() -> None:
    symbols = torch.arange(16).unsqueeze(0)
    plain, fast = (model_of(language_network(trunk(), head_multiplier=m)) for m in (1.0, 8.0))
    torch.testing.assert_close(plain(symbols), fast(symbols))
    assert float(fast.head.detach().square().sum() / plain.head.detach().square().sum()) == pytest.approx(1 / 64)
    with pytest.raises(SpecError, match="head_multiplier must be 1"):
        language_network(trunk(), tied=True, head_multiplier=8.0)


def test_dropout_on_embeddings_keeps_their_size() -> None:
    network = language_network(trunk(), dropout=0.2)
    assert isinstance(network.stem, TokenStem) and network.stem.token**2 == pytest.approx(0.4)
    model = model_of(network).train()
    symbols = torch.arange(16).unsqueeze(0)
    assert not torch.equal(model(symbols), model(symbols))
    assert torch.equal(model.eval()(symbols), model(symbols))


def test_recomputing_changes_nothing() -> None:
    network = language_network(trunk(n_layers=4, dropout=0.1))
    kept, again = train(network), train(network, recompute=True)
    np.testing.assert_allclose(kept.losses, again.losses, rtol=0, atol=1e-6)


def test_causal_models_do_not_look_ahead() -> None:
    model = model_of(language_network(trunk()))
    symbols = torch.arange(16).unsqueeze(0)
    other = symbols.clone()
    other[0, -1] = 50
    torch.testing.assert_close(model(symbols)[:, :-1], model(other)[:, :-1])


def test_bad_networks() -> None:
    network = language_network(trunk())
    with pytest.raises(SpecError, match="needs a TokenStem without segments"):
        model_of(replace(network, stem=TokenStem(token=1.0, segment=1.0)))
    with pytest.raises(SpecError, match=r"reads every token; Head\.pooling is 'mean'"):
        model_of(replace(network, head=replace(network.head, pooling="mean")))
    with pytest.raises(BatchError, match="sequences have at most 16 tokens; got 17"):
        model_of(network)(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(
        SpecError, match="'masked' needs attention without a causal mask; the network's attention has one"
    ):
        train(network, objective="masked")
    with pytest.raises(
        SpecError, match="'causal' needs attention with a causal mask; the network's attention has none"
    ):
        train(language_network(trunk(causal=False)))


# Single runs


def test_a_run_learns_and_repeats_and_leaves_the_random_state_alone() -> None:
    network = language_network(deepscalelm(trunk(n_layers=3, placement=Sublayer.pre_norm)), head_multiplier=8.0)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"steps": 150, "n_tokens": 32, "batch_size": 4, "rate": 5e-3, "warmup": 10}
    run = train(network, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert run.status == "ok" and run.held_out < run.unigram_loss - 0.2
    assert run.seconds_per_step > 0 and len(run.losses) == 150
    assert train(network, **{**options, "steps": 5}).losses == run.losses[:5]
    assert train(network, **{**options, "steps": 5, "seed": 1}).losses != run.losses[:5]


def test_masked_runs_learn_too() -> None:
    spec = deepscalelm(trunk(n_layers=3, causal=False, placement=Sublayer.pre_norm))
    network = language_network(spec, head_multiplier=8.0)
    options: dict[str, Any] = {"n_tokens": 32, "batch_size": 8, "warmup": 10, "held_out_windows": 64}
    run = train(network, objective="masked", steps=250, rate=3e-3, **options)
    judged = held_out_batches(TEXT, "masked", n_tokens=32, batch_size=8, n_batches=8)
    scores = [float(-TEXT.log_frequencies[batch.targets[batch.scored]].mean()) for batch in judged]
    assert run.unigram_loss == pytest.approx(np.mean(scores), rel=1e-6)
    assert run.status == "ok" and run.held_out < run.unigram_loss - 0.1


def test_a_diverging_run_says_so_and_survives_json() -> None:
    run = train(language_network(trunk(placement=Sublayer.pre_norm)), rate=1e6, steps=10)
    assert run.status == "diverged" and math.isnan(run.held_out)
    data = json.loads(run.to_json())
    assert data["held_out"] is None and data["status"] == "diverged"
    back = LanguageRun.from_dict(data)
    np.testing.assert_array_equal(back.losses, run.losses)
    assert math.isnan(back.held_out)
    with pytest.raises(SpecError, match="a run of schema 2 is not known"):
        LanguageRun.from_dict({**data, "schema": 2})


def test_an_interruption_leaves_what_was_done() -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    run = train(language_network(trunk()), progress=stop)
    assert run.status == "interrupted" and len(run.losses) == 3 and math.isnan(run.held_out)


def test_gradients_are_clipped_on_request_only() -> None:
    """The first step of AdamW does not depend on the gradient's size, the second on its change."""
    network = language_network(trunk())
    free, bound = train(network), train(network, clip=1e-12)
    assert free.losses[0] == bound.losses[0] and free.losses[-1] != bound.losses[-1]
    assert train(network, weight_decay=0.5).losses[-1] != free.losses[-1]


def test_an_interruption_while_judging_is_none_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = language.batch_loss

    def stop(model: Any, *rest: Any) -> torch.Tensor:
        if not model.training:
            raise KeyboardInterrupt
        return loss(model, *rest)

    monkeypatch.setattr(language, "batch_loss", stop)
    run = train(language_network(trunk()))
    assert run.status == "interrupted" and len(run.losses) == 8 and math.isnan(run.held_out)


def test_a_run_without_a_step_has_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "batch_loss", stop)
    run = train(language_network(trunk()))
    assert run.losses == () and math.isnan(run.seconds_per_step)
    data = json.loads(run.to_json())
    assert data["seconds_per_step"] is None and math.isnan(LanguageRun.from_dict(data).seconds_per_step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\); got 1.5"),
        ({"dropout": math.nan}, r"dropout must lie in \[0, 1\); got nan"),
        ({"head_multiplier": 0.0}, "head_multiplier must be positive and finite; got 0.0"),
        ({"logit_std": -1.0}, "logit_std must be positive and finite; got -1.0"),
    ],
)
def test_networks_with_bad_numbers(options: dict[str, float], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        language_network(trunk(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate must be positive and finite; got 0.0"),
        ({"rate": math.nan}, "rate must be positive and finite; got nan"),
        ({"steps": 1}, "steps must be >= 2 and warmup >= 0; got 1 and 0"),
        ({"clip": 0.0}, "clip must be positive; got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0; got -1.0"),
        ({"objective": "mask"}, "objective 'mask' is unknown; did you mean 'masked'"),
    ],
)
def test_bad_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        train(language_network(trunk()), **changes)


# Stacks


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("tied", [False, True])
def test_together_is_one_after_another(objective: str, tied: bool) -> None:
    base = trunk(n_layers=3, causal=objective == "causal")
    specs = [deepscalelm(base), apply_scheme(base, "xavier").spec, deepscalelm(base)]
    networks = [language_network(spec, tied=tied) for spec in specs]
    rates, seeds = [2e-3, 1e-3, 1e-3], [0, 0, 4]
    options: dict[str, Any] = {**RUN, "objective": objective, "warmup": 2}
    together = train_together(networks, TEXT, rates=rates, seeds=seeds, **options)
    for network, rate, seed, run in zip(networks, rates, seeds, together, strict=True):
        alone = train(network, rate=rate, seed=seed, **options)
        np.testing.assert_allclose(run.losses, alone.losses, rtol=0, atol=2e-5)
        assert run.held_out == pytest.approx(alone.held_out, abs=2e-5)
        assert run.status == alone.status == "ok"


def test_equal_networks_stack_by_seed_and_one_diverges_alone() -> None:
    network = language_network(trunk(placement=Sublayer.pre_norm))
    model = StackedLanguageModel([network] * 2, seeds=[3, 5], log_frequencies=TEXT.log_frequencies, n_tokens=16)
    symbols = torch.arange(16).expand(2, 1, -1)
    for index, seed in enumerate((3, 5)):
        torch.testing.assert_close(model(symbols)[index].T, model_of(network, seed=seed)(symbols[0])[0])
    calm, wild = train_together([network] * 2, TEXT, rates=[1e-3, 1e6], seeds=[0, 0], **RUN)
    assert (calm.status, wild.status) == ("ok", "diverged") and math.isnan(wild.held_out)


def test_what_cannot_be_stacked_is_named() -> None:
    with pytest.raises(SpecError, match=r"one architecture; they differ in trunk.blocks\[0\].*activation"):
        stacked_trunk([trunk(), trunk(activation="gelu")])
    with pytest.raises(SpecError, match="share their stem and head"):
        train_together(
            [language_network(trunk()), language_network(trunk(), tied=True)],
            TEXT,
            rates=[1.0] * 2,
            seeds=[0] * 2,
            **RUN,
        )
    with pytest.raises(SpecError, match="no dropout; train them one after another"):
        train_together([language_network(trunk(), dropout=0.1)], TEXT, rates=[1.0], seeds=[0], **RUN)
    with pytest.raises(SpecError, match="must be as many, and not none; got 1, 2, 1"):
        train_together([language_network(trunk())], TEXT, rates=[1.0, 2.0], seeds=[0], **RUN)


# Comparisons

COMPARE: dict[str, Any] = {
    **{name: value for name, value in RUN.items() if name != "held_out_windows"},
    "schemes": {"deepscalelm": {}, "gpt2": {"std": 0.1}},
    "depths": (4, 3),
    "rates": (1e-3, 1e6),
    "seeds": (0, 1),
}


@pytest.mark.parametrize("together", [False, True])
def test_a_comparison_trains_each_point_once(together: bool) -> None:
    runs: dict[str, LanguageRun] = {}
    steps: list[tuple[int, int]] = []
    spec = trunk(placement=Sublayer.pre_norm)
    found = compare_training(
        spec,
        TEXT,
        together=together,
        runs=runs,
        progress=lambda _, done, total: steps.append((done, total)),
        **COMPARE,
    )
    assert found.held_out.shape == (2, 2, 2, 2) and found.losses.shape == (2, 2, 2, 2, 8) and len(runs) == 16
    assert steps[-1][0] <= steps[-1][1] == (16 if together else 16 * 8)
    assert (found.status[:, :, 0] == "ok").all() and (found.status[:, :, 1] == "diverged").all()
    np.testing.assert_array_equal(found.largest_stable_rate(), np.full((2, 2), 1e-3))
    assert not found.best_rate().any()
    network = language_network(
        apply_scheme(spec.with_depth(3), "deepscalelm", r0=TEXT.input_collision("causal") / 2, n_tokens=16).spec
    )
    alone = train(network, seed=1, held_out_windows=256)
    np.testing.assert_allclose(found.losses[0, 1, 0, 1], alone.losses, rtol=0, atol=2e-5)
    assert found.held_out[0, 1, 0, 1] == pytest.approx(alone.held_out, abs=2e-5)

    windows = list(itertools.islice(training_batches(TEXT, "causal", n_tokens=16, batch_size=8, seed=1), 8))
    marks = [float(-TEXT.log_frequencies[batch.targets].mean()) for batch in windows]
    np.testing.assert_allclose(found.frequency_losses[1], marks, rtol=1e-6)

    steps.clear()
    again = compare_training(
        spec, TEXT, together=together, runs=runs, progress=lambda _, done, total: steps.append((done, total)), **COMPARE
    )
    assert not steps
    np.testing.assert_array_equal(again.held_out, found.held_out)
    assert json.loads(found.to_json())["held_out"][0][0][1] == [None, None]


def test_finished_runs_serve_one_split_and_one_way_of_computing() -> None:
    runs: dict[str, LanguageRun] = {}
    short = {**COMPARE, "schemes": {"gpt2": {"std": 0.1}}, "depths": (2,), "rates": (1e-3,), "seeds": (0,), "steps": 2}
    split = byte_text(held_out=0.3)
    assert split.digest == TEXT.digest
    for count, (text, options) in enumerate(((TEXT, {}), (split, {}), (TEXT, {"recompute": True}), (TEXT, {})), 1):
        found = compare_training(trunk(), text, runs=runs, **short, **options)
        assert len(runs) == min(count, 3)
        assert found.about["train_bytes"] == len(text.train) and found.about["device"] == "cpu"
    assert json.loads(replace(found, about={"deep": {"er": math.nan}}).to_json())["about"] == {"deep": {"er": None}}


def test_repeated_runs_are_summed_up() -> None:
    def run(held_out: float, status: str = "ok") -> LanguageRun:
        return LanguageRun(losses=(3.0,), held_out=held_out, unigram_loss=3.0, status=status, seconds_per_step=0.1)

    found = RepeatedRuns(runs=(run(2.0), run(2.95), run(math.nan, "diverged")), about={"steps": 1})
    mean, error = found.gap()
    assert (mean, error) == pytest.approx((-0.525, 0.475)) and found.learned == 1
    alone = RepeatedRuns(runs=(run(2.0),), about={})
    assert alone.gap()[0] == -1.0 and math.isnan(alone.gap()[1]) and json.loads(alone.to_json())["gap_error"] is None
    assert math.isnan(RepeatedRuns(runs=(run(math.nan, "diverged"),), about={}).gap()[0])


def test_an_interrupted_comparison_keeps_what_is_finished() -> None:
    runs: dict[str, LanguageRun] = {}

    def stop(label: str, done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_training(trunk(), TEXT, runs=runs, progress=stop, **COMPARE)
    assert len(runs) == 1


def test_rates_are_read_off_by_their_definitions() -> None:
    held_out = np.array([2.0, 2.1, 2.5, 3.4, 2.2, np.nan, 2.0, 2.0]).reshape(1, 1, 4, 2)
    status = np.where(np.isfinite(held_out), "ok", "diverged")
    losses = np.repeat(held_out[..., None], 5, axis=-1)
    found = TrainingComparison(
        schemes=("a",),
        depths=(2,),
        rates=(1.0, 2.0, 4.0, 8.0),
        seeds=(0, 1),
        held_out=held_out,
        status=status,
        seconds_per_step=held_out,
        losses=losses,
        unigram_loss=3.0,
        frequency_losses=np.ones((2, 5)),
        about={},
    )
    assert found.largest_stable_rate()[0, 0] == 2.0  # at 4 a seed diverged, so 8 is not reached
    assert found.largest_learning_rate()[0, 0] == 8.0
    assert found.best_rate()[0, 0] == 3
    mean, error = found.at_best_rate()
    assert (mean[0, 0], error[0, 0]) == (-1.0, 0.0)
    np.testing.assert_array_equal(found.curves(0, 0), np.ones((2, 5)))
    mean, error = replace(found, rates=(1.0,), **_first(found)).at_best_rate()
    assert mean[0, 0] == pytest.approx(-0.95) and error[0, 0] == pytest.approx(0.05)


def _first(found: TrainingComparison) -> dict[str, Any]:
    names = ("held_out", "status", "seconds_per_step", "losses")
    return {name: getattr(found, name)[:, :, :1] for name in names}


def test_bad_comparisons() -> None:
    with pytest.raises(SpecError, match="depths must not be empty"):
        compare_training(trunk(), TEXT, **{**COMPARE, "depths": ()})
    with pytest.raises(DomainError, match=r"rates must ascend; got \[0.1, 0.1\]"):
        compare_training(trunk(), TEXT, **{**COMPARE, "rates": (0.1, 0.1)})
    with pytest.raises(SpecError, match="on the CPU and without recomputing; set together=False"):
        compare_training(trunk(), TEXT, together=True, recompute=True, **COMPARE)
    with pytest.raises(SpecError, match="n_layers must be a positive integer; got 0"):
        compare_training(trunk(), TEXT, **{**COMPARE, "depths": (0,)})


# What deep networks do


AROUND = partial(language_network, head_multiplier=8.0)


def against_xavier(n_layers: int, d_model: int, **options: Any) -> np.ndarray:
    """Return held-out losses of post-norm stacks above the mark, by DeepScaleLM and Xavier; (scheme, seed)."""
    found = compare_training(
        trunk(d_model=d_model),
        TEXT,
        objective="causal",
        schemes={"deepscalelm": {}, "xavier": {}},
        depths=(n_layers,),
        n_tokens=32,
        batch_size=4,
        around=AROUND,
        together=True,
        **options,
    )
    return np.asarray(found.held_out[:, 0, 0] - found.unigram_loss)


def test_post_norm_trains_by_deepscalelm_and_not_from_xavier() -> None:
    ours, standard = against_xavier(36, 16, rates=(1e-3,), seeds=(0, 1), steps=160, warmup=10)
    assert (ours < -0.2).all(), ours
    assert (standard > -0.1).all(), standard


@pytest.mark.slow
def test_post_norm_of_a_hundred_blocks_trains_by_deepscalelm_and_not_from_xavier() -> None:
    ours, standard = against_xavier(100, 32, rates=(3e-4,), seeds=(0, 1, 2), steps=300, warmup=20)
    assert (ours < -0.4).all(), ours
    assert (standard > -0.1).all(), standard


@pytest.mark.slow
def test_a_thousand_blocks_train() -> None:
    spec = deepscalelm(trunk(n_layers=1000, d_model=32, placement=Sublayer.pre_norm))
    run = train(
        AROUND(spec),
        rate=1e-3,
        steps=170,
        warmup=10,
        n_tokens=32,
        batch_size=4,
        recompute=True,
        held_out_windows=64,
    )
    assert run.status == "ok"
    assert run.held_out < min(run.unigram_loss, TEXT.unigram_entropy) - 0.4
