r"""One sublayer acting on one Gram matrix, forward and backward.

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

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import (
    Annealed,
    AnnealedMixing,
    Closure,
    FixedMixing,
    JointRows,
    Mixing,
    SampledRows,
    ScorePath,
    ScoreResponse,
    Uniform,
    UniformLargeN,
    UniformMixing,
    Visibility,
    diagonal_part,
    matched,
)
from fathometer.errors import NotCoveredError
from fathometer.kernels import PairKernel, activation_kernel, norm_kernel
from fathometer.propagation.branch_maps import attention_bias, dropout_variance
from fathometer.propagation.exchangeable import without_memory
from fathometer.spec import MLP, GatedMLP, LayerNorm, Norm, RMSNorm, SelfAttention, Sublayer

FloatArray = NDArray[np.float64]

_SMALLEST = 1e-300  # in place of the size of tokens of zeros


class GramHalfLayer:
    """One sublayer acting on one Gram matrix, keeping what its backward map needs.

    Args:
        sublayer: The sublayer.
        gram: Gram matrix of the stream, shape ``(*batch, n, n)``.
        closure: How the softmax is averaged; a :class:`JointRows` takes one matrix, without a batch.
        visible: Which keys each query sees.
        mixing: Fixed attention in place of the closure, or ``None``.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        gram: FloatArray,
        closure: Closure | JointRows,
        visible: Visibility,
        mixing: FixedMixing | None = None,
        *,
        norm_epsilon: float = 0.0,
    ) -> None:
        self.sublayer = sublayer
        self.visible = visible
        self.norm_epsilon = norm_epsilon
        self._stream = gram
        self._normed = self.normalised(sublayer.input_norm, gram)
        self.statistics: dict[str, FloatArray] | None = None
        self._closure = closure
        self._branch = self._attend(mixing) if isinstance(sublayer.branch, SelfAttention) else self._perceive()
        out = self.normalised(sublayer.output_norm, self._branch)
        self.added = sublayer.branch_scale**2 * with_noise(out, dropout_variance(sublayer.dropout))
        self._residual = sublayer.skip_scale**2 * gram + self.added
        self.output = self.normalised(sublayer.stream_norm, self._residual)

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Map the gradient Gram matrix at the sublayer's output to that at its input."""
        rows, columns, after = self._slopes
        gradient = gradient * after
        through = self._through(with_noise(gradient * columns, dropout_variance(self.sublayer.dropout)), forward=False)
        return np.asarray(self.sublayer.skip_scale**2 * gradient + self.sublayer.branch_scale**2 * rows * through)

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the input to that of the output: the adjoint of :meth:`backward`."""
        rows, columns, after = self._slopes
        through = with_noise(
            columns * self._through(rows * tangent, forward=True), dropout_variance(self.sublayer.dropout)
        )
        skip, weight = self.sublayer.skip_scale**2, self.sublayer.branch_scale**2
        return np.asarray(after * (skip * tangent + weight * through))

    def through(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the normed tokens to that of the branch output."""
        return self._through(tangent, forward=True)

    def emit(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the branch output to that of the sublayer's output."""
        _, columns, after = self._slopes
        branch = self.sublayer.branch
        if isinstance(branch, SelfAttention) and branch.centred:
            tangent = self._centred(tangent)
        weight = self.sublayer.branch_scale**2
        return np.asarray(after * weight * with_noise(columns * tangent, dropout_variance(self.sublayer.dropout)))

    def normalised(self, norm: Norm | None, gram: FloatArray) -> FloatArray:
        """Return the Gram matrix behind a norm."""
        return gram if norm is None else norm_gram(norm, gram, epsilon=self.norm_epsilon)

    def norms(self) -> Iterator[tuple[Norm, FloatArray, Callable[[FloatArray], FloatArray]]]:
        """Yield every norm, the Gram matrix in front of it, and the map of a perturbation behind it to the output."""
        sublayer = self.sublayer
        if sublayer.input_norm is not None:
            yield sublayer.input_norm, self._stream, lambda tangent: self.emit(self.through(tangent))
        if sublayer.output_norm is not None:
            weight, after = sublayer.branch_scale**2, self._slopes[2]
            yield (
                sublayer.output_norm,
                self._branch,
                lambda tangent: np.asarray(after * weight * with_noise(tangent, dropout_variance(sublayer.dropout))),
            )
        if sublayer.stream_norm is not None:
            yield sublayer.stream_norm, self._residual, lambda tangent: tangent

    @property
    def normed(self) -> FloatArray:
        """Gram matrix of the tokens that enter the branch."""
        return self._normed

    @cached_property
    def hidden(self) -> tuple[FloatArray, FloatArray]:
        """Gram matrices of an MLP's activation and of its slope, at the pre-activations it sees."""
        kernel = activation_kernel(self._perceptron.activation)
        return _overlap(kernel, self._preactivation), _slope(kernel, self._preactivation)

    def mixed(self, gram: FloatArray) -> FloatArray:
        """Return the Gram matrix of attention-averaged tokens, per unit of value and output scales."""
        return np.asarray(self._mixing.forward(gram))

    def score_paths(self, gram: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return how the output responds to perturbed queries and keys, per unit ``sigma_OV^2 sigma_QK^2``.

        Args:
            gram: Gram matrix of the perturbation of the keys.
        Returns:
            The factor on the Gram matrix of a perturbation of the queries, and the Gram matrix of the output's
            response to that of the keys; zeros where the closure has no path through the scores.
        """
        if self._scores is None:
            return np.zeros(self._normed.shape), np.zeros(self._normed.shape)
        path, _ = self._scores
        response = np.asarray(self._score_factor * path.response)
        return response, np.asarray(self._score_factor * path.forward(gram) - response * gram)

    @cached_property
    def score_gram(self) -> FloatArray:
        """Gram matrix of the tokens as they enter the scores: of unit size with normalised queries and keys."""
        branch = self.sublayer.branch
        if not (isinstance(branch, SelfAttention) and branch.qk_norm):
            return self._normed
        return np.asarray(self._normed / self.key_size)

    @cached_property
    def key_size(self) -> FloatArray:
        """What normalised queries and keys divide the tokens' overlaps by; tokens of zeros stay zeros."""
        size = np.sqrt(np.maximum(np.diagonal(self._normed, axis1=-2, axis2=-1), _SMALLEST))
        return np.asarray(size[..., :, None] * size[..., None, :])

    @cached_property
    def _slopes(self) -> tuple[Any, Any, Any]:
        """Slope kernels of the input, output and stream norms."""
        sublayer = self.sublayer
        slots = (
            (sublayer.input_norm, self._stream),
            (sublayer.output_norm, self._branch),
            (sublayer.stream_norm, self._residual),
        )
        inner, outer, stream = (
            1.0 if norm is None else norm_slope(norm, gram, epsilon=self.norm_epsilon) for norm, gram in slots
        )
        return inner, outer, stream

    @property
    def _perceptron(self) -> MLP | GatedMLP:
        branch = self.sublayer.branch
        if not isinstance(branch, (MLP, GatedMLP)):
            raise without_memory()
        return branch

    @cached_property
    def _perceptron_slope(self) -> FloatArray:
        branch = self._perceptron
        scale = (branch.mlp_in * branch.mlp_out) ** 2
        overlap, slope = self.hidden
        if isinstance(branch, MLP):
            return np.asarray(scale * slope)
        return np.asarray(scale * (branch.gate**2 * slope * self._normed + overlap))

    def _centred(self, gram: FloatArray) -> FloatArray:
        """Return the Gram matrix of the same vectors less their mean over the tokens of a sample."""
        rows = gram - self.visible.over_keys(gram, -1) / self.visible.counts
        return np.asarray(rows - self.visible.over_keys(rows, -2) / self.visible.counts[:, None])

    def _through(self, matrix: FloatArray, *, forward: bool) -> FloatArray:
        """Apply the branch's linear map on gradient Gram matrices, or its adjoint."""
        branch = self.sublayer.branch
        if not isinstance(branch, SelfAttention):
            return self._perceptron_slope * matrix
        if branch.centred and not forward:
            matrix = self._centred(matrix)
        out = self._mixing.forward(matrix) if forward else self._mixing.backward(matrix)
        if self._scores is not None:
            out = out + self._through_scores(matrix, forward=forward)
        if np.any(branch.attention_dropout):
            out = out + dropout_variance(branch.attention_dropout) * self._through_noise(matrix, forward=forward)
        if branch.centred and forward:
            out = self._centred(out)
        return np.asarray((branch.value * branch.output) ** 2 * out)

    def _through_scores(self, matrix: FloatArray, *, forward: bool, noise: bool = False) -> FloatArray:
        """Apply the gradient path through the scores; with ``noise`` that of independent noise on every weight."""
        assert self._scores is not None
        path, coupling = self._scores
        weight = self._score_factor
        if noise:
            assert isinstance(path, ScorePath)  # joint averages refuse dropout on attention weights
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
        normed, score_gram, closure = self._normed, self.score_gram, self._closure
        coupling: Any = branch.score_multiplier**2
        if not branch.qk_norm:
            coupling = coupling * (branch.query * branch.key) ** 2
        self._scores: tuple[ScoreResponse, Any] | None = None
        self._score_factor: Any = 1.0
        if isinstance(closure, JointRows):
            return self._attend_jointly(closure, coupling)
        if mixing is not None:
            self._mixing: Mixing = mixing
        elif isinstance(closure, (Uniform, UniformLargeN)):  # one map when tokens are not alike
            self._mixing = UniformMixing(self.visible)
        elif isinstance(closure, Annealed):
            self._mixing = AnnealedMixing(self.visible, score_gram, coupling)
            if closure.score_path:
                self._scores = ScorePath(self.visible, normed, score_gram), self._per_token(coupling)
                self._score_factor = matched(closure, self.visible, score_gram, coupling).score
        else:
            factors = matched(closure, self.visible, score_gram, coupling)
            self._mixing = AnnealedMixing(self.visible, score_gram, coupling, beta_factor=factors.beta_factor)
            self._scores = ScorePath(self.visible, normed, score_gram), self._per_token(coupling)
            self._score_factor = factors.score
        self.statistics = _row_statistics(self.visible, score_gram, coupling, closure)
        if mixing is not None:
            self.statistics |= mixing.row_statistics(normed.shape[:-1])
        mixed = self._mixing.forward(normed)
        if np.any(branch.attention_dropout):
            mixed = mixed + dropout_variance(branch.attention_dropout) * diagonal_part(
                self._mixing.forward(diagonal_part(normed))
            )
        return self._attended(mixed)

    def _attended(self, mixed: FloatArray) -> FloatArray:
        branch = self.sublayer.branch
        assert isinstance(branch, SelfAttention)
        mixed = (branch.value * branch.output) ** 2 * mixed
        return self._centred(mixed) if branch.centred else np.asarray(mixed + attention_bias(branch))

    def _attend_jointly(self, rows: JointRows, coupling: Any) -> FloatArray:
        """Average over all pairs of rows at once."""
        branch = self.sublayer.branch
        assert isinstance(branch, SelfAttention)
        if np.any(branch.attention_dropout):
            raise NotCoveredError(f"dropout on attention weights with {rows.name} averages; use a closure")
        if branch.qk_norm and isinstance(rows, SampledRows) and rows.d_head is not None:
            raise NotCoveredError(
                "normalised queries and keys of sampled heads of finite width: their sizes would have to be divided "
                "out head by head; use d_head=None"
            )
        shape = self._normed.shape[-2:]
        if self._normed.size != shape[0] * shape[1]:
            raise NotCoveredError(
                f"{rows.name} averages take one Gram matrix over all samples; got a batch, shape {self._normed.shape}"
            )
        scores = self.score_gram
        found = rows.average(self.visible, self._normed.reshape(shape), scores.reshape(shape), float(coupling))
        self._mixing = found.mixing
        self._scores = found.path, self._per_token(coupling)
        self.statistics = _row_variances(self.visible, scores, coupling) | {
            "attention_entropy": np.broadcast_to(found.entropy, scores.shape[:-1]),
            "inverse_participation": np.broadcast_to(found.participation, scores.shape[:-1]),
        }
        return self._attended(self._mixing.forward(self._normed))

    def row_overlap(self) -> FloatArray:
        """Return, for every query of an attention sublayer, the mean of ``sum_c A_ac A_bc`` over the others."""
        n = self._normed.shape[-1]
        length = n // self.visible.n_samples
        if length == 1:
            return np.ones(self._normed.shape[:-1])
        overlap = self._mixing.forward(np.broadcast_to(np.eye(n), self._normed.shape))  # none between samples
        return np.asarray((overlap.sum(axis=-1) - np.diagonal(overlap, axis1=-2, axis2=-1)) / (length - 1))

    def _per_token(self, coupling: Any) -> Any:
        """Return the coupling of perturbed tokens: normalised queries and keys divide it by the tokens' sizes."""
        branch = self.sublayer.branch
        assert isinstance(branch, SelfAttention)
        return coupling / self.key_size if branch.qk_norm else coupling

    def _perceive(self) -> FloatArray:
        branch = self._perceptron
        kernel = activation_kernel(branch.activation)
        if isinstance(branch, MLP):
            self._preactivation = branch.mlp_in**2 * self._normed + branch.in_bias**2
            return np.asarray(branch.mlp_out**2 * _overlap(kernel, self._preactivation) + branch.out_bias**2)
        self._preactivation = branch.gate**2 * self._normed
        scale = (branch.mlp_in * branch.mlp_out) ** 2
        return np.asarray(scale * _overlap(kernel, self._preactivation) * self._normed)


def with_noise(gram: FloatArray, variance: Any) -> FloatArray:
    """Return the Gram matrix of the same vectors under independent multiplicative noise of this variance."""
    return gram + variance * diagonal_part(gram) if np.any(variance) else gram


def norm_gram(norm: Norm, gram: FloatArray, *, epsilon: float = 0.0) -> FloatArray:
    """Return the Gram matrix behind a norm.

    Args:
        norm: The norm.
        gram: In front of it, shape ``(..., n, n)``.
        epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    """
    return _pairwise(norm_kernel(norm).overlap, gram, _added(norm, epsilon))


def norm_slope(norm: Norm, gram: FloatArray, *, epsilon: float = 0.0) -> FloatArray:
    """Return what a norm multiplies the Gram matrix of a perturbation by; arguments as for :func:`norm_gram`."""
    return _pairwise(norm_kernel(norm).slope_overlap, gram, _added(norm, epsilon))


def _added(norm: Norm, epsilon: float) -> float:
    return epsilon if isinstance(norm, (LayerNorm, RMSNorm)) else 0.0


def _row_statistics(visible: Visibility, scores: FloatArray, coupling: Any, closure: Closure) -> dict[str, FloatArray]:
    """Return per-query attention statistics, from the variance of that query's scores over the keys it sees."""
    found = _row_variances(visible, scores, coupling)
    variance = found["logit_variance"]
    statistics = closure.statistics(visible.counts, variance, 0.0 * variance)
    return found | {"attention_entropy": statistics.entropy, "inverse_participation": statistics.y2}


def _row_variances(visible: Visibility, scores: FloatArray, coupling: Any) -> dict[str, FloatArray]:
    """Return the variance of every query's scores over the keys it sees, and their number."""
    diagonal = np.diagonal(scores, axis1=-2, axis2=-1)
    n = visible.counts
    key_square = visible.over_keys(diagonal, -1) / n
    key_mean = np.diagonal(visible.key_pairs(scores), axis1=-2, axis2=-1) / n**2
    spread = np.maximum(key_square - key_mean, 0.0)
    variance = coupling * diagonal * spread * n / np.maximum(n - 1, 1)
    return {"logit_variance": variance, "visible_keys": np.broadcast_to(n, variance.shape)}


def _overlap(kernel: PairKernel, gram: FloatArray) -> FloatArray:
    return _pairwise(kernel.overlap, gram)


def _slope(kernel: PairKernel, gram: FloatArray) -> FloatArray:
    return _pairwise(kernel.slope_overlap, gram)


def _pairwise(function: Callable[[Any, Any, Any], FloatArray], gram: FloatArray, added: float = 0.0) -> FloatArray:
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1) + added
    return np.asarray(function(diagonal[..., :, None], diagonal[..., None, :], gram))
