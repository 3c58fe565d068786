"""The networks of arXiv:2403.02579: one head, LayerNorm, tanh, and residuals that preserve the norm of unit tokens.

The paper has a single value matrix; the networks here have an output matrix of unit scale behind it, which leaves every
mean as it is. The residual strengths ``alpha_A = alpha_M = 8^(-1/2)`` and the 256 tokens are the paper's; ``sigma_A``
and the two values of ``sigma_w`` are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fathometer.papers.item import FloatArray, Size
from fathometer.spec import LayerNorm, Scales, Transformer, with_field

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 8**-0.5
N_TOKENS = 256
#: Input scale sigma_w of the MLP on either side of the edge of chaos, which lies at 3.675 for the default alphas.
NETWORKS = {"ordered": 2.0, "chaotic": 8.0}


def network(
    *,
    n_layers: int,
    d_model: int,
    sigma_w: float = NETWORKS["ordered"],
    sigma_a: float = 1.0,
    alpha_attention: float = ALPHA,
    alpha_mlp: float = ALPHA,
) -> Transformer:
    """Return a stack of attention and MLP.

    Args:
        n_layers, d_model: Blocks and width.
        sigma_w: Input scale of the MLP.
        sigma_a: Standard deviation of the attention scores of orthogonal tokens.
        alpha_attention, alpha_mlp: Residual strengths of the two branches.
    """
    spec = Transformer.uniform(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=1,
        norm=LayerNorm(),
        scales=Scales(query=sigma_a, key=1.0, value=1.0, output=1.0, mlp_in=sigma_w, mlp_out=1.0),
        activation="tanh",
        ratio=4.0,
    )
    spec = with_field(spec, "attention.residual_strength", alpha_attention)
    return with_field(spec, "mlp.residual_strength", alpha_mlp)


def token_number(size: Size) -> int:
    """Return the 256 tokens of the paper, fewer where tokens with an exact Gram matrix need more width than there is.

    >>> from fathometer.papers.item import SMALL
    >>> token_number(SMALL)
    256
    """
    return min(N_TOKENS, size.d_model)


def gram_matrices(spec: Transformer, tokens: Tensor, *, seed: int) -> Iterator[FloatArray]:
    """Run one network with weights of its own on every sample of tokens.

    Args:
        spec: What to build; every block alike.
        tokens: Shape ``(n_networks, n_tokens, d_model)``.
        seed: Seed of the weights of the first layer; later layers use the numbers that follow.
    Yields:
        ``x_a . x_b / d_model`` at every block border, shape ``(n_networks, n_tokens, n_tokens)``. The weights of one
        layer are held at a time.
    """
    from fathometer.models import stacked_network

    n_networks, n_tokens, d_model = tokens.shape
    model = stacked_network(spec.with_depth(1), n_copies=n_networks, seed=seed).requires_grad_(False)
    stream = tokens.mT.contiguous()
    for layer in range(spec.n_layers + 1):
        if layer > 1:
            model.draw(seed + layer - 1)
        if layer > 0:
            stream = model.advance(stream, n_tokens)
        yield (stream.mT @ stream / d_model).double().numpy()


def described(size: Size, **more: Any) -> dict[str, Any]:
    """Return what a result says about its origin."""
    from fathometer import __version__
    from fathometer.papers.item import plain

    return {"paper": "arXiv:2403.02579", "version": __version__, "size": plain(size), **more}
