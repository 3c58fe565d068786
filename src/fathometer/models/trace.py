"""Watching a forward pass: which leaf modules ran, on which tensors, and every attention operation among them.

The watched modules are left exactly as found: hooks are removed and the fused attention fast path is restored, also
after an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROWS = 64


@dataclass
class Call:
    """One call of a leaf module.

    Attributes:
        name, module: The leaf.
        input, output: Its tensors, for following who made what; an in-place operation may have overwritten them since.
        before, after: Their first rows as they were, float64.
        versions: Write counters of input and output when the call ended.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    before: Tensor
    after: Tensor
    versions: tuple[int, int]

    @property
    def overwritten(self) -> bool:
        """Whether the output was changed in place after the call."""
        return self.output._version != self.versions[1]


@dataclass
class AttentionCall:
    """One attention operation, as scores or as what makes them.

    Attributes:
        queries, keys: Shape ``(batch, heads, n, d_head)`` when the fused kernel was called; ``None`` for a plain
            softmax.
        scale: Factor on ``q.k``; ``None`` for a plain softmax.
        causal: Whether the kernel itself masks the future.
        mask: Additive or boolean mask given to the kernel.
        logits: Masked scores given to a plain softmax.
        crossed: Whether keys are known to come from another tensor than queries.
        memory: That tensor, where values come from it too.
    """

    queries: Tensor | None
    keys: Tensor | None
    scale: float | None
    causal: bool
    mask: Tensor | None
    logits: Tensor | None
    crossed: bool = False
    memory: Tensor | None = None

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        source = self.queries if self.queries is not None else self.logits
        assert source is not None
        return int(source.shape[1]) if source.ndim == 4 else 1

    @property
    def n_keys(self) -> int:
        """Number of keys."""
        if self.keys is not None:
            return int(self.keys.shape[-2])
        assert self.logits is not None
        return int(self.logits.shape[-1])

    def scores(self) -> Tensor:
        """Return masked scores of shape ``(batch, heads, n_queries, n_keys)``, ``-inf`` where a key is hidden."""
        if self.logits is not None:
            logits = self.logits if self.logits.ndim == 4 else self.logits.unsqueeze(1)
            return logits.masked_fill(_hidden(logits), -math.inf)
        assert self.queries is not None and self.keys is not None and self.scale is not None
        queries, keys = self.queries, self.keys
        if keys.shape[1] != queries.shape[1]:
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = (queries @ keys.transpose(-1, -2)) * self.scale
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        if self.mask is not None:
            if self.mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.mask, -math.inf)
            else:
                scores = (scores + self.mask).masked_fill(_hidden(self.mask), -math.inf)
        return scores

    @property
    def bias_share(self) -> float:
        """Share of the spread of visible scores, within a row, that an additive mask brings: 0 for a pure mask."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return 0.0
        scores = self.scores()
        hidden = torch.isneginf(scores)
        whole = centred_rms(scores, hidden)
        return (centred_rms(self.mask.expand_as(scores), hidden) / whole) ** 2 if whole > 0 else 0.0


def centred_rms(scores: Tensor, hidden: Tensor) -> float:
    """Return the rms deviation of scores from their row means, over visible keys."""
    shown = scores.double().masked_fill(hidden, 0.0)
    mean = shown.sum(-1, keepdim=True) / (~hidden).sum(-1, keepdim=True).clamp_min(1)
    return float((((shown - mean).square() * ~hidden).sum() / (~hidden).sum()).sqrt())


def _hidden(logits: Tensor) -> Tensor:
    """Return which keys are masked: far below the best key of the row, whatever number the mask was made of."""
    top = logits.max(dim=-1, keepdim=True).values
    return torch.isneginf(logits) | (logits < top - 1e3) | (logits < -1e4)


@dataclass
class Trace:
    """Everything seen during one watched call, in order."""

    events: list[Call | AttentionCall] = field(default_factory=list)

    @property
    def calls(self) -> list[Call]:
        """The module calls."""
        return [event for event in self.events if isinstance(event, Call)]

    @property
    def attention(self) -> list[AttentionCall]:
        """The attention operations."""
        return [event for event in self.events if isinstance(event, AttentionCall)]


class _AttentionWatch(TorchFunctionMode):
    """Report every fused attention kernel and every softmax that looks like attention."""

    def __init__(self, report: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self._report(_from_fused(*args, **kwargs))
        elif func in _SOFTMAX:
            logits = args[0] if args else kwargs.get("input")
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(logits, Tensor) and logits.ndim >= 3 and dim in (-1, logits.ndim - 1):
                self._report(AttentionCall(None, None, None, False, None, logits.detach()))
        elif func is nn.functional.multi_head_attention_forward:
            self._report(_from_multihead(*args, **kwargs))
        return func(*args, **kwargs)


_SOFTMAX = {torch.softmax, nn.functional.softmax, Tensor.softmax}


def _from_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    del value, dropout_p, enable_gqa
    return AttentionCall(
        queries=query.detach(),
        keys=key.detach(),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        causal=is_causal,
        mask=None if attn_mask is None else attn_mask.detach(),
        logits=None,
    )


def _from_multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *rest: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> AttentionCall:
    """Redo the input projection of ``nn.MultiheadAttention``, whose kernel runs out of sight; tokens come first."""
    d_head = embed_dim_to_check // num_heads
    if in_proj_weight is None:
        weights = [others["q_proj_weight"], others["k_proj_weight"]]
    else:
        weights = list(in_proj_weight.detach().chunk(3)[:2])
    biases = [0.0, 0.0] if in_proj_bias is None else list(in_proj_bias.detach().chunk(3)[:2])
    heads = [
        (x.detach() @ w.T + b).reshape(*x.shape[:2], num_heads, d_head).permute(1, 2, 0, 3)
        for x, w, b in zip((query, key), weights, biases, strict=True)
    ]
    masks = [_additive(attn_mask, heads[0]), _additive(key_padding_mask, heads[0])]
    if masks[0] is not None and masks[0].ndim == 3:  # one mask for every sample and head
        masks[0] = masks[0].reshape(-1, num_heads, *masks[0].shape[1:])
    if masks[1] is not None:
        masks[1] = masks[1][:, None, None, :]
    given = [mask for mask in masks if mask is not None]
    crossed = not same_tensor(query, key)
    return AttentionCall(
        queries=heads[0],
        keys=heads[1],
        scale=1 / math.sqrt(d_head),
        causal=False,
        mask=sum(given[1:], given[0]) if given else None,
        logits=None,
        crossed=crossed,
        memory=key.detach() if crossed and same_tensor(key, value) else None,
    )


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask of this module, where true means hidden, as numbers to add to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.detach()
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


@contextmanager
def watch_attention(report: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Call ``report`` for every attention operation run inside, with the opaque fused fast path switched off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _AttentionWatch(report):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def hooked(
    modules: dict[str, nn.Module],
    after: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any] | None = None,
    before: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> Iterator[None]:
    """Attach forward hooks to named modules and remove them on the way out."""
    handles = []
    try:
        for name, module in modules.items():
            if before is not None:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, a, k, name=name: before(name, m, a, k),
                        with_kwargs=True,
                    )
                )
            if after is not None:
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, k, out, name=name: after(name, m, a, k, out),
                        with_kwargs=True,
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules treated as one operation: those without children, and ``nn.MultiheadAttention``."""
    whole = {name for name, child in module.named_modules() if isinstance(child, nn.MultiheadAttention)}
    return {
        name: child
        for name, child in module.named_modules()
        if name in whole
        or (not any(True for _ in child.children()) and not any(name.startswith(w + ".") for w in whole))
    }


@contextmanager
def tracing(module: nn.Module) -> Iterator[Trace]:
    """Record the leaf calls and attention operations of ``module`` inside the ``with`` block."""
    trace = Trace()
    with recording(leaves(module), trace), watch_attention(trace.events.append):
        yield trace


@contextmanager
def recording(modules: dict[str, nn.Module], trace: Trace) -> Iterator[None]:
    """Add the calls of the given leaves, by name, to a trace."""
    pending: dict[str, list[Tensor]] = {}

    def before(name: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = first_tensor(args, kwargs)
        if source is not None:
            pending.setdefault(name, []).append(sampled(source))

    def after(name: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        source, result = first_tensor(args, kwargs), first_tensor((out,), {})
        if source is not None and result is not None:
            source, result = source.detach(), result.detach()
            rows = pending[name].pop() if pending.get(name) else sampled(source)
            versions = (source._version, result._version)
            trace.events.append(Call(name, child, source, result, rows, sampled(result), versions))

    with hooked(modules, after=after, before=before):
        yield


def sampled(x: Tensor) -> Tensor:
    """Return a float64 copy of a tensor's first rows, shape ``(rows, features)``: enough to recognise what made it."""
    return x.detach().reshape(-1, x.shape[-1])[:_ROWS].to(torch.float64, copy=True) if x.ndim else x.detach().double()


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first floating-point tensor among positional, then keyword arguments, looking into tuples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list)):
            inner = first_tensor(tuple(value), {})
            if inner is not None:
                return inner
    return None


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Return whether two live tensors are the same data, possibly reshaped."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.device == b.device
