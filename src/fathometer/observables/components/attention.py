r"""Self-attention with or without its output matrix.

Refined: the maps of the recursion (:class:`~fathometer.propagation.branch_maps.AttentionMap`), by default with the
corrections of :mod:`~fathometer.observables.components.finite_width`; under a causal mask the Gram matrix engine, read
out as averages over positions and pairs of positions.

Published, with ``S = \sigma_{QK}^2 q^2``, ``v = (1-r) S``, the gain ``f`` of the values and ``H`` that of gradients:

.. math::
    q' &= f q \left\{ r + \frac1n \left[(1-r)^2 (n-1) \frac Sd
          + \frac{e^v}{1-p_a} \left(4 (1-r)^2 \frac Sd + 1 - r\right)\right]\right\}, &
    p' &= f q \left\{ r + \frac1n \left[2 (1-r)^2 \frac Sd + 1 - r\right]\right\}, \\
    J_{in} &= H\,\frac{J + (n-1)(1-p_a) K}{n (1-p_a)}, &
    K_{in} &= H\,\frac{J + (n-1) K}{n},

whose gradient takes the path through the values only. To leading order ``q' = p' = f p`` and ``J = K = H K``.

Source: A. Kedia et al., arXiv:2403.09635; the refined form derived here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE, Closure
from fathometer.errors import NotCoveredError, SpecError
from fathometer.observables.components.finite_width import HeadWidth, selected_direction
from fathometer.observables.components.state import Form, GradientState, TokenState, check_form
from fathometer.propagation import GramTrajectory, check_moments, propagate_gram
from fathometer.propagation.branch_maps import Attending, AttentionMap, attention_bias
from fathometer.spec import Block, SelfAttention, Sublayer, Transformer, refuse_arrays


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention of ``n_tokens`` tokens of width ``d_model``.

    Cost: that of the closure, thrice at finite width; under a causal mask ``O(n_tokens^2)`` work and memory, and
    single numbers only.

    Args:
        branch: Scales, heads, mask, dropout on the weights.
        n_tokens, d_model: Sizes.
        d_head: Width of a head; by default ``d_model / n_heads``.
        projected: Whether the output matrix is part of it; without, the output is the concatenated heads.
        form: ``"refined"``, ``"reference"`` (published) or ``"leading"`` (its leading order in ``1/n``).
        finite_width: Whether the refined form is corrected for finite width. Without effect on centred attention and
            normalised queries and keys, which the corrections do not cover.
        closure: How the softmax is averaged in the refined form.
    """

    branch: SelfAttention
    n_tokens: int
    d_model: int
    d_head: int | None = None
    projected: bool = True
    form: Form = "refined"
    finite_width: bool = True
    closure: Closure = DEFAULT_CLOSURE

    def __post_init__(self) -> None:
        check_form(self, self.form, ("refined", "reference", "leading"))
        if self.d_head is None and self.d_model % self.branch.n_heads:
            raise SpecError(
                f"d_model must be a multiple of n_heads; got {self.d_model} and {self.branch.n_heads}. "
                "State d_head if it is not their ratio"
            )
        if self.form != "refined" and (self.branch.centred or self.branch.qk_norm):
            raise NotCoveredError("the published form knows neither centred attention nor normalised queries and keys")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_model // self.branch.n_heads if self.d_head is None else self.d_head

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        check_moments(self.n_tokens, x.q, x.p)
        if self.form != "refined":
            return self._published_forward(x)
        if self.branch.causal and not self._passes:
            bias = attention_bias(self._acting)
            return TokenState(q=bias, p=bias)
        maps, known = self._inspect(x)
        q, p = _averages(self._gram(x).grams[-1]) if self.branch.causal else maps.forward(x.moments, known)
        shift = self._selected(x, known) * x.q
        return TokenState(q=q + shift, p=p + shift * x.cosine)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        check_moments(self.n_tokens, x.q, x.p)
        if self.form != "refined":
            return self._published_backward(g, x)
        if self.branch.causal and not (self._passes and g.J):
            return GradientState(J=0.0, K=0.0)
        maps, known = self._inspect(x)
        if self.branch.causal:
            start = g.alignment + (1 - g.alignment) * np.eye(self.n_tokens)
            ((log_norm, matrices),) = self._gram(x).backward(start)
            own, shared = _averages(matrices[0] * np.exp(log_norm[0]) * g.J)
        else:
            (jj, jk), (kj, kk) = maps.transfer(x.moments, known)
            own, shared = jj * g.J + jk * g.K, kj * g.J + kk * g.K
        shift = self._selected(x, known)
        return GradientState(J=self._widening * (own + shift * g.J), K=self._widening * (shared + shift * g.K))

    @property
    def _corrected(self) -> bool:
        return self.finite_width and not (self.branch.centred or self.branch.qk_norm)

    @property
    def _passes(self) -> bool:
        """Whether values reach the output, of a branch with single numbers."""
        refuse_arrays(self.branch, "attention under a causal mask", "branch")
        return bool(self._acting.value) and bool(self._acting.output)

    @property
    def _averaging(self) -> Closure:
        return HeadWidth(self.closure, self.head_width, self.d_model) if self._corrected else self.closure

    def _selected(self, x: TokenState, known: Attending) -> Any:
        """Return what the direction shared by a row's keys adds to the second moment over that of a token."""
        if not self._corrected:
            return 0.0
        if self.branch.causal:
            counts = np.arange(1.0, self.n_tokens + 1)
            rows = self._averaging.statistics(counts, np.full(len(counts), known.variance), 0.0, entropy=False)
            share = np.mean(selected_direction(rows.y2, self.d_model))
        else:
            share = selected_direction(known.statistics.y2, self.d_model)
        gain = (self._acting.value * self._acting.output) ** 2
        return gain * known.coupling * (x.q - x.p) ** 2 * share

    @property
    def _widening(self) -> float:
        """Output features per input feature where the output matrix is missing: gradients sum over them."""
        return 1.0 if self.projected else self.branch.n_heads * self.head_width / self.d_model

    @property
    def _acting(self) -> SelfAttention:
        return self.branch if self.projected else replace(self.branch, output=1.0, output_bias=0.0)

    def _inspect(self, x: TokenState) -> tuple[AttentionMap, Attending]:
        maps = AttentionMap(self._acting, self.n_tokens, self._averaging)
        return maps, maps.inspect(x.moments)

    def _gram(self, x: TokenState) -> GramTrajectory:
        sublayer = Sublayer(branch=self._acting, skip_scale=0.0)
        spec = Transformer(d_model=self.d_model, blocks=(Block(sublayers=(sublayer,)),))
        return propagate_gram(spec, x.p + (x.q - x.p) * np.eye(self.n_tokens), closure=self._averaging)

    def _published_forward(self, x: TokenState) -> TokenState:
        b, n, r = self._acting, self.n_tokens, x.cosine
        level = (b.value * b.output) ** 2 * x.q
        if self.form == "leading":
            return TokenState(q=level * r, p=level * r)
        share = (1 - r) ** 2 * self._score_variance(x) / self.d_model
        weights = np.exp((1 - r) * self._score_variance(x)) / (1 - b.attention_dropout)
        q = r + ((n - 1) * share + weights * (4 * share + 1 - r)) / n
        return TokenState(q=level * q, p=level * (r + (2 * share + 1 - r) / n))

    def _published_backward(self, g: GradientState, x: TokenState) -> GradientState:
        b, n = self._acting, self.n_tokens
        gain = self._widening * (b.value * b.output) ** 2
        if self.form == "leading":
            return GradientState(J=gain * g.K, K=gain * g.K)
        own = g.J / (1 - b.attention_dropout) + (n - 1) * g.K
        return GradientState(J=gain * own / n, K=gain * (g.J + (n - 1) * g.K) / n)

    def _score_variance(self, x: TokenState) -> Any:
        b = self.branch
        return (b.query * b.key * b.score_multiplier * x.q) ** 2


def _averages(gram: Any) -> tuple[float, float]:
    """Return the mean of the diagonal and the mean off it."""
    n = gram.shape[-1]
    own = float(np.trace(gram)) / n
    return own, (float(gram.sum()) / n - own) / (n - 1) if n > 1 else own
