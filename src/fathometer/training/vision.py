"""A small vision transformer around the blocks of a spec."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathometer.models import reference_network
from fathometer.spec import Transformer
from fathometer.training.digits import CLASSES, PATCH_PIXELS, PATCHES


class PatchClassifier(nn.Module):
    """Patch embedding, positions, the spec's blocks, mean pooling, and a head that starts at zero.

    Args:
        spec: The blocks; they are the reference network of the spec, so the theory describes them exactly.
        seed: Seed of all weights.
        token_scale: Root mean square of a token at the first block: patch embedding and positions share it evenly.
    """

    def __init__(self, spec: Transformer, *, seed: int, token_scale: float = 1.0) -> None:
        super().__init__()
        half = token_scale / 2**0.5
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(
            torch.randn(PATCH_PIXELS, spec.d_model, generator=generator) * half / PATCH_PIXELS**0.5
        )
        self.positions = nn.Parameter(torch.randn(PATCHES, spec.d_model, generator=generator) * half)
        self.stack = reference_network(spec, seed=seed)
        self.norm = nn.LayerNorm(spec.d_model)
        self.head = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, spec.d_model, CLASSES
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches ``(batch, 16, 4)`` to logits ``(batch, 10)``."""
        tokens = self.stack(patches @ self.embed + self.positions)
        return self.head(self.norm(tokens).mean(dim=1))  # type: ignore[no-any-return]
