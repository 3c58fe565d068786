"""The linear maps in which a model uses its weights, seen from one forward pass.

What the inner products of weight gradients need of such a map is little: the inner products of its inputs, and where to
find the gradient at its output. Convolutions are linear maps of patches, embedding tables of one-hot vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class LinearUse:
    """A weight at work in a linear map.

    Attributes:
        weight: The parameter.
        gram: Inner products of the map's inputs, shape ``(n_positions, n_positions)``.
        arranged: Brings a gradient at the map's output to shape ``(n_positions, fan_out)``.
        axis: Output axis of the weight.
        edge: Where the gradient at the map's output is found.
    """

    weight: Tensor
    gram: Tensor
    arranged: Callable[[Tensor], Tensor]
    axis: int
    edge: GradientEdge


class ParameterWatch(TorchFunctionMode):
    """Watch every operation on a parameter, keeping what the linear maps among them need."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.counts: dict[str, int] = {}
        self._linear: dict[str, LinearUse] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        used = [self._names[id(value)] for value in _tensors((*args, *kwargs.values())) if id(value) in self._names]
        if used and any(True for _ in _tensors((out,))):
            for name in used:
                self.counts[name] = self.counts.get(name, 0) + 1
            reader = _READERS.get(func)
            use = None if reader is None or not out.requires_grad else reader(out, *args, **kwargs)
            if use is not None and id(use.weight) in self._names:
                self._linear[self._names[id(use.weight)]] = use
        return out

    def single(self, name: str) -> LinearUse | None:
        """Return the linear map that is the only use of a parameter."""
        return self._linear.get(name) if self.counts.get(name) == 1 else None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearUse | None:
    if input.ndim < 2 or weight.ndim != 2 or input.numel() > weight.shape[1] ** 2:
        return None
    return _linear_use(out, input.detach().flatten(0, -2), weight, 0)


def _addmm(out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> LinearUse | None:
    if scales or mat1.shape[0] > mat1.shape[1]:
        return None
    return _linear_use(out, mat1.detach(), mat2, 1)


def _conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> LinearUse | None:
    n_patches, fan_in = out.numel() // weight.shape[0], weight[0].numel()
    if groups != 1 or isinstance(padding, str) or input.ndim != 4 or n_patches > fan_in:
        return None
    kernel = (weight.shape[2], weight.shape[3])
    patches = F.unfold(input.detach(), kernel, dilation=dilation, padding=padding, stride=stride)
    use = _linear_use(out, patches.mT.flatten(0, 1), weight, 0)
    return replace(use, arranged=lambda g: g.flatten(2).mT.flatten(0, 1))


def _embedding(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> LinearUse | None:
    ids = input.flatten()
    if max_norm is not None or scale_grad_by_freq or sparse or len(ids) > len(weight):
        return None
    same = ids[:, None] == ids
    if padding_idx is not None:
        same = same & (ids != padding_idx % len(weight))
    return _use(out, same.to(wide(weight.dtype)), weight, 1)


def _linear_use(out: Tensor, x: Tensor, weight: Tensor, axis: int) -> LinearUse:
    """Return the use of a weight on the rows of ``x``."""
    x = x.to(wide(x.dtype))
    return _use(out, x @ x.mT, weight, axis)


def _use(out: Tensor, gram: Tensor, weight: Tensor, axis: int) -> LinearUse:
    """Return a use whose output has one row, along its last axis, a position.

    An output that is a view has its history rewritten when it is overwritten later; that of its base goes on.
    """
    base = out._base if out._is_view() and out._base is not None else out
    return LinearUse(
        weight=weight,
        gram=gram,
        arranged=lambda g: g.reshape(len(gram), -1),
        axis=axis,
        edge=get_gradient_edge(base),
    )


#: What is known of each operation; a reader refuses more rows than fan-in, where the gradient itself is smaller.
_READERS: dict[Any, Callable[..., LinearUse | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv2d: _conv2d,
    F.embedding: _embedding,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which gradients of a type are summed: at least single precision."""
    return dtype if dtype == torch.float64 else torch.float32
