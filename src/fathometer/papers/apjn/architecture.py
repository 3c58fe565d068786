"""The networks of arXiv:2604.11890v3: ViT blocks with ReLU, norms by name, tokens to start from.

Scales are those of ViT with entries of standard deviation 0.02 at widths 768 (base) and 1024 (large). They are kept at
any simulated width, so a small network has the same theory as the large one.
"""

from __future__ import annotations

from typing import Any

from fathometer.papers.item import Size
from fathometer.spec import Derf, DyT, LayerNorm, Norm, Scales, Transformer

VIT_BASE = Scales.from_std(0.02, d_model=768, d_mlp=4 * 768)
VIT_LARGE = Scales.from_std(0.02, d_model=1024, d_mlp=4 * 1024)

#: Moments of the synthetic tokens at the first block.
Q0, P0 = 1.0, 0.4

ALPHAS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9)
NORMS: tuple[Norm, ...] = (LayerNorm(), *(Derf(alpha=alpha) for alpha in ALPHAS))


def network(size: Size, norm: Norm, scales: Scales = VIT_LARGE) -> Transformer:
    """Return the stack of one norm at a size."""
    return Transformer.uniform(
        n_layers=size.n_layers,
        d_model=size.d_model,
        n_heads=size.n_heads,
        norm=norm,
        scales=scales,
        activation="relu",
    )


def name_of(norm: Norm) -> str:
    """Return a norm's name with its alpha.

    >>> name_of(Derf(alpha=0.5)), name_of(LayerNorm())
    ('Derf 0.5', 'LayerNorm')
    """
    if isinstance(norm, (Derf, DyT)):
        return f"{type(norm).__name__} {float(norm.alpha):g}"
    return type(norm).__name__


def described(size: Size, **more: Any) -> dict[str, Any]:
    """Return what a result says about its origin."""
    from fathometer import __version__
    from fathometer.papers.item import plain

    return {"paper": "arXiv:2604.11890v3", "version": __version__, "size": plain(size), **more}
