"""Which inverse temperature a model's attention is at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fathometer as fm
from fathometer.report.architecture import sizes_table


def test_the_report_says_how_far_attention_is_from_condensing() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256, vocab_size=60
    )
    model = transformers.BertModel(config)
    batch = {"input_ids": torch.randint(60, (2, 24))}
    report = fm.diagnose(model, batch, seeds=2)
    heat = report.about["temperatures"]
    # entries of standard deviation 0.02: sigma_QK = 0.02^2 d
    assert heat["beta"][0] == pytest.approx(0.02**2 * 128 / np.sqrt(np.log(24)), rel=0.05)
    assert report.predicted is not None
    assert heat["beta"][0] / heat["beta_critical"][0] == pytest.approx(float(report.predicted.condensation[0]))
    measured = report.measured
    assert float(measured.condensation[0]) == pytest.approx(float(report.predicted.condensation[0]), rel=0.25)
    labels = dict(sizes_table(report))
    assert "condenses at" in labels["inverse temperature of attention, first block"]


def test_sharp_queries_are_named_with_their_distance_from_condensing() -> None:
    scales = fm.Scales(query=9.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
    spec = fm.Transformer.uniform(n_layers=3, d_model=64, n_heads=1, norm=fm.LayerNorm(), scales=scales)
    report = fm.diagnose(
        fm.reference_network(spec), fm.equiangular_tokens(n_tokens=16, d_model=64, q=1, p=0.1), seeds=2
    )
    (finding,) = [f for f in report.findings if f.name == "attention_concentrated"]
    assert "of the spread at which attention condenses on single keys" in str(finding.evidence)
    assert report.about["temperatures"]["beta"][0] > report.about["temperatures"]["beta_critical"][0]
