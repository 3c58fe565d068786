r"""The Markov chain on the full Gram matrix of the tokens: causal masks, unequal norms, clustered tokens.

With elementwise kernels written as functions of a Gram matrix and ``o`` for the elementwise product, one sublayer
acts as

.. math::
    \tilde\Sigma = N(\Sigma), \qquad
    \Sigma' = \mu^2 \Sigma + \tau^2 N_o\bigl(\sigma_{OV}^2\, \mathcal M \tilde\Sigma\bigr), \qquad
    \Gamma = \mu^2 \Gamma' + \tau^2 \hat N(\Sigma) \circ \bigl[\sigma_{OV}^2\, \mathcal M^{*} \Gamma' +
    \text{scores}\bigr]

for attention, with the mixing ``M`` of the closure, and with elementwise activation kernels for an MLP. Dropout adds to
the diagonal, what two tokens share stays. Exchangeable tokens are the special case of two distinct entries.

Source: derived in the documentation; the elementwise kernels for unequal variances as cited where they are defined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import (
    Annealed,
    AnnealedMixing,
    Closure,
    FixedMixing,
    Mixing,
    ScorePath,
    Uniform,
    UniformLargeN,
    UniformMixing,
    Visibility,
    matched,
)
from fathometer.errors import DomainError
from fathometer.kernels import PairKernel, activation_kernel, norm_kernel
from fathometer.propagation.branch_maps import attention_bias
from fathometer.propagation.exchangeable import block_borders
from fathometer.spec import MLP, SelfAttention, Sublayer, Transformer

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
        averaging, mixing: The closure, and the fixed attention if one was given.
    """

    spec: Transformer
    closure: str
    borders: NDArray[np.int64]
    is_attention: NDArray[np.bool_]
    grams: FloatArray
    added: FloatArray
    attention: dict[str, FloatArray]
    forward_log: FloatArray
    averaging: Closure = field(repr=False)
    mixing: FixedMixing | None = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
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
        """
        shape, n_half = self.grams.shape[1:], len(self.added)
        out = [(np.zeros((n_half + 1, *shape[:-2])), np.empty(self.grams.shape)) for _ in boundaries]
        for (_, matrices), boundary in zip(out, boundaries, strict=True):
            start = np.eye(self.n_tokens) if boundary is None else np.asarray(boundary, dtype=np.float64)
            matrices[-1], _ = _rescaled(np.broadcast_to(start, shape))
        sublayers = [sublayer for block in self.spec.layers() for sublayer in block.sublayers]
        build = _Builder(self.n_tokens, self.averaging, self.mixing)
        for half in range(n_half - 1, -1, -1):
            step = build(sublayers[half], self.grams[half])
            for log_norm, matrices in out:
                matrices[half], growth = _rescaled(step.backward(matrices[half + 1]))
                log_norm[half] = log_norm[half + 1] + growth
        return out


class GramHalfLayer:
    """One sublayer acting on one Gram matrix, keeping what its backward map needs."""

    def __init__(
        self, sublayer: Sublayer, gram: FloatArray, closure: Closure, visible: Visibility, mixing: FixedMixing | None
    ) -> None:
        self.sublayer = sublayer
        self.visible = visible
        self._kernels = [
            norm_kernel(norm) for norm in (sublayer.input_norm, sublayer.output_norm, sublayer.stream_norm)
        ]
        self._stream = gram
        self._normed = _overlap(self._kernels[0], gram)
        self.statistics: dict[str, FloatArray] | None = None
        self._closure = closure
        self._branch = self._attend(mixing) if isinstance(sublayer.branch, SelfAttention) else self._perceive()
        out = self._branch if sublayer.output_norm is None else _overlap(self._kernels[1], self._branch)
        self.added = sublayer.branch_scale**2 * with_noise(out, _lost(sublayer.dropout))
        self._residual = sublayer.skip_scale**2 * gram + self.added
        self.output = self._residual if sublayer.stream_norm is None else _overlap(self._kernels[2], self._residual)

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Map the gradient Gram matrix at the sublayer's output to that at its input."""
        rows, columns, after = self._slopes
        gradient = gradient * after
        through = self._through(with_noise(gradient * columns, _lost(self.sublayer.dropout)), forward=False)
        return np.asarray(self.sublayer.skip_scale**2 * gradient + self.sublayer.branch_scale**2 * rows * through)

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the input to that of the output: the adjoint of :meth:`backward`."""
        rows, columns, after = self._slopes
        through = with_noise(columns * self._through(rows * tangent, forward=True), _lost(self.sublayer.dropout))
        skip, weight = self.sublayer.skip_scale**2, self.sublayer.branch_scale**2
        return np.asarray(after * (skip * tangent + weight * through))

    @cached_property
    def _slopes(self) -> tuple[Any, Any, Any]:
        """Slope kernels of the input, output and stream norms."""
        sublayer = self.sublayer
        slots = (
            (sublayer.input_norm, self._kernels[0], self._stream),
            (sublayer.output_norm, self._kernels[1], self._branch),
            (sublayer.stream_norm, self._kernels[2], self._residual),
        )
        inner, outer, stream = (1.0 if norm is None else _slope(kernel, gram) for norm, kernel, gram in slots)
        return inner, outer, stream

    @cached_property
    def _perceptron_slope(self) -> FloatArray:
        branch = self.sublayer.branch
        assert not isinstance(branch, SelfAttention)
        kernel = activation_kernel(branch.activation)
        scale = (branch.mlp_in * branch.mlp_out) ** 2
        slope = _slope(kernel, self._preactivation)
        if isinstance(branch, MLP):
            return np.asarray(scale * slope)
        return np.asarray(scale * (branch.gate**2 * slope * self._normed + _overlap(kernel, self._preactivation)))

    def _through(self, matrix: FloatArray, *, forward: bool) -> FloatArray:
        """Apply the branch's linear map on gradient Gram matrices, or its adjoint."""
        branch = self.sublayer.branch
        if not isinstance(branch, SelfAttention):
            return self._perceptron_slope * matrix
        if branch.centred and not forward:
            matrix = centred(matrix)
        out = self._mixing.forward(matrix) if forward else self._mixing.backward(matrix)
        if self._scores is not None:
            out = out + self._through_scores(matrix, forward=forward)
        if np.any(branch.attention_dropout):
            out = out + _lost(branch.attention_dropout) * self._through_noise(matrix, forward=forward)
        if branch.centred and forward:
            out = centred(out)
        return np.asarray((branch.value * branch.output) ** 2 * out)

    def _through_scores(self, matrix: FloatArray, *, forward: bool, noise: bool = False) -> FloatArray:
        """Apply the gradient path through the scores; with ``noise`` that of independent noise on every weight."""
        assert self._scores is not None
        path, coupling = self._scores
        weight = self._score_factor
        if noise:
            path = path.of_noise()
        return np.asarray(
            weight * path.forward(coupling * matrix) if forward else coupling * path.backward(weight * matrix)
        )

    def _through_noise(self, matrix: FloatArray, *, forward: bool) -> FloatArray:
        """Apply what dropout on attention weights adds to the linear map: independent for every query and key."""
        if forward:
            out = diagonal_part(self._mixing.forward(diagonal_part(matrix)))
            if self._scores is not None:
                out = out + diagonal_part(self._through_scores(matrix, forward=True, noise=True))
            return out
        own = diagonal_part(matrix)
        out = diagonal_part(self._mixing.backward(own))
        return out if self._scores is None else out + self._through_scores(own, forward=False, noise=True)

    def _attend(self, mixing: FixedMixing | None) -> FloatArray:
        branch = self.sublayer.branch
        assert isinstance(branch, SelfAttention)
        normed = self._normed
        coupling: Any = branch.score_multiplier**2
        score_gram = normed
        if branch.qk_norm:
            scale = np.sqrt(np.diagonal(normed, axis1=-2, axis2=-1))
            score_gram = normed / (scale[..., :, None] * scale[..., None, :])
        else:
            coupling = coupling * (branch.query * branch.key) ** 2
        self._scores: tuple[ScorePath, Any] | None = None
        self._score_factor: Any = 1.0
        if mixing is not None:
            self._mixing: Mixing = mixing
        elif isinstance(self._closure, (Uniform, UniformLargeN)):  # one map when tokens are not alike
            self._mixing = UniformMixing(self.visible)
        elif isinstance(self._closure, Annealed):
            self._mixing = AnnealedMixing(self.visible, score_gram, coupling)
            if self._closure.score_path:
                self._scores = self._score_path(score_gram, coupling)
                self._score_factor = matched(self._closure, self.visible, score_gram, coupling).score
        else:
            factors = matched(self._closure, self.visible, score_gram, coupling)
            self._mixing = AnnealedMixing(self.visible, score_gram, coupling, beta_factor=factors.beta_factor)
            self._scores = self._score_path(score_gram, coupling)
            self._score_factor = factors.score
        self.statistics = _row_statistics(self.visible, score_gram, coupling, self._closure)
        if mixing is not None:
            self.statistics |= mixing.row_statistics(normed.shape[:-1])
        mixed = self._mixing.forward(normed)
        if np.any(branch.attention_dropout):
            mixed = mixed + _lost(branch.attention_dropout) * diagonal_part(self._mixing.forward(diagonal_part(normed)))
        mixed = (branch.value * branch.output) ** 2 * mixed
        return centred(mixed) if branch.centred else np.asarray(mixed + attention_bias(branch))

    def row_overlap(self) -> FloatArray:
        """Return, for every query of an attention sublayer, the mean of ``sum_c A_ac A_bc`` over the other queries."""
        n = self._normed.shape[-1]
        if n == 1:
            return np.ones(self._normed.shape[:-1])
        overlap = self._mixing.forward(np.broadcast_to(np.eye(n), self._normed.shape))
        return np.asarray((overlap.sum(axis=-1) - np.diagonal(overlap, axis1=-2, axis2=-1)) / (n - 1))

    def _score_path(self, score_gram: FloatArray, coupling: Any) -> tuple[ScorePath, Any]:
        """Return the gradient path through the scores; normalised queries and keys divide it by the tokens' sizes."""
        branch = self.sublayer.branch
        assert isinstance(branch, SelfAttention)
        if branch.qk_norm:
            size = np.sqrt(np.diagonal(self._normed, axis1=-2, axis2=-1))
            coupling = coupling / (size[..., :, None] * size[..., None, :])
        return ScorePath(self.visible, self._normed, score_gram), coupling

    def _perceive(self) -> FloatArray:
        branch = self.sublayer.branch
        assert not isinstance(branch, SelfAttention)
        kernel = activation_kernel(branch.activation)
        if isinstance(branch, MLP):
            self._preactivation = branch.mlp_in**2 * self._normed + branch.in_bias**2
            return np.asarray(branch.mlp_out**2 * _overlap(kernel, self._preactivation) + branch.out_bias**2)
        self._preactivation = branch.gate**2 * self._normed
        scale = (branch.mlp_in * branch.mlp_out) ** 2
        return np.asarray(scale * _overlap(kernel, self._preactivation) * self._normed)


def with_noise(gram: FloatArray, lost: Any) -> FloatArray:
    """Return the Gram matrix of the same vectors under independent multiplicative noise of variance ``lost``."""
    return gram + lost * diagonal_part(gram) if np.any(lost) else gram


def diagonal_part(gram: FloatArray) -> FloatArray:
    """Return the matrix with everything off the diagonal set to zero; shape ``(..., n, n)``."""
    return np.asarray(gram * np.eye(gram.shape[-1]))


def _lost(rate: Any) -> Any:
    """Return the variance of inverted dropout's factor, ``p / (1 - p)``."""
    return rate / (1 - rate)


def centred(gram: FloatArray) -> FloatArray:
    """Return the Gram matrix of the same vectors less their mean over tokens; shape ``(..., n, n)``."""
    rows = gram - gram.mean(axis=-1, keepdims=True)
    return np.asarray(rows - rows.mean(axis=-2, keepdims=True))


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


def propagate_gram(spec: Transformer, gram: Any, *, closure: Closure, attention: Any | None = None) -> GramTrajectory:
    """Carry the tokens' Gram matrix through every sublayer.

    Args:
        spec: The transformer, with scalar fields.
        gram: Gram matrices ``x_a . x_b / d`` at the first block, shape ``(*batch, n, n)``; batch for several samples.
        closure: How the softmax is averaged.
        attention: Optional fixed row-stochastic matrix used in every layer instead of the closure.
    Returns:
        The trajectory. Cost: O(n^2) elementwise work a sublayer, times the number of interpolation nodes for
        annealed attention; memory O(n_half * batch * n^2).
    Raises:
        DomainError: for a matrix that is no Gram matrix, or attention that is not row-stochastic.
    """
    current = check_gram(gram)
    n_tokens = current.shape[-1]
    fixed = None if attention is None else FixedMixing(check_attention(attention, n_tokens))
    build = _Builder(n_tokens, closure, fixed)
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
                raise DomainError(
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
    )


class _Builder:
    """Builds sublayers on demand, with the sums over visible keys shared between them."""

    def __init__(self, n_tokens: int, closure: Closure, mixing: FixedMixing | None) -> None:
        self._closure, self._mixing = closure, mixing
        self._visible = {flag: Visibility(n_tokens, causal=flag) for flag in (False, True)}

    def __call__(self, sublayer: Sublayer, gram: FloatArray) -> GramHalfLayer:
        causal = isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal
        return GramHalfLayer(sublayer, gram, self._closure, self._visible[causal], self._mixing)


def _rescaled(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return a Gram matrix with mean diagonal one, and the log of what it was divided by."""
    level = _mean_diagonal(matrix)
    return matrix / level[..., None, None], np.log(level)


def _row_statistics(visible: Visibility, scores: FloatArray, coupling: Any, closure: Closure) -> dict[str, FloatArray]:
    """Return per-query attention statistics, from the variance of that query's scores over the keys it sees."""
    diagonal = np.diagonal(scores, axis1=-2, axis2=-1)
    n = visible.counts
    key_square = visible.over_keys(diagonal, -1) / n
    key_mean = np.diagonal(visible.key_pairs(scores), axis1=-2, axis2=-1) / n**2
    spread = np.maximum(key_square - key_mean, 0.0)
    variance = coupling * diagonal * spread * n / np.maximum(n - 1, 1)
    statistics = closure.statistics(n, variance, 0.0 * variance)
    return {
        "attention_entropy": statistics.entropy,
        "inverse_participation": statistics.y2,
        "logit_variance": variance,
        "visible_keys": np.broadcast_to(n, variance.shape),
    }


def _mean_diagonal(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.mean(np.diagonal(matrix, axis1=-2, axis2=-1), axis=-1))


def _overlap(kernel: PairKernel, gram: FloatArray) -> FloatArray:
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.asarray(kernel.overlap(diagonal[..., :, None], diagonal[..., None, :], gram))


def _slope(kernel: PairKernel, gram: FloatArray) -> FloatArray:
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.asarray(kernel.slope_overlap(diagonal[..., :, None], diagonal[..., None, :], gram))
