"""How gradients grow from the output back to each block, for nine alphas of Derf and for LayerNorm."""

from __future__ import annotations

from fathometer.papers.apjn.architecture import NORMS
from fathometer.papers.apjn.overlay import Overlay, overlay
from fathometer.papers.item import Progress, Size, silent


def backward(size: Size, progress: Progress = silent) -> Overlay:
    """Return ``ln J^{L,l}``, the log APJN from every block to the output.

    Source: arXiv:2604.11890v3; the alignment K at finite token number and the score path, derived in the
    documentation.
    """
    return overlay(size, NORMS, ("apjn_log",), progress)


def pooled(size: Size, progress: Progress = silent) -> Overlay:
    """Return the log gradient amplification of a mean-pooled loss, with the APJN of the same networks beside it.

    The recursion is the APJN's, started at (J, K) = (1, 1): the output gradient is the same on every token. Derived in
    the documentation.
    """
    return overlay(size, NORMS, ("gradient_log", "apjn_log"), progress)
