"""The rules behind DeepScaleLM: what gives every branch unit second moment, sublayer by sublayer.

Source: A. Kedia et al., Transformers Get Stable, arXiv:2403.09635; what is derived here is said at
:func:`fathometer.prescription.deepscalelm.deepscalelm`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import DomainError, SpecError
from fathometer.kernels import activation_kernel
from fathometer.prescription.plans import BIASES, Setting, every_sublayer, fan_in
from fathometer.propagation import Memory, Moments, check_tokens
from fathometer.propagation.branch_maps import AttentionMap
from fathometer.propagation.encoder_decoder import normed_moments
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import MLP, CrossAttention, GatedMLP, SelfAttention, Sublayer, Transformer

HOMOGENEOUS = ("relu", "identity")  # f(a x) = a f(x), so both matrices of the MLP may share one deviation


def residual_factors(beta_squared: float) -> tuple[float, float]:
    """Return lambda and beta."""
    return math.sqrt(1 - beta_squared), math.sqrt(beta_squared)


def refined_settings(
    spec: Transformer,
    cosine: float,
    n_tokens: int,
    beta_squared: float,
    dropout: float,
    memory: Memory | None = None,
) -> tuple[list[Setting], Moments]:
    """Return DeepScaleLM's settings with exact attention gains, and the tokens' moments behind the last sublayer.

    Args:
        spec: The stack.
        cosine: Of two tokens at the first sublayer, behind the dropout on embeddings.
        n_tokens: Number of tokens.
        beta_squared: Share of every branch in the stream.
        dropout: Rate on what each branch adds.
        memory: What cross attention reads.
    Returns:
        One setting for each sublayer in order of depth, and the moments.
    """
    check_tokens(n_tokens)
    steps: dict[int, HalfLayer] = {}
    stream = Moments(1.0, float(cosine))
    keep, share = 1 - dropout, beta_squared
    settings = []
    for layer, block in enumerate(spec.layers()):
        for sublayer in block.sublayers:
            if id(sublayer) not in steps:
                unit = _unit_branch(sublayer, dropout)
                steps[id(sublayer)] = HalfLayer(unit, n_tokens, DEFAULT_CLOSURE, memory=memory)
            branch, added = _branch_moments(steps[id(sublayer)], stream)
            gain = float(branch.q)
            if not gain > 1e-12:
                raise DomainError(
                    f"the branch of layer {layer} puts out nothing to scale up: its second moment is {gain:g}",
                    value=gain,
                )
            if sublayer.output_norm is None:
                added = Moments(1.0, keep * branch.p / gain)
            residual = Moments((1 - share) * stream.q + share * added.q, (1 - share) * stream.p + share * added.p)
            after = normed_moments(sublayer.stream_norm, residual)
            stream = Moments(float(after.q), float(after.p))
            stds = unit_stds(spec, sublayer, keep / gain)
            settings.append(Setting(stds, _unit_reason(sublayer), *residual_factors(share), dropout))
    return settings, stream


def reference_settings(
    spec: Transformer, cosine: float, beta_squared: float, dropout: float, r_memory: float | None = None
) -> tuple[list[Setting], float]:
    """Return DeepScaleLM's published settings, and the published correlation behind the last sublayer.

    Args:
        spec, cosine, beta_squared, dropout: As for :func:`refined_settings`.
        r_memory: Correlation of the memory, which takes the place of ``r`` in cross attention.
    """
    if cosine == 0:
        raise DomainError("the published value variance diverges at r0 = 0; use the refined scheme", value=cosine)
    sublayers = every_sublayer(spec)
    if any(isinstance(sublayer.branch, GatedMLP) for sublayer in sublayers):
        raise SpecError("the published formulas of 'deepscalelm' have no gated MLP; use the refined scheme")
    relu = activation_kernel("relu")
    keep, share, r = 1 - dropout, beta_squared, cosine
    factors = (*residual_factors(share), dropout)
    settings = []
    for sublayer in sublayers:
        if sublayer.is_attention:
            read = r_memory if isinstance(sublayer.branch, CrossAttention) else r
            if read is None:
                raise SpecError("the scheme 'deepscalelm' scales cross attention for an EncoderDecoder only")
            reason = "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/r)"
            settings.append(Setting(unit_stds(spec, sublayer, keep / read), reason, *factors))
            r = (1 - share) * r + share * keep
        else:
            even = math.sqrt(math.sqrt(keep / 2) / spec.d_model)
            settings.append(Setting({"mlp_in": even, "mlp_out": even}, "var (1/d) sqrt((1-p)/2)", *factors))
            r = (1 - share) * r + share * keep * 2 * float(relu.overlap(1.0, 1.0, min(r, 1.0)))
    return settings, r


def _branch_moments(step: HalfLayer, stream: Moments) -> tuple[Moments, Moments]:
    """Return the moments a branch puts out, averaged over positions under a causal mask, and what it adds."""
    _, added, record = step.forward(stream)
    branch, known = step.sublayer.branch, record.known
    if isinstance(branch, SelfAttention) and branch.causal:
        return _causal_average(step, record.normed, known.variance, known.statistics.y12), added
    return record.branch, added


def unit_stds(spec: Transformer, sublayer: Sublayer, wanted: float) -> dict[str, float]:
    """Return the deviations under which a branch, of unit gain at unit scales, multiplies that by ``wanted``."""
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        scales = dict.fromkeys(("query", "key"), _score_scale(branch)) | dict.fromkeys(
            ("value", "output"), wanted**0.25
        )
    elif isinstance(branch, MLP) and branch.activation in HOMOGENEOUS:
        even = (wanted / (spec.d_model * fan_in(spec, sublayer, "mlp_out"))) ** 0.25
        return {"mlp_in": even, "mlp_out": even}
    else:
        scales = dict.fromkeys(branch.scale_names, 1.0) | {"mlp_out": math.sqrt(wanted)}
    return {role: scale / math.sqrt(fan_in(spec, sublayer, role)) for role, scale in scales.items()}


def _unit_branch(sublayer: Sublayer, dropout: float) -> Sublayer:
    """Return the sublayer with every weight scale at one and no bias, adding its branch unscaled."""
    changes: dict[str, Any] = dict.fromkeys(sublayer.branch.scale_names, 1.0)
    if isinstance(sublayer.branch, (SelfAttention, CrossAttention)):
        changes |= dict.fromkeys(("query", "key"), _score_scale(sublayer.branch))
    changes |= {bias: 0.0 for bias in BIASES if hasattr(sublayer.branch, bias)}
    branch = replace(sublayer.branch, **changes)
    return replace(sublayer, branch=branch, skip_scale=1.0, branch_scale=1.0, dropout=dropout)


def _score_scale(branch: SelfAttention | CrossAttention) -> float:
    """Return the scale of queries and keys at which scores have variance one, one where no scale has that."""
    multiplier = float(branch.score_multiplier)
    normed = isinstance(branch, SelfAttention) and branch.qk_norm
    return 1.0 if normed or multiplier == 0 else multiplier**-0.5


def _causal_average(step: HalfLayer, x: Moments, variance: Any, y12: Any) -> Moments:
    r"""Return the moments of causal attention averaged over positions, for tokens that are alike.

    .. math:: \overline{Y_2} = \frac1n \sum_{i \le n} Y_2(v, i), \qquad
              \overline{Y_{12}} = Y_{12}\, \frac{2 (n - H_n)}{n - 1}, \quad H_n = \sum_{i \le n} 1/i

    The second is leading order: two rows share the keys of the earlier one, and overlap as ``1/max(i, i')``.
    """
    assert isinstance(step.map, AttentionMap)
    n, noise = step.map.n_tokens, float(step.map.dropout_variance)
    if n == 1:
        return Moments(x.q * (1 + noise), x.p)
    y2 = DEFAULT_CLOSURE.statistics(np.arange(1, n + 1), float(variance), 0.0, entropy=False).y2
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    spread = x.q - x.p
    own = float(np.mean(y2))
    shared = min(float(y12) * 2 * (n - harmonic) / (n - 1), own)
    return Moments(x.p + (spread + noise * x.q) * own, x.p + spread * shared)


def _unit_reason(sublayer: Sublayer) -> str:
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        scores = "1/d" if _score_scale(branch) == 1 else "1/(m d), m the score multiplier"
        return f"queries and keys var {scores}; values and outputs var (1/d) sqrt((1-p)/a_v)"
    if isinstance(branch, MLP) and branch.activation in HOMOGENEOUS:
        return "both matrices var sqrt((1-p) / (M d d_mlp)), M = E f^2 at unit input"
    return "first matrices var 1/d; the last brings the output to 1 - p"
