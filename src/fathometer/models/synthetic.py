r"""Tokens with a prescribed Gram matrix, to start a network exactly where the theory starts.

.. math:: X = \sqrt{d}\; S\, U^\top, \qquad S^2 = G, \qquad U^\top U = 1,

with S the symmetric root of the wanted Gram matrix and U a uniformly random d x n matrix of orthonormal columns, so
that :math:`x_a \cdot x_b / d = G_{ab}` holds exactly and not on average.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathometer.errors import DomainError


def equiangular_tokens(
    *,
    n_tokens: int,
    d_model: int,
    q: float,
    p: float,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return tokens that all have mean square ``q`` and pairwise overlap ``p`` per coordinate, exactly.

    Args:
        n_tokens: Number of tokens.
        d_model: Width; at least ``n_tokens``.
        q: Mean square per coordinate.
        p: Mean overlap of two different tokens, in ``[-q/(n_tokens-1), q]``.
        batch: Number of independent samples.
        seed: Which draw.
        dtype: Type of the result; the computation is in float64.
    Returns:
        Shape ``(batch, n_tokens, d_model)``.
    Raises:
        DomainError: if there are more tokens than coordinates, or no tokens have these moments.
    """
    gram = p + (q - p) * np.eye(n_tokens)
    return tokens_with_gram(gram, d_model=d_model, batch=batch, seed=seed, dtype=dtype)


def tokens_with_gram(
    gram: Any, *, d_model: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return tokens with ``x_a . x_b / d_model`` equal to ``gram``.

    Args:
        gram: Symmetric positive semidefinite matrix, shape ``(n_tokens, n_tokens)``.
        d_model: Width; at least ``n_tokens``.
        batch: Number of independent samples.
        seed: Which draw.
        dtype: Type of the result; the computation is in float64.
    Returns:
        Shape ``(batch, n_tokens, d_model)``.
    Raises:
        DomainError: if there are more tokens than coordinates, or the matrix is no Gram matrix.
    """
    target = torch.as_tensor(gram, dtype=torch.float64)
    if target.ndim != 2 or target.shape[0] != target.shape[1]:
        raise DomainError(f"gram must have shape (n_tokens, n_tokens); got {tuple(target.shape)}")
    n_tokens = len(target)
    if n_tokens > d_model:
        raise DomainError(
            f"an exact Gram matrix needs d_model >= n_tokens; got d_model={d_model} and n_tokens={n_tokens}",
            value=n_tokens,
        )
    values, vectors = torch.linalg.eigh(target)
    lowest = float(values[0])
    if not torch.allclose(target, target.T) or not lowest >= -1e-9 * max(float(values[-1]), 0.0):
        raise DomainError(
            f"gram must be symmetric and positive semidefinite; its lowest eigenvalue is {lowest:.3g}. "
            "For equal tokens p must lie in [-q/(n_tokens-1), q].",
            value=lowest,
        )
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, d_model, n_tokens, generator=generator, dtype=torch.float64)
    columns, triangle = torch.linalg.qr(noise)
    # The sign makes the columns uniformly distributed; pointwise norms can tell directions apart.
    columns = columns * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    tokens: Tensor = d_model**0.5 * root @ columns.mT
    return tokens.to(dtype)
