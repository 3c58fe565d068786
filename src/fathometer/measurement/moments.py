r"""Moments of every component inside the blocks of a real model, forward and backward, with standard errors.

Each block is run again from its kept input, last block first; the tensors its modules take in and put out are held for
that one run, and one reverse pass gives the gradients at all of them together with the one that goes on to the block
before. Which tensor is which component is told by what the traced block computes, see
:mod:`fathometer.measurement.places`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import DomainError, ModelError, NotCoveredError
from fathometer.measurement.batches import as_batch
from fathometer.measurement.layout import Layout
from fathometer.measurement.measure import Report, check_count, observe
from fathometer.measurement.places import Place, Tap, block_taps
from fathometer.measurement.sounding import BlockCall, first_layout, record_calls
from fathometer.measurement.statistics import token_moments
from fathometer.measurement.untouched import untouched
from fathometer.models.finding import Stack
from fathometer.models.reading import SublayerReading
from fathometer.models.redraw import redrawn
from fathometer.models.seeding import named_generator
from fathometer.models.trace import AttentionCall, first_tensor, hooked, tracing, watch_attention
from fathometer.results.moments import COMPONENTS, ComponentMoments, ModelMoments
from fathometer.spec import branch_names

FloatArray = NDArray[np.float64]
#: Mean, q, p, gradient_log (relative to the cotangent carried) and gradient_alignment of one place.
Row = tuple[float, float, float, float, float]


def measure_moments(
    model: nn.Module,
    batch: Any,
    *,
    seeds: int = 8,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    top_alignment: float = 0.0,
    progress: Report | None = None,
) -> ModelMoments:
    """Measure mean, second moments and gradients at every place inside every block of a model.

    Output gradients are Gaussian, of mean cosine ``top_alignment`` between tokens. The first draw has the model's own
    weights, the others redraw every block matrix as in :func:`fathometer.measure`. The model is left untouched, in
    evaluation mode: without dropout.

    Args:
        model: Any torch module whose blocks can be read into a spec.
        batch: A tensor, a tuple or dict of tensors, or a :class:`fathometer.measurement.Batch`.
        seeds: Weight draws. One gives no standard errors.
        seed: Seed of everything random here.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
        top_alignment: Mean cosine of the gradients of two tokens at the output, in ``[0, 1]``.
        progress: Called with (label, done, total).
    Returns:
        The moments, ``source="measurement"``, named as those of :func:`fathometer.observables.moments`: means
        over draws, of ``gradient_log`` too, since gradients of deep stacks scatter log-normally. Gradients of scores
        and weights are NaN, and so is what a fused attention module hides. Cost: per draw one forward of the model,
        then a forward and a backward to inputs of every block, and its attention scores; memory of block inputs plus
        one block's graph.
    Raises:
        NotCoveredError: for a model whose blocks cannot be read.
        DomainError: for an alignment outside ``[0, 1]``.
        ModelError, BatchError: as :func:`fathometer.measure`.
    """
    check_count("seeds", seeds)
    if not 0 <= top_alignment <= 1:
        raise DomainError(f"top_alignment must lie in [0, 1]; got {top_alignment!r}", value=top_alignment)
    ready = as_batch(batch)
    found = observe(model, ready, seeds=1, seed=seed, blocks=blocks, forward=False, pooled=False)
    if found.reading is None:
        raise NotCoveredError(found.not_covered or "the blocks cannot be read into a spec")
    draws: list[dict[str, FloatArray]] = []
    layers: dict[str, list[int]] = {}
    taps: list[list[list[Tap]]] | None = None
    with untouched(model):
        for draw in range(seeds):
            with redrawn(model, [] if draw == 0 else found.slices, seed + draw, tied=bool(found.duplicates)):
                calls, _ = record_calls(model, found.stack, ready, False, seed + draw)
                layout = first_layout(found.stack.blocks[0], calls[0])
                if taps is None:
                    taps = _all_taps(found.stack, calls, found.reading.layers)
                cotangent = _cotangent(calls[-1].output, layout, seed + draw, top_alignment)
                rows = _one_draw(found.stack, calls, taps, found.reading.layers, layout, cotangent)
            layers = {name: sorted(places) for name, places in rows.items()}
            draws.append({name: np.array([places[i] for i in layers[name]]).T for name, places in rows.items()})
            if progress is not None:
                progress("weight draws", draw + 1, seeds)
    about = {
        "n_tokens": int(found.gram.shape[-1]),
        "top_alignment": float(top_alignment),
        "weight_draws": seeds,
        "seed": seed,
        "batch": ready.label,
        "blocks": found.stack.label,
    }
    components = {name: averaged(np.array(layers[name]), [draw[name] for draw in draws]) for name in layers}
    return ModelMoments(source="measurement", components=components, about=about)


def averaged(layers: NDArray[np.int64], draws: Sequence[FloatArray]) -> ComponentMoments:
    """Return the mean over draws, each of shape ``(5, n)``, with standard errors."""
    values = np.stack(draws)
    mean = values.mean(axis=0)
    errors = {}
    if len(draws) > 1:
        spread = values.std(axis=0, ddof=1) / math.sqrt(len(draws))
        errors = dict(zip(("mean", "q", "p", "gradient_log", "gradient_alignment"), spread, strict=True))
        variance = values[:, 1] - values[:, 0] ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = (values[:, 2] - values[:, 0] ** 2) / variance
        errors["correlation"] = correlation.std(axis=0, ddof=1) / math.sqrt(len(draws))
    return ComponentMoments(
        layers=layers,
        mean=mean[0],
        q=mean[1],
        p=mean[2],
        gradient_log=mean[3],
        gradient_alignment=mean[4],
        errors=errors,
    )


def _all_taps(
    stack: Stack, calls: Sequence[BlockCall], readings: Sequence[tuple[SublayerReading, ...]]
) -> list[list[list[Tap]]]:
    out = []
    for name, block, call, reading in zip(stack.names, stack.blocks, calls, readings, strict=True):
        with torch.no_grad(), tracing(block) as trace:
            result = call.run(block, call.stream.clone())
        out.append(block_taps(name, trace, reading, result))
    return out


def _one_draw(
    stack: Stack,
    calls: Sequence[BlockCall],
    taps: list[list[list[Tap]]],
    readings: Sequence[tuple[SublayerReading, ...]],
    layout: Layout,
    cotangent: Tensor,
) -> dict[str, dict[int, Row]]:
    """Return, by component and layer, the numbers of one weight draw."""
    rows: dict[str, dict[int, Row]] = {"stream": {}}
    unit, overlap = token_moments(layout.arranged(cotangent))
    log_scale = 0.0
    output = calls[-1].output
    assert output is not None
    rows["stream"][len(stack)] = (*_forward(layout.arranged(output)), 0.0, overlap / unit)
    for layer in range(len(stack) - 1, -1, -1):
        call, block = calls[layer], stack.blocks[layer]
        leaf = call.stream.detach().requires_grad_()
        attention: list[AttentionCall] = []
        with torch.enable_grad(), watch_attention(attention.append), _tapped(block, taps[layer]) as tensors:
            out = call.run(block, leaf.clone())
        onward, gradients = _pulled(stack.names[layer], out, leaf, tensors, cotangent)
        calls_left = iter(attention)
        names = branch_names([reading.sublayer for reading in readings[layer]])
        for kind, sublayer, reading in zip(names, taps[layer], readings[layer], strict=True):
            found = _sublayer_rows(sublayer, tensors, gradients, layout, leaf, log_scale - math.log(unit))
            if reading.sublayer.is_attention:
                found |= _pair_rows(next(calls_left), causal=reading.sublayer.branch.causal)  # type: ignore[union-attr]
            if "sum" not in found:
                found["sum"] = (
                    *_forward(layout.arranged(out)),
                    *_backward(layout.arranged(cotangent), log_scale - math.log(unit)),
                )
            if "added" in found:  # the gradient of a sum is that of its terms
                found["added"] = (*found["added"][:3], *found["sum"][3:])
            for name in (name for name in COMPONENTS if name in found):
                rows.setdefault(f"{kind}.{name}", {})[layer] = found[name]
        level, shared = token_moments(layout.arranged(onward))
        if not (math.isfinite(level) and level > 0):
            raise ModelError(f"the gradient at {stack.names[layer]!r} is {level}; it cannot be carried further back")
        log_scale += math.log(level / unit)
        rows["stream"][layer] = (*_forward(layout.arranged(call.stream)), log_scale, shared / level)
        cotangent = onward * math.sqrt(unit / level)
        calls[layer].output = None
    return {name: rows[name] for name in ("stream", *_in_order(rows))}


def _in_order(rows: dict[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(name.partition(".")[0] for name in rows if name != "stream"))
    return [f"{kind}.{name}" for kind in kinds for name in COMPONENTS if f"{kind}.{name}" in rows]


def _sublayer_rows(
    taps: list[Tap],
    tensors: dict[Place, Tensor],
    gradients: dict[Place, Tensor | None],
    layout: Layout,
    stream: Tensor,
    offset: float,
) -> dict[str, Row]:
    """Return the rows of one sublayer; ``offset`` turns log mean squares of its gradients into relative ones."""
    found: dict[str, Row] = {}
    for tap in taps:
        gradient = gradients[tap.place]
        mean, q, p = _forward(_arranged(tap.of(tensors[tap.place]), layout, stream))
        back = (math.nan, math.nan)
        if gradient is not None:
            log, alignment = _backward(_arranged(tap.of(gradient), layout, stream), offset)
            back = (log - 2 * math.log(abs(tap.factor)), alignment) if tap.factor else back
        found[tap.component] = (mean * tap.factor, q * tap.factor**2, p * tap.factor**2, *back)
    return found


def _arranged(x: Tensor, layout: Layout, stream: Tensor) -> Tensor:
    """Return a tensor inside a block as ``(batch, n_tokens, features)``."""
    if x.ndim != stream.ndim:
        x = x.reshape(*stream.shape[:-1], x.shape[-1])
    return layout.arranged(x)


def _forward(x: Tensor) -> tuple[float, float, float]:
    return (float(x.detach().mean(dtype=torch.float64)), *token_moments(x))


def _backward(x: Tensor, offset: float) -> tuple[float, float]:
    level, shared = token_moments(x)
    return (math.log(level) + offset, shared / level) if level > 0 else (-math.inf, math.nan)


def _pair_rows(call: AttentionCall, *, causal: bool) -> dict[str, Row]:
    """Return scores and weights; under a causal mask only weights, hidden keys counting as zeros."""
    scores = call.scores().detach().float()
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    seen = {"weights": weights} if causal else {"scores": scores, "weights": weights}
    return {name: (*_forward(x.flatten(0, -3)), math.nan, math.nan) for name, x in seen.items()}


@contextmanager
def _tapped(block: nn.Module, taps: list[list[Tap]]) -> Iterator[dict[Place, Tensor]]:
    """Hold what the tapped modules take in and put out during a run inside the ``with`` block."""
    wanted = {tap.place for sublayer in taps for tap in sublayer}
    modules = dict(block.named_modules())
    tensors: dict[Place, Tensor] = {}
    entered: dict[str, int] = {}
    left: dict[str, int] = {}

    def keep(count: dict[str, int], name: str, entering: bool, values: tuple[Any, ...], more: dict[str, Any]) -> None:
        place = (name, count.get(name, 0), entering)
        count[name] = place[1] + 1
        if place in wanted:
            tensor = first_tensor(values, more)
            if tensor is None:
                raise ModelError(f"module {name!r} took in or put out no tensor when it was run again")
            tensors[place] = tensor

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(entered, name, True, args, kwargs)

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        keep(left, name, False, (out,), {})

    with hooked({name: modules[name] for name, _, _ in wanted}, after=after, before=before):
        yield tensors


def _pulled(
    name: str, out: Tensor, leaf: Tensor, tensors: dict[Place, Tensor], cotangent: Tensor
) -> tuple[Tensor, dict[Place, Tensor | None]]:
    """Return the gradients at the block's input and at every tensor held, ``None`` where none flows."""
    live = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
    try:
        onward, *rest = torch.autograd.grad(out, [leaf, *live.values()], cotangent, allow_unused=True)
    except RuntimeError as error:
        raise ModelError(f"no gradient flows back through block {name!r}: {str(error).splitlines()[0]}") from error
    if onward is None:
        raise ModelError(f"no gradient flows back through block {name!r}")
    found = dict(zip(live, rest, strict=True))
    return onward, {key: found.get(key) for key in tensors}


def _cotangent(output: Tensor | None, layout: Layout, seed: int, alignment: float) -> Tensor:
    """Return output gradients: a part all tokens share, and a part of their own."""
    assert output is not None
    generator = named_generator(seed, "cotangent")
    own = torch.randn(output.shape, generator=generator)
    shared = torch.randn(layout.shared_shape(output), generator=generator)
    mixed: Tensor = math.sqrt(1 - alignment) * own + math.sqrt(alignment) * shared
    return mixed.to(output)
