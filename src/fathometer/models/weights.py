"""The weights of a branch: which parameter plays which role, and its scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import NotCoveredError
from fathometer.models.branches import Branch, role_letter
from fathometer.models.identify import identify_activation, identify_gated, identify_norm, rms
from fathometer.models.trace import AttentionCall, Call, centred_rms
from fathometer.spec import MLP, CrossAttention, GatedMLP, SelfAttention

#: Share of a variance that may be left out of the theory.
_NEGLECTED = 0.05

ROLES = ("query", "key", "value", "output", "mlp_in", "gate", "mlp_out")


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """Where the weight of one role lives: a parameter of the model, and the rows or columns of it.

    Attributes:
        parameter: Full parameter name.
        axis: Output axis of the weight: 0 for ``nn.Linear``, 1 for input-first layouts.
        start, stop: Range along that axis.
        size: Full extent of that axis.
    """

    parameter: str
    axis: int
    start: int
    stop: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of ``tensor`` this slice names."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)


def read_attention(name: str, branch: Branch) -> tuple[SelfAttention | CrossAttention, dict[str, WeightSlice]]:
    """Return the attention a branch computes and where its weights live.

    Args:
        name: The block's name, the prefix of parameter names.
        branch: A branch with an attention operation.
    Raises:
        NotCoveredError: for projections that cannot be split, or masks neither full nor causal; of a memory, for any
            mask and for normalised queries and keys.
    """
    call = branch.attention
    assert call is not None
    exit_call = branch.exit
    if call.crossed and branch.memory is None:
        raise NotCoveredError(f"the keys and values of {exit_call.name!r} are made of different tensors")
    if call.bias_share > _NEGLECTED:
        raise NotCoveredError(
            f"an additive attention bias that depends on the key makes {call.bias_share:.0%} of the score variance"
        )
    if isinstance(exit_call.module, nn.MultiheadAttention):
        return _read_multihead(name, exit_call, call)
    seen = branch.source if branch.memory is None else branch.memory
    tokens = seen.numel() // seen.shape[-1]
    if call.n_keys not in (seen.shape[0], seen.shape[-2]) and call.n_keys != tokens // len(seen):
        raise NotCoveredError(f"attention sees {call.n_keys} keys, not all tokens (windows, or another sequence)")
    n_heads = call.n_heads
    width = exit_call.input.shape[-1]
    d_head = width // n_heads
    slices, tensors = _attention_slices(name, branch, width, d_head)
    fan_in = {"query": branch.source.shape[-1], "key": seen.shape[-1], "value": seen.shape[-1]}
    scales = {role: _scale(slices[role], tensors[role], n) for role, n in fan_in.items()}
    weight = _weight(exit_call)
    slices["output"] = whole_weight(name, exit_call)
    scales["output"] = rms(weight) * math.sqrt(width)
    value = next(
        entry for entry in reversed(branch.entries) if slices["value"].parameter.startswith(f"{name}.{entry.name}.")
    )
    kv_width = slices["value"].stop - slices["value"].start
    outputs = {role: _projected(branch, slices[role]) for role in ("query", "key")}
    for role in ("query", "key"):
        entry = next(e for e in branch.entries if slices[role].parameter.endswith(f".{e.name}.weight"))
        _refuse_large_bias(entry, slices[role], outputs[role])
    qk_norm, multiplier = _score_scale(branch, call, outputs, d_head)
    common: dict[str, Any] = {
        **scales,
        "value_bias": _bias_rms(value, slices["value"]),
        "output_bias": _bias_rms(exit_call, None),
        "n_heads": n_heads,
        "n_kv_heads": max(kv_width // d_head, 1),
        "score_multiplier": multiplier,
    }
    if branch.memory is None:
        return SelfAttention(**common, causal=_is_causal(call), qk_norm=qk_norm), slices
    if qk_norm:
        raise NotCoveredError(f"{exit_call.name!r}: cross-attention with normalised queries and keys")
    _refuse_mask(call)
    return CrossAttention(**common, d_memory=_other_width(branch)), slices


def _read_multihead(
    name: str, event: Call, call: AttentionCall
) -> tuple[SelfAttention | CrossAttention, dict[str, WeightSlice]]:
    module = event.module
    assert isinstance(module, nn.MultiheadAttention)
    prefix, d = f"{name}.{event.name}", module.embed_dim
    if module.in_proj_weight is None:
        raise NotCoveredError(f"{event.name!r}: attention with keys and values of another width")
    slices = {
        role: WeightSlice(parameter=f"{prefix}.in_proj_weight", axis=0, start=i * d, stop=(i + 1) * d, size=3 * d)
        for i, role in enumerate(("query", "key", "value"))
    }
    common: dict[str, Any] = {role: rms(s.of(module.in_proj_weight)) * math.sqrt(d) for role, s in slices.items()}
    slices["output"] = WeightSlice(parameter=f"{prefix}.out_proj.weight", axis=0, start=0, stop=d, size=d)
    bias = module.in_proj_bias
    common |= {
        "output": rms(module.out_proj.weight) * math.sqrt(d),
        "value_bias": 0.0 if bias is None else rms(bias[2 * d :]),
        "output_bias": 0.0 if module.out_proj.bias is None else rms(module.out_proj.bias),
        "n_heads": module.num_heads,
        "n_kv_heads": module.num_heads,
    }
    if not call.crossed:
        return SelfAttention(**common, causal=_is_causal(call)), slices
    _refuse_mask(call)
    return CrossAttention(**common), slices


def _attention_slices(
    name: str, branch: Branch, width: int, d_head: int
) -> tuple[dict[str, WeightSlice], dict[str, Tensor]]:
    """Assign query, key and value to the entry linears: three of them in call order, or one fused in that order.

    Of a memory, keys and values may be fused beside the queries.
    """
    entries = branch.entries
    if branch.memory is not None and len(entries) == 2:
        query, fused = entries
        total = _weight(fused).shape[_out_axis(fused)]
        bounds = {"key": (0, total // 2), "value": (total // 2, total)}
        slices = {"query": whole_weight(name, query)}
        slices |= {role: replace(whole_weight(name, fused), start=a, stop=b) for role, (a, b) in bounds.items()}
        return slices, {"query": _weight(query), "key": _weight(fused), "value": _weight(fused)}
    if len(entries) == 3:
        ordered = _by_name(entries)
        if branch.memory is not None and ordered[0] is not entries[0]:
            raise NotCoveredError(f"{ordered[0].name!r} makes queries of the tensor that keys or values are made of")
        by_role = dict(zip(("query", "key", "value"), ordered, strict=True))
        return {role: whole_weight(name, entry) for role, entry in by_role.items()}, {
            role: _weight(entry) for role, entry in by_role.items()
        }
    if len(entries) == 1:
        entry = entries[0]
        axis, weight = _out_axis(entry), _weight(entry)
        total = weight.shape[axis]
        kv = (total - width) // 2
        if kv <= 0 or width + 2 * kv != total or kv % d_head:
            raise NotCoveredError(f"{entry.name!r}: cannot split {total} outputs into query, key and value of {width}")
        bounds = {"query": (0, width), "key": (width, width + kv), "value": (width + kv, total)}
        parameter = f"{name}.{entry.name}.weight"
        slices = {
            role: WeightSlice(parameter=parameter, axis=axis, start=a, stop=b, size=total)
            for role, (a, b) in bounds.items()
        }
        return slices, dict.fromkeys(slices, weight)
    raise NotCoveredError(f"attention with {len(entries)} input maps; accepted: three, or one fused")


def check_order(branch: Branch, roles: dict[str, WeightSlice]) -> None:
    """Refuse a fused map of attention whose outputs are not all queries, then all keys, then all values.

    Reading takes their order for granted, which does no harm while all three have one scale. The kernel's queries and
    keys may be scaled, rotated or normalised on the way; the lengths of the heads tell. A plain softmax shows none.

    Raises:
        NotCoveredError: for another order, such as query, key and value head by head.
    """
    call = branch.attention
    if call is None or isinstance(branch.exit.module, nn.MultiheadAttention):
        return
    for role, given in (("query", call.queries), ("key", call.keys)):
        fused = roles[role].stop - roles[role].start < roles[role].size
        if not fused or given is None or _even(given.double().reshape(-1, given.shape[-1])):
            continue
        made = _projected(branch, roles[role])
        if given.shape[1] * given.shape[-1] != made.shape[-1]:
            continue
        seen = given.double().norm(dim=-1).transpose(1, 2).flatten()
        ratio = seen / made.reshape(-1, given.shape[-1]).norm(dim=-1).clamp_min(1e-300)
        if float(ratio.std()) > 2e-2 * float(ratio.mean()):
            raise NotCoveredError(
                f"{branch.entries[-1].name!r} does not put out all queries, then all keys, then all values: "
                "what to write where is not known"
            )


def _by_name(entries: list[Call]) -> list[Call]:
    """Return query, key, value in that order: by their first letter when it tells, else in call order."""
    found = {letter: entry for entry in entries if (letter := role_letter(entry)) is not None}
    return [found[letter] for letter in "qkv"] if len(found) == 3 else entries


def _projected(branch: Branch, part: WeightSlice) -> Tensor:
    """Return what the projection of a role put out, shape ``(..., width of the role)``."""
    entry = next(e for e in branch.entries if part.parameter.endswith(f".{e.name}.weight"))
    return entry.output.detach().narrow(-1, part.start, part.stop - part.start).double()


def _score_scale(branch: Branch, call: AttentionCall, outputs: dict[str, Tensor], d_head: int) -> tuple[bool, float]:
    """Return whether queries and keys are normalised per head, and the score multiplier beyond ``1/sqrt(d_head)``.

    The fused kernel shows the queries and keys it was given: their sizes against the projections' tell every factor
    applied in between, and rotations change no size. A plain softmax shows only its logits: their spread over the
    visible keys is compared with that of the products of the projections.
    """
    heads = {role: out.reshape(-1, d_head) for role, out in outputs.items()}
    raw = {role: rms(h) for role, h in heads.items()}
    if call.queries is not None and call.keys is not None and call.scale is not None:
        seen = {"query": call.queries.double().reshape(-1, d_head), "key": call.keys.double().reshape(-1, d_head)}
        normed = all(_even(seen[role]) and not _even(heads[role]) for role in heads)
        size = rms(seen["query"]) * rms(seen["key"])
        reference = 1.0 if normed else raw["query"] * raw["key"]
        if reference == 0:  # queries or keys start at zero: no multiplier can be told, and none matters
            return normed, 1.0
        return normed, call.scale * math.sqrt(d_head) * size / reference
    assert call.logits is not None
    inner = [
        e for e in branch.inner if e.before.shape[-1] == d_head or e.output.shape == branch.entries[0].output.shape
    ]
    normed = any(identify_norm(e.module, e.before, e.after) is not None for e in inner)
    if normed:
        outputs = {
            role: out
            * torch.rsqrt(out.reshape(*out.shape[:-1], -1, d_head).square().mean(-1)).repeat_interleave(d_head, dim=-1)
            for role, out in outputs.items()
        }
    queries, keys = (
        out.reshape(*out.shape[:-1], -1, d_head).transpose(-2, -3) for out in (outputs["query"], outputs["key"])
    )
    if keys.shape[-3] != queries.shape[-3]:
        keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], dim=-3)
    products = (queries @ keys.transpose(-1, -2)) / math.sqrt(d_head)
    scores = call.scores().double().reshape(products.shape)
    spread = centred_rms(products, torch.isneginf(scores))
    return normed, centred_rms(scores, torch.isneginf(scores)) / spread if spread > 0 else 1.0


def _even(heads: Tensor) -> bool:
    """Return whether all head vectors have one length."""
    lengths = heads.square().mean(-1).sqrt()
    return float(lengths.std()) < 2e-2 / math.sqrt(heads.shape[-1]) * float(lengths.mean())


def _refuse_large_bias(call: Call, part: WeightSlice, output: Tensor) -> None:
    """Refuse a bias the theory leaves out where it is more than a twentieth of the mean square the map puts out."""
    share = (_bias_rms(call, part) / max(rms(output), 1e-300)) ** 2
    if share > _NEGLECTED:
        raise NotCoveredError(f"the bias of {call.name!r} makes {share:.0%} of its output; the theory has none there")


def read_mlp(name: str, branch: Branch) -> tuple[MLP | GatedMLP, dict[str, WeightSlice]]:
    """Return the MLP a branch computes and where its weights live.

    Raises:
        NotCoveredError: for an activation that no kernel knows, or more than two input maps.
    """
    exit_call, entries = branch.exit, branch.entries
    d_in, hidden = branch.source.shape[-1], exit_call.input.shape[-1]
    after = exit_call.before
    roles = {"mlp_out": whole_weight(name, exit_call)}
    mlp_out = rms(_weight(exit_call)) * math.sqrt(hidden)
    ratio = hidden / d_in
    slices = []
    for entry in entries:
        axis, weight = _out_axis(entry), _weight(entry)
        parts = 2 if len(entries) == 1 and weight.shape[axis] == 2 * hidden else 1
        step = weight.shape[axis] // parts
        for i in range(parts):
            part = WeightSlice(
                parameter=f"{name}.{entry.name}.weight",
                axis=axis,
                start=i * step,
                stop=(i + 1) * step,
                size=step * parts,
            )
            scale = rms(part.of(weight)) * math.sqrt(d_in)
            slices.append((part, scale, entry.after.narrow(-1, i * step, step), entry))
    if len(slices) == 1:
        part, scale, before, entry = slices[0]
        activation = identify_activation(before, after)
        if activation is None:
            raise NotCoveredError(
                f"the activation between {entries[0].name!r} and {exit_call.name!r} is none the theory knows"
            )
        roles["mlp_in"] = part
        mlp = MLP(
            mlp_in=scale,
            mlp_out=mlp_out,
            activation=activation,
            in_bias=_bias_rms(entry, part),
            out_bias=_bias_rms(exit_call, None),
            ratio=ratio,
        )
        return mlp, roles
    if len(slices) != 2:
        raise NotCoveredError(f"an MLP with {len(slices)} input maps; accepted: one, or two for a gated MLP")
    for gate, linear in (slices, slices[::-1]):
        activation = identify_gated(gate[2], linear[2], after)
        if activation is not None:
            for part, _, out, entry in (gate, linear):
                _refuse_large_bias(entry, part, out)
            _refuse_large_bias(exit_call, _whole(exit_call), exit_call.after)
            roles["gate"], roles["mlp_in"] = gate[0], linear[0]
            gated = GatedMLP(gate=gate[1], mlp_in=linear[1], mlp_out=mlp_out, activation=activation, ratio=ratio)
            return gated, roles
    raise NotCoveredError(f"{exit_call.name!r} does not take activation(gate) * linear of its two input maps")


def _is_causal(call: AttentionCall) -> bool:
    """Return whether every query sees exactly the keys up to its own position.

    Raises:
        NotCoveredError: for any other mask that hides keys.
    """
    every = torch.isneginf(call.scores())
    if not bool(every.any()):
        return False
    hidden = every[0, 0]
    if not bool((every == hidden).all()):
        raise NotCoveredError("an attention mask that differs between samples or heads (padding)")
    n_queries, n_keys = hidden.shape
    future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=hidden.device).triu(1)
    if n_queries == n_keys and bool((hidden == future).all()):
        return True
    raise NotCoveredError("an attention mask that is neither full nor causal (padding, windows or blocks)")


def _refuse_mask(call: AttentionCall) -> None:
    """Refuse cross attention in which a query does not see the whole memory."""
    if bool(torch.isneginf(call.scores()).any()):
        raise NotCoveredError("cross-attention that hides a part of the memory (padding)")


def _other_width(branch: Branch) -> int | None:
    """Return the width of the memory where it differs from that of the stream."""
    assert branch.memory is not None
    width = int(branch.memory.shape[-1])
    return None if width == branch.source.shape[-1] else width


def whole_weight(name: str, call: Call) -> WeightSlice:
    """Return the slice that is all of a linear map's weight."""
    axis = _out_axis(call)
    size = _weight(call).shape[axis]
    return WeightSlice(parameter=f"{name}.{call.name}.weight", axis=axis, start=0, stop=size, size=size)


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
    x, y = call.before[:2], call.after[:2]
    if isinstance(bias, Tensor):
        y = y - bias.detach().double()
    w = weight.detach().double()
    return 0 if float((x @ w.T - y).abs().max()) <= float((x @ w - y).abs().max()) else 1


def _scale(part: WeightSlice, weight: Tensor, fan_in: int) -> float:
    return rms(part.of(weight)) * math.sqrt(fan_in)


def _whole(call: Call) -> WeightSlice:
    size = _weight(call).shape[_out_axis(call)]
    return WeightSlice(parameter="", axis=0, start=0, stop=size, size=size)


def _bias_rms(call: Call, part: WeightSlice | None) -> float:
    bias: Any = getattr(call.module, "bias", None)
    if not isinstance(bias, Tensor):
        return 0.0
    return rms(bias if part is None else bias[part.start : part.stop])
