"""An encoder and its decoder on two numbers each: the encoder's tokens become the memory of every decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import Closure
from fathometer.kernels import norm_kernel
from fathometer.propagation.branch_maps import Moments
from fathometer.propagation.cross import Memory
from fathometer.propagation.exchangeable import check_tokens, propagate
from fathometer.propagation.trajectory import Trajectory
from fathometer.spec import EncoderDecoder, Norm

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderTrajectory:
    """Both stacks and what joins them.

    Attributes:
        spec: What was propagated.
        encoder: The encoder's trajectory.
        memory: Moments of the encoder's output behind ``memory_norm``, and its number of tokens.
        memory_slopes: What that norm does to (J, K) of gradients; shape ``(2, *batch)``.
        decoder: The decoder's trajectory; its ``to_memory`` holds the gradients that leave for the encoder.
    """

    spec: EncoderDecoder
    encoder: Trajectory
    memory: Memory
    memory_slopes: FloatArray
    decoder: Trajectory


def propagate_encoder_decoder(
    spec: EncoderDecoder,
    *,
    n_tokens: int,
    q: Any,
    p: Any,
    n_memory: int,
    q_memory: Any,
    p_memory: Any,
    closure: Closure,
) -> EncoderDecoderTrajectory:
    """Carry the tokens' moments through the encoder and then the decoder, with every transfer matrix.

    A causal decoder is taken as if its tokens were alike and saw each other; see
    :func:`~fathometer.propagation.propagate_encoder_decoder_gram` for masks. Gradients are read off by
    :func:`fathometer.observables.backward_encoder_decoder`.

    Args:
        spec: Encoder and decoder; numbers may be arrays that broadcast to one batch shape.
        n_tokens, q, p: Number of tokens of the decoder, and their moments at its first block.
        n_memory, q_memory, p_memory: The same of the encoder.
        closure: How the softmax is averaged.
    Returns:
        Both trajectories. Cost: that of two calls of :func:`~fathometer.propagation.propagate`.
    Raises:
        DomainError: for moments no set of tokens can have, or a stream that overflows.
    """
    check_tokens(n_tokens)
    encoder = propagate(spec.encoder, n_tokens=n_memory, q=q_memory, p=p_memory, closure=closure)
    last = Moments(encoder.q[-1], encoder.p[-1])
    memory = Memory(normed_moments(spec.memory_norm, last), int(n_memory), spec.decoder.d_model / spec.encoder.d_model)
    decoder = propagate(spec.decoder, n_tokens=n_tokens, q=q, p=p, closure=closure, memory=memory)
    return EncoderDecoderTrajectory(
        spec=spec,
        encoder=encoder,
        memory=memory,
        memory_slopes=_slopes(spec.memory_norm, last),
        decoder=decoder,
    )


def normed_moments(norm: Norm | None, x: Moments) -> Moments:
    """Return the moments of tokens behind a norm, or the same where there is none."""
    if norm is None:
        return x
    kernel = norm_kernel(norm)
    return Moments(kernel.overlap(x.q, x.q, x.q), kernel.overlap(x.q, x.q, x.p))


def _slopes(norm: Norm | None, x: Moments) -> FloatArray:
    if norm is None:
        return np.ones((2, *np.shape(x.q)))
    kernel = norm_kernel(norm)
    return np.stack([kernel.slope_overlap(x.q, x.q, x.q), kernel.slope_overlap(x.q, x.q, x.p)])
