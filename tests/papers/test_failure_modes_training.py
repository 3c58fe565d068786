"""The training check of the failure modes at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fathometer import papers
from fathometer.plotting.canvas import to_png


def test_a_tiny_run_is_complete_and_counts_every_run() -> None:
    item = papers.find_item("failure-modes/training")
    told: list[int] = []
    result = item.run(replace(papers.SMALL, seeds=1, grid=20), lambda label, done, total: told.append(done))
    assert told == list(range(1, 81))
    assert result.losses.shape == (1, 2, *result.predicted.shape)
    assert sum(learned + failed for learned, failed in result.confusion.values()) == result.losses.size
    assert set(result.predicted.ravel()) == {"trainable", "rank collapse", "entropy collapse"}
    learned = result.learned
    for mode, (right, wrong) in result.confusion.items():
        assert right == np.count_nonzero(learned[:, :, result.predicted == mode])
        assert wrong == np.count_nonzero(~learned[:, :, result.predicted == mode])
    assert result.confusion["rank collapse"][0] == 0
    assert result.unigram_entropy == pytest.approx(2.3247, abs=1e-3)
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.table().rows[-1][0] == "foretold rightly"
    assert to_png(item.draw(result))[:4] == b"\x89PNG"
