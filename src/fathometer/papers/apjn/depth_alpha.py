"""The APJN over depth and alpha, and the alpha at which Derf amplifies gradients as much as pre-LayerNorm does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.observables import predict
from fathometer.papers.apjn.architecture import VIT_BASE, described, network
from fathometer.papers.item import FloatArray, Progress, Size, Table, plain, silent
from fathometer.prescription import solve_field
from fathometer.spec import Derf, LayerNorm

#: Tokens of natural images behind the patch embedding of ViT-base: number, mean square and overlap.
N_TOKENS, Q_IMAGE, P_IMAGE = 196, 0.27, 0.11
DEPTH = 256
SOLVED_DEPTHS = (3, 6, 12, 24, 48, 64, 96, 128, 192)


@dataclass(frozen=True, kw_only=True)
class DepthAlpha:
    """The picture and what is drawn on it.

    Attributes:
        depths: Number of blocks, 1 to 256.
        alphas: Slope of Derf.
        log_apjn: ``ln J^{l,0}``, shape ``(n_depths, n_alphas)``.
        layer_norm: ``ln J^{l,0}`` of LayerNorm, shape ``(n_depths,)``.
        contour: Alpha at which Derf matches LayerNorm, interpolated on the grid; NaN where none does.
        solved_depths, solved: The same, solved for at a few depths.
        about: Sizes, tokens, closure.
    """

    depths: FloatArray
    alphas: FloatArray
    log_apjn: FloatArray
    layer_norm: FloatArray
    contour: FloatArray
    solved_depths: tuple[int, ...]
    solved: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return the matching alphas."""
        rows = tuple(
            (f"{depth}", f"{np.exp(self.layer_norm[depth - 1]):.4g}", f"{alpha:.4f}", f"{self.contour[depth - 1]:.4f}")
            for depth, alpha in zip(self.solved_depths, self.solved, strict=True)
        )
        return Table(
            title="Alpha at which Derf has the APJN of pre-LayerNorm",
            headings=("blocks", "J of LayerNorm", "alpha solved", "alpha on the grid"),
            rows=rows,
        )


def depth_alpha(size: Size, progress: Progress = silent) -> DepthAlpha:
    """Predict forward APJN curves for all alphas in one array-valued prediction.

    A forward curve from the input equals, at depth l, the backward APJN of a stack of l blocks: one prediction gives
    the whole picture.
    """
    alphas = np.geomspace(0.1, 4.0, size.grid)
    inputs: dict[str, Any] = {"n_tokens": N_TOKENS, "q": Q_IMAGE, "p": P_IMAGE}
    spec = network(size, Derf(alpha=alphas), VIT_BASE).with_depth(DEPTH)
    log_apjn = predict(spec, **inputs).curves["apjn_forward_log"][1:]
    plain_norm = network(size, LayerNorm(), VIT_BASE).with_depth(DEPTH)
    layer_norm = predict(plain_norm, **inputs).curves["apjn_forward_log"][1:]
    solved = []
    for i, depth in enumerate(SOLVED_DEPTHS):
        start = network(size, Derf(alpha=1.0), VIT_BASE).with_depth(depth)
        solved.append(solve_field(start, "alpha", target="gradient", **inputs).value)
        progress("solving for alpha", i + 1, len(SOLVED_DEPTHS))
    return DepthAlpha(
        depths=np.arange(1.0, DEPTH + 1),
        alphas=alphas,
        log_apjn=log_apjn,
        layer_norm=layer_norm,
        contour=matching(alphas, log_apjn, layer_norm),
        solved_depths=SOLVED_DEPTHS,
        solved=np.array(solved),
        about=described(size, **inputs, scales="ViT-base, std 0.02", closure=DEFAULT_CLOSURE.name),
    )


def matching(alphas: FloatArray, log_apjn: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return at each depth the alpha at which a row of ``log_apjn``, increasing in alpha, crosses ``wanted``."""
    out = [
        np.exp(np.interp(level, row, np.log(alphas), left=np.nan, right=np.nan))
        for row, level in zip(log_apjn, wanted, strict=True)
    ]
    return np.array(out)
