"""Taking one traced block apart into residual branches: where each reads the stream, and where it writes back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathometer.errors import NotCoveredError
from fathometer.models.identify import ResidualFit, feature_gain, fit_residual, identify_norm, rms
from fathometer.models.trace import AttentionCall, Call, Trace, same_tensor
from fathometer.spec import Norm


@dataclass
class Branch:
    """Linear maps between two points of the stream: entries read it, the exit writes back.

    Attributes:
        source: What the entries read.
        entries: The input maps; of cross attention the query's first, then those that read the memory.
        exit: The output map.
        attention: The attention operation between them.
        inner: Other modules between them.
        memory: What the keys and values of cross attention read in place of ``source``.
    """

    source: Tensor
    entries: list[Call]
    exit: Call
    attention: AttentionCall | None
    inner: list[Call]
    memory: Tensor | None = None


def split_branches(trace: Trace) -> list[Branch]:
    """Return the branches of a traced block in order.

    Raises:
        NotCoveredError: where the linear maps do not pair into entries and one exit.
    """
    branches: list[Branch] = []
    entries: list[Call] = []
    inner: list[Call] = []
    attention: AttentionCall | None = None
    memory: Tensor | None = None
    for position, event in enumerate(trace.events):
        if isinstance(event, AttentionCall):
            attention = event
            continue
        if isinstance(event.module, nn.MultiheadAttention):
            if entries:
                raise NotCoveredError(f"attention module {event.name!r} nested inside another branch")
            branches.append(
                Branch(event.input, [event], event, attention, [], None if attention is None else attention.memory)
            )
            attention = None
            continue
        if not is_linear(event):
            if entries:
                inner.append(event)
            continue
        if not entries and branches and same_tensor(event.input, branches[-1].exit.input):
            raise NotCoveredError(f"{event.name!r} reads another sequence: cross-attention")
        if not entries or same_tensor(event.input, entries[-1].input):
            entries.append(event)
        elif memory is None and attention is None and _leads_to_attention(trace, position):
            if len(entries) == 1:
                memory, entries = event.input, [*entries, event]
            elif role_letter(event) == "q":  # keys and values first
                memory, entries = entries[0].input, [event, *entries]
            else:
                raise NotCoveredError(
                    f"{entries[0].name!r} and {event.name!r} read different tensors, and which of them makes the "
                    "queries is not known"
                )
        else:
            branches.append(Branch(entries[0].input, entries, event, attention, inner, memory))
            entries, inner, attention, memory = [], [], None, None
    if entries:
        raise NotCoveredError(f"linear map {entries[0].name!r} does not lead back to the stream")
    if not branches:
        raise NotCoveredError("no pair of linear maps found in the block")
    return branches


def _leads_to_attention(trace: Trace, position: int) -> bool:
    """Return whether the linear maps from here on to the next attention all share one input.

    They then are a second set of input maps: an MLP that ends here would be followed by maps of another input.
    """
    first = trace.events[position]
    assert isinstance(first, Call)
    for event in trace.events[position + 1 :]:
        if isinstance(event, AttentionCall):
            return True
        if is_linear(event) and not same_tensor(event.input, first.input):
            return False
    return False


def branch_outputs(trace: Trace) -> list[tuple[bool, Tensor]]:
    """Return, per branch of a traced block, whether it is attention and the tensor it hands to the residual sum.

    Raises:
        NotCoveredError: if the block's linear maps do not form branches.
    """
    return [(branch.attention is not None, leaving(branch, trace)[0]) for branch in split_branches(trace)]


def entry(branch: Branch, streams: list[Tensor], trace: Trace) -> tuple[Norm | None, Tensor]:
    """Return the norm before a branch and the stream tensor it reads."""
    for stream in streams:
        if same_tensor(branch.source, stream):
            return None, stream
    call = producer_of(branch.source, trace)
    if call is None:
        raise NotCoveredError(f"the input of {branch.entries[0].name!r} is neither the stream nor a norm of it")
    for stream in streams:
        if same_tensor(call.input, stream):
            norm = identify_norm(call.module, call.before, call.after)
            if norm is None:
                raise NotCoveredError(f"{call.name!r} ({type(call.module).__name__}) is no norm the theory knows")
            return norm, stream
    # A custom residual may compute the stream afresh: take the norm's input as the stream, the fit decides.
    norm = identify_norm(call.module, call.before, call.after)
    if norm is None:
        raise NotCoveredError(f"{call.name!r} ({type(call.module).__name__}) is no norm the theory knows")
    return norm, call.input


def leaving(branch: Branch, trace: Trace) -> tuple[Tensor, Norm | None, float, str]:
    """Follow the branch output through dropout, layer scale and output norm.

    Returns the tensor that reaches the residual sum, the norm, the rms gain of a layer scale, and the last module's
    name. A residual multiplier on the exit acts unseen by the trace and counts as such a gain.
    """
    current, norm, last = branch.exit.output, None, branch.exit.name
    hooks = branch.exit.module._forward_hooks.values()
    gain = math.prod(float(getattr(hook, "residual_factor", 1.0)) for hook in hooks)
    if branch.exit.overwritten:
        raise NotCoveredError(f"the output of {branch.exit.name!r} is changed in place")
    position = next(i for i, event in enumerate(trace.events) if event is branch.exit)
    for event in trace.events[position + 1 :]:
        if not isinstance(event, Call) or is_linear(event) or isinstance(event.module, nn.MultiheadAttention):
            break
        if not same_tensor(event.input, current):
            continue
        if event.input.shape == event.output.shape and torch.equal(event.input, event.output):
            current, last = event.output, event.name
            continue
        found = identify_norm(event.module, event.before, event.after)
        if found is not None:
            norm = found
        elif event.input.shape == event.output.shape:
            x, y = event.before, event.after
            slope = feature_gain(x, y)
            if not torch.allclose(x * slope, y, rtol=1e-3, atol=1e-6 * float(y.abs().max())):
                break
            gain *= rms(slope)
        else:
            break
        current, last = event.output, event.name
    return current, norm, gain, last


def next_stream(
    stream: Tensor,
    streams: list[Tensor],
    output: Tensor,
    following: Branch | None,
    block_output: Tensor,
    trace: Trace,
) -> tuple[Tensor, ResidualFit | None]:
    """Find the tensor after the residual sum and fit it; try every tensor the skip may have come from."""
    if following is None:
        targets = [block_output]
        producer = producer_of(block_output, trace)
        if producer is not None:
            targets.append(producer.input)
    else:
        targets = [following.source]
        producer = producer_of(following.source, trace)
        if producer is not None:
            targets.append(producer.input)
    bases = [stream, *(s for s in streams if s is not stream)]
    pairs = [
        (target, fit_residual(target, base, output))
        for target in targets
        for base in bases
        if not same_tensor(target, base)
    ]
    fits = [(target, fit) for target, fit in pairs if fit is not None]
    return min(fits, key=lambda pair: pair[1].misfit) if fits else (targets[0], None)


def post_norm(
    target: Tensor, following: Branch | None, block_output: Tensor, trace: Trace
) -> tuple[Norm | None, list[Tensor]]:
    """Return the norm standing on the stream after the sum, and the tensors the next residual may start from."""
    end = block_output if following is None else following.source
    if same_tensor(target, end):
        return None, [target]
    call = producer_of(end, trace)
    assert call is not None
    if following is None:
        norm = identify_norm(call.module, call.before, call.after)
        if norm is None:
            raise NotCoveredError(
                f"{call.name!r} ({type(call.module).__name__}) on the stream is no norm the theory knows"
            )
        return norm, [end]
    # Pre-norm of the next branch or post-norm of this one: the next residual tells.
    #   pre-norm    target --+--> norm --> branch --(+)      the skip starts at the target
    #   post-norm   target --> norm --+--> branch --(+)      the skip starts after the norm
    output, _, _, _ = leaving(following, trace)
    sums = _sums_after(following, block_output, trace)
    before, after = (
        min((fit.misfit for t in sums if (fit := fit_residual(t, base, output)) is not None), default=math.inf)
        for base in (target, end)
    )
    norm = identify_norm(call.module, call.before, call.after) if after < before else None
    return (norm, [end]) if norm is not None else (None, [target])


def _sums_after(branch: Branch, block_output: Tensor, trace: Trace) -> list[Tensor]:
    """Return the tensors that may hold the residual sum after ``branch``."""
    last = leaving(branch, trace)[3]
    position = max(i for i, event in enumerate(trace.events) if isinstance(event, Call) and event.name == last)
    later = [e.input for e in trace.events[position + 1 :] if isinstance(e, Call) and not is_linear(e)]
    linear = [e.input for e in trace.events[position + 1 :] if isinstance(e, Call) and is_linear(e)]
    return [t for t in (*later, *linear, block_output) if t.numel() == block_output.numel()]


def role_letter(call: Call) -> str | None:
    """Return ``"q"``, ``"k"`` or ``"v"`` where a module's name tells that it makes queries, keys or values."""
    leaf = call.name.rpartition(".")[2].lower()
    return next((letter for letter in "qkv" if leaf.startswith(letter) or leaf.endswith(f"_{letter}")), None)


def is_linear(call: Call) -> bool:
    """Return whether a call multiplied its input by a weight matrix."""
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and call.input.shape[-1] in weight.shape


def producer_of(tensor: Tensor, trace: Trace) -> Call | None:
    """Return the last call that made ``tensor`` from something else, unless it is a linear map."""
    for event in reversed(trace.events):
        if isinstance(event, Call) and same_tensor(event.output, tensor) and not same_tensor(event.input, tensor):
            return None if is_linear(event) else event
    return None


def norm_input(tensor: Tensor, trace: Trace) -> Tensor:
    """Return what a norm made ``tensor`` from, or ``tensor`` itself."""
    call = producer_of(tensor, trace)
    return tensor if call is None else call.input
