"""DeepScaleLM: unit second moments at every depth, in refined, published and simplified form."""

from __future__ import annotations

import math

import numpy as np

from fathometer.errors import DomainError, SpecError, nearest
from fathometer.prescription.plans import (
    EncoderDecoderPlan,
    SchemePlan,
    Setting,
    every_sublayer,
    fan_in,
    paired,
    plan_of,
    planned,
)
from fathometer.prescription.unit_branches import reference_settings, refined_settings, residual_factors
from fathometer.propagation import Memory
from fathometer.propagation.encoder_decoder import normed_moments
from fathometer.spec import MLP, EncoderDecoder, Sublayer, Transformer

COUNTS = ("layers", "blocks")


def deepscalelm(
    spec: Transformer,
    *,
    r0: float,
    n_tokens: int | None = None,
    k: float = 2.0,
    alpha: float = 1.0,
    count: str = "layers",
    dropout: float | None = None,
    embedding_dropout: float | None = None,
    reference: bool = False,
) -> SchemePlan:
    r"""Let every branch add unit second moment to a stream of unit second moment.

    .. math:: x \leftarrow \lambda x + \beta\,\mathrm{drop}(B(x)), \quad \lambda^2 = 1 - \beta^2, \quad
              \beta^2 = k / N^\alpha, \qquad
              \mathrm{var}\,W_{V,O} = \frac1d \sqrt{\frac{1 - p}{a_v}}

    with the dropout rate p and the second moment a_v of attention with unit value and output scales. Queries and keys
    have scale one, or, where the code multiplies scores beyond ``1/sqrt(d_head)``, what gives scores unit variance.
    A ReLU MLP has equal deviations in both matrices, ``var W = sqrt(2 (1-p) / (d d_mlp))``; of any other, the first
    matrix (and a gate) has scale one and the second brings its output to ``1 - p``.

    By default a_v is computed by the recursion of this library with exact softmax averages, at the cosine of the
    tokens in front of each attention, for any activation and norm. ``reference`` uses the published leading order
    instead: ``a_v = r`` with ``r <- lambda^2 r + beta^2 (1-p)`` at attention and ``r <- lambda^2 r + beta^2 (1-p)
    kappa_1(r)`` at the MLP, and ``var W = (1/d) sqrt((1-p)/2)``, meant for a ReLU MLP of ratio four.

    Source: A. Kedia et al., Transformers Get Stable, arXiv:2403.09635. What N counts is not settled: the published
    text is read as layers, the default of the published code as blocks; the default here is a choice. The rule for
    activations other than ReLU, for gated MLPs and for causal masks is derived here.

    Args:
        spec: The architecture.
        r0: Cosine of two tokens' embeddings, before dropout on them, which lowers it by one minus the rate.
        n_tokens: Number of tokens; needed unless ``reference``.
        k, alpha: Of beta.
        count: Whether N is the number of ``"layers"`` or of ``"blocks"``, that is of sublayers.
        dropout: Rate on what each branch adds, which becomes that of the spec; by default the spec's own. Dropout on
            attention weights is the spec's.
        embedding_dropout: Rate on embeddings; by default ``dropout`` if given, else that of the stem of a
            :class:`~fathometer.spec.Network`, else that of the branches.
        reference: Whether to use the published recurrence.
    Raises:
        DomainError: for an option outside its range, or attention whose output vanishes.
        SpecError: for an unknown ``count``, a missing ``n_tokens``, or a gated MLP under ``reference``.
    """
    rate, beta_squared = common_rate(spec, dropout), _branch_share(spec, k, alpha, count)
    _check_unit("r0", r0)
    first = rate if embedding_dropout is None else embedding_dropout
    _check_unit("embedding_dropout", first, open_end=True)
    if reference:
        settings, _ = reference_settings(spec, r0 * (1 - first), beta_squared, rate)
    else:
        settings, _ = refined_settings(spec, r0 * (1 - first), _given("n_tokens", n_tokens), beta_squared, rate)
    return plan_of("deepscalelm", spec, settings, _notes(spec, beta_squared, k, count, first, reference))


def deepscalelm_encoder_decoder(
    spec: EncoderDecoder,
    *,
    r0: float,
    r0_memory: float | None = None,
    n_tokens: int | None = None,
    n_memory: int | None = None,
    k: float = 2.0,
    alpha: float = 1.0,
    count: str = "layers",
    dropout: float | None = None,
    reference: bool = False,
) -> EncoderDecoderPlan:
    r"""Do to both stacks what :func:`deepscalelm` does, with cross attention scaled for the memory it reads.

    Its values and outputs have ``var (1/d) sqrt((1-p)/a_v)`` with the a_v of averages over the memory's tokens, at
    their cosine behind the encoder's last norm, the same in every decoder layer but for its queries; the published
    leading order is that cosine itself. N counts the layers, or blocks, of each stack on its own: the encoder collects
    N gradients of weight beta^2, which is of order k.

    Source: A. Kedia et al., arXiv:2403.09635, has encoder-decoders; their constants there were not at hand and are
    derived here from the paper's principle.

    Args:
        spec: Encoder and decoder.
        r0, r0_memory: Cosine of two tokens' embeddings, of the decoder and of the encoder; the same by default.
        n_tokens, n_memory: Number of tokens of each; needed unless ``reference``.
        k, alpha, count, dropout, reference: As in :func:`deepscalelm`.
    """
    r0_memory = r0 if r0_memory is None else r0_memory
    _check_unit("r0", r0)
    _check_unit("r0_memory", r0_memory)
    encoder, decoder = spec.encoder, spec.decoder
    shares = [_branch_share(stack, k, alpha, count) for stack in (encoder, decoder)]
    rates = [common_rate(stack, dropout) for stack in (encoder, decoder)]
    first, second = r0_memory * (1 - rates[0]), r0 * (1 - rates[1])
    if reference:
        below, r_memory = reference_settings(encoder, first, shares[0], rates[0])
        above, _ = reference_settings(decoder, second, shares[1], rates[1], r_memory=r_memory)
    else:
        keys = _given("n_memory", n_memory)
        below, stream = refined_settings(encoder, first, keys, shares[0], rates[0])
        memory = Memory(normed_moments(spec.memory_norm, stream), keys, decoder.d_model / encoder.d_model)
        above, _ = refined_settings(decoder, second, _given("n_tokens", n_tokens), shares[1], rates[1], memory)
    lower, upper = (
        plan_of("deepscalelm", stack, settings, _notes(stack, share, k, count, rate, reference))
        for stack, settings, share, rate in zip((encoder, decoder), (below, above), shares, rates, strict=True)
    )
    note = (
        f"N counts the {count} of each stack on its own (a choice); the gradient at the encoder's output is the sum "
        "over the decoder's layers."
    )
    return paired("deepscalelm", spec, lower, upper, note)


def deepscalelm_simple(
    spec: Transformer, *, k: float = 2.0, alpha: float = 1.0, count: str = "layers", dropout: float | None = None
) -> SchemePlan:
    r"""Use one variance, ``(1/d) sqrt((1-p)/2)``, for values, outputs and the MLP, and DeepScaleLM's residual factors.

    Queries and keys have variance ``1/d``. The stream settles below one, at a depth-independent level.

    Source: the simplified form of A. Kedia et al., arXiv:2403.09635, as re-implemented by others; not checked against
    the paper. A gate matrix gets the same variance, which is a choice.

    Args:
        spec, k, alpha, count, dropout: As in :func:`deepscalelm`.
    """
    rate, beta_squared = common_rate(spec, dropout), _branch_share(spec, k, alpha, count)
    std = math.sqrt(math.sqrt((1 - rate) / 2) / spec.d_model)
    factors = (*residual_factors(beta_squared), rate)

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        stds = dict.fromkeys(sublayer.branch.scale_names, std)
        if sublayer.is_attention:
            stds |= {role: fan_in(spec, sublayer, role) ** -0.5 for role in ("query", "key")}
        return Setting(stds, "var (1/d) sqrt((1-p)/2); queries and keys 1/d", *factors)

    notes = [*_stability_notes(spec, beta_squared, k, count), "Branches do not add unit second moments."]
    return planned("deepscalelm-simple", spec, rule, notes)


def _branch_share(spec: Transformer, k: float, alpha: float, count: str) -> float:
    """Return beta^2 = k / N^alpha."""
    if count not in COUNTS:
        raise SpecError(f"count {count!r} is unknown{nearest(str(count), COUNTS)}")
    if not (math.isfinite(k) and k > 0):
        raise DomainError(f"k must be positive and finite; got {k!r}", value=k)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise DomainError(f"alpha must be finite and >= 0; got {alpha!r}", value=alpha)
    number = _number(spec, count)
    with np.errstate(over="ignore"):
        share = float(k / np.float_power(number, alpha))
    if share >= 1:
        raise DomainError(
            f"beta^2 = k / N^alpha must be below one; got {share:.4g} with k = {k:g}, N = {number} {count}, "
            f"alpha = {alpha:g}. Lower k or use a deeper stack",
            value=share,
        )
    return share


def _number(spec: Transformer, count: str) -> int:
    """Return the N of beta^2."""
    return spec.n_layers if count == "layers" else sum(len(b.sublayers) * b.repeat for b in spec.blocks)


def common_rate(spec: Transformer, dropout: float | None) -> float:
    """Return the rate of the dropout on branches: the one asked for, or the one all sublayers of the spec have."""
    if dropout is None:
        rates = {float(sublayer.dropout) for sublayer in every_sublayer(spec)}
        if len(rates) > 1:
            raise SpecError(
                "the sublayers of the spec have different dropout rates, "
                f"{', '.join(f'{r:g}' for r in sorted(rates))}; give one: dropout=..."
            )
        return rates.pop()
    _check_unit("dropout", dropout, open_end=True)
    return float(dropout)


def _given(name: str, value: int | None) -> int:
    if value is None:
        raise SpecError(f"the scheme 'deepscalelm' needs {name}, unless reference=True")
    return value


def _check_unit(name: str, value: float, *, open_end: bool = False) -> None:
    if not (0 <= value < 1 or (value == 1 and not open_end)):
        raise DomainError(f"{name} must lie in [0, 1{')' if open_end else ']'}; got {value!r}", value=value)


def _notes(
    spec: Transformer, beta_squared: float, k: float, count: str, embedding_dropout: float, reference: bool
) -> list[str]:
    notes = [*_stability_notes(spec, beta_squared, k, count), *_stream_notes(spec, embedding_dropout)]
    if reference:
        notes.append(
            "Published leading order: a_v = r. It loses what attention to single tokens adds, (1-r) E sum A^2."
        )
        if any(
            isinstance(s.branch, MLP) and (s.branch.activation, s.branch.ratio) != ("relu", 4.0)
            for s in every_sublayer(spec)
        ):
            notes.append("The published MLP variance is meant for ReLU and ratio 4; here the MLP is not of unit gain.")
    elif spec.is_causal:
        notes.append(
            "Causal attention: second moments are averaged over positions, tokens taken as alike (derived here)."
        )
    return notes


def _stability_notes(spec: Transformer, beta_squared: float, k: float, count: str) -> list[str]:
    attentions = sum(b.repeat * sum(s.is_attention for s in b.sublayers) for b in spec.blocks)
    lowest = attentions * math.log1p(-beta_squared)
    share = attentions / _number(spec, count)
    power = "e^-k" if share == 1 else f"e^-{share:g}k"
    return [
        f"lambda^2 = {1 - beta_squared:.6g}, beta^2 = {beta_squared:.6g}, N counts {count} (a choice).",
        "Where MLPs pass gradients with a gain of at least one, the mean square of gradients falls by no more than "
        f"(1 - beta^2)^{attentions} = e^{lowest:.4g} from output to input; for many layers and alpha = 1 that tends to "
        f"{power} = {math.exp(-k * share):.4g}.",
    ]


def _stream_notes(spec: Transformer, dropout: float) -> list[str]:
    notes = [
        f"The stream must start at second moment one: n_e embedding tables of variance {1 - dropout:g} / n_e each."
    ]
    if any(s.output_norm is not None for s in every_sublayer(spec)):
        notes.append("A norm at the end of a branch undoes the scales in front of it; its gain sets what is added.")
    return notes
