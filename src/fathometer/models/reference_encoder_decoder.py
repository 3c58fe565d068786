"""The network an :class:`~fathometer.spec.EncoderDecoder` describes: two reference stacks and the norm between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathometer.models.reference import (
    ReferenceTransformer,
    draw_weights,
    norm_module,
    refuse_arrays,
    set_norm,
    set_norms,
)
from fathometer.spec import EncoderDecoder


class ReferenceEncoderDecoder(nn.Module):
    """An encoder, the norm behind it, and a decoder that reads it; without embeddings or head.

    Attributes:
        spec: What it was built from.
        encoder, decoder: The stacks.
        memory_norm: The norm between them.
    """

    def __init__(self, spec: EncoderDecoder) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = ReferenceTransformer(spec.encoder)
        self.memory_norm = norm_module(spec.memory_norm, spec.encoder.d_model)
        self.decoder = ReferenceTransformer(spec.decoder)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Map both streams at the first blocks, each ``(batch, tokens, width)``, to the decoder's at its last."""
        out: Tensor = self.decoder(target, self.memory_norm(self.encoder(source)))
        return out


def reference_encoder_decoder(
    spec: EncoderDecoder,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ReferenceEncoderDecoder:
    """Build the network a spec describes and draw its weights, as :func:`~fathometer.models.reference_network` does.

    Args:
        spec: Encoder and decoder, with single numbers in every field.
        seed: Which draw of the weights.
        dtype: Type of the parameters.
        device: Where the parameters live; the draw does not depend on it.
    Raises:
        SpecError: for fields that hold arrays, or heads that do not divide a width.
        NotCoveredError: for a user's numpy function, which torch cannot differentiate.
    """
    refuse_arrays(spec)
    with torch.device("meta"):
        model = ReferenceEncoderDecoder(spec)
    model = model.to(dtype).to_empty(device=device)
    for stack in (model.encoder, model.decoder):
        set_norms(stack)
    set_norm(spec.memory_norm, model.memory_norm)
    draw_weights(model, seed)
    return model
