"""Drawing parameters of a model, each from a generator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError
from fathometer.models.seeding import named_generator


class Draw(NamedTuple):
    """Name of a parameter, the key of what is drawn of it, the view of it, and a standard deviation."""

    parameter: str
    key: str
    view: Callable[[Tensor], Tensor]
    std: float


def draw(model: nn.Module, rows: Iterable[Draw], *, seed: int, label: str) -> None:
    """Fill views of parameters with independent Gaussian numbers, in place.

    A draw depends on the seed, the label and the key only. Rows of padding symbols in embedding tables become zero
    again.

    Args:
        model: The model.
        rows: What to draw.
        seed: Which draw.
        label: What keeps this draw independent of others with the same seed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    drawn: set[int] = set()
    with torch.no_grad():
        for row in rows:
            parameter = parameters[row.parameter]
            view = row.view(parameter)
            generator = named_generator(seed, f"{label} {row.key}")
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float32).mul_(row.std))
            drawn.add(id(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in drawn:
                module.weight[module.padding_idx] = 0.0


def frozen_among(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return which of the named parameters are frozen, and therefore stay.

    Raises:
        ModelError: if all of them are.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = [name for name in dict.fromkeys(names) if not parameters[name].requires_grad]
    if names and len(frozen) == len(set(names)):
        raise ModelError("every parameter that would be drawn is frozen: requires_grad is False")
    return frozen
