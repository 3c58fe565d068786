"""Tied heads and few heads are named in a report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tr

import fathometer as fm
from fathometer.diagnosis.cautions import cautions
from fathometer.measurement.batches import as_batch


def language_model(width: int, *, tied: bool, heads: int = 8) -> tr.GPT2LMHeadModel:
    config = tr.GPT2Config(
        n_layer=3,
        n_embd=width,
        n_head=heads,
        vocab_size=200,
        n_positions=32,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return tr.GPT2LMHeadModel(config)


BATCH = as_batch({"input_ids": torch.randint(200, (4, 24), generator=torch.Generator().manual_seed(1))})


def test_a_tied_head_reads_its_own_token_and_more_so_in_a_wider_model() -> None:
    """sqrt(d) s_e / sqrt(q), with the stream's second moment measured."""
    for width in (64, 256):
        model = language_model(width, tied=True)
        with torch.no_grad():
            for weight in model.transformer.h.parameters():
                weight.mul_(0.1 if weight.ndim == 2 else 1.0)
        q = float(fm.measure(model, BATCH, seeds=1).q[-1])
        (note,) = cautions(model, BATCH, None)
        expected = np.sqrt(width) * 0.3 / np.sqrt(q)
        assert float(note.split("lies ")[1].split()[0]) == pytest.approx(expected, rel=0.1)


def test_the_order_of_a_batch_does_not_matter() -> None:
    ids = BATCH.inputs["input_ids"]
    masked = as_batch({"attention_mask": torch.ones_like(ids), "input_ids": ids})
    model = language_model(256, tied=True)
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            weight.mul_(0.1 if weight.ndim == 2 else 1.0)
    assert cautions(model, masked, None) == cautions(model, BATCH, None) != []


def test_untied_heads_and_many_heads_need_no_word() -> None:
    assert cautions(language_model(64, tied=False), BATCH, None) == []
    report = fm.diagnose(language_model(64, tied=False), BATCH, seeds=2)
    assert not any("head" in note for note in report.about["notes"])


def test_few_heads_are_named_with_the_scatter() -> None:
    report = fm.diagnose(language_model(64, tied=False, heads=2), BATCH, seeds=2)
    (note,) = [note for note in report.about["notes"] if "heads a layer" in note]
    assert "scatter by about 100%" in note
