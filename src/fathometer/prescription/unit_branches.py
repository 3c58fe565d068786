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


class RefinedRule:
    """DeepScaleLM's rule with exact attention gains; it carries the tokens' moments from sublayer to sublayer.

    Args:
        spec: The stack.
        r0: Cosine of two tokens in front of the dropout on embeddings.
        n_tokens: Number of tokens.
        beta_squared: Share of every branch in the stream.
        dropout: Rate on embeddings and on what each branch adds.
        memory: What cross attention reads.

    Attributes:
        stream: Moments of the stream behind the sublayers seen so far.
    """

    def __init__(
        self,
        spec: Transformer,
        r0: float,
        n_tokens: int,
        beta_squared: float,
        dropout: float,
        memory: Memory | None = None,
    ) -> None:
        check_tokens(n_tokens)
        self._spec, self._n_tokens, self._memory = spec, n_tokens, memory
        self._beta_squared, self._dropout = beta_squared, dropout
        self._steps: dict[int, HalfLayer] = {}
        self.stream = Moments(1.0, float(r0) * (1 - dropout))

    def __call__(self, layer: int, sublayer: Sublayer) -> Setting:
        """Return what the next sublayer gets, and step over it."""
        if id(sublayer) not in self._steps:
            unit = _unit_branch(sublayer, self._dropout)
            self._steps[id(sublayer)] = HalfLayer(unit, self._n_tokens, DEFAULT_CLOSURE, memory=self._memory)
        step, keep, share = self._steps[id(sublayer)], 1 - self._dropout, self._beta_squared
        _, added, record = step.forward(self.stream)
        branch, known = record.branch, record.known
        if isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal:
            branch = _causal_average(step, record.normed, known.variance, known.statistics.y12)
        gain = float(branch.q)
        if not gain > 1e-12:
            raise DomainError(
                f"the branch of layer {layer} puts out nothing to scale up: its second moment is {gain:g}", value=gain
            )
        if sublayer.output_norm is None:
            added = Moments(1.0, keep * branch.p / gain)
        stream = self.stream
        residual = Moments((1 - share) * stream.q + share * added.q, (1 - share) * stream.p + share * added.p)
        after = normed_moments(sublayer.stream_norm, residual)
        self.stream = Moments(float(after.q), float(after.p))
        stds = unit_stds(self._spec, sublayer, keep / gain)
        return Setting(stds, _unit_reason(sublayer), *residual_factors(share), self._dropout)


class ReferenceRule:
    """DeepScaleLM's published rule; it carries the published correlation from sublayer to sublayer.

    Args:
        spec, r0, beta_squared, dropout: As for :class:`RefinedRule`.
        r_memory: Correlation of the memory, which takes the place of ``r`` in cross attention.
    """

    def __init__(
        self, spec: Transformer, r0: float, beta_squared: float, dropout: float, r_memory: float | None = None
    ) -> None:
        if r0 == 0:
            raise DomainError("the published value variance diverges at r0 = 0; use the refined scheme", value=r0)
        if any(isinstance(sublayer.branch, GatedMLP) for sublayer in every_sublayer(spec)):
            raise SpecError("the published formulas of 'deepscalelm' have no gated MLP; use the refined scheme")
        self._spec, self._beta_squared, self._dropout, self._memory = spec, beta_squared, dropout, r_memory
        self._relu = activation_kernel("relu")
        self.r = r0 * (1 - dropout)

    def __call__(self, layer: int, sublayer: Sublayer) -> Setting:
        """Return what the next sublayer gets, and step over it."""
        keep, share, r = 1 - self._dropout, self._beta_squared, self.r
        factors = (*residual_factors(share), self._dropout)
        if sublayer.is_attention:
            across = isinstance(sublayer.branch, CrossAttention)
            read = self._memory if across else r
            if read is None:
                raise SpecError("the scheme 'deepscalelm' scales cross attention for an EncoderDecoder only")
            self.r = (1 - share) * r + share * keep
            reason = "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/r)"
            return Setting(unit_stds(self._spec, sublayer, keep / read), reason, *factors)
        even = math.sqrt(math.sqrt(keep / 2) / self._spec.d_model)
        self.r = (1 - share) * r + share * keep * 2 * float(self._relu.overlap(1.0, 1.0, min(r, 1.0)))
        return Setting({"mlp_in": even, "mlp_out": even}, "var (1/d) sqrt((1-p)/2)", *factors)


def unit_stds(spec: Transformer, sublayer: Sublayer, wanted: float) -> dict[str, float]:
    """Return the deviations under which a branch, of unit gain at unit scales, multiplies that by ``wanted``."""
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        scales = {"query": 1.0, "key": 1.0, "value": wanted**0.25, "output": wanted**0.25}
    elif isinstance(branch, MLP) and branch.activation in HOMOGENEOUS:
        even = (wanted / (spec.d_model * fan_in(spec, sublayer, "mlp_out"))) ** 0.25
        return {"mlp_in": even, "mlp_out": even}
    else:
        scales = dict.fromkeys(branch.scale_names, 1.0) | {"mlp_out": math.sqrt(wanted)}
    return {role: scale / math.sqrt(fan_in(spec, sublayer, role)) for role, scale in scales.items()}


def _unit_branch(sublayer: Sublayer, dropout: float) -> Sublayer:
    """Return the sublayer with every weight scale at one and no bias, adding its branch unscaled."""
    changes: dict[str, Any] = dict.fromkeys(sublayer.branch.scale_names, 1.0)
    changes |= {bias: 0.0 for bias in BIASES if hasattr(sublayer.branch, bias)}
    branch = replace(sublayer.branch, **changes)
    return replace(sublayer, branch=branch, skip_scale=1.0, branch_scale=1.0, dropout=dropout)


def _causal_average(step: HalfLayer, x: Moments, variance: Any, y12: Any) -> Moments:
    r"""Return the moments of causal attention averaged over positions, for tokens that are alike.

    .. math:: \overline{Y_2} = \frac1n \sum_{i \le n} Y_2(v, i), \qquad
              \overline{Y_{12}} = Y_{12}\, \frac{2 (n - H_n)}{n - 1}, \quad H_n = \sum_{i \le n} 1/i

    The second is leading order: two rows share the keys of the earlier one, and overlap as ``1/max(i, i')``.
    """
    assert isinstance(step.map, AttentionMap)
    n, lost = step.map.n_tokens, float(step.map.lost)
    if n == 1:
        return Moments(x.q * (1 + lost), x.p)
    y2 = DEFAULT_CLOSURE.statistics(np.arange(1, n + 1), float(variance), 0.0, entropy=False).y2
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    spread = x.q - x.p
    own = float(np.mean(y2))
    shared = min(float(y12) * 2 * (n - harmonic) / (n - 1), own)
    return Moments(x.p + (spread + lost * x.q) * own, x.p + spread * shared)


def _unit_reason(sublayer: Sublayer) -> str:
    branch = sublayer.branch
    if isinstance(branch, (SelfAttention, CrossAttention)):
        return "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/a_v)"
    if isinstance(branch, MLP) and branch.activation in HOMOGENEOUS:
        return "both matrices var sqrt((1-p) / (M d d_mlp)), M = E f^2 at unit input"
    return "first matrices var 1/d; the last brings the output to 1 - p"
