r"""The neural tangent kernel of an encoder-decoder at initialisation, by parameter group.

The decoder's outputs depend on three kinds of parameters: its own, carried up its stack; those of its cross attentions,
which count under the roles of self-attention; and the encoder's, which reach it through the memory,
see :mod:`fathometer.propagation.tangent_cross`. The head reads the decoder as in
:mod:`fathometer.observables.tangent`.

A token table that both stems share has one gradient that is the sum of two. Its kernel is the sum of the two kernels:
of the cross term, averages over value and output matrices leave what came through the queries times what came through
the keys of one cross attention, and that is of order one over the width, because one index of the table has to run
through a query's token and a key's token at once where squares have two free ones.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.80-1.84, 1.178-1.190 and 2.2-2.4; the maps between the
stacks derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import NotCoveredError, SpecError
from fathometer.observables.tangent import TANGENT_ROLES, TangentKernel
from fathometer.observables.tangent_head import check_epsilon, check_factors, read_out
from fathometer.propagation.cross import check_closure
from fathometer.propagation.stem import StemGram, stem_gram
from fathometer.propagation.tangent_cross import propagate_encoder_decoder_tangent
from fathometer.spec import EncoderDecoder, Head, Stem, TokenStem, refuse_arrays

FloatArray = NDArray[np.float64]


def encoder_decoder_tangent_kernel(
    encoder_stem: Stem,
    decoder_stem: Stem,
    spec: EncoderDecoder,
    head: Head,
    *,
    encoder_tokens: Any | None = None,
    decoder_tokens: Any | None = None,
    encoder_patches: Any | None = None,
    decoder_patches: Any | None = None,
    shared_embedding: bool = False,
    rates: Mapping[str, float] | None = None,
    closure: Closure | str = DEFAULT_CLOSURE,
    norm_epsilon: float = 0.0,
) -> TangentKernel:
    r"""Predict the tangent kernel of plain gradient descent for every parameter group, of one pair of samples.

    Leading order in the width at fixed depth and tokens, in evaluation mode, with many heads. Keys of
    :attr:`TangentKernel.groups` are ``(role, ("encoder", layer))`` and ``(role, ("decoder", layer))``; layer ``None``
    is that of a stem, of the norm behind the encoder, and of head and final norm, which count as the decoder's. A
    shared table is ``("token_embedding", None)``. :attr:`TangentKernel.roles` adds up both stacks; self-attention and
    cross attention of one layer count together.

    Args:
        encoder_stem, decoder_stem: The stems.
        spec: Encoder and decoder, scalar fields.
        head: What reads the decoder. A tied head uses the decoder's token table, and is treated as independent of it,
            which is right for outputs that are not among the tokens.
        encoder_tokens, decoder_tokens: For a :class:`TokenStem`: vocabulary indices of one sample, shape
            ``(n_tokens,)`` or ``(1, n_tokens)``.
        encoder_patches, decoder_patches: For a :class:`PatchStem`: patches of one sample, shape ``(n_patches, fan_in)``
            or ``(1, n_patches, fan_in)``.
        shared_embedding: Whether both stems read one token table; position tables are always two.
        rates: Learning-rate factor :math:`\Lambda` by role, as for :func:`fathometer.observables.tangent_kernel`.
        closure: How the softmax is averaged; right for tokens that are alike, for others at leading order in the score
            variance.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    Returns:
        The kernels over the decoder's tokens, without standard errors. Cost: see
        :func:`fathometer.propagation.propagate_encoder_decoder_tangent`.
    Raises:
        SpecError: for fields that are arrays, an unknown role, a shared or tied table that is none, or shared tables of
            different scales or widths.
        DomainError: for a rate or an epsilon that is negative or not finite.
        BatchError: see :func:`stem_gram`.
        NotCoveredError: for more than one sample, or a closure stated for self-attention only.

    >>> from fathometer.spec import MLP, Block, CrossAttention, Sublayer, Transformer
    >>> cross = CrossAttention(query=1.0, key=1.0, value=1.0, output=1.0)
    >>> blocks = [(Block(sublayers=(Sublayer(branch=b),)),) for b in (MLP(mlp_in=1.0, mlp_out=1.0), cross)]
    >>> encoder, decoder = (Transformer(blocks=block, d_model=64) for block in blocks)
    >>> spec = EncoderDecoder(encoder=encoder, decoder=decoder)
    >>> stem = TokenStem(token=1.0)
    >>> found = encoder_decoder_tangent_kernel(stem, stem, spec, Head(), encoder_tokens=[0, 1], decoder_tokens=[2])
    >>> round(float(found.groups["head", ("decoder", None)][0, 0]), 6)
    1.0
    """
    for part, name in ((spec, "spec"), (head, "head"), (encoder_stem, "encoder_stem"), (decoder_stem, "decoder_stem")):
        refuse_arrays(part, "a tangent kernel", name)
    chosen = as_closure(closure)
    check_closure(chosen)
    factors = rates or {}
    check_factors(factors, TANGENT_ROLES)
    check_epsilon(norm_epsilon)
    if head.tied and not isinstance(decoder_stem, TokenStem):
        raise SpecError("a tied head shares the token table of the decoder's stem; a PatchStem has none")
    if shared_embedding:
        _check_shared(encoder_stem, decoder_stem, spec)
    source = _one_sample("encoder", stem_gram(encoder_stem, tokens=encoder_tokens, patches=encoder_patches))
    target = _one_sample("decoder", stem_gram(decoder_stem, tokens=decoder_tokens, patches=decoder_patches))
    found = propagate_encoder_decoder_tangent(
        spec,
        gram=target.gram,
        memory_gram=source.gram,
        closure=chosen,
        kernels=target.overlaps,
        memory_kernels=source.overlaps,
        norm_epsilon=norm_epsilon,
    )
    output, groups = read_out(
        found.gram,
        found.kernels,
        head,
        decoder_stem,
        d_model=spec.decoder.d_model,
        place=("decoder", None),
        epsilon=norm_epsilon,
    )
    if shared_embedding:
        places = [("token_embedding", (stack, None)) for stack in ("encoder", "decoder")]
        groups["token_embedding", None] = groups.pop(places[0]) + groups.pop(places[1])
    groups = {group: factors.get(group[0], 1.0) * _pooled(kernel, head.pooling) for group, kernel in groups.items()}
    output = _pooled(output, head.pooling)
    exact = np.zeros(output.shape)
    return TangentKernel(
        output=output,
        groups=groups,
        output_se=exact,
        group_se=dict.fromkeys(groups, exact),
        role_se={role: exact for role, _ in groups},
        n_samples=1,
        n_tokens=target.n_tokens,
    )


def _pooled(kernel: FloatArray, pooling: str) -> FloatArray:
    """Read out every token of the sample, their mean or the first."""
    if pooling == "none":
        return kernel
    return np.asarray(kernel.mean(keepdims=True) if pooling == "mean" else kernel[:1, :1])


def _one_sample(name: str, stem: StemGram) -> StemGram:
    if stem.n_samples != 1:
        raise NotCoveredError(f"the tangent kernel between samples of an encoder-decoder; {name}: {stem.n_samples}")
    return stem


def _check_shared(encoder: Stem, decoder: Stem, spec: EncoderDecoder) -> None:
    if not (isinstance(encoder, TokenStem) and isinstance(decoder, TokenStem)):
        raise SpecError("shared_embedding needs two TokenStems; a PatchStem has no token table")
    for what, first, second in (
        ("scale", encoder.token, decoder.token),
        ("width", spec.encoder.d_model, spec.decoder.d_model),
    ):
        if first != second:
            raise SpecError(f"a shared token table has one {what}; encoder {first}, decoder {second}")
