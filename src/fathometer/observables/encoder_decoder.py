r"""Gradients of an encoder-decoder: down the decoder, out of every cross attention, and on down the encoder.

Cross attentions of different layers have independent weights, so that what they send to the memory adds up in (J, K):

.. math:: (J_m, K_m)^\top = \mathrm{diag}(\hat q, \hat p) \sum_l T^{m}_l\, (J_{l+1}, K_{l+1})^\top

with hats for the slopes of the norm behind the encoder. Derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import DomainError, SpecError
from fathometer.observables.jacobian import Gradients, backward
from fathometer.propagation import (
    EncoderDecoderGramTrajectory,
    EncoderDecoderTrajectory,
    check_moments,
    propagate_encoder_decoder,
    propagate_encoder_decoder_gram,
)
from fathometer.propagation.exchangeable import block_borders
from fathometer.results import Profile
from fathometer.spec import EncoderDecoder

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderGradients:
    """Gradient moments along both stacks, all relative to the mean square at the decoder's output.

    Attributes:
        decoder, encoder: Curves over sublayer borders of each stack; the encoder's last entry is the gradient at its
            output, summed over the decoder's layers.
        layers_log: ln J that each sublayer of the decoder contributes to the encoder's output; ``-inf`` where it has
            no cross attention; shape ``(n_half, *batch)``.
    """

    decoder: Gradients
    encoder: Gradients
    layers_log: FloatArray


def backward_encoder_decoder(
    trajectory: EncoderDecoderTrajectory, *, alignment: float | FloatArray = 0.0
) -> EncoderDecoderGradients:
    """Carry gradients from the decoder's output to every border of both stacks.

    Args:
        trajectory: Both stacks.
        alignment: Mean cosine between the decoder's output gradients of two tokens: 0 isotropic, 1 pooled.
    Returns:
        The curves. Cost O(n_half * batch); nothing overflows at any depth.
    Raises:
        DomainError: if no gradient reaches the encoder, as behind cross attention that adds nothing.
    """
    decoder = backward(trajectory.decoder.transfer, alignment=alignment)
    matrices = trajectory.decoder.to_memory
    assert matrices is not None
    slope_own, slope_shared = trajectory.memory_slopes
    ratio = decoder.alignment[1:]
    own = slope_own * (matrices[:, 0, 0] + matrices[:, 0, 1] * ratio)
    shared = slope_shared * (matrices[:, 1, 0] + matrices[:, 1, 1] * ratio)
    with np.errstate(divide="ignore"):
        layers_log = decoder.log_norm[1:] + np.log(own)
    top = np.max(layers_log, axis=0)
    if not np.all(top > -np.inf):
        if np.any(matrices[:, 1] != 0):
            raise DomainError(
                f"the gradient of a single memory token is zero with the closure {trajectory.decoder.closure!r}, whose "
                "rows are spread over infinitely many keys; use one of finitely many tokens, such as Exact()"
            )
        raise DomainError("no gradient reaches the encoder: its output is not read, or read by branches of zero scale")
    weight = np.exp(decoder.log_norm[1:] - top)
    total_own, total_shared = np.sum(weight * own, axis=0), np.sum(weight * shared, axis=0)
    cosine = np.clip(total_shared / total_own, -1.0, 1.0)  # rounding may exceed one at collapse
    encoder = backward(_aligned(trajectory.encoder.transfer, np.shape(cosine)), alignment=cosine)
    return EncoderDecoderGradients(
        decoder=decoder,
        encoder=Gradients(log_norm=encoder.log_norm + top + np.log(total_own), alignment=encoder.alignment),
        layers_log=layers_log,
    )


def predict_encoder_decoder(
    spec: EncoderDecoder,
    *,
    n_tokens: int,
    q: Any,
    p: Any,
    n_memory: int,
    q_memory: Any,
    p_memory: Any,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> tuple[Profile, Profile]:
    """Predict activation and gradient statistics at every layer of an encoder and its decoder.

    Stacks without a causal mask are propagated with every token alike, and their fields may be arrays; with one, both
    are propagated on full Gram matrices of tokens that start equal, and curves average over tokens.

    Args:
        spec: Encoder and decoder.
        n_tokens, q, p: Number of tokens of the decoder, and their moments at its first block.
        n_memory, q_memory, p_memory: The same of the encoder.
        closure: How the softmax is averaged, an instance or a name.
    Returns:
        Encoder and decoder. Gradients of both are relative to the decoder's output: ``apjn_log`` for an isotropic
        gradient there, ``gradient_log`` for a mean-pooled loss. The ``p`` and ``cosine`` of a single token are zero.
    """
    chosen = as_closure(closure)
    pooled = 1.0 if n_tokens > 1 else 0.0
    if not (spec.encoder.is_causal or spec.decoder.is_causal):
        found = propagate_encoder_decoder(
            spec,
            n_tokens=n_tokens,
            q=q,
            p=p,
            n_memory=n_memory,
            q_memory=q_memory,
            p_memory=p_memory,
            closure=chosen,
        )
        isotropic = backward_encoder_decoder(found)
        common = backward_encoder_decoder(found, alignment=pooled)
        encoder, decoder = found.encoder, found.decoder
        return (
            _profile(spec, "encoder", n_memory, chosen, encoder.q, encoder.p, isotropic.encoder, common.encoder),
            _profile(spec, "decoder", n_tokens, chosen, decoder.q, decoder.p, isotropic.decoder, common.decoder),
        )
    starts = []
    for count, square, overlap in ((n_tokens, q, p), (n_memory, q_memory, p_memory)):
        start = check_moments(count, square, overlap)
        if np.ndim(start.q):
            raise SpecError("a causal spec is propagated on full Gram matrices: give single numbers q and p")
        starts.append(start.p + (start.q - start.p) * np.eye(count))
    full = propagate_encoder_decoder_gram(spec, gram=starts[0], memory_gram=starts[1], closure=chosen)
    decoder_noise, encoder_noise = _gram_gradients(full, None)
    decoder_common, encoder_common = _gram_gradients(full, np.ones((n_tokens, n_tokens)))
    return (
        _profile(spec, "encoder", n_memory, chosen, *_means(full.encoder.grams), encoder_noise, encoder_common),
        _profile(spec, "decoder", n_tokens, chosen, *_means(full.grams), decoder_noise, decoder_common),
    )


def _profile(
    spec: EncoderDecoder,
    stack: str,
    n_tokens: int,
    closure: Closure,
    q: FloatArray,
    p: FloatArray,
    isotropic: Gradients,
    pooled: Gradients,
) -> Profile:
    at = block_borders(getattr(spec, stack))
    p = p if n_tokens > 1 else np.zeros(p.shape)
    curves = {
        "q": q[at],
        "p": p[at],
        "cosine": (p / q)[at],
        "apjn_log": isotropic.log_norm[at],
        "gradient_alignment": isotropic.alignment[at],
        "gradient_log": pooled.log_norm[at],
    }
    about = {"stack": stack, "closure": closure.name, "n_tokens": n_tokens, "version": __version__}
    return Profile(source="theory", curves=curves, about=about)


def _gram_gradients(found: EncoderDecoderGramTrajectory, boundary: FloatArray | None) -> list[Gradients]:
    """Return decoder and encoder, averaged over tokens."""
    return [
        Gradients(log_norm=stack.log_norm, alignment=_means(stack.matrices)[1]) for stack in found.backward(boundary)
    ]


def _means(grams: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the means of diagonal and off-diagonal entries, the second zero for one token."""
    n = grams.shape[-1]
    own = np.trace(grams, axis1=-2, axis2=-1) / n
    return own, np.asarray((grams.sum(axis=(-2, -1)) / n - own) / max(n - 1, 1))


def _aligned(transfer: FloatArray, batch: tuple[int, ...]) -> FloatArray:
    """Return matrices of the encoder on the batch of the decoder, which may have more axes."""
    own = transfer.shape[3:]
    shape = (*transfer.shape[:3], *(1,) * (len(batch) - len(own)), *own)
    return np.broadcast_to(transfer.reshape(shape), (*transfer.shape[:3], *batch))
