"""Leaving a user's model exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without key-value caches; restore modes, settings and random states after.

    A block that is run again would find the keys of its first run in the cache and attend to everything twice, which
    no check of outputs notices: doubled keys give the same averages.
    """
    modes = {module: module.training for module in model.modules()}
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            for config in caching:
                config.use_cache = False
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients reach parameters, also frozen ones; afterwards every one is as before."""
    kept = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in kept:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in kept:
            parameter.requires_grad_(flag)
