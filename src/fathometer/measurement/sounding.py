r"""One sounding of a model: a signal down, gradients back.

The model runs forward once with an isotropic tangent riding on the first block's input, which gives the forward
APJN; only block inputs are kept. Then each block is run again from its kept input, last block first, with gradients
on: one reverse pass gives the APJN to every layer, and the same re-run shows branches and attention rows. It costs
about two forwards and one backward to inputs per draw (a training step's backward also forms weight gradients), and
the memory of block inputs plus one block's graph, so a thousand layers fit.

.. math:: \hat J^{L,l} = \frac{|g^l|^2}{|g^L|^2}, \qquad
          g^{l} = \Bigl(\frac{\partial x^{L}}{\partial x^{l}}\Bigr)^{T} g^{L}, \qquad g^L \sim \mathcal N(0, I)

Source: the estimator, Doshi et al., arXiv:2111.12143; the single reverse pass and the alignment K from the same
vectors, ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fathometer.errors import ModelError, NotCoveredError
from fathometer.measurement.batches import Batch
from fathometer.measurement.layout import Layout, layout_of
from fathometer.measurement.statistics import row_statistics, token_moments
from fathometer.models.branches import branch_outputs
from fathometer.models.finding import Stack
from fathometer.models.seeding import named_generator
from fathometer.models.trace import Trace, first_tensor, hooked, tracing

FloatArray = NDArray[np.float64]
Progress = Callable[[int], None]


@dataclass
class BlockCall:
    """How a block was called: its stream input, everything else, and what came out."""

    stream: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None

    def run(self, block: nn.Module, stream: Tensor) -> Tensor:
        """Call the block again on another stream tensor."""

        def swap(value: Any) -> Any:
            return stream if value is self.stream else value

        out = block(*map(swap, self.args), **{key: swap(value) for key, value in self.kwargs.items()})
        result = first_tensor((out,), {})
        assert result is not None
        return result


@dataclass
class Sounding:
    """Curves of one weight draw; names as in :data:`fathometer.results.VOCABULARY`."""

    curves: dict[str, FloatArray]
    first_stream: Tensor
    notes: list[str] = field(default_factory=list)


def record_calls(model: nn.Module, stack: Stack, batch: Batch, tangent: bool, seed: int) -> tuple[list[BlockCall], Any]:
    """Run the model forward and keep every block's call; optionally carry a tangent and return ``ln J^{l,0}``."""
    calls: list[BlockCall] = []
    norms: list[float] = []
    generator = named_generator(seed, "tangent")

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = first_tensor(args, kwargs)
        assert stream is not None
        replaced: Tensor
        if not tangent:
            replaced = stream
        elif not norms:
            direction = torch.randn(stream.shape, generator=generator).to(stream)
            replaced = forward_ad.make_dual(stream.detach(), direction)  # type: ignore[no-untyped-call]
            norms.append(_mean_square(direction))
        else:
            replaced = stream
            norms.append(_mean_square(_tangent_of(stream)))
        plain = _primal(replaced).clone()  # a block may overwrite its input

        def swap(value: Any) -> Any:
            return replaced if value is stream else value

        def keep(value: Any) -> Any:
            return plain if value is stream else _primal(value)

        calls.append(BlockCall(plain, tuple(map(keep, args)), {k: keep(v) for k, v in kwargs.items()}))
        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        result = first_tensor((out,), {})
        assert result is not None
        if tangent and len(calls) == len(stack):
            norms.append(_mean_square(_tangent_of(result)))
            result = _primal(result)
        calls[-1].output = result.detach()

    named = dict(zip(stack.names, stack.blocks, strict=True))
    with torch.no_grad(), hooked(named, after=after, before=before):
        if tangent:
            with warnings.catch_warnings(), forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH]):
                # The framework scripts its forward derivatives on first use and warns of its own deprecation.
                warnings.simplefilter("ignore", DeprecationWarning)
                batch.call(model)
        else:
            batch.call(model)
    if len(calls) != len(stack):
        raise ModelError(
            f"{len(calls)} block calls in one forward pass over {len(stack)} blocks; each must run exactly once"
        )
    return calls, np.log(np.array(norms) / norms[0]) if tangent else None


def sound(
    model: nn.Module,
    stack: Stack,
    batch: Batch,
    *,
    seed: int,
    draws: int = 1,
    forward: bool = True,
    pooled: bool = True,
    added_scales: list[list[float]] | None = None,
    progress: Progress | None = None,
    watch: bool = True,
    check_state: bool = False,
    inspect: Callable[[int, Tensor, Tensor, Trace], None] | None = None,
) -> Sounding:
    """Measure one weight draw.

    Args:
        model, stack, batch: What to sound, and with what. The model must be in evaluation mode.
        seed: Seed of the random cotangents and tangent.
        draws: Number of isotropic cotangents.
        forward: Whether to measure the forward APJN.
        pooled: Whether to measure the gradient amplification of a mean-pooled loss.
        added_scales: Per block and branch, the factor between the branch's output and the stream; ``None`` skips
            branch curves.
        watch: Whether to look inside blocks at branches and attention; without it only the stream and gradients are
            measured.
        progress: Called with the number of blocks done, out of twice the depth.
        check_state: Whether to verify that running a block twice gives the same output.
        inspect: Called with (layer, stream before, stream after, trace) of every block.
    """
    notes: list[str] = []
    ahead: Any = None
    if forward:
        try:
            calls, ahead = record_calls(model, stack, batch, True, seed)
        except (NotImplementedError, RuntimeError) as error:
            notes.append(f"forward APJN not measured: {str(error).splitlines()[0]}")
    if ahead is None:
        calls, _ = record_calls(model, stack, batch, False, seed)
    if progress is not None:
        progress(len(stack))
    last = calls[-1].output
    assert last is not None
    layout = first_layout(stack.blocks[0], calls[0])
    moments = np.array([token_moments(layout.arranged(x)) for x in (*(call.stream for call in calls), last)])
    _check_finite(moments[:, 0])
    curves: dict[str, FloatArray] = {"q": moments[:, 0], "p": moments[:, 1], "cosine": moments[:, 1] / moments[:, 0]}
    if ahead is not None:
        curves["apjn_forward_log"] = ahead
    rows: list[dict[str, float]] = []
    added: list[dict[str, float]] = []
    cotangents = _cotangents(last, layout, seed, draws, pooled)
    starts = [token_moments(layout.arranged(c)) for c in cotangents]
    logs = np.zeros((len(stack) + 1, len(cotangents)))
    overlaps = np.zeros((len(stack) + 1, len(cotangents)))
    by_token: list[FloatArray] = []
    overlaps[-1] = [start[1] / start[0] for start in starts]
    for layer in range(len(stack) - 1, -1, -1):
        call = calls[layer]
        block = stack.blocks[layer]
        leaf = call.stream.detach().requires_grad_()
        with torch.enable_grad(), tracing(block) if watch else nullcontext(Trace()) as trace:
            entered = leaf.clone()  # which a block may overwrite
            out = call.run(block, entered)
        if check_state and call.output is not None:
            _check_repeatable(stack.names[layer], out, call.output)
        if inspect is not None:
            inspect(layer, entered.detach(), out.detach(), trace)
        rows.append(_attention_rows(trace))
        added.append(_added_squares(trace, None if added_scales is None else added_scales[layer]))
        del trace
        for i, gradient in enumerate(pull_back(stack.names[layer], out, leaf, cotangents)):
            level, overlap = token_moments(layout.arranged(gradient))
            if not math.isfinite(level) or level <= 0:
                raise ModelError(
                    f"the gradient at {stack.names[layer]!r} is {level}; it cannot be carried further back"
                )
            logs[layer, i] = logs[layer + 1, i] + math.log(level / starts[i][0])
            if layer == 0 and i < draws:
                tokens = layout.arranged(gradient).square().mean(dim=-1, dtype=torch.float64).mean(dim=0)
                by_token.append(logs[0, i] + np.log(tokens.cpu().numpy() / level))
            overlaps[layer, i] = overlap / level
            cotangents[i] = gradient * math.sqrt(starts[i][0] / level)
        calls[layer].output = None
        if progress is not None:
            progress(2 * len(stack) - layer)
    isotropic = logs[:, :draws]
    top = isotropic.max(axis=1, keepdims=True)
    weights = np.exp(isotropic - top)
    curves["apjn_log"] = np.log(weights.mean(axis=1)) + top[:, 0]
    curves["gradient_alignment"] = (overlaps[:, :draws] * weights).mean(axis=1) / weights.mean(axis=1)
    curves["apjn_token_log"] = np.log(np.mean(np.exp(np.stack(by_token) - top[0]), axis=0)) + top[0]
    if pooled:
        curves["gradient_log"] = logs[:, -1]
    curves |= _layer_curves(rows[::-1], added[::-1])
    return Sounding(curves=curves, first_stream=layout.arranged(calls[0].stream), notes=notes)


def first_layout(block: nn.Module, call: BlockCall) -> Layout:
    """Return how the stream of a recorded call is laid out."""
    with torch.no_grad(), tracing(block) as trace:
        call.run(block, call.stream.clone())
    return layout_of(block, call.stream, trace)


def _cotangents(output: Tensor, layout: Layout, seed: int, draws: int, pooled: bool) -> list[Tensor]:
    generator = named_generator(seed, "cotangent")
    out = [torch.randn(output.shape, generator=generator).to(output) for _ in range(draws)]
    if pooled:
        shared = torch.randn(layout.shared_shape(output), generator=generator).to(output)
        out.append(shared.expand_as(output).contiguous())
    return out


def pull_back(name: str, out: Tensor, leaf: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """Return the gradients at ``leaf`` of every cotangent at ``out``; ``name`` is for the error."""
    last = len(cotangents) - 1
    try:
        return [torch.autograd.grad(out, leaf, c, retain_graph=i < last)[0] for i, c in enumerate(cotangents)]
    except RuntimeError as error:
        raise ModelError(f"no gradient flows back through block {name!r}: {str(error).splitlines()[0]}") from error


def _attention_rows(trace: Trace) -> dict[str, float]:
    attention = trace.attention
    if not attention:
        return {}
    stats = [row_statistics(call.scores()) for call in attention]
    return {key: float(np.mean([s[key] for s in stats])) for key in stats[0]}


def _added_squares(trace: Trace, scales: list[float] | None) -> dict[str, float]:
    try:
        outputs = branch_outputs(trace)
    except NotCoveredError:
        return {}
    if scales is None:
        scales = [1.0] * len(outputs)
    out: dict[str, float] = {}
    for (is_attention, tensor), scale in zip(outputs, scales, strict=True):
        name = "attention_added_q" if is_attention else "mlp_added_q"
        out[name] = out.get(name, 0.0) + scale**2 * _mean_square(tensor)
    return out


def _layer_curves(rows: list[dict[str, float]], added: list[dict[str, float]]) -> dict[str, FloatArray]:
    curves = {}
    if all(rows):
        curves["attention_entropy"] = np.array([row["entropy"] for row in rows])
        curves["attention_entropy_relative"] = np.array([row["entropy_relative"] for row in rows])
        curves["participation"] = 1 / np.array([row["y2"] for row in rows])
        curves["logit_variance"] = np.array([row["logit_variance"] for row in rows])
        curves["row_overlap"] = np.array([row["row_overlap"] for row in rows])
        curves["condensation"] = np.array([row["condensation"] for row in rows])
    for name in ("attention_added_q", "mlp_added_q"):
        if all(name in layer for layer in added):
            curves[name] = np.array([layer[name] for layer in added])
    return curves


def _check_finite(levels: FloatArray) -> None:
    """Refuse a stream that leaves the range of its number format, saying where: that is signal growth, diagnosed."""
    bad = np.flatnonzero(~np.isfinite(levels))
    if bad.size:
        block = int(bad[0])
        last = f"; its mean square is {levels[block - 1]:.3g} one block before" if block else ""
        raise ModelError(
            f"signal growth: the stream is NaN or infinite at block {block} of {len(levels) - 1}{last}. Shorten the "
            f"stack to {max(block - 1, 1)} blocks to diagnose it, scale branches down, or put norms in front of them"
        )


def _check_repeatable(name: str, out: Tensor, kept: Tensor) -> None:
    scale = float(kept.abs().max())
    tolerance = max(1e-3, 16 * torch.finfo(kept.dtype).eps)
    if float((out.detach() - kept).abs().max()) > tolerance * scale:
        raise ModelError(
            f"block {name!r} gives another output when run twice on the same input (a cache, or randomness in "
            "evaluation mode); switch it off, e.g. use_cache=False"
        )


def _mean_square(x: Tensor) -> float:
    return float(x.detach().square().mean(dtype=torch.float64))


def _tangent_of(x: Tensor) -> Tensor:
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    if tangent is None:
        raise NotImplementedError("an operation between blocks drops forward-mode derivatives")
    return tangent


def _primal(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return forward_ad.unpack_dual(value).primal.detach()  # type: ignore[no-untyped-call]
    return value
