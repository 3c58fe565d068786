r"""What does not decide whether a model trains at initialisation, but a user should know: tied heads, few heads.

*Tied head.* The skip connections carry a token's embedding to the head, which multiplies it by the same table. With a
table of standard deviation s_e, pre-norm blocks and a final norm that divides by the root of the stream's second
moment q, the logit of a position's own token exceeds the mean by

.. math:: \frac{N d\, s_e^2\, \mu}{\sqrt{q}}, \qquad \text{that is}\quad \frac{\sqrt d\, s_e\, \mu}{\sqrt q}
          \;\text{standard deviations of the other logits,}

with N the factor in front of the head and mu the product of the skip factors: growing like the root of the width.

*Few heads.* All coordinates share the H attention matrices of a layer. Tangent kernels of queries and keys of one
network then scatter by about :math:`\sqrt{2/H}` around their mean, at any width.

Sources: both are beyond the leading order of Dinan, Yaida and Zhang, arXiv:2304.02034v1, whose footnotes 19, 32 and 34
name the contact terms of tied weights; derived in the documentation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.measurement.batches import Batch
from fathometer.measurement.untouched import untouched
from fathometer.models import ModelReading
from fathometer.spec import SelfAttention

FEW_HEADS = 8
OWN_TOKEN = 3.0


def cautions(model: nn.Module, batch: Batch, reading: ModelReading | None) -> list[str]:
    """Return sentences about a model's tied head and number of heads; none where neither matters.

    Args:
        model: The model, left as found.
        batch: What it is run on, once, if its head is tied.
        reading: What its blocks compute, ``None`` where they were not read.
    """
    out = []
    own = _own_token(model, batch)
    if own is not None and own > OWN_TOKEN:
        out.append(
            "the head is tied to the token embedding: at initialisation the logit of a position's own token lies "
            f"{own:.1f} standard deviations above the others, more in a wider model (like the root of the width). "
            "Theory of outputs holds for the other logits"
        )
    heads = _fewest_heads(reading)
    if heads is not None and heads < FEW_HEADS:
        named = f"{heads} heads a layer" if heads > 1 else "one head a layer"
        out.append(
            f"{named}: tangent kernels of queries and keys, the squares of their gradients, scatter by about "
            f"{math.sqrt(2 / heads):.0%} between draws of the weights, at any width"
        )
    return out


def _fewest_heads(reading: ModelReading | None) -> int | None:
    if reading is None:
        return None
    branches = [s.branch for block in reading.spec.blocks for s in block.sublayers]
    return min((branch.n_heads for branch in branches if isinstance(branch, SelfAttention)), default=None)


def _own_token(model: nn.Module, batch: Batch) -> float | None:
    """Return by how many standard deviations the own token's logit exceeds the others; ``None`` if no head is tied."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and id(module.weight) in linear]
    if not tables:
        return None
    seen: list[Tensor] = []
    handle = tables[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()) if args else None)
    try:
        with untouched(model), torch.no_grad():
            out: Any = batch.call(model)
    finally:
        handle.remove()
    logits = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
    rows = tables[0].num_embeddings
    if not seen or not isinstance(logits, Tensor) or logits.shape != (*seen[0].shape, rows):
        return None
    logits = logits.double()
    own = logits.gather(-1, seen[0][..., None].long())
    others = rows - 1
    mean = (logits.sum(dim=-1, keepdim=True) - own) / others
    variance = ((logits - mean).square().sum(dim=-1, keepdim=True) - (own - mean).square()) / others
    return float(((own - mean) / variance.sqrt().clamp_min(1e-300)).mean())
