"""Reading a spec off a real model: per-layer scales, residuals and norms, and the role of every weight.

Nothing is inferred from names. One traced call of each block shows which tensors went where; a branch is the linear
maps between two points of the residual stream, and what stands on the stream is found by regressing the next stream
tensor on the previous one and on the branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError, NotCoveredError
from fathometer.models.branches import (
    Branch,
    entry,
    leaving,
    next_stream,
    norm_input,
    post_norm,
    producer_of,
    split_branches,
)
from fathometer.models.trace import Trace, same_tensor
from fathometer.models.weights import WeightSlice, read_attention, read_mlp
from fathometer.spec import Block, Derf, DyT, Sublayer, Transformer


@dataclass(frozen=True, kw_only=True)
class SublayerReading:
    """One residual branch of one block.

    Attributes:
        sublayer: What it computes, as data.
        roles: Role to weight slice.
        added_scale: Factor between the branch's last module (after layer scale or output norm) and the stream.
        alpha: Name of the parameter that holds the input norm's alpha, for DyT and Derf.
    """

    sublayer: Sublayer
    roles: dict[str, WeightSlice]
    added_scale: float
    alpha: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelReading:
    """A stack of blocks read into data.

    Attributes:
        spec: The transformer the theory propagates.
        layers: Per block, per sublayer, where everything lives.
    """

    spec: Transformer
    layers: tuple[tuple[SublayerReading, ...], ...]


def read_block(
    name: str, block_input: Tensor, block_output: Tensor, trace: Trace, *, memory: Tensor | None = None
) -> tuple[SublayerReading, ...]:
    """Read the sublayers of one traced block.

    Args:
        name: The block's name in the model, the prefix of all parameter names.
        block_input, block_output: The stream before and after.
        trace: What happened inside.
        memory: What cross attention may read: the encoder's tokens in the same call. Without it any other sequence is
            refused.
    Raises:
        NotCoveredError: naming what the theory has no map for.
    """
    for call in trace.calls:
        if call.input._version != call.versions[0]:
            raise NotCoveredError(f"the input of {call.name!r} is changed in place afterwards")
    branches = split_branches(trace)
    if len(branches) > 1 and len({_origin(branch, trace) for branch in branches}) == 1:
        raise NotCoveredError("branches read the same stream tensor in parallel")
    for branch in branches:
        if branch.memory is not None and (memory is None or not same_tensor(branch.memory, memory)):
            raise NotCoveredError(
                f"{branch.exit.name!r} reads another sequence: cross-attention is read only together with the encoder "
                "it attends to"
            )
    readings: list[SublayerReading] = []
    streams = [block_input]
    for index, branch in enumerate(branches):
        following = branches[index + 1] if index + 1 < len(branches) else None
        reading, streams = _read_branch(name, branch, streams, following, block_output, trace)
        readings.append(reading)
    return tuple(readings)


def spec_of(readings: Sequence[tuple[SublayerReading, ...]], d_model: int) -> Transformer:
    """Return the transformer with one block per reading, equal neighbours merged."""
    blocks: list[Block] = []
    for reading in readings:
        sublayers = tuple(r.sublayer for r in reading)
        if blocks and blocks[-1].sublayers == sublayers:
            blocks[-1] = replace(blocks[-1], repeat=blocks[-1].repeat + 1)
        else:
            blocks.append(Block(sublayers=sublayers))
    return Transformer(blocks=tuple(blocks), d_model=d_model)


def _read_branch(
    name: str, branch: Branch, streams: list[Tensor], following: Branch | None, block_output: Tensor, trace: Trace
) -> tuple[SublayerReading, list[Tensor]]:
    """Read one branch; ``streams`` are the tensors the residual may start from (before and after a post-norm)."""
    input_norm, stream = entry(branch, streams, trace)
    output, output_norm, gain, _ = leaving(branch, trace)
    target, fitted = next_stream(stream, streams, output, following, block_output, trace)
    if fitted is None:
        if any(same_tensor(branch.source, other) for other in streams[1:]) and following is None:
            raise NotCoveredError("the block's output is not skip * stream + scale * branch")
        raise NotCoveredError(f"what follows {branch.exit.name!r} is not skip * stream + scale * branch")
    body, roles = read_attention(name, branch) if branch.attention is not None else read_mlp(name, branch)
    stream_norm, after = post_norm(target, following, block_output, trace)
    sublayer = Sublayer(
        branch=body,
        input_norm=input_norm,
        output_norm=output_norm,
        stream_norm=stream_norm,
        skip_scale=fitted.skip,
        branch_scale=fitted.scale * gain,
    )
    reading = SublayerReading(
        sublayer=sublayer,
        roles=roles,
        added_scale=fitted.scale,
        alpha=_alpha_parameter(name, branch, trace) if isinstance(input_norm, (DyT, Derf)) else None,
    )
    return reading, after


def _alpha_parameter(name: str, branch: Branch, trace: Trace) -> str | None:
    call = producer_of(branch.source, trace)
    assert call is not None
    scalars = [key for key, parameter in call.module.named_parameters() if parameter.numel() == 1]
    return f"{name}.{call.name}.{scalars[0]}" if scalars else None


def _origin(branch: Branch, trace: Trace) -> int:
    """Return the memory a branch reads, before its norm."""
    return norm_input(branch.source, trace).data_ptr()


def check_weights(model: nn.Module) -> None:
    """Refuse parameters that are not finite, or a model without any randomness.

    Raises:
        ModelError: naming the first such parameter, or saying that all matrices are zero.
    """
    largest = 0.0
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"parameter {name!r} is on the meta device; materialise the model first")
        if not parameter.is_floating_point():
            raise ModelError(
                f"parameter {name!r} has dtype {parameter.dtype}; accepted: floating point (not quantised)"
            )
        low, high = torch.aminmax(parameter.detach()) if parameter.numel() else (torch.zeros(()), torch.zeros(()))
        top = max(-float(low), float(high))
        if not math.isfinite(top):
            raise ModelError(f"parameter {name!r} holds NaN or infinity")
        if parameter.ndim >= 2:
            largest = max(largest, top)
    if largest == 0.0:
        raise ModelError("every weight matrix is zero: there is no randomness to propagate; initialise the model first")
