r"""An encoder and its decoder on full Gram matrices: causal decoders, unequal tokens.

One cross-attention sublayer acts on the decoder's Gram matrix as

.. math:: \Sigma' = \mu^2 \Sigma + \tau^2 N_o\bigl(\sigma_{OV}^2\, \mathcal M \tilde M\bigr)

with the memory's Gram matrix :math:`\tilde M` behind the encoder's last norm. Gradients leave it for the tokens that
ask and for the memory, see :class:`fathometer.attention.CrossRows`; all decoder layers together give the gradient at
the encoder's output. Everything else is as in :mod:`fathometer.propagation.gram`.

Source: derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import Closure, CrossRows, Visibility
from fathometer.errors import DomainError
from fathometer.propagation.branch_maps import attention_bias, dropout_variance, effective_coupling
from fathometer.propagation.cross import check_closure
from fathometer.propagation.exchangeable import block_borders
from fathometer.propagation.gram import GramTrajectory, check_gram, propagate_gram, rescaled_gradient
from fathometer.propagation.gram_half_layer import GramHalfLayer, norm_gram, norm_slope, with_noise
from fathometer.propagation.trajectory import StreamOverflowError
from fathometer.spec import CrossAttention, EncoderDecoder, Norm, SelfAttention, Sublayer, refuse_arrays

FloatArray = NDArray[np.float64]


class GramGradients(NamedTuple):
    """Gradient Gram matrices along one stack.

    Attributes:
        log_norm: Log of the mean square at every sublayer border, relative to the decoder's output; shape
            ``(n_half + 1, *batch)``.
        matrices: The matrices divided by that mean square, shape ``(n_half + 1, *batch, n, n)``.
    """

    log_norm: FloatArray
    matrices: FloatArray


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderGramTrajectory:
    """Gram matrices of both stacks.

    Attributes:
        spec: What was propagated.
        encoder: The encoder's trajectory.
        memory: Gram matrix of its output behind ``memory_norm``, shape ``(*batch, N, N)``.
        borders, is_attention, grams, added, attention: Of the decoder, as in
            :class:`fathometer.propagation.GramTrajectory`.
        averaging: The closure.
    """

    spec: EncoderDecoder
    encoder: GramTrajectory
    memory: FloatArray
    borders: NDArray[np.int64]
    is_attention: NDArray[np.bool_]
    grams: FloatArray
    added: FloatArray
    attention: dict[str, FloatArray]
    averaging: Closure = field(repr=False)

    def backward(self, boundary: FloatArray | None = None) -> tuple[GramGradients, GramGradients]:
        """Carry a gradient Gram matrix from the decoder's output to every border of the decoder and of the encoder.

        Args:
            boundary: Gram matrix of the output gradients over coordinates, shape ``(*batch, n, n)``; ``None`` is the
                identity.
        Returns:
            Decoder and encoder; the encoder's last entry sums what all decoder layers send. Rescaled at every step.
        Raises:
            DomainError: if no gradient reaches the encoder, or none passes a sublayer.
        """
        shape, n_half = self.grams.shape[1:], len(self.added)
        matrices, log_norm = np.empty(self.grams.shape), np.zeros((n_half + 1, *shape[:-2]))
        start = np.eye(shape[-1]) if boundary is None else np.asarray(boundary, dtype=np.float64)
        matrices[-1], _ = rescaled_gradient(np.broadcast_to(start, shape), n_half)
        total, total_log = np.zeros(self.memory.shape), np.full(shape[:-2], -np.inf)
        build = _DecoderSteps(self.spec, self.memory, shape[-1], self.averaging)
        for half in range(n_half - 1, -1, -1):
            step = build(half, self.grams[half])
            if isinstance(step, CrossGramHalfLayer):
                level = np.maximum(total_log, log_norm[half + 1])
                sent = step.to_memory(matrices[half + 1])
                total = total * _factor(total_log - level) + sent * _factor(log_norm[half + 1] - level)
                total_log = level
            matrices[half], growth = rescaled_gradient(step.backward(matrices[half + 1]), half)
            log_norm[half] = log_norm[half + 1] + growth
        norm, raw = self.spec.memory_norm, self.encoder.grams[-1]
        at_output = total if norm is None else total * norm_slope(norm, raw)
        level = np.trace(at_output, axis1=-2, axis2=-1) / at_output.shape[-1]
        if not np.all(level > 0):
            raise DomainError(
                "no gradient reaches the encoder: its output is not read, or read by branches of zero scale"
            )
        ((encoder_log, encoder_matrices),) = self.encoder.backward(at_output)
        return GramGradients(log_norm, matrices), GramGradients(
            encoder_log + total_log + np.log(level), encoder_matrices
        )


class CrossGramHalfLayer:
    """One cross-attention sublayer acting on one Gram matrix, keeping what its backward maps need.

    Args:
        sublayer: The sublayer.
        gram: Gram matrix of the decoder's stream, shape ``(*batch, n, n)``.
        memory: Gram matrix of the memory, shape ``(*batch, N, N)``.
        closure: How the softmax is averaged.
        width_ratio: Width of the decoder over that of the memory.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.

    Attributes:
        normed: Gram matrix of the tokens that ask, behind the input norm.
        memory: Gram matrix of the memory.
        rows: Averaged attention from the one to the other.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        gram: FloatArray,
        memory: FloatArray,
        closure: Closure,
        width_ratio: float = 1.0,
        *,
        norm_epsilon: float = 0.0,
    ) -> None:
        branch = sublayer.branch
        assert isinstance(branch, CrossAttention)
        check_closure(closure)
        self.sublayer, self._stream, self._width_ratio = sublayer, gram, width_ratio
        self.memory, self._epsilon = memory, norm_epsilon
        self._gain = (branch.value * branch.output) ** 2
        self._weight_noise = dropout_variance(branch.attention_dropout)
        self.normed = self.normalised(sublayer.input_norm, gram)
        self.rows = CrossRows(self.normed, memory, float(effective_coupling(branch, 1.0)), closure)
        mixed = self.rows.forward(memory, dropout_variance=self._weight_noise)
        self._branch = np.asarray(self._gain * mixed + attention_bias(branch))
        out = self.normalised(sublayer.output_norm, self._branch)
        self.added = sublayer.branch_scale**2 * with_noise(out, dropout_variance(sublayer.dropout))
        self._residual = sublayer.skip_scale**2 * gram + self.added
        self.output = self.normalised(sublayer.stream_norm, self._residual)
        keys = memory.shape[-1]
        found = closure.statistics(keys, self.rows.variance, 0.0 * self.rows.variance)
        self.statistics = {
            "attention_entropy": np.asarray(found.entropy),
            "inverse_participation": np.asarray(found.y2),
            "logit_variance": self.rows.variance,
            "visible_keys": np.full(self.rows.variance.shape, float(keys)),
        }

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Map the gradient Gram matrix at the sublayer's output to that at its input."""
        skip, weight = self.sublayer.skip_scale**2, self.sublayer.branch_scale**2
        after = gradient * self._slope(self.sublayer.stream_norm, self._residual)
        through = self.through(self._at_branch(after))
        return np.asarray(skip * after + weight * self._slope(self.sublayer.input_norm, self._stream) * through)

    def to_memory(self, gradient: FloatArray) -> FloatArray:
        """Map the gradient Gram matrix at the sublayer's output to what it adds to that of the memory."""
        weight = self._width_ratio * self.sublayer.branch_scale**2 * self._gain
        after = gradient * self._slope(self.sublayer.stream_norm, self._residual)
        return np.asarray(weight * self.rows.to_memory(self._at_branch(after), dropout_variance=self._weight_noise))

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the input to that of the output: the adjoint of :meth:`backward`."""
        slope = self._slope(self.sublayer.input_norm, self._stream)
        skip = self.sublayer.skip_scale**2 * self._slope(self.sublayer.stream_norm, self._residual)
        return np.asarray(skip * tangent + self.emit(self.through(slope * tangent)))

    def from_memory(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the memory to that of the output.

        The adjoint of :meth:`to_memory`, up to the ratio of widths.
        """
        return self.emit(self._gain * self.rows.from_memory(tangent, dropout_variance=self._weight_noise))

    def through(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the normed tokens to that of the branch output: its own adjoint."""
        return np.asarray(self._gain * self.rows.to_queries(tangent, dropout_variance=self._weight_noise))

    def emit(self, tangent: FloatArray) -> FloatArray:
        """Map the Gram matrix of a perturbation of the branch output to that of the sublayer's output."""
        after = self.sublayer.branch_scale**2 * self._slope(self.sublayer.stream_norm, self._residual)
        return np.asarray(after * self._at_branch(tangent))

    def norms(self) -> Iterator[tuple[Norm, FloatArray, Callable[[FloatArray], FloatArray]]]:
        """Yield every norm, the Gram matrix in front of it, and the map of a perturbation behind it to the output."""
        sublayer = self.sublayer
        if sublayer.input_norm is not None:
            yield sublayer.input_norm, self._stream, lambda tangent: self.emit(self.through(tangent))
        if sublayer.output_norm is not None:
            weight = sublayer.branch_scale**2 * self._slope(sublayer.stream_norm, self._residual)
            noise = dropout_variance(sublayer.dropout)
            yield sublayer.output_norm, self._branch, lambda tangent: np.asarray(weight * with_noise(tangent, noise))
        if sublayer.stream_norm is not None:
            yield sublayer.stream_norm, self._residual, lambda tangent: tangent

    def normalised(self, norm: Norm | None, gram: FloatArray) -> FloatArray:
        """Return the Gram matrix behind a norm."""
        return gram if norm is None else norm_gram(norm, gram, epsilon=self._epsilon)

    def row_overlap(self) -> FloatArray:
        """Return, for every query, the mean of ``sum_c A_ac A_bc`` over the other queries."""
        return self.rows.row_overlap()

    def _at_branch(self, after: FloatArray) -> FloatArray:
        return with_noise(
            after * self._slope(self.sublayer.output_norm, self._branch), dropout_variance(self.sublayer.dropout)
        )

    def _slope(self, norm: Norm | None, gram: FloatArray) -> Any:
        return 1.0 if norm is None else norm_slope(norm, gram, epsilon=self._epsilon)


def propagate_encoder_decoder_gram(
    spec: EncoderDecoder, *, gram: Any, memory_gram: Any, closure: Closure
) -> EncoderDecoderGramTrajectory:
    """Carry the tokens' Gram matrices through the encoder and then the decoder.

    Args:
        spec: Encoder and decoder, with scalar fields; causal masks are kept.
        gram: Gram matrices at the decoder's first block, shape ``(*batch, n, n)``.
        memory_gram: Gram matrices at the encoder's first block, shape ``(*batch, N, N)``.
        closure: How the softmax is averaged.
    Returns:
        The trajectory. Cost: that of :func:`~fathometer.propagation.propagate_gram` for each stack.
    Raises:
        SpecError: for fields that are arrays.
        DomainError: for a matrix that is no Gram matrix, different batches, or a stream that overflows.
    """
    refuse_arrays(spec, "propagation on full Gram matrices")
    current = check_gram(gram)
    encoder = propagate_gram(spec.encoder, memory_gram, closure=closure)
    memory = _normalised(spec.memory_norm, encoder.grams[-1])
    if current.shape[:-2] != memory.shape[:-2]:
        raise DomainError(
            f"gram and memory_gram need one batch shape; got {current.shape[:-2]} and {memory.shape[:-2]}"
        )
    build = _DecoderSteps(spec, memory, current.shape[-1], closure)
    grams, added, rows, attends = [current], [], [], []
    for half in range(len(build.sublayers)):
        step = build(half, current)
        current = step.output
        if not np.all(np.isfinite(current)):
            level = float(np.max(grams[-1]))
            raise StreamOverflowError(
                f"the stream overflows at sublayer {half}: its largest entry is {level:.3g} one before",
                value=level,
                index=(half,),
            )
        grams.append(current)
        added.append(step.added)
        attends.append(step.statistics is not None)
        if step.statistics is not None:
            rows.append(step.statistics | {"row_overlap": step.row_overlap()})
    return EncoderDecoderGramTrajectory(
        spec=spec,
        encoder=encoder,
        memory=memory,
        borders=block_borders(spec.decoder),
        is_attention=np.array(attends),
        grams=np.stack(grams),
        added=np.stack(added),
        attention={key: np.stack([row[key] for row in rows]) for key in rows[0]},
        averaging=closure,
    )


class _DecoderSteps:
    """Builds the decoder's sublayers on demand."""

    def __init__(self, spec: EncoderDecoder, memory: FloatArray, n_tokens: int, closure: Closure) -> None:
        self.sublayers = [sublayer for block in spec.decoder.layers() for sublayer in block.sublayers]
        self._memory, self._closure = memory, closure
        self._width_ratio = spec.decoder.d_model / spec.encoder.d_model
        self._visible = {flag: Visibility(n_tokens, causal=flag) for flag in (False, True)}

    def __call__(self, half: int, gram: FloatArray) -> GramHalfLayer | CrossGramHalfLayer:
        sublayer = self.sublayers[half]
        branch = sublayer.branch
        if isinstance(branch, CrossAttention):
            return CrossGramHalfLayer(sublayer, gram, self._memory, self._closure, self._width_ratio)
        causal = isinstance(branch, SelfAttention) and branch.causal
        return GramHalfLayer(sublayer, gram, self._closure, self._visible[causal])


def _normalised(norm: Norm | None, gram: FloatArray) -> FloatArray:
    return gram if norm is None else norm_gram(norm, gram)


def _factor(log: FloatArray) -> FloatArray:
    return np.exp(log)[..., None, None]
