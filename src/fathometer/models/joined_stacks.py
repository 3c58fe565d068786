"""Finding an encoder and the decoder that reads it, by following tensors from the one to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import NotCoveredError
from fathometer.models.finding import Stack, find_stacks
from fathometer.models.identify import identify_norm
from fathometer.models.trace import Call, Trace, first_tensor, hooked, leaves, recording, same_tensor
from fathometer.spec import Norm


@dataclass(frozen=True, kw_only=True)
class JoinedStacks:
    """Two stacks, the second of which is given the output of the first.

    Attributes:
        encoder, decoder: The stacks.
        between: The calls that make the decoder's memory of the encoder's output, the last one first.
        argument: Position or keyword of the memory among the arguments of the decoder's first block.
    """

    encoder: Stack
    decoder: Stack
    between: tuple[Call, ...]
    argument: int | str

    @property
    def both(self) -> Stack:
        """All blocks in order of execution."""
        return Stack((*self.encoder.names, *self.decoder.names), (*self.encoder.blocks, *self.decoder.blocks))

    def memory_norm(self) -> Norm | None:
        """Return the norm behind the encoder, ``None`` where the decoder reads the encoder's output itself.

        Raises:
            NotCoveredError: if something else stands there.
        """
        if not self.between:
            return None
        call, *more = self.between
        norm = identify_norm(call.module, call.before, call.after)
        if norm is None or more:
            raise NotCoveredError(
                f"between encoder and decoder stands {call.name!r} ({type(call.module).__name__}); accepted: one norm, "
                "or nothing"
            )
        return norm


def find_joined_stacks(model: nn.Module, forward: Callable[[], Any]) -> JoinedStacks | None:
    """Return the encoder and decoder of a model, or ``None`` where no stack is given another one's output.

    Costs two forward passes, of which the tensors outside the blocks are kept.

    Args:
        model: The model.
        forward: Runs it once.
    Raises:
        ModelError: if the model has no blocks.
    """
    stacks = _apart(find_stacks(model, forward))
    if len(stacks) < 2:
        return None
    names = [name for stack in stacks for name in stack.names]
    outside = {name: leaf for name, leaf in leaves(model).items() if not any(_within(name, other) for other in names)}
    given: dict[str, dict[int | str, Tensor]] = {}
    ends: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_tensor(args, kwargs)
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given[name] = {key: t.detach() for key, t in arguments if isinstance(t, Tensor) and t is not stream}

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        result = first_tensor((out,), {})
        assert result is not None
        ends[name] = result.detach()

    trace = Trace()
    firsts, lasts = ({stack.names[i]: stack.blocks[i] for stack in stacks} for i in (0, -1))
    with torch.no_grad(), recording(outside, trace), hooked(firsts, before=before), hooked(lasts, after=after):
        forward()
    for decoder in stacks:
        for encoder in stacks:
            if encoder is decoder:
                continue
            for argument, tensor in given[decoder.names[0]].items():
                between = _joint(tensor, ends[encoder.names[-1]], trace)
                if between is not None:
                    return JoinedStacks(encoder=encoder, decoder=decoder, between=between, argument=argument)
    return None


def _apart(stacks: list[Stack]) -> list[Stack]:
    """Return the best stack and all others that lie neither inside nor around one kept before."""
    kept: list[Stack] = []
    for stack in stacks:
        names = [name for other in kept for name in other.names]
        if not any(_within(a, b) or _within(b, a) for a in stack.names for b in names):
            kept.append(stack)
    return kept


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _joint(memory: Tensor, end: Tensor, trace: Trace) -> tuple[Call, ...] | None:
    """Return the calls that made the memory of an encoder's output, ``None`` where it is made of something else."""
    calls: list[Call] = []
    for call in reversed(trace.calls):
        if same_tensor(memory, end):
            break
        if same_tensor(call.output, memory) and not same_tensor(call.input, memory):
            calls.append(call)
            memory = call.input
    return tuple(calls) if same_tensor(memory, end) else None
