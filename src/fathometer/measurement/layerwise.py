"""Networks deeper than memory: every layer is drawn, run and forgotten, forward and again on the way back.

Weights are drawn from the seed and the layer, so the way back meets the weights of the way down; only the stream in
front of every layer is kept. Dropout, where the spec has it, acts as in training, with masks drawn alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathometer.errors import BatchError, DomainError, ModelError
from fathometer.measurement.statistics import token_moments
from fathometer.models.reference import ReferenceTransformer, reference_network
from fathometer.models.seeding import named_generator
from fathometer.spec import Block, Transformer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerwiseDraw:
    """What one draw of all weights shows.

    Attributes:
        q, p: Moments of the stream at block borders; shape ``(n_layers + 1,)``.
        sum_q: Second moment of every block's last residual sum, in front of a norm there; shape ``(n_layers,)``.
        gradient_log: Log mean square of gradients over that at the output; shape ``(n_layers + 1,)``.
        gradient_alignment: Mean product of two tokens' gradients over their mean square; same shape.
        weight_log: Log of the squared norm of the gradient of all matrices of a block, for ``n_tokens d_model`` as
            the squared norm of the output gradients of a sample; shape ``(n_layers,)``; NaN where not asked for.
    """

    q: FloatArray
    p: FloatArray
    sum_q: FloatArray
    gradient_log: FloatArray
    gradient_alignment: FloatArray
    weight_log: FloatArray


def layerwise_draw(
    spec: Transformer,
    tokens: Tensor,
    *,
    seed: int,
    top_alignment: float = 0.0,
    weights: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LayerwiseDraw:
    """Measure one draw of the reference network of a spec, a layer at a time.

    Args:
        spec: The transformer.
        tokens: Stream at the first block, shape ``(batch, n_tokens, d_model)``.
        seed: Of weights, dropout masks and output gradients.
        top_alignment: Mean cosine of the gradients of two tokens at the output, in ``[0, 1]``.
        weights: Whether to measure gradients of weights too, which costs half as much again.
        progress: Called with (layers done, twice the depth).
    Returns:
        The curves. Cost: two draws of every weight (4 ns each), two forwards and a backward; memory of one layer and
        of the stream at every border.
    Raises:
        BatchError: for tokens of another shape.
        DomainError: for an alignment outside ``[0, 1]``.
        ModelError: for a stream or gradient that leaves the range of its number format.
    """
    if tokens.ndim != 3 or tokens.shape[-1] != spec.d_model:
        raise BatchError(f"expected tokens of shape (batch, n_tokens, {spec.d_model}); got {tuple(tokens.shape)}")
    if not 0 <= top_alignment <= 1:
        raise DomainError(f"top_alignment must lie in [0, 1]; got {top_alignment!r}", value=top_alignment)
    blocks, depth = list(spec.layers()), spec.n_layers
    streams, sums = [tokens], []
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            model = _layer(block, spec.d_model, seed, layer, tokens)
            norm = model.get_submodule(f"blocks.0.sublayers.{len(block.sublayers) - 1}.stream_norm")
            seen: list[Tensor] = []
            handle = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            streams.append(_run(model, streams[-1], seed, layer))
            handle.remove()
            sums.append(token_moments(seen[0])[0])
            if not math.isfinite(sums[-1]):
                raise ModelError(f"the stream leaves the range of its number format in block {layer} of {depth}")
            if progress is not None:
                progress(layer + 1, 2 * depth)
    forward = np.array([token_moments(x) for x in streams])
    generator = named_generator(seed, "cotangent")
    own = torch.randn(tokens.shape, generator=generator)
    shared = torch.randn((len(tokens), 1, spec.d_model), generator=generator)
    gradient = (math.sqrt(1 - top_alignment) * own + math.sqrt(top_alignment) * shared).to(tokens)
    level, overlap = token_moments(gradient)
    unit, scale = level, 0.0
    back, weight_log = [(0.0, overlap / level)], []
    for layer in range(depth - 1, -1, -1):
        model = _layer(blocks[layer], spec.d_model, seed, layer, tokens)
        leaf = streams[layer].detach().requires_grad_()
        matrices = [p for p in model.parameters() if p.ndim == 2] if weights else []
        for parameter in model.parameters():
            parameter.requires_grad_(weights)
        with torch.enable_grad():
            out = _run(model, leaf, seed, layer)
        gradient, *of_weights = torch.autograd.grad(out, [leaf, *matrices], gradient)
        squares = sum(float(g.square().sum(dtype=torch.float64)) for g in of_weights)
        weight_log.append(math.log(squares / len(tokens) / unit) + scale if squares > 0 else math.nan)
        level, overlap = token_moments(gradient)
        if not (math.isfinite(level) and level > 0):
            raise ModelError(f"the gradient in front of block {layer} is {level}; it cannot be carried further back")
        scale += math.log(level / unit)
        back.append((scale, overlap / level))
        gradient = gradient * math.sqrt(unit / level)
        if progress is not None:
            progress(2 * depth - layer, 2 * depth)
    curves = np.array(back[::-1])
    return LayerwiseDraw(
        q=forward[:, 0],
        p=forward[:, 1],
        sum_q=np.array(sums),
        gradient_log=curves[:, 0],
        gradient_alignment=curves[:, 1],
        weight_log=np.array(weight_log[::-1]),
    )


def _layer(block: Block, d_model: int, seed: int, layer: int, like: Tensor) -> ReferenceTransformer:
    """Return one layer as a network of its own, in training mode."""
    alone = Transformer(blocks=(replace(block, repeat=1),), d_model=d_model)
    drawn = named_generator(seed, f"layer {layer}").initial_seed()
    return reference_network(alone, seed=drawn, dtype=like.dtype, device=like.device).train()


def _run(model: ReferenceTransformer, stream: Tensor, seed: int, layer: int) -> Tensor:
    """Run a layer with the dropout masks of a seed, random states left as found."""
    devices = [stream.device] if stream.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(named_generator(seed, f"dropout {layer}").initial_seed())
        out: Tensor = model(stream)
    return out
