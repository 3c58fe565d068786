"""Where the components of a block's sublayers can be seen: which tensor of which module, after one traced call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from fathometer.models.branches import Branch, leaving, producer_of, split_branches
from fathometer.models.reading import SublayerReading
from fathometer.models.trace import Call, Trace, same_tensor
from fathometer.spec import SelfAttention

#: Name of a module within the block, which of its calls, and whether its input is meant.
Place: TypeAlias = tuple[str, int, bool]


class Tap(NamedTuple):
    """One component of one sublayer.

    Attributes:
        component: Its name in :data:`fathometer.results.moments.COMPONENTS`.
        module: Name of a module within the block.
        call: Which of the module's calls within the block, from zero; a module may be shared.
        entering: Whether it is the module's input, else its output.
        start, stop: Range of features; ``None`` for all of them.
        factor: The component over the tensor.
    """

    component: str
    module: str
    call: int
    entering: bool
    start: int | None = None
    stop: int | None = None
    factor: float = 1.0

    @property
    def place(self) -> Place:
        """Which tensor this is a part of."""
        return self.module, self.call, self.entering

    def of(self, tensor: Tensor) -> Tensor:
        """Return the features this tap names."""
        return tensor if self.start is None else tensor[..., self.start : self.stop]


def block_taps(name: str, trace: Trace, readings: Sequence[SublayerReading], block_output: Tensor) -> list[list[Tap]]:
    """Return, per sublayer of a traced block, every component that a module takes in or puts out.

    The residual sum of the last sublayer, where no norm follows, is the block's output and has no tap; inside
    ``nn.MultiheadAttention`` nothing is seen.

    Args:
        name: The block's name, the prefix of parameter names.
        trace: One call of it.
        readings: What its sublayers are.
        block_output: What it returned.
    """
    branches = split_branches(trace)
    out = []
    for i, (branch, reading) in enumerate(zip(branches, readings, strict=True)):
        following = branches[i + 1] if i + 1 < len(branches) else None
        taps = _branch_taps(name, branch, reading, trace)
        taps += _sum_taps(branch, reading, following, readings[i + 1] if following else None, block_output, trace)
        out.append(taps)
    return out


def _branch_taps(name: str, branch: Branch, reading: SublayerReading, trace: Trace) -> list[Tap]:
    taps = []
    sublayer = reading.sublayer
    if sublayer.input_norm is not None:
        norm = producer_of(branch.source, trace)
        assert norm is not None
        taps.append(_tap("input_norm", norm, trace, entering=False))
    opaque = isinstance(branch.exit.module, nn.MultiheadAttention)
    for role, part in reading.roles.items():
        for entry in branch.entries:
            if entry is not branch.exit and part.parameter == f"{name}.{entry.name}.weight":
                fused = part.stop - part.start < part.size
                bounds = (part.start, part.stop) if fused else (None, None)
                taps.append(_tap(role, entry, trace, entering=False)._replace(start=bounds[0], stop=bounds[1]))
    attends = isinstance(sublayer.branch, SelfAttention)
    if not opaque:
        taps.append(_tap("mixed" if attends else "activation", branch.exit, trace, entering=True))
    hooks = branch.exit.module._forward_hooks.values()
    multiplier = math.prod(float(getattr(hook, "residual_factor", 1.0)) for hook in hooks)
    if multiplier != 0:
        taps.append(_tap("branch", branch.exit, trace, entering=False)._replace(factor=1 / multiplier))
    tensor, _, _, name_of_last = leaving(branch, trace)
    last = next(call for call in reversed(trace.calls) if call.name == name_of_last and _made(call, tensor))
    if sublayer.output_norm is not None:
        taps.append(_tap("output_norm", last, trace, entering=False))
    taps.append(_tap("added", last, trace, entering=False)._replace(factor=reading.added_scale))
    return taps


def _made(call: Call, tensor: Tensor) -> bool:
    return same_tensor(call.output, tensor)


def _tap(component: str, call: Call, trace: Trace, *, entering: bool) -> Tap:
    """Return the tap at a traced call."""
    alike = [other for other in trace.calls if other.name == call.name]
    return Tap(component, call.name, next(i for i, other in enumerate(alike) if other is call), entering)


def _sum_taps(
    branch: Branch,
    reading: SublayerReading,
    following: Branch | None,
    next_reading: SublayerReading | None,
    block_output: Tensor,
    trace: Trace,
) -> list[Tap]:
    """Return the residual sum, and what a norm on the stream makes of it."""
    stream, place = block_output, None
    if following is not None and next_reading is not None:
        stream, place = following.source, _tap("sum", following.entries[0], trace, entering=True)
        if next_reading.sublayer.input_norm is not None:
            norm = producer_of(stream, trace)
            assert norm is not None
            stream, place = norm.input, _tap("sum", norm, trace, entering=True)
    if reading.sublayer.stream_norm is not None:
        norm = producer_of(stream, trace)
        assert norm is not None
        return [
            _tap("sum", norm, trace, entering=True),
            _tap("stream_norm", norm, trace, entering=False),
        ]
    return [] if place is None else [place]
