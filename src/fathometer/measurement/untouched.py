"""Leaving a user's model exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without key-value caches; restore modes, settings and random states after.

    A block that is run again would find the keys of its first run in the cache and attend to everything twice, which
    no check of outputs notices: doubled keys give the same averages.
    """
    modes = {module: module.training for module in model.modules()}
    caching = {
        id(config): config
        for module in model.modules()
        if getattr(config := getattr(module, "config", None), "use_cache", False) is True
    }
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            for config in caching.values():
                config.use_cache = False
            yield
    finally:
        for config in caching.values():
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode
