"""Reading a spec off a real model: per-layer scales, residuals and norms, and the role of every weight.

Nothing is inferred from names. One traced call of each block shows which tensors went where; a branch is the linear maps between
two points of the residual stream, and what stands on the stream is found by regressing the next stream tensor on the
previous one and on the branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError, NotCoveredError
from fathometer.models.finding import Stack
from fathometer.models.identify import (
    ResidualFit,
    feature_gain,
    fit_residual,
    identify_activation,
    identify_gated,
    identify_norm,
    rms,
)
from fathometer.models.trace import AttentionCall, Call, Trace, same_tensor
from fathometer.spec import MLP, Block, GatedMLP, Norm, SelfAttention, Sublayer, Transformer

ROLES = ("query", "key", "value", "output", "mlp_in", "gate", "mlp_out")


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """Where the weight of one role lives: a parameter of the model, and the rows or columns of it.

    Attributes:
        parameter: Full parameter name.
        axis: Output axis of the weight: 0 for ``nn.Linear``, 1 for input-first layouts.
        start, stop: Range along that axis.
    """

    parameter: str
    axis: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of ``tensor`` this slice names."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)


@dataclass(frozen=True, kw_only=True)
class SublayerReading:
    """One residual branch of one block.

    Attributes:
        sublayer: What it computes, as data.
        roles: Role to weight slice.
        exit_module: Name of the module whose output is added to the stream, after layer scale or output norm.
        added_scale: Factor between that module's output and what reaches the stream.
    """

    sublayer: Sublayer
    roles: dict[str, WeightSlice]
    exit_module: str
    added_scale: float


@dataclass(frozen=True, kw_only=True)
class ModelReading:
    """A stack of blocks read into data.

    Attributes:
        spec: The transformer the theory propagates.
        layers: Per block, per sublayer, where everything lives.
        notes: What was read but is not modelled, with its size.
    """

    spec: Transformer
    layers: tuple[tuple[SublayerReading, ...], ...]
    notes: tuple[str, ...]


def read_block(name: str, block_input: Tensor, block_output: Tensor, trace: Trace) -> tuple[SublayerReading, ...]:
    """Read the sublayers of one traced block.

    Args:
        name: The block's name in the model, the prefix of all parameter names.
        block_input, block_output: The stream before and after.
        trace: What happened inside.
    Raises:
        NotCoveredError: naming what the theory has no map for.
    """
    branches = _split_branches(trace)
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


@dataclass
class _Branch:
    """Linear maps between two points of the stream: entries share one input, the exit writes back."""

    source: Tensor
    entries: list[Call]
    exit: Call
    attention: AttentionCall | None
    inner: list[Call]


def _split_branches(trace: Trace) -> list[_Branch]:
    branches: list[_Branch] = []
    entries: list[Call] = []
    inner: list[Call] = []
    attention: AttentionCall | None = None
    for event in trace.events:
        if isinstance(event, AttentionCall):
            attention = event
            continue
        if isinstance(event.module, nn.MultiheadAttention):
            if entries:
                raise NotCoveredError(f"attention module {event.name!r} nested inside another branch")
            branches.append(_Branch(event.input, [event], event, attention, []))
            attention = None
            continue
        if not _is_linear(event):
            if entries:
                inner.append(event)
            continue
        if not entries or same_tensor(event.input, entries[0].input):
            entries.append(event)
        else:
            branches.append(_Branch(entries[0].input, entries, event, attention, inner))
            entries, inner, attention = [], [], None
    if entries:
        raise NotCoveredError(f"linear map {entries[0].name!r} does not lead back to the stream")
    if not branches:
        raise NotCoveredError("no pair of linear maps found in the block")
    return branches


def _read_branch(
    name: str, branch: _Branch, streams: list[Tensor], following: _Branch | None, block_output: Tensor, trace: Trace
) -> tuple[SublayerReading, list[Tensor]]:
    """Read one branch; ``streams`` are the tensors the residual may start from (before and after a post-norm)."""
    input_norm, stream = _entry(branch, streams, trace)
    output, output_norm, gain, exit_name = _leaving(branch, trace)
    target, fitted = _next_stream(stream, streams, output, following, block_output, trace)
    if fitted is None:
        if any(same_tensor(branch.source, other) for other in streams[1:]) and following is None:
            raise NotCoveredError("the block's output is not skip * stream + scale * branch")
        parallel = following is not None and any(
            same_tensor(s, _norm_input(following.source, trace)) for s in streams
        )
        raise NotCoveredError(
            "attention and MLP read the same tensor in parallel"
            if parallel
            else f"what follows {branch.exit.name!r} is not skip * stream + scale * branch"
        )
    body, roles = _read_attention(name, branch) if branch.attention is not None else _read_mlp(name, branch)
    stream_norm, after = _post_norm(target, following, block_output, trace)
    sublayer = Sublayer(
        branch=body,
        input_norm=input_norm,
        output_norm=output_norm,
        stream_norm=stream_norm,
        skip_scale=fitted.skip,
        branch_scale=fitted.scale * gain,
    )
    reading = SublayerReading(
        sublayer=sublayer, roles=roles, exit_module=f"{name}.{exit_name}", added_scale=fitted.scale
    )
    return reading, after


def _entry(branch: _Branch, streams: list[Tensor], trace: Trace) -> tuple[Norm | None, Tensor]:
    """Return the norm before a branch and the stream tensor it reads."""
    for stream in streams:
        if same_tensor(branch.source, stream):
            return None, stream
    call = _producer(branch.source, trace)
    if call is None:
        raise NotCoveredError(f"the input of {branch.entries[0].name!r} is neither the stream nor a norm of it")
    for stream in streams:
        if same_tensor(call.input, stream):
            norm = identify_norm(call.module, call.input, call.output)
            if norm is None:
                raise NotCoveredError(f"{call.name!r} ({type(call.module).__name__}) is no norm the theory knows")
            return norm, stream
    # A custom residual may compute the stream afresh: take the norm's input as the stream, the fit decides.
    norm = identify_norm(call.module, call.input, call.output)
    if norm is None:
        raise NotCoveredError(f"{call.name!r} ({type(call.module).__name__}) is no norm the theory knows")
    return norm, call.input


def _leaving(branch: _Branch, trace: Trace) -> tuple[Tensor, Norm | None, float, str]:
    """Follow the branch output through dropout, layer scale and output norm.

    Returns the tensor that reaches the residual sum, the norm, the rms gain of a layer scale, and the last module's name.
    """
    current, norm, gain, last = branch.exit.output, None, 1.0, branch.exit.name
    position = next(i for i, event in enumerate(trace.events) if event is branch.exit)
    for event in trace.events[position + 1 :]:
        if not isinstance(event, Call) or _is_linear(event) or isinstance(event.module, nn.MultiheadAttention):
            break
        if not same_tensor(event.input, current):
            continue
        if event.input.shape == event.output.shape and torch.equal(event.input, event.output):
            current, last = event.output, event.name
            continue
        found = identify_norm(event.module, event.input, event.output)
        if found is not None:
            norm = found
        elif event.input.shape == event.output.shape:
            x, y = (t.double().reshape(-1, t.shape[-1]) for t in (event.input, event.output))
            slope = feature_gain(x, y)
            if not torch.allclose(x * slope, y, rtol=1e-3, atol=1e-6 * float(y.abs().max())):
                break
            gain *= rms(slope)
        else:
            break
        current, last = event.output, event.name
    return current, norm, gain, last


def _next_stream(
    stream: Tensor,
    streams: list[Tensor],
    output: Tensor,
    following: _Branch | None,
    block_output: Tensor,
    trace: Trace,
) -> tuple[Tensor, ResidualFit | None]:
    """Find the tensor after the residual sum and fit it; try every tensor the skip may have come from."""
    if following is None:
        targets = [block_output]
        producer = _producer(block_output, trace)
        if producer is not None:
            targets.append(producer.input)
    else:
        targets = [following.source]
        producer = _producer(following.source, trace)
        if producer is not None:
            targets.append(producer.input)
    bases = [stream, *(s for s in streams if s is not stream)]
    pairs = [(target, fit_residual(target, base, output)) for target in targets for base in bases]
    fits = [(target, fit) for target, fit in pairs if fit is not None]
    return min(fits, key=lambda pair: pair[1].misfit) if fits else (targets[0], None)


def _post_norm(
    target: Tensor, following: _Branch | None, block_output: Tensor, trace: Trace
) -> tuple[Norm | None, list[Tensor]]:
    """Return the norm standing on the stream after the sum, and the tensors the next residual may start from."""
    end = block_output if following is None else following.source
    if same_tensor(target, end):
        return None, [target]
    call = _producer(end, trace)
    assert call is not None
    if following is None:
        norm = identify_norm(call.module, call.input, call.output)
        if norm is None:
            raise NotCoveredError(f"{call.name!r} ({type(call.module).__name__}) on the stream is no norm the theory knows")
        return norm, [end]
    # Pre-norm of the next branch or post-norm of this one: the next residual tells. Its skip starts from the normed tensor
    # only for post-norm, so look at what the next sum is made of.
    output, _, _, _ = _leaving(following, trace)
    sums = _sums_after(following, block_output, trace)
    before, after = (
        min((fit.misfit for t in sums if (fit := fit_residual(t, base, output)) is not None), default=math.inf)
        for base in (target, end)
    )
    norm = identify_norm(call.module, call.input, call.output) if after < before else None
    return (norm, [end]) if norm is not None else (None, [target])


def _sums_after(branch: _Branch, block_output: Tensor, trace: Trace) -> list[Tensor]:
    """Return the tensors that may hold the residual sum after ``branch``."""
    last = _leaving(branch, trace)[3]
    position = max(i for i, event in enumerate(trace.events) if isinstance(event, Call) and event.name == last)
    later = [e.input for e in trace.events[position + 1 :] if isinstance(e, Call) and not _is_linear(e)]
    linear = [e.input for e in trace.events[position + 1 :] if isinstance(e, Call) and _is_linear(e)]
    return [t for t in (*later, *linear, block_output) if t.numel() == block_output.numel()]


def _read_attention(name: str, branch: _Branch) -> tuple[SelfAttention, dict[str, WeightSlice]]:
    call = branch.attention
    assert call is not None
    exit_call = branch.exit
    if isinstance(exit_call.module, nn.MultiheadAttention):
        return _read_multihead(name, exit_call, call)
    n_heads = call.n_heads
    width = exit_call.input.shape[-1]
    d_head = width // n_heads
    slices, tensors = _attention_slices(name, branch, width, d_head)
    scales = {role: _scale(slices[role], tensors[role], branch.source.shape[-1]) for role in ("query", "key", "value")}
    axis = _out_axis(exit_call)
    weight = _weight(exit_call)
    slices["output"] = WeightSlice(
        parameter=f"{name}.{exit_call.name}.{_weight_name(exit_call)}", axis=axis, start=0, stop=weight.shape[axis]
    )
    scales["output"] = rms(weight) * math.sqrt(width)
    value = next(entry for entry in reversed(branch.entries) if slices["value"].parameter.startswith(f"{name}.{entry.name}."))
    kv_width = slices["value"].stop - slices["value"].start
    qk_norm = any(
        identify_norm(inner.module, inner.input, inner.output) is not None
        for inner in branch.inner
        if any(same_tensor(inner.input, entry.output) for entry in branch.entries)
        or inner.input.shape[-1] == d_head != width
    )
    multiplier = 1.0 if call.scale is None else call.scale * math.sqrt(d_head)
    if call.scale is None:
        multiplier = _softmax_multiplier(branch, slices, call, d_head)
    return (
        SelfAttention(
            **scales,
            value_bias=_bias_rms(value, slices["value"]),
            output_bias=_bias_rms(exit_call, None),
            n_heads=n_heads,
            n_kv_heads=max(kv_width // d_head, 1),
            causal=_is_causal(call),
            score_multiplier=multiplier,
            qk_norm=qk_norm,
        ),
        slices,
    )


def _read_multihead(name: str, event: Call, call: AttentionCall) -> tuple[SelfAttention, dict[str, WeightSlice]]:
    module = event.module
    assert isinstance(module, nn.MultiheadAttention)
    prefix, d = f"{name}.{event.name}", module.embed_dim
    if module.in_proj_weight is None:
        raise NotCoveredError(f"{event.name!r}: attention with keys and values of another width")
    slices = {
        role: WeightSlice(parameter=f"{prefix}.in_proj_weight", axis=0, start=i * d, stop=(i + 1) * d)
        for i, role in enumerate(("query", "key", "value"))
    }
    scales = {role: rms(s.of(module.in_proj_weight)) * math.sqrt(d) for role, s in slices.items()}
    slices["output"] = WeightSlice(parameter=f"{prefix}.out_proj.weight", axis=0, start=0, stop=d)
    bias = module.in_proj_bias
    return (
        SelfAttention(
            **scales,
            output=rms(module.out_proj.weight) * math.sqrt(d),
            value_bias=0.0 if bias is None else rms(bias[2 * d :]),
            output_bias=0.0 if module.out_proj.bias is None else rms(module.out_proj.bias),
            n_heads=module.num_heads,
            n_kv_heads=module.num_heads,
            causal=_is_causal(call),
        ),
        slices,
    )


def _attention_slices(
    name: str, branch: _Branch, width: int, d_head: int
) -> tuple[dict[str, WeightSlice], dict[str, Tensor]]:
    """Assign query, key and value to the entry linears: three of them in call order, or one fused in that order."""
    entries = branch.entries
    if len(entries) == 3:
        ordered = _by_name(entries)
        slices = {}
        tensors = {}
        for role, entry in zip(("query", "key", "value"), ordered, strict=True):
            axis, weight = _out_axis(entry), _weight(entry)
            slices[role] = WeightSlice(
                parameter=f"{name}.{entry.name}.{_weight_name(entry)}", axis=axis, start=0, stop=weight.shape[axis]
            )
            tensors[role] = weight
        return slices, tensors
    if len(entries) == 1:
        entry = entries[0]
        axis, weight = _out_axis(entry), _weight(entry)
        total = weight.shape[axis]
        kv = (total - width) // 2
        if kv <= 0 or width + 2 * kv != total or kv % d_head:
            raise NotCoveredError(f"{entry.name!r}: cannot split {total} outputs into query, key and value of {width}")
        bounds = {"query": (0, width), "key": (width, width + kv), "value": (width + kv, total)}
        parameter = f"{name}.{entry.name}.{_weight_name(entry)}"
        slices = {r: WeightSlice(parameter=parameter, axis=axis, start=a, stop=b) for r, (a, b) in bounds.items()}
        return slices, dict.fromkeys(slices, weight)
    raise NotCoveredError(f"attention with {len(entries)} input maps; accepted: three, or one fused")


def _by_name(entries: list[Call]) -> list[Call]:
    """Return query, key, value in that order: by their first letter when it tells, else in call order."""
    found = {}
    for entry in entries:
        leaf = entry.name.rpartition(".")[2].lower()
        for letter in "qkv":
            if leaf.startswith(letter) or leaf.endswith(f"_{letter}"):
                found[letter] = entry
    return [found[letter] for letter in "qkv"] if len(found) == 3 else entries


def _softmax_multiplier(
    branch: _Branch, slices: dict[str, WeightSlice], call: AttentionCall, d_head: int
) -> float:
    """Return the score multiplier of a plain softmax by regressing its logits' spread on queries times keys."""
    outputs = {}
    for role in ("query", "key"):
        part = slices[role]
        entry = next(e for e in branch.entries if part.parameter.rpartition(".")[0].endswith(e.name))
        outputs[role] = entry.output.narrow(-1, part.start, part.stop - part.start)
    logits = call.logits
    assert logits is not None
    queries, keys = (
        t.reshape(*t.shape[:2], -1, d_head).transpose(1, 2).double() for t in (outputs["query"], outputs["key"])
    )
    if keys.shape[1] != queries.shape[1]:
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    products = (queries @ keys.transpose(-1, -2)) / math.sqrt(d_head)
    target = logits.double().reshape(products.shape)
    seen = target > -1e30
    x, y = products[seen], target[seen]
    return float((x @ y) / (x @ x)) if float(x @ x) > 0 else 1.0


def _read_mlp(name: str, branch: _Branch) -> tuple[MLP | GatedMLP, dict[str, WeightSlice]]:
    exit_call, entries = branch.exit, branch.entries
    d_in, hidden = branch.source.shape[-1], exit_call.input.shape[-1]
    after = exit_call.input
    out_axis, out_weight = _out_axis(exit_call), _weight(exit_call)
    roles = {
        "mlp_out": WeightSlice(
            parameter=f"{name}.{exit_call.name}.{_weight_name(exit_call)}",
            axis=out_axis,
            start=0,
            stop=out_weight.shape[out_axis],
        )
    }
    mlp_out = rms(out_weight) * math.sqrt(hidden)
    ratio = hidden / d_in
    slices = []
    for entry in entries:
        axis, weight = _out_axis(entry), _weight(entry)
        parts = 2 if len(entries) == 1 and weight.shape[axis] == 2 * hidden else 1
        step = weight.shape[axis] // parts
        for i in range(parts):
            part = WeightSlice(
                parameter=f"{name}.{entry.name}.{_weight_name(entry)}", axis=axis, start=i * step, stop=(i + 1) * step
            )
            scale = rms(part.of(weight)) * math.sqrt(d_in)
            slices.append((part, scale, entry.output.narrow(-1, i * step, step), _bias_rms(entry, part)))
    if len(slices) == 1:
        part, scale, before, bias = slices[0]
        activation = identify_activation(before, after)
        if activation is None:
            raise NotCoveredError(f"the activation between {entries[0].name!r} and {exit_call.name!r} is none the theory knows")
        roles["mlp_in"] = part
        mlp = MLP(
            mlp_in=scale,
            mlp_out=mlp_out,
            activation=activation,
            in_bias=bias,
            out_bias=_bias_rms(exit_call, None),
            ratio=ratio,
        )
        return mlp, roles
    if len(slices) != 2:
        raise NotCoveredError(f"an MLP with {len(slices)} input maps; accepted: one, or two for a gated MLP")
    for gate, linear in (slices, slices[::-1]):
        activation = identify_gated(gate[2], linear[2], after)
        if activation is not None:
            roles["gate"], roles["mlp_in"] = gate[0], linear[0]
            gated = GatedMLP(gate=gate[1], mlp_in=linear[1], mlp_out=mlp_out, activation=activation, ratio=ratio)
            return gated, roles
    raise NotCoveredError(f"{exit_call.name!r} does not take activation(gate) * linear of its two input maps")


def _is_causal(call: AttentionCall) -> bool:
    """Return whether every query sees exactly the keys up to its own position.

    Raises:
        NotCoveredError: for any other mask that hides keys.
    """
    hidden = torch.isneginf(call.scores()[:1, :1])[0, 0]
    if not bool(hidden.any()):
        return False
    n_queries, n_keys = hidden.shape
    future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=hidden.device).triu(1)
    if n_queries == n_keys and bool((hidden == future).all()):
        return True
    raise NotCoveredError("an attention mask that is neither full nor causal (padding, windows or blocks)")


def _is_linear(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and call.input.shape[-1] in weight.shape


def _weight_name(call: Call) -> str:
    return "weight"


def _weight(call: Call) -> Tensor:
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _out_axis(call: Call) -> int:
    """Return the output axis of a linear map's weight, by its shape or, for a square one, by what it computed."""
    weight = _weight(call)
    n_in, n_out = call.input.shape[-1], call.output.shape[-1]
    if n_in != n_out:
        return 0 if tuple(weight.shape) == (n_out, n_in) else 1
    bias: Any = getattr(call.module, "bias", None)
    x = call.input.detach().reshape(-1, n_in)[:2].double()
    y = call.output.detach().reshape(-1, n_out)[:2].double()
    if isinstance(bias, Tensor):
        y = y - bias.detach().double()
    w = weight.detach().double()
    return 0 if float((x @ w.T - y).abs().max()) <= float((x @ w - y).abs().max()) else 1


def _scale(part: WeightSlice, weight: Tensor, fan_in: int) -> float:
    return rms(part.of(weight)) * math.sqrt(fan_in)


def _bias_rms(call: Call, part: WeightSlice | None) -> float:
    bias: Any = getattr(call.module, "bias", None)
    if not isinstance(bias, Tensor):
        return 0.0
    return rms(bias if part is None else bias[part.start : part.stop])


def _producer(tensor: Tensor, trace: Trace) -> Call | None:
    """Return the last non-linear-map call whose output is ``tensor`` and whose input is not (so not a dropout at rest)."""
    for event in reversed(trace.events):
        if isinstance(event, Call) and same_tensor(event.output, tensor) and not same_tensor(event.input, tensor):
            return None if _is_linear(event) else event
    return None


def _norm_input(tensor: Tensor, trace: Trace) -> Tensor:
    call = _producer(tensor, trace)
    return tensor if call is None else call.input


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
            raise ModelError(f"parameter {name!r} has dtype {parameter.dtype}; accepted: floating point (not quantised)")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"parameter {name!r} holds NaN or infinity")
        if parameter.ndim >= 2:
            largest = max(largest, float(parameter.detach().abs().max()))
    if largest == 0.0:
        raise ModelError("every weight matrix is zero: there is no randomness to propagate; initialise the model first")


def read_stack(stack: Stack, d_model: int, calls: Sequence[tuple[Tensor, Tensor, Trace]]) -> ModelReading:
    """Read every block of a stack from one traced call each.

    Args:
        stack: The blocks.
        d_model: Width of the stream.
        calls: Per block: stream before, stream after, trace.
    """
    layers = tuple(
        read_block(name, before, after, trace)
        for name, (before, after, trace) in zip(stack.names, calls, strict=True)
    )
    return ModelReading(spec=spec_of(layers, d_model), layers=layers, notes=())
