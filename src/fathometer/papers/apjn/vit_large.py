"""The width and depth of the paper: Derf with alpha 0.5 and LayerNorm, simulated networks on top of their theory."""

from __future__ import annotations

from fathometer.papers.apjn.overlay import Overlay, overlay
from fathometer.papers.item import Progress, Size, silent
from fathometer.spec import Derf, LayerNorm


def vit_large(size: Size, progress: Progress = silent) -> Overlay:
    """Return q, p/q and ln J, predicted and simulated.

    At full size a network has 128 blocks of width 1024, 6.4 GB of float32 weights; block inputs and one block's graph
    are all that is kept besides.
    """
    return overlay(size, (LayerNorm(), Derf(alpha=0.5)), ("q", "cosine", "apjn_log"), progress)
