"""DeepScaleLM: unit second moments at every depth, in refined, published and simplified form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import DomainError, SpecError, nearest
from fathometer.kernels import activation_kernel, norm_kernel
from fathometer.prescription.plans import BIASES, Rule, SchemePlan, Setting, every_sublayer, fan_in, planned
from fathometer.propagation import Moments, check_tokens
from fathometer.propagation.branch_maps import AttentionMap
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import MLP, GatedMLP, SelfAttention, Sublayer, Transformer

COUNTS = ("layers", "blocks")


_HOMOGENEOUS = ("relu", "identity")  # f(a x) = a f(x), so both matrices of the MLP may share one deviation


def deepscalelm(
    spec: Transformer,
    *,
    r0: float,
    n_tokens: int | None = None,
    k: float = 2.0,
    alpha: float = 1.0,
    count: str = "layers",
    dropout: float = 0.0,
    reference: bool = False,
) -> SchemePlan:
    r"""Let every branch add unit second moment to a stream of unit second moment.

    .. math:: x \leftarrow \lambda x + \beta\,\mathrm{drop}(B(x)), \quad \lambda^2 = 1 - \beta^2, \quad
              \beta^2 = k / N^\alpha, \qquad
              \mathrm{var}\,W_{V,O} = \frac1d \sqrt{\frac{1 - p}{a_v}}

    with the dropout rate p and the second moment a_v of attention with unit value and output scales. Queries and keys
    have scale one. A ReLU MLP has equal deviations in both matrices, ``var W = sqrt(2 (1-p) / (d d_mlp))``; of any
    other, the first matrix (and a gate) has scale one and the second brings its output to ``1 - p``.

    By default a_v is computed by the recursion of this library with exact softmax averages, at the cosine of the
    tokens in front of each attention, for any activation and norm. ``reference`` uses the published leading order
    instead: ``a_v = r`` with ``r <- lambda^2 r + beta^2 (1-p)`` at attention and ``r <- lambda^2 r + beta^2 (1-p)
    kappa_1(r)`` at the MLP, and ``var W = (1/d) sqrt((1-p)/2)``, meant for a ReLU MLP of ratio four.

    Source: A. Kedia et al., Transformers Get Stable, arXiv:2403.09635. What N counts is not settled: the published
    text is read as layers, the default of the published code as blocks; the default here is a choice. The rule for
    activations other than ReLU, for gated MLPs and for causal masks is derived here.

    Args:
        spec: The architecture.
        r0: Cosine of two tokens' embeddings, before dropout, which lowers it by ``1 - dropout``.
        n_tokens: Number of tokens; needed unless ``reference``.
        k, alpha: Of beta.
        count: Whether N is the number of ``"layers"`` or of ``"blocks"``, that is of sublayers.
        dropout: Rate, on what each branch adds.
        reference: Whether to use the published recurrence.
    Raises:
        DomainError: for an option outside its range, or attention whose output vanishes.
        SpecError: for an unknown ``count``, a missing ``n_tokens``, or a gated MLP under ``reference``.
    """
    beta_squared = _branch_share(spec, k, alpha, count)
    _check_unit("dropout", dropout, open_end=True)
    _check_unit("r0", r0)
    if reference:
        rule = _reference_rule(spec, r0, beta_squared, dropout)
    elif n_tokens is None:
        raise SpecError("the scheme 'deepscalelm' needs n_tokens, unless reference=True")
    else:
        rule = _refined_rule(spec, r0, n_tokens, beta_squared, dropout)
    notes = [*_stability_notes(spec, beta_squared, k, count), *_stream_notes(spec, dropout)]
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
    return planned("deepscalelm", spec, rule, notes)


def deepscalelm_simple(
    spec: Transformer, *, k: float = 2.0, alpha: float = 1.0, count: str = "layers", dropout: float = 0.0
) -> SchemePlan:
    r"""Use one variance, ``(1/d) sqrt((1-p)/2)``, for values, outputs and the MLP, and DeepScaleLM's residual factors.

    Queries and keys have variance ``1/d``. The stream settles below one, at a depth-independent level.

    Source: the simplified form of A. Kedia et al., arXiv:2403.09635, as re-implemented by others; not checked against
    the paper. A gate matrix gets the same variance, which is a choice.

    Args:
        spec, k, alpha, count, dropout: As in :func:`deepscalelm`.
    """
    beta_squared = _branch_share(spec, k, alpha, count)
    _check_unit("dropout", dropout, open_end=True)
    std = math.sqrt(math.sqrt((1 - dropout) / 2) / spec.d_model)
    factors = _factors(beta_squared)

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        stds = dict.fromkeys(sublayer.branch.scale_names, std)
        if sublayer.is_attention:
            stds |= dict.fromkeys(("query", "key"), spec.d_model**-0.5)
        return Setting(stds, "var (1/d) sqrt((1-p)/2); queries and keys 1/d", *factors)

    notes = [*_stability_notes(spec, beta_squared, k, count), "Branches do not add unit second moments."]
    return planned("deepscalelm-simple", spec, rule, notes)


def _refined_rule(spec: Transformer, r0: float, n_tokens: int, beta_squared: float, dropout: float) -> Rule:
    """Return DeepScaleLM's rule with exact attention gains; it carries the tokens' moments from layer to layer."""
    check_tokens(n_tokens)
    keep, factors = 1 - dropout, _factors(beta_squared)
    stream = Moments(1.0, float(r0) * keep)
    unit_steps: dict[int, HalfLayer] = {}

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        nonlocal stream
        if id(sublayer) not in unit_steps:
            unit_steps[id(sublayer)] = HalfLayer(_unit_branch(sublayer), n_tokens, DEFAULT_CLOSURE)
        step = unit_steps[id(sublayer)]
        _, added, record = step.forward(stream)
        branch, known = record.branch, record.known
        if isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal:
            branch = _causal_average(step, record.normed, known.variance, known.statistics.y12)
        gain = float(branch.q)
        if not gain > 1e-12:
            raise DomainError(
                f"the branch of layer {layer} puts out nothing to scale up: its second moment is {gain:g}", value=gain
            )
        if sublayer.output_norm is None:
            added = Moments(keep, keep * branch.p / gain)
        share = beta_squared
        residual = Moments((1 - share) * stream.q + share * added.q / keep, (1 - share) * stream.p + share * added.p)
        stream = _after(sublayer, residual)
        return Setting(_unit_stds(spec, sublayer, keep / gain), _unit_reason(sublayer), *factors)

    return rule


def _after(sublayer: Sublayer, residual: Moments) -> Moments:
    if sublayer.stream_norm is None:
        return residual
    kernel, (q, p) = norm_kernel(sublayer.stream_norm), residual
    return Moments(float(kernel.overlap(q, q, q)), float(kernel.overlap(q, q, p)))


def _unit_branch(sublayer: Sublayer) -> Sublayer:
    """Return the sublayer with every weight scale at one and no bias, adding its branch unscaled."""
    changes: dict[str, Any] = dict.fromkeys(sublayer.branch.scale_names, 1.0)
    changes |= {bias: 0.0 for bias in BIASES if hasattr(sublayer.branch, bias)}
    return replace(sublayer, branch=replace(sublayer.branch, **changes), skip_scale=1.0, branch_scale=1.0)


def _causal_average(step: HalfLayer, x: Moments, variance: Any, y12: Any) -> Moments:
    r"""Return the moments of causal attention averaged over positions, for tokens that are alike.

    .. math:: \overline{Y_2} = \frac1n \sum_{i \le n} Y_2(v, i), \qquad
              \overline{Y_{12}} = Y_{12}\, \frac{2 (n - H_n)}{n - 1}, \quad H_n = \sum_{i \le n} 1/i

    The second is leading order: two rows share the keys of the earlier one, and overlap as ``1/max(i, i')``.
    """
    assert isinstance(step.map, AttentionMap)
    n = step.map.n_tokens
    if n == 1:
        return Moments(x.q, x.p)
    y2 = DEFAULT_CLOSURE.statistics(np.arange(1, n + 1), float(variance), 0.0, entropy=False).y2
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    spread = x.q - x.p
    own = float(np.mean(y2))
    return Moments(x.p + spread * own, x.p + spread * min(float(y12) * 2 * (n - harmonic) / (n - 1), own))


def _unit_stds(spec: Transformer, sublayer: Sublayer, wanted: float) -> dict[str, float]:
    """Return the deviations under which a branch, of unit gain at unit scales, multiplies that by ``wanted``."""
    branch, d = sublayer.branch, spec.d_model
    if isinstance(branch, SelfAttention):
        even = wanted**0.25 / math.sqrt(d)
        return {"query": d**-0.5, "key": d**-0.5, "value": even, "output": even}
    d_mlp = fan_in(spec, sublayer, "mlp_out")
    if isinstance(branch, MLP) and branch.activation in _HOMOGENEOUS:
        even = (wanted / (d * d_mlp)) ** 0.25
        return {"mlp_in": even, "mlp_out": even}
    return dict.fromkeys(branch.scale_names, d**-0.5) | {"mlp_out": math.sqrt(wanted / d_mlp)}


def _unit_reason(sublayer: Sublayer) -> str:
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        return "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/a_v)"
    if isinstance(branch, MLP) and branch.activation in _HOMOGENEOUS:
        return "both matrices var sqrt((1-p) / (M d d_mlp)), M = E f^2 at unit input"
    return "first matrices var 1/d; the last brings the output to 1 - p"


def _reference_rule(spec: Transformer, r0: float, beta_squared: float, dropout: float) -> Rule:
    """Return DeepScaleLM's published rule; it carries the published correlation from layer to layer."""
    if r0 == 0:
        raise DomainError("the published value variance diverges at r0 = 0; use the refined scheme", value=r0)
    if any(isinstance(sublayer.branch, GatedMLP) for sublayer in every_sublayer(spec)):
        raise SpecError("the published formulas of 'deepscalelm' have no gated MLP; use the refined scheme")
    keep, d, factors = 1 - dropout, spec.d_model, _factors(beta_squared)
    relu = activation_kernel("relu")
    mlp = math.sqrt(math.sqrt(keep / 2) / d)
    r = r0 * keep

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        nonlocal r
        if sublayer.is_attention:
            even = math.sqrt(math.sqrt(keep / r) / d)
            r = (1 - beta_squared) * r + beta_squared * keep
            stds = {"query": d**-0.5, "key": d**-0.5, "value": even, "output": even}
            return Setting(stds, "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/r)", *factors)
        r = (1 - beta_squared) * r + beta_squared * keep * 2 * float(relu.overlap(1.0, 1.0, min(r, 1.0)))
        return Setting({"mlp_in": mlp, "mlp_out": mlp}, "var (1/d) sqrt((1-p)/2)", *factors)

    return rule


def _branch_share(spec: Transformer, k: float, alpha: float, count: str) -> float:
    """Return beta^2 = k / N^alpha."""
    if count not in COUNTS:
        raise SpecError(f"count {count!r} is unknown{nearest(str(count), COUNTS)}")
    if not (math.isfinite(k) and k > 0):
        raise DomainError(f"k must be positive and finite; got {k!r}", value=k)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise DomainError(f"alpha must be finite and >= 0; got {alpha!r}", value=alpha)
    number = spec.n_layers if count == "layers" else sum(len(b.sublayers) * b.repeat for b in spec.blocks)
    with np.errstate(over="ignore"):
        share = float(k / np.float_power(number, alpha))
    if share >= 1:
        raise DomainError(
            f"beta^2 = k / N^alpha must be below one; got {share:.4g} with k = {k:g}, N = {number} {count}, "
            f"alpha = {alpha:g}. Lower k or use a deeper stack",
            value=share,
        )
    return share


def _factors(beta_squared: float) -> tuple[float, float]:
    return math.sqrt(1 - beta_squared), math.sqrt(beta_squared)


def _check_unit(name: str, value: float, *, open_end: bool = False) -> None:
    if not (0 <= value < 1 or (value == 1 and not open_end)):
        raise DomainError(f"{name} must lie in [0, 1{')' if open_end else ']'}; got {value!r}", value=value)


def _stability_notes(spec: Transformer, beta_squared: float, k: float, count: str) -> list[str]:
    attentions = sum(b.repeat * sum(s.is_attention for s in b.sublayers) for b in spec.blocks)
    lowest = attentions * math.log1p(-beta_squared)
    return [
        f"lambda^2 = {1 - beta_squared:.6g}, beta^2 = {beta_squared:.6g}, N counts {count} (a choice).",
        "Where MLPs pass gradients with a gain of at least one, the mean square of gradients falls by no more than "
        f"(1 - beta^2)^{attentions} = e^{lowest:.4g} from output to input; with N layers and alpha = 1 that tends to "
        f"e^-k = {math.exp(-k):.4g}.",
    ]


def _stream_notes(spec: Transformer, dropout: float) -> list[str]:
    notes = [
        f"The stream must start at second moment one: n_e embedding tables of variance {1 - dropout:g} / n_e each."
    ]
    if any(s.output_norm is not None for s in every_sublayer(spec)):
        notes.append("A norm at the end of a branch undoes the scales in front of it; its gain sets what is added.")
    return notes
