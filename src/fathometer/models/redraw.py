"""Drawing a model's weights anew, in place and reversibly.

Each weight matrix is replaced by an independent Gaussian one with the mean square it has now, so that averages over draws
answer the question the theory answers. Vectors, norms, biases and embeddings stay. The generator of every parameter is seeded by the seed
and the parameter's name: independent of order, device and of what else is in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fathometer.models.reading import WeightSlice
from fathometer.models.identify import rms


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by ``hash(seed, name)``."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def redrawn(model: nn.Module, slices: Sequence[WeightSlice], seed: int) -> Iterator[None]:
    """Redraw the named weight slices inside the ``with`` block; afterwards the very same tensors are back.

    Args:
        model: The model.
        slices: Which weights to redraw; each part keeps its own mean square.
        seed: Seed of this draw.
    """
    parameters = dict(model.named_parameters())
    by_parameter: dict[str, list[WeightSlice]] = {}
    for part in slices:
        by_parameter.setdefault(part.parameter, []).append(part)
    kept: dict[str, Tensor] = {}
    try:
        for name, parts in by_parameter.items():
            parameter = parameters[name]
            fresh = parameter.detach().clone()
            for part in parts:
                view = part.of(fresh)
                generator = parameter_generator(seed, f"{name}[{part.start}:{part.stop}]")
                noise = torch.randn(view.shape, generator=generator, dtype=torch.float32)
                view.copy_(noise.to(view.device, view.dtype) * rms(view))
            kept[name] = parameter.data
            parameter.data = fresh
        yield
    finally:
        for name, original in kept.items():
            parameters[name].data = original
