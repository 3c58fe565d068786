r"""Tangent kernels carried through an encoder and the decoder that reads it.

Parameters of the encoder perturb the memory, behind the encoder's last norm, and with it what every cross attention
adds to the decoder's stream. With F the Gram matrix of the normed tokens that ask, M that of the memory, ``S1`` and
``S2`` the operators of :mod:`fathometer.propagation.tangent` over the memory's tokens with M inside, a kernel
:math:`\tilde\Theta` of the memory enters the decoder's stream as

.. math:: \sigma_{OV}^2\, S_1[\tilde\Theta] + \sigma_{OV}^2 \sigma_{QK}^2\, F \circ S_2[\tilde\Theta],

through values and keys, and a kernel :math:`\Theta` that is in the stream passes the sublayer as
:math:`\Theta + \sigma_{OV}^2 \sigma_{QK}^2\, (\Theta \circ \hat N) \circ S_2[M]`, through queries. The parameters of
cross attention add

.. math:: \Theta_O = S_1[\sigma_V^2 M + b_V^2], \quad \Theta_V = \sigma_O^2 S_1[M], \quad
          \Theta_Q = m^2 \sigma_{OV}^2 \sigma_K^2\, F \circ S_2[M], \quad
          \Theta_K = m^2 \sigma_{OV}^2 \sigma_Q^2\, F \circ S_2[M] .

Cross attentions of different layers have independent weights, so what enters at each of them adds up.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.98, 1.151-1.163 and 2.2-2.4 for self-attention and the
architecture; the maps between the stacks derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import Closure, Visibility
from fathometer.propagation.cross_gram import CrossGramHalfLayer
from fathometer.propagation.gram_half_layer import GramHalfLayer, norm_gram, norm_slope
from fathometer.propagation.tangent import Place, propagate_tangent, pushed, sublayer_kernels
from fathometer.propagation.trajectory import StreamOverflowError
from fathometer.spec import CrossAttention, EncoderDecoder, Norm, PointwiseNorm, SelfAttention, Sublayer, refuse_arrays

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderTangent:
    r"""What both stacks make of their tokens and of the tangent kernels at their inputs.

    Attributes:
        gram: Gram matrix of the decoder's stream behind its last block, shape ``(n, n)``.
        kernels: By parameter role and place, the tangent kernel of that stream per unit :math:`\Lambda`, shape
            ``(n, n)``. Places are ``("encoder", layer)`` and ``("decoder", layer)``; layer ``None`` are groups that
            entered with the tokens, and the norm behind the encoder.
    """

    gram: FloatArray
    kernels: Mapping[tuple[str, Place], FloatArray]


def propagate_encoder_decoder_tangent(
    spec: EncoderDecoder,
    *,
    gram: FloatArray,
    memory_gram: FloatArray,
    closure: Closure,
    kernels: Mapping[str, FloatArray],
    memory_kernels: Mapping[str, FloatArray],
    norm_epsilon: float = 0.0,
) -> EncoderDecoderTangent:
    """Carry Gram matrices and the tangent kernels of all parameters through the encoder and then the decoder.

    Args:
        spec: Encoder and decoder, scalar fields; dropout is off.
        gram: Gram matrix of one sample at the decoder's first block, shape ``(n, n)``.
        memory_gram: The same at the encoder's first block, shape ``(N, N)``.
        closure: How the softmax is averaged.
        kernels: Tangent kernels of the decoder's stem by role, each of shape ``(n, n)``.
        memory_kernels: Those of the encoder's stem, each of shape ``(N, N)``.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    Returns:
        The kernels behind the decoder's last block. Cost: as :func:`fathometer.propagation.propagate_tangent` for each
        stack; every cross attention also maps all groups of the encoder, O(K (n^2 + N^2)) each with a closure's K
        interpolation nodes.
    Raises:
        SpecError: for fields that are arrays.
        DomainError: if a stream overflows.
    """
    refuse_arrays(spec, "propagation on full Gram matrices")
    spec, n = spec.without_dropout(), gram.shape[-1]
    memory, sent = _memory(spec, memory_gram, closure, memory_kernels, norm_epsilon)
    n_sent = len(sent)
    at_memory = np.array(list(sent.values())).reshape(n_sent, *memory.shape)
    groups: list[tuple[str, Place]] = [*sent, *((role, ("decoder", None)) for role in kernels)]
    stack = np.concatenate([np.zeros((n_sent, n, n)), np.array(list(kernels.values())).reshape(-1, n, n)])
    visible = {flag: Visibility(n, causal=flag) for flag in (False, True)}
    current = gram[None]
    for layer, block in enumerate(spec.decoder.layers()):
        for sublayer in block.sublayers:
            step = _step(sublayer, current, memory[None], closure, visible, norm_epsilon)
            stack = pushed(step.forward, stack)
            if isinstance(step, CrossGramHalfLayer):
                stack[:n_sent] += pushed(step.from_memory, at_memory)
                own = cross_attention_kernels(step)
            else:
                own = sublayer_kernels(step)
            for role, kernel in own:
                group: tuple[str, Place] = (role, ("decoder", layer))
                added = kernel.reshape(1, n, n)
                if group in groups:
                    stack[groups.index(group)] += added[0]
                else:
                    groups.append(group)
                    stack = np.concatenate([stack, added])
            current = step.output
            if not np.all(np.isfinite(current)):
                raise StreamOverflowError(f"the stream overflows in layer {layer} of the decoder", index=(layer,))
    return EncoderDecoderTangent(gram=current[0], kernels=dict(zip(groups, stack, strict=True)))


def cross_attention_kernels(step: CrossGramHalfLayer) -> Iterator[tuple[str, FloatArray]]:
    """Yield the tangent kernels of a cross attention's own parameters at its output, per unit learning-rate factor."""
    branch = step.sublayer.branch
    assert isinstance(branch, CrossAttention)
    memory, rows, ones = step.memory, step.rows, np.ones(step.normed.shape)
    gain = (branch.score_multiplier * branch.value * branch.output) ** 2
    response, mixed = rows.score_response(memory), rows.forward(memory)
    own = {
        "query": gain * branch.key**2 * step.normed * response,
        "key": gain * branch.query**2 * step.normed * response,
        "value": branch.output**2 * mixed,
        "output": branch.value**2 * mixed + branch.value_bias**2,
        "query_bias": gain * branch.key**2 * response,
        "key_bias": 0.0 * ones,  # the same for all scores of a query
        "value_bias": branch.output**2 * ones,
        "output_bias": ones,
    }
    for role, kernel in own.items():
        yield role, step.emit(kernel)
    for norm, seen, push in step.norms():
        if not isinstance(norm, PointwiseNorm):
            yield "norm_gain", push(step.normalised(replace(norm, gain=1.0), seen))
            yield "norm_bias", push(ones)


def _memory(
    spec: EncoderDecoder, gram: FloatArray, closure: Closure, kernels: Mapping[str, FloatArray], epsilon: float
) -> tuple[FloatArray, dict[tuple[str, Place], FloatArray]]:
    """Return the memory's Gram matrix and the tangent kernels there of everything in front of it."""
    found = propagate_tangent(spec.encoder, gram, averaging=closure, kernels=kernels, norm_epsilon=epsilon)
    norm: Norm | None = spec.memory_norm
    slope = np.ones(gram.shape) if norm is None else norm_slope(norm, found.gram, epsilon=epsilon)
    sent: dict[tuple[str, Place], FloatArray] = {}
    for (role, layer), kernel in found.kernels.items():
        assert layer is None or isinstance(layer, int)  # one stack
        sent[role, ("encoder", layer)] = slope * kernel
    if norm is None:
        return found.gram, sent
    if not isinstance(norm, PointwiseNorm):
        sent["norm_gain", ("encoder", None)] = norm_gram(replace(norm, gain=1.0), found.gram, epsilon=epsilon)
        sent["norm_bias", ("encoder", None)] = np.ones(gram.shape)
    return norm_gram(norm, found.gram, epsilon=epsilon), sent


def _step(
    sublayer: Sublayer,
    gram: FloatArray,
    memory: FloatArray,
    closure: Closure,
    visible: Mapping[bool, Visibility],
    epsilon: float,
) -> GramHalfLayer | CrossGramHalfLayer:
    branch = sublayer.branch
    if isinstance(branch, CrossAttention):
        return CrossGramHalfLayer(sublayer, gram, memory, closure, norm_epsilon=epsilon)
    causal = isinstance(branch, SelfAttention) and branch.causal
    return GramHalfLayer(sublayer, gram, closure, visible[causal], norm_epsilon=epsilon)
