"""Deep against shallow language models at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fathometer import papers
from fathometer.papers.moments.deep_vs_shallow import (
    DeepVsShallow,
    Protocol,
    RunFolder,
    Study,
    block_weights,
    large_protocol,
    run,
    small_protocol,
)
from fathometer.plotting.canvas import to_png
from fathometer.plotting.moments.deep_vs_shallow import draw_deep_vs_shallow
from fathometer.training.language import LanguageRun
from fathometer.training.text import byte_text

TEXT = byte_text()
TINY = Protocol(
    studies=(
        Study(objective="causal", placement="post-norm", d_model=8, depths=(3, 5)),
        Study(objective="masked", placement="pre-norm", d_model=8, depths=(3, 4), schemes=("deepscalelm", "xavier")),
    ),
    shapes=(
        Study(objective="causal", placement="post-norm", d_model=8, depths=(12,), schemes=("deepscalelm",)),
        Study(objective="causal", placement="post-norm", d_model=16, depths=(3,), schemes=("deepscalelm",)),
    ),
    d_head=4,
    n_tokens=16,
    batch_size=8,
    steps=6,
    warmup=1,
    rates=(1e-3, 2e-3),
    seeds=2,
    together=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deep") / "runs"


@pytest.fixture(scope="module")
def result(folder: Path) -> DeepVsShallow:
    return run(TINY, TEXT, RunFolder(folder))


def test_a_tiny_run_is_complete(result: DeepVsShallow) -> None:
    assert [trained.name for trained in result.studies] == ["causal, post-norm", "masked, pre-norm"]
    assert result.studies[0].runs.losses.shape == (3, 2, 2, 2, 6)
    assert result.studies[1].runs.held_out.shape == (2, 2, 2, 2)
    assert all(np.isfinite(trained.runs.losses).all() for trained in (*result.studies, *result.shapes))
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["studies"][1]["study"]["placement"] == "pre-norm"
    table = result.table()
    assert len(table.rows) == 6 + 4 + 2 and {len(row) for row in table.rows} == {len(table.headings)}
    gpt2 = result.studies[0].runs.about["schemes"]["gpt2"]["std"]
    assert gpt2 * 8**0.5 == pytest.approx(0.02 * 768**0.5)


def test_finished_runs_are_kept_and_not_repeated(result: DeepVsShallow, folder: Path) -> None:
    runs = RunFolder(folder)
    assert len(runs) == len(list(runs)) == 24 + 16 + 8 and not list(folder.glob(".*"))
    told: list[int] = []
    again = run(TINY, TEXT, runs, lambda label, done, total: told.append(done))
    assert not told
    np.testing.assert_array_equal(again.studies[0].runs.losses, result.studies[0].runs.losses)
    key = next(key for key in runs if key.startswith("causal-xavier-5x8-rate0.002-seed1-"))
    (folder / f"{key}.json").write_text("half a fi")
    assert key not in runs
    again = run(TINY, TEXT, runs, lambda label, done, total: told.append(done))
    assert told == list(range(1, 7)) and key in runs
    np.testing.assert_allclose(again.studies[0].runs.losses, result.studies[0].runs.losses, atol=1e-5)


def test_a_folder_of_runs_is_a_mapping(tmp_path: Path) -> None:
    runs = RunFolder(tmp_path / "new")
    assert not len(runs) and "a" not in runs
    kept = LanguageRun(losses=(3.0, 2.0), held_out=2.0, unigram_loss=3.0, status="ok", seconds_per_step=0.1)
    runs["a"] = kept
    assert runs["a"] == kept and list(runs) == ["a"]
    del runs["a"]
    with pytest.raises(KeyError, match="a"):
        del runs["a"]


def test_one_after_another_recomputing_gives_the_same_numbers(result: DeepVsShallow) -> None:
    """The path of the large protocol, on the CPU."""
    part = replace(TINY, studies=(TINY.studies[0],), shapes=(), together=False, rates=(1e-3,), seeds=1)
    alone = run(part, TEXT, {}).studies[0].runs
    np.testing.assert_allclose(alone.losses[:, :, 0, 0], result.studies[0].runs.losses[:, :, 0, 0], atol=2e-5)


def test_pairs_of_shapes_have_equally_many_weights() -> None:
    for protocol in (small_protocol(2), large_protocol(papers.FULL)):
        pairs = list(zip(protocol.shapes[::2], protocol.shapes[1::2], strict=True))
        assert pairs
        for thin, wide in pairs:
            assert block_weights(thin) == block_weights(wide)
            assert thin.depths == (192,) and wide.depths == (12,)
            assert (thin.objective, thin.placement) == (wide.objective, wide.placement)
        assert all(study.d_model % protocol.d_head == 0 for study in (*protocol.studies, *protocol.shapes))
    assert any(study.depths == (1000,) and study.d_model == 256 for study in large_protocol(papers.FULL).studies)


def test_the_picture_shows_every_study(result: DeepVsShallow) -> None:
    figure = draw_deep_vs_shallow(result)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:2] == ["Causal, post-norm: 5 blocks", "Masked, pre-norm: 4 blocks"] and len(figure.axes) == 6
    lines = figure.axes[0].get_lines()
    assert len(lines) == 3 * (2 + 1) + 1  # three schemes, two seeds and their mean; and the mark
    mean, _ = result.studies[0].runs.at_best_rate()
    drawn = [line.get_ydata() for line in figure.axes[3].get_lines() if len(line.get_xdata()) == 2]
    assert any(np.allclose(np.asarray(y, dtype=float), mean[0]) for y in drawn)
    assert to_png(figure)[:4] == b"\x89PNG"
    assert to_png(draw_deep_vs_shallow(replace(result, shapes=())))[:4] == b"\x89PNG"


def test_the_item_is_listed() -> None:
    assert papers.find_item("moments/deep-vs-shallow").draw is draw_deep_vs_shallow
