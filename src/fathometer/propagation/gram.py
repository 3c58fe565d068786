"""The Markov chain on the full Gram matrix of the tokens: causal masks, unequal norms, clustered tokens.

Sublayers are those of :mod:`fathometer.propagation.gram_half_layer`. Exchangeable tokens are the special case of two
distinct entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import (
    Closure,
    FixedMixing,
    JointRows,
    Visibility,
)
from fathometer.errors import DomainError, NotCoveredError
from fathometer.propagation.exchangeable import block_borders
from fathometer.propagation.gram_half_layer import GramHalfLayer
from fathometer.propagation.trajectory import StreamOverflowError, vanished_gradient
from fathometer.spec import SelfAttention, Sublayer, Transformer, refuse_arrays

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GramTrajectory:
    """Gram matrices of the tokens at every sublayer border, and the map that carries gradients back.

    Attributes:
        spec, closure, borders, is_attention: As in :class:`fathometer.propagation.Trajectory`.
        grams: Gram matrices over coordinates; shape ``(n_half + 1, *batch, n_tokens, n_tokens)``.
        added: Gram matrices of what each branch adds; shape ``(n_half, *batch, n_tokens, n_tokens)``.
        attention: Per attention sublayer and query: ``attention_entropy`` (nats), ``inverse_participation``,
            ``row_overlap``, ``logit_variance`` and ``visible_keys``; each of shape ``(n_attention, *batch, n_tokens)``.
        forward_log: Log mean square of an isotropic perturbation of the input, ``ln J^{m,0}``, at every sublayer
            border; shape ``(n_half + 1, *batch)``.
        averaging, mixing: The closure or joint average, and the fixed attention if one was given.
        n_samples: Number of samples whose tokens share the matrices, one after the other.
    """

    spec: Transformer
    closure: str
    borders: NDArray[np.int64]
    is_attention: NDArray[np.bool_]
    grams: FloatArray
    added: FloatArray
    attention: dict[str, FloatArray]
    forward_log: FloatArray
    averaging: Closure | JointRows = field(repr=False)
    mixing: FixedMixing | None = field(repr=False)
    n_samples: int = 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens, of all samples that share the matrices."""
        return int(self.grams.shape[-1])

    def backward(self, *boundaries: FloatArray | None) -> list[tuple[FloatArray, FloatArray]]:
        """Carry gradient Gram matrices from the output to every sublayer border.

        Sublayers are rebuilt from the kept Gram matrices, last first, so nothing but those is held in memory.

        Args:
            boundaries: Gram matrices of the output gradients over coordinates, each of shape ``(*batch, n, n)``;
                ``None`` is the identity (isotropic noise, hence the APJN), the all-ones matrix a mean-pooled loss.
        Returns:
            Per boundary: ``log_norm`` of shape ``(n_half + 1, *batch)``, the log of the mean square relative to the
            output, and the matrices divided by that mean square, shape ``(n_half + 1, *batch, n, n)``. Rescaled at
            every step: no overflow at any depth.
        Raises:
            DomainError: for a gradient of zero, naming the sublayer that lets none through.
        """
        shape, n_half = self.grams.shape[1:], len(self.added)
        out = [(np.zeros((n_half + 1, *shape[:-2])), np.empty(self.grams.shape)) for _ in boundaries]
        for (_, matrices), boundary in zip(out, boundaries, strict=True):
            start = np.eye(self.n_tokens) if boundary is None else np.asarray(boundary, dtype=np.float64)
            matrices[-1], _ = rescaled_gradient(np.broadcast_to(start, shape), n_half)
        sublayers = [sublayer for block in self.spec.layers() for sublayer in block.sublayers]
        build = _Builder(self.n_tokens, self.averaging, self.mixing, self.n_samples)
        for half in range(n_half - 1, -1, -1):
            step = build(sublayers[half], self.grams[half])
            for log_norm, matrices in out:
                matrices[half], growth = rescaled_gradient(step.backward(matrices[half + 1]), half)
                log_norm[half] = log_norm[half + 1] + growth
        return out


def check_gram(gram: Any) -> FloatArray:
    """Validate Gram matrices of shape ``(*batch, n, n)``: finite, symmetric, positive semidefinite, non-zero tokens.

    Raises:
        DomainError: saying by how much a condition fails.
    """
    matrix = np.asarray(gram, dtype=np.float64)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise DomainError(f"gram must have shape (..., n_tokens, n_tokens); got {matrix.shape}", value=matrix.shape)
    if not np.all(np.isfinite(matrix)):
        raise DomainError("gram must be finite", value=float("nan"))
    diagonal = np.diagonal(matrix, axis1=-2, axis2=-1)
    if np.any(diagonal <= 0):
        index = tuple(int(i) for i in np.argwhere(diagonal <= 0)[0])
        raise DomainError(
            f"every token needs a positive mean square; got {diagonal[index]:g} at index {index}", index=index
        )
    largest = float(np.max(diagonal))
    skew = float(np.max(np.abs(matrix - np.swapaxes(matrix, -1, -2))))
    if skew > 1e-9 * largest:
        raise DomainError(f"gram must be symmetric; it differs from its transpose by {skew:.3g}", value=skew)
    lowest = float(np.min(np.linalg.eigvalsh(matrix)))
    if lowest < -1e-7 * largest * matrix.shape[-1]:
        raise DomainError(
            f"gram must be positive semidefinite; its lowest eigenvalue is {lowest:.3g} "
            f"(largest diagonal entry {largest:.3g})",
            value=lowest,
        )
    return matrix


def check_attention(attention: Any, n_tokens: int) -> FloatArray:
    """Validate a row-stochastic attention matrix of shape ``(n_tokens, n_tokens)``."""
    matrix = np.asarray(attention, dtype=np.float64)
    if matrix.shape != (n_tokens, n_tokens):
        raise DomainError(f"attention must have shape ({n_tokens}, {n_tokens}); got {matrix.shape}", value=matrix.shape)
    if not np.all(np.isfinite(matrix)) or np.any(matrix < 0):
        raise DomainError(f"attention weights must be finite and non-negative; lowest is {np.min(matrix):.3g}")
    sums = matrix.sum(axis=1)
    worst = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[worst] - 1) > 1e-9:
        raise DomainError(f"attention rows must sum to 1; row {worst} sums to {sums[worst]:.12g}", index=(worst,))
    return matrix


def propagate_gram(
    spec: Transformer,
    gram: Any,
    *,
    closure: Closure | JointRows,
    attention: Any | None = None,
    n_samples: int = 1,
) -> GramTrajectory:
    """Carry the tokens' Gram matrix through every sublayer.

    Args:
        spec: The transformer, with scalar fields.
        gram: Gram matrices ``x_a . x_b / d`` at the first block, shape ``(*batch, n, n)``; batch for several samples
            whose overlaps with each other do not matter.
        closure: How the softmax is averaged: a closure, or all pairs of rows jointly for a single Gram matrix.
        attention: Optional fixed row-stochastic matrix used in every layer instead of the closure.
        n_samples: Number of samples in one matrix, of equal length, one after the other. Their overlaps are carried
            as well; a token attends to its own sample only.
    Returns:
        The trajectory. Cost: O(n^2) elementwise work a sublayer, times the number of interpolation nodes for
        annealed attention; memory O(n_half * batch * n^2).
    Raises:
        SpecError: for fields that are arrays.
        DomainError: for a matrix that is no Gram matrix, attention that is not row-stochastic, or a stream that
            overflows.
    """
    refuse_arrays(spec, "propagation on full Gram matrices")
    current = check_gram(gram)
    n_tokens = current.shape[-1]
    if n_samples < 1 or n_tokens % n_samples:
        raise DomainError(f"{n_tokens} tokens are not {n_samples} samples of equal length", value=n_samples)
    if attention is not None and isinstance(closure, JointRows):
        raise NotCoveredError(f"fixed attention leaves {closure.name} averages nothing to do; give a closure")
    fixed = None if attention is None else FixedMixing(check_attention(attention, n_tokens))
    build = _Builder(n_tokens, closure, fixed, n_samples)
    tangent = np.broadcast_to(np.eye(n_tokens), current.shape)
    grams: list[FloatArray] = [current]
    added: list[FloatArray] = []
    growths: list[FloatArray] = [np.zeros(current.shape[:-2])]
    rows: list[dict[str, FloatArray]] = []
    attends: list[bool] = []
    for block in spec.layers():
        for sublayer in block.sublayers:
            step = build(sublayer, current)
            tangent, growth = _rescaled(step.forward(tangent))
            current = step.output
            if not np.all(np.isfinite(current)):
                level = float(np.max(grams[-1]))
                raise StreamOverflowError(
                    f"the stream overflows at sublayer {len(added)}: its largest entry is {level:.3g} one before",
                    value=level,
                    index=(len(added),),
                )
            grams.append(current)
            added.append(step.added)
            growths.append(growth)
            attends.append(step.statistics is not None)
            if step.statistics is not None:
                rows.append(step.statistics | {"row_overlap": step.row_overlap()})
    return GramTrajectory(
        spec=spec,
        closure=closure.name if attention is None else "fixed",
        borders=block_borders(spec),
        is_attention=np.array(attends),
        grams=np.stack(grams),
        added=np.stack(added),
        attention={key: np.stack([row[key] for row in rows]) for key in rows[0]} if rows else {},
        forward_log=np.cumsum(growths, axis=0),
        averaging=closure,
        mixing=fixed,
        n_samples=n_samples,
    )


class _Builder:
    """Builds sublayers on demand, with the sums over visible keys shared between them."""

    def __init__(
        self, n_tokens: int, closure: Closure | JointRows, mixing: FixedMixing | None, n_samples: int = 1
    ) -> None:
        self._closure, self._mixing = closure, mixing
        self._visible = {flag: Visibility(n_tokens, causal=flag, n_samples=n_samples) for flag in (False, True)}

    def __call__(self, sublayer: Sublayer, gram: FloatArray) -> GramHalfLayer:
        causal = isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal
        return GramHalfLayer(sublayer, gram, self._closure, self._visible[causal], self._mixing)


def rescaled_gradient(matrix: FloatArray, half: int) -> tuple[FloatArray, FloatArray]:
    """Return a gradient's Gram matrix with mean diagonal one, and the log of what it was divided by.

    Args:
        matrix: At the input of sublayer ``half``, shape ``(..., n, n)``.
        half: Where; the number of sublayers at the output.
    Raises:
        DomainError: if it vanishes.
    """
    level = _mean_diagonal(matrix)
    if not np.all(level > 0):
        raise vanished_gradient(half)
    return matrix / level[..., None, None], np.log(level)


def _rescaled(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return a perturbation's Gram matrix with mean diagonal one, and the log of what it was divided by.

    A perturbation that nothing is left of stays zero, at a log of minus infinity.
    """
    level = _mean_diagonal(matrix)
    with np.errstate(divide="ignore"):
        return matrix / np.where(level > 0, level, 1.0)[..., None, None], np.log(level)


def _mean_diagonal(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.mean(np.diagonal(matrix, axis1=-2, axis2=-1), axis=-1))
