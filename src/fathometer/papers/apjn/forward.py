"""How the residual stream grows and its tokens align, for nine alphas of Derf and for LayerNorm."""

from __future__ import annotations

from fathometer.papers.apjn.architecture import NORMS
from fathometer.papers.apjn.overlay import Overlay, overlay
from fathometer.papers.item import Progress, Size, silent


def forward(size: Size, progress: Progress = silent) -> Overlay:
    """Return q, p and p/q over depth, predicted and simulated.

    Source: arXiv:2604.11890v3, the forward recursion; its terms in 1/n and the softmax weights as derived in the
    documentation.
    """
    return overlay(size, NORMS, ("q", "p", "cosine"), progress)
