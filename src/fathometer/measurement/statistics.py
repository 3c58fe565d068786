"""Statistics of tokens, gradients and attention rows, and their averages over weight draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]


def token_moments(x: Tensor) -> tuple[float, float]:
    """Return (q, p) of tokens of shape ``(batch, n, d)``, averaged over the batch. O(n d), no Gram matrix."""
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    n, d = x.shape[-2:]
    square = x.square().sum(dim=(-2, -1), dtype=torch.float64) / d
    total = x.sum(dim=-2, dtype=torch.float64).square().sum(dim=-1) / d
    q = square / n
    p = (total - square) / (n * (n - 1)) if n > 1 else torch.zeros_like(q)
    return float(q.mean()), float(p.mean())


def gram_matrix(x: Tensor) -> FloatArray:
    """Return ``x_a . x_b / d`` of shape ``(batch, n, n)`` in float64."""
    wide = x.detach().double()
    gram = (wide @ wide.transpose(-1, -2)) / x.shape[-1]
    return np.asarray((gram + gram.transpose(-1, -2)).cpu().numpy() / 2)


def row_statistics(scores: Tensor) -> dict[str, float]:
    """Return mean attention statistics of masked scores, shape ``(batch, heads, n_queries, n_keys)``.

    Keys: ``entropy`` (nats), ``entropy_relative`` (over the logarithm of the number of visible keys, rows that see
        more than one), ``y2`` (mean of sum A^2), ``logit_variance`` (unbiased, over the visible keys of a row),
        ``row_overlap`` (mean of sum A A' over two different queries), ``condensation`` (root of the mean of the
        variance over twice the logarithm of the number of visible keys, rows that see more than one).
    """
    scores = scores.float()
    visible = ~torch.isneginf(scores)
    counts = visible.sum(-1)
    log_weights = torch.log_softmax(scores, dim=-1)
    weights = log_weights.exp()
    entropy = -(weights * log_weights.masked_fill(~visible, 0.0)).sum(-1)
    shown = scores.masked_fill(~visible, 0.0)
    mean = shown.sum(-1, keepdim=True) / counts.unsqueeze(-1)
    spread = ((shown - mean).square() * visible).sum(-1) / (counts - 1).clamp_min(1)
    many = counts > 1
    relative = entropy[many] / counts[many].float().log()
    some = counts > 0  # padded queries see nothing
    return {
        "entropy": float(entropy[some].double().mean()),
        "entropy_relative": float(relative.double().mean()) if bool(many.any()) else 1.0,
        "y2": float(weights.square().sum(-1)[some].double().mean()),
        "row_overlap": _row_overlap(weights),
        "logit_variance": float(spread[some].double().mean()),
        "condensation": float((spread[many] / (2 * counts[many].float().log())).double().mean()) ** 0.5
        if bool(many.any())
        else 0.0,
    }


def _row_overlap(weights: Tensor) -> float:
    """Return the mean overlap of two rows of attention, shape ``(batch, heads, n_queries, n_keys)``; O(n^2)."""
    n = weights.shape[-2]
    if n < 2:
        return 1.0
    wide = weights.double()
    total = wide.sum(dim=-2).square().sum(dim=-1) - wide.square().sum(dim=(-2, -1))
    return float((total / (n * (n - 1))).mean())


def average(draws: Sequence[Mapping[str, FloatArray]]) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Average curves over weight draws.

    A ``_log`` curve is averaged as the number it is the logarithm of; its error is then relative.

    Returns:
        Means and standard errors by name; no errors from a single draw.
    """
    means: dict[str, FloatArray] = {}
    errors: dict[str, FloatArray] = {}
    names = [name for name in draws[0] if all(name in draw for draw in draws)]
    for name in names:
        values = np.stack([draw[name] for draw in draws])
        if name.endswith("_log"):
            top = values.max(axis=0)
            plain = np.exp(values - top)
            means[name] = np.log(plain.mean(axis=0)) + top
            scale = plain.mean(axis=0)
        else:
            plain, scale = values, np.ones(values.shape[1:])
            means[name] = values.mean(axis=0)
        if len(draws) > 1:
            errors[name] = plain.std(axis=0, ddof=1) / math.sqrt(len(draws)) / scale
    return means, errors
