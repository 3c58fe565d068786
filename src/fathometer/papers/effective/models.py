"""The two small models of these figures, at any width: a byte-level language model and a vision transformer.

Matrices start with variance ``1 / fan_in``, tables of tokens with variance one. A head is eight channels wide at every
width, so that the number of heads follows the width. Positions of the language model start small, as in the paper;
those of the vision model at half the size of its patches, see :mod:`fathometer.papers.effective.transfer`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fathometer.spec import Head, LayerNorm, Network, Scales, TokenStem, Transformer

if TYPE_CHECKING:
    from torch import Tensor, nn

D_HEAD, N_LAYERS = 8, 2
POSITION, VISION_POSITION = 0.02, 0.5

_SCALES = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)


def trunk(width: int, *, causal: bool, n_layers: int = N_LAYERS, d_head: int = D_HEAD) -> Transformer:
    """Return the pre-norm blocks of a width.

    Args:
        width: Of the stream, a multiple of ``d_head``.
        causal: Whether attention is masked.
        n_layers: Blocks.
        d_head: Channels of a head.
    """
    return Transformer.uniform(
        n_layers=n_layers,
        d_model=width,
        n_heads=width // d_head,
        norm=LayerNorm(),
        activation="gelu",
        scales=_SCALES,
        causal=causal,
    )


def language_spec(width: int, *, position: float = POSITION, d_head: int = D_HEAD) -> Network:
    """Return the language model of a width as a spec, with its positions' standard deviation and width of heads."""
    stem = TokenStem(token=1.0, position=position)
    return Network(stem=stem, trunk=trunk(width, causal=True, d_head=d_head), head=Head())


def language_model(width: int, seed: int, *, log_frequencies: Tensor, n_tokens: int) -> nn.Module:
    """Return the language model of a width and a seed."""
    from fathometer.training.language import LanguageModel

    return LanguageModel(language_spec(width), log_frequencies=log_frequencies, n_tokens=n_tokens, seed=seed)


def vision_model(width: int, seed: int, *, position: float = VISION_POSITION) -> nn.Module:
    """Return the classifier of digits of a width and a seed; its head is drawn with variance ``1 / fan_in``.

    Args:
        width: Of the stream.
        seed: Of all weights.
        position: Standard deviation of the table of positions.
    """
    import torch

    from fathometer.models.seeding import named_generator
    from fathometer.training import PatchClassifier

    model = PatchClassifier(trunk(width, causal=False), seed=seed, token_scale=math.sqrt(2.0))
    generator = named_generator(seed, "head")
    with torch.no_grad():
        model.positions.mul_(position)
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator) / math.sqrt(width))
    return model
