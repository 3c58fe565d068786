"""The networks of arXiv:2505.24333: one head, ReLU MLP of ratio one, skips that are scaled instead of branches.

``sigma_w^2 = sigma_v^2 = 0.2``, biases of standard deviation 0.02 and 50 blocks are the authors' defaults. They have a
single value matrix; the networks here have an output matrix of unit scale behind it, which leaves every mean as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer.papers.item import FloatArray, Size
from fathometer.spec import MLP, Block, LayerNorm, Norm, SelfAttention, Sublayer, Transformer

if TYPE_CHECKING:
    from torch import Tensor

SIGMA_W = SIGMA_V = 0.2**0.5
SIGMA_B = 0.02
#: Mean cosine of tokens of text at the first block.
TEXT_COSINE = 0.03
PLACEMENTS = ("post", "pre", "none")
#: Widest simulated network; the paper's have 720.
_WIDEST = 512


def network(
    *,
    n_layers: int,
    d_model: int,
    n_tokens: int,
    beta: Any,
    skip_scale: Any = 1.0,
    sigma_v: float = SIGMA_V,
    value_bias: float = SIGMA_B,
    placement: str = "post",
    centred: bool = False,
) -> Transformer:
    r"""Return a stack of attention and MLP.

    Args:
        n_layers, d_model: Blocks and width.
        n_tokens: The context ``n`` by which scores are scaled: queries and keys have entries of variance ``\beta
            \sqrt{\ln n}/d``.
        beta: Inverse temperature of attention.
        skip_scale: Factor on the skip of attention; that of the MLP is one.
        sigma_v, value_bias: Scale of the values and of their bias.
        placement: ``"post"`` or ``"pre"`` for LayerNorm behind the sum or in front of the branch, ``"none"`` for none.
        centred: Whether the mean over tokens is subtracted from what attention adds.
    """
    norm: Norm | None = None if placement == "none" else LayerNorm()
    place = Sublayer.post_norm if placement == "post" else Sublayer.pre_norm
    sharp = np.sqrt(np.asarray(beta, dtype=np.float64) * np.sqrt(np.log(n_tokens)))
    attention = SelfAttention(query=sharp, key=sharp, value=sigma_v, output=1.0, value_bias=value_bias, centred=centred)
    mlp = MLP(mlp_in=SIGMA_W, mlp_out=SIGMA_W, activation="relu", in_bias=SIGMA_B, out_bias=SIGMA_B, ratio=1.0)
    sublayers = (replace(place(attention, norm), skip_scale=skip_scale), place(mlp, norm))
    return Transformer(blocks=(Block(sublayers=sublayers, repeat=n_layers),), d_model=d_model)


def simulated_width(size: Size) -> int:
    """Return the width of simulated networks, which is also their number of tokens.

    >>> from fathometer.papers.item import FULL, SMALL
    >>> simulated_width(SMALL), simulated_width(FULL)
    (256, 512)
    """
    return min(size.d_model, _WIDEST)


def weight_draws(size: Size, per_seed: int) -> int:
    """Return the number of weight draws; a network of half the size's width costs little, so it is drawn more often."""
    return int(per_seed * size.seeds * (size.d_model / simulated_width(size)) ** 2)


def simulated_cosines(
    spec: Transformer, *, n_tokens: int, q: float, cosine: float, draws: int, seed: int
) -> FloatArray:
    """Return p/q at every block border of networks that start from equiangular tokens.

    Args:
        spec: What to build; every block alike.
        n_tokens, q, cosine: The tokens.
        draws: Networks, each with tokens of its own.
        seed: Of the tokens and of the first layer; later layers use the numbers that follow.
    Returns:
        Shape ``(draws, n_layers + 1)``. The weights of one layer are held at a time, for a few networks.
    """
    import torch

    parts = []
    for first in range(0, draws, 4):
        count = min(4, draws - first)
        with torch.no_grad():
            parts.append(
                np.stack(list(_run(spec, n_tokens, q, cosine, count, seed + first * (spec.n_layers + 1))), axis=1)
            )
    return np.concatenate(parts)


def _run(spec: Transformer, n_tokens: int, q: float, cosine: float, count: int, seed: int) -> Iterator[FloatArray]:
    from fathometer.models import equiangular_tokens, stacked_network

    tokens = equiangular_tokens(n_tokens=n_tokens, d_model=spec.d_model, q=q, p=cosine * q, batch=count, seed=seed)
    model = stacked_network(spec.with_depth(1), n_copies=count, seed=seed)
    stream = tokens.mT.contiguous()
    yield _mean_cosine(stream)
    for layer in range(spec.n_layers):
        if layer > 0:
            model.draw(seed + layer)
        stream = model.advance(stream, n_tokens)
        yield _mean_cosine(stream)


def _mean_cosine(stream: Tensor) -> FloatArray:
    """Return p/q of every network; shape ``(n_networks, d_model, n_tokens)``."""
    stream = stream.double()
    n_tokens = stream.shape[-1]
    own = stream.square().sum((-1, -2))
    every = stream.sum(-1).square().sum(-1)
    cosine: FloatArray = ((every - own) / (n_tokens - 1) / own).numpy()
    return cosine


def described(size: Size, **more: Any) -> dict[str, Any]:
    """Return what a result says about its origin."""
    from fathometer import __version__
    from fathometer.papers.item import plain

    return {"paper": "arXiv:2505.24333", "version": __version__, "size": plain(size), **more}
