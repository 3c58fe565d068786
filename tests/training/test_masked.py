"""Masked-token training of stacks of networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fathometer.papers.failure_modes.architecture import network
from fathometer.training.masked import StackedMaskedModel, load_patch_tokens, train_masked


def test_the_tokens_are_those_of_the_images() -> None:
    data = load_patch_tokens()
    assert data.train.shape == (1437, 16) and data.test.shape == (360, 16)
    assert int(data.train.min()) == 0 and int(data.train.max()) == data.n_symbols - 1 == 15
    shares = np.bincount(data.train.numpy().ravel()) / data.train.numel()
    assert data.unigram_entropy == pytest.approx(float(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_a_network_sees_its_own_tokens_only() -> None:
    spec = network(d_model=8, n_layers=2, n_tokens=16, beta=np.array([0.3, 1.0]))
    model = StackedMaskedModel(spec, n_symbols=16, n_tokens=16, seed=0)
    with torch.no_grad():
        model.head.normal_(generator=torch.Generator().manual_seed(0))
        ids = load_patch_tokens().train[:3]
        whole = model(ids).view(2, 16, 3, 16)
        alone = model(ids[1:2]).view(2, 16, 1, 16)
    torch.testing.assert_close(whole[:, :, 1:2], alone)


def test_a_network_whose_tokens_are_one_learns_nothing_but_frequencies() -> None:
    spec = network(d_model=16, n_layers=8, n_tokens=16, beta=0.3, skip_scale=np.array([0.02, 2.0]))
    run = train_masked(spec, steps=120, rate=3e-3, warmup=10, batch_size=16)
    assert run.losses.shape == (120, 2) and set(run.status) == {"ok"}
    collapsed, healthy = run.test_loss
    assert collapsed > run.unigram_entropy - 0.05
    assert healthy < run.unigram_entropy - 0.2
    again = train_masked(spec, steps=120, rate=3e-3, warmup=10, batch_size=16)
    np.testing.assert_array_equal(run.losses, again.losses)
