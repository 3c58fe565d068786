"""Watching what a forward pass does with every parameter: multiply by it, look rows up in it, add it, norm with it.

A parameter is followed through views, casts and other operations on it alone (``weight.T``, ``1 + weight``,
``token.expand(...)``) to the operation that brings it together with something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fathometer.models.finding import Stack
from fathometer.models.trace import Trace, hooked, tracing

_LINEAR = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "__rmatmul__", "mm"}
_LOOKUP = {"embedding", "__getitem__", "index_select"}
_NORM = {"layer_norm", "group_norm", "rms_norm"}
_MULTIPLY = {"mul", "__mul__", "__rmul__", "multiply"}
_ADD = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_JOIN = {"cat", "concat", "concatenate", "stack"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One operation on a parameter and something else.

    Attributes:
        parameter: Its name.
        kind: ``"linear"``, ``"bias"``, ``"lookup"``, ``"gain"``, ``"offset"``, ``"multiply"``, ``"add"``, ``"join"``
            or ``"attention"``; any other function by its own name.
        block: Index of the block that was running, or ``None``.
        entered: How many blocks had been entered.
        output: What came out.
        fans: Inputs and outputs of a linear map.
        ids: The indices of a lookup.
        partner: Name of the weight a bias belongs to.
    """

    parameter: str
    kind: str
    block: int | None
    entered: int
    output: Tensor
    fans: tuple[int, int] | None = None
    ids: Tensor | None = None
    partner: str | None = None


@dataclass
class ForwardRecord:
    """One watched forward pass.

    Attributes:
        uses: Every operation on a parameter, in order.
        blocks: What happened inside each block, with names relative to the block.
        widths: Size of the last axis of the stream in front of each block.
        trace: What happened in the whole model.
        output: What the model returned.
    """

    uses: list[Use] = field(default_factory=list)
    blocks: list[Trace] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    output: Any = None


class _Watch(TorchFunctionMode):
    """Record what is done with parameters; the record keeps every tensor it names alive, so memory is identity."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.block: int | None = None
        self.entered = 0
        self._names = dict(names)
        self._kept: list[Tensor] = []
        self._products: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = list(_tensors((args, kwargs)))
        if not any(self._name(operand) for operand in operands):
            return out
        result = next(_tensors(out), None)
        if result is None or self._name(result):
            return out
        if all(self._name(operand) for operand in operands) and len({self._name(o) for o in operands}) == 1:
            self._names[_memory(result)] = self._name(operands[0])
            self._kept.append(result)
            return out
        self._record(getattr(func, "__name__", str(func)), args, kwargs, result)
        return out

    def _name(self, value: Any) -> str:
        return self._names.get(_memory(value), "") if isinstance(value, Tensor) else ""

    def _add(self, value: Any, kind: str, output: Tensor, **more: Any) -> None:
        if name := self._name(value):
            self.uses.append(
                Use(parameter=name, kind=kind, block=self.block, entered=self.entered, output=output, **more)
            )

    def _record(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if function in _LINEAR:
            self._record_linear(function, args, kwargs, out)
        elif function == "multi_head_attention_forward":
            self._record_multihead(args, kwargs, out)
        elif function in _NORM:
            weight, bias = (kwargs.get(n, args[i] if len(args) > i else None) for i, n in ((2, "weight"), (3, "bias")))
            self._add(weight, "gain", out)
            self._add(bias, "offset", out)
        elif function in _LOOKUP:
            tensors = list(_tensors((args, kwargs)))
            ids = next((t for t in tensors if not t.is_floating_point() and not self._name(t)), None)
            for tensor in tensors:
                self._add(tensor, "lookup" if ids is not None else function, out, ids=ids)
        elif function in _ADD:
            others = [t for t in _tensors(args) if not self._name(t)]
            made_by = next((self._products[t.data_ptr()] for t in others if t.data_ptr() in self._products), None)
            for operand in _tensors(args):
                partner = made_by if operand.ndim == 1 else None
                self._add(operand, "bias" if partner else "add", out, partner=partner)
        else:
            kind = "multiply" if function in _MULTIPLY else "join" if function in _JOIN else function
            for operand in _tensors((args, kwargs)):
                self._add(operand, kind, out)

    def _record_linear(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        bias: Any = None
        if function == "addmm":
            bias, first, weight = (*args, kwargs.get("mat1"), kwargs.get("mat2"))[:3]
            fans = tuple(weight.shape[-2:])
        elif function in ("linear", "conv1d", "conv2d", "conv3d"):
            first = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            fans = (math.prod(weight.shape[1:]), weight.shape[0])
        else:
            first, weight = args[:2]
            fans = tuple(weight.shape[-2:])
            if self._name(first) and not self._name(weight):  # the matrix stands on the left: W @ x
                first, weight = weight, first
                fans = tuple(weight.shape[-2:])[::-1]
        del first
        self._add(weight, "linear", out, fans=fans if len(fans) == 2 else None)
        self._add(bias, "bias", out, partner=self._name(weight) or None)
        if self._name(weight) and bias is None:
            self._products[out.data_ptr()] = self._name(weight)
            self._kept.append(out)

    def _record_multihead(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        names = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p")
        given = dict(zip((*names, "out_proj_weight", "out_proj_bias"), args[5:], strict=False)) | kwargs
        for key in ("in_proj", "out_proj"):
            weight = given.get(f"{key}_weight")
            self._add(weight, "attention", out)
            self._add(given.get(f"{key}_bias"), "bias", out, partner=self._name(weight) or None)
        for key in ("bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self._add(given.get(key), key, out)


def watch_parameters(model: nn.Module, stacks: Sequence[Stack], run: Any, names: Mapping[int, str]) -> ForwardRecord:
    """Run a model once and record what it does with its parameters, inside and outside its blocks.

    Costs one forward pass and the memory of all activations.

    Args:
        model: The model.
        stacks: Its blocks, all of them in order of execution.
        run: Calls the model.
        names: Name of each parameter by the address of its storage.
    """
    record = ForwardRecord()
    watch = _Watch(names)
    blocks = {name: block for stack in stacks for name, block in zip(stack.names, stack.blocks, strict=True)}
    order = {name: i for i, name in enumerate(blocks)}
    bounds: dict[int, tuple[int, int]] = {}
    with torch.no_grad(), tracing(model) as trace:

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch.block, watch.entered = order[name], watch.entered + 1
            bounds[order[name]] = (len(trace.events), len(trace.events))

        def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            watch.block = None
            bounds[order[name]] = (bounds[order[name]][0], len(trace.events))
            record.widths.append(int(next(_tensors(out)).shape[-1]))

        with hooked(blocks, after=after, before=before), watch:
            record.output = run()
    record.uses, record.trace = watch.uses, trace
    for name, i in order.items():
        start, stop = bounds.get(i, (0, 0))
        record.blocks.append(Trace(list(_relative(trace.events[start:stop], f"{name}."))))
    return record


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; restore every module's mode and the random state after."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts and dataclasses."""
    return list(_tensors(value))


def _relative(events: Sequence[Any], prefix: str) -> Iterator[Any]:
    for event in events:
        name = getattr(event, "name", None)
        yield event if name is None else replace(event, name=name.removeprefix(prefix))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
