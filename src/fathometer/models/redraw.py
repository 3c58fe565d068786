"""Drawing a model's weights anew, in place and reversibly.

Each weight matrix is replaced by an independent Gaussian one with the mean square it has now, so that averages over
draws answer the question the theory answers. Vectors, norms, biases and embeddings stay. The generator of every
parameter is seeded by the seed and the parameter's name: independent of order, device and of what else is in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fathometer.models.identify import rms
from fathometer.models.seeding import named_generator
from fathometer.models.weights import WeightSlice


@contextmanager
def redrawn(model: nn.Module, slices: Sequence[WeightSlice], seed: int, *, tied: bool = False) -> Iterator[None]:
    """Redraw the named weight slices inside the ``with`` block; afterwards the very same tensors are back.

    Args:
        model: The model.
        slices: Which weights to redraw; each part keeps its own mean square.
        seed: Seed of this draw.
        tied: Whether weights that are equal now stay equal, as in layers copied from one another.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_parameter: dict[str, list[WeightSlice]] = {}
    for part in slices:
        by_parameter.setdefault(part.parameter, []).append(part)
    kept: dict[str, Tensor] = {}
    twins: dict[bytes, str] = {}
    done: set[int] = set()
    try:
        for name, parts in by_parameter.items():
            parameter = parameters[name]
            if id(parameter) in done:  # one weight under two names is drawn once
                continue
            done.add(id(parameter))
            fresh = parameter.detach().clone()
            for part in parts:
                view = part.of(fresh)
                key = f"{name}[{part.start}:{part.stop}]"
                if tied:
                    key = twins.setdefault(_fingerprint(view), key)
                generator = named_generator(seed, key)
                noise = torch.randn(view.shape, generator=generator, dtype=torch.float32)
                view.copy_(noise.to(view.device, view.dtype) * rms(view))
            kept[name] = parameter.data
            parameter.data = fresh
        yield
    finally:
        for name, original in kept.items():
            parameters[name].data = original


def _fingerprint(weight: Tensor) -> bytes:
    flat = weight.detach().float().cpu().contiguous()
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).digest()
