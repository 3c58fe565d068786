r"""Attention from the tokens of a decoder to those of an encoder, the memory.

Queries have moments ``(q, p)``, the ``m`` memory tokens ``(q_m, p_m)``; both matrices of the scores and the values are
fresh. A row is the softmax of m scores of variance ``v = \sigma_{QK}^2 q (q_m - p_m)``, two rows have correlation
``c = p / q``, and with ``s = q_m - p_m``, ``\delta = p_a / (1 - p_a)`` and n queries

.. math::
    q' &= \sigma_V^2 \left\{p_m + (s + \delta q_m) Y_2\right\}, \qquad
    p' = \sigma_V^2 \left\{p_m + s\, Y_{12}\right\}, \\
    J_{query} &= \sigma_V^2 \sigma_{QK}^2\, s\,(s + \delta q_m)\, S\, J, \qquad
    K_{query} = \sigma_V^2 \sigma_{QK}^2\, s^2 S' K, \\
    J_{memory} &= \sigma_V^2 \frac nm \left\{ \left[(1 + \delta) Y_2
        + \sigma_{QK}^2 q\, (s + \delta q_m)\, S\right] J
        + (n - 1) \left[Y_{12} + \sigma_{QK}^2 p\, s\, S'\right] K \right\} .

A row sums to one and its score gradients to zero, which fixes the sums over memory tokens:

.. math:: K_{memory} = \frac{1}{m - 1} \left\{ \sigma_V^2 \left[\frac nm (J + (n-1) K)
          - \frac nm (Y_2 J + (n-1) Y_{12} K)\right] - J_{keys} \right\}

with ``J_{keys}`` the part of ``J_{memory}`` behind ``\sigma_{QK}^2``. At finite width both parts of
:mod:`~fathometer.observables.components.finite_width` apply. Derived here, after A. Kedia et al., arXiv:2403.09635.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fathometer.attention import DEFAULT_CLOSURE, AttentionStatistics, Closure
from fathometer.errors import NotCoveredError, SpecError
from fathometer.observables.components.finite_width import HeadWidth, selected_direction
from fathometer.observables.components.state import GradientState, TokenState
from fathometer.propagation import check_moments
from fathometer.spec import SelfAttention


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Attention of ``n_queries`` tokens to ``n_memory`` others.

    Args:
        branch: Scales, heads, dropout on the weights; neither causal nor centred nor with normalised queries and keys.
        n_queries, n_memory: Numbers of tokens, the latter at least 2.
        d_model: Width of both.
        d_head: Width of a head; by default ``d_model / n_heads``.
        projected: Whether the output matrix is part of it.
        finite_width: Whether to correct for finite width.
        closure: How the softmax is averaged.
    """

    branch: SelfAttention
    n_queries: int
    n_memory: int
    d_model: int
    d_head: int | None = None
    projected: bool = True
    finite_width: bool = True
    closure: Closure = DEFAULT_CLOSURE

    def __post_init__(self) -> None:
        b = self.branch
        if b.causal or b.centred or b.qk_norm:
            raise NotCoveredError("cross-attention with a causal mask, centring or normalised queries and keys")
        if self.n_queries < 1 or self.n_memory < 2:
            raise SpecError(
                "cross-attention needs at least one query and two memory tokens; "
                f"got {self.n_queries} and {self.n_memory}"
            )
        if self.d_head is None and self.d_model % b.n_heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {self.d_model} and {b.n_heads}")

    def forward(self, x: TokenState, memory: TokenState) -> TokenState:
        """Return the moments of the output for queries ``x``."""
        rows = self._rows(x, memory)
        spread, gain = memory.q - memory.p, self._gain
        shared = spread * self._variance(x, memory) * self._direction(rows)
        return TokenState(
            q=gain * (memory.p + (spread + self._lost * memory.q) * rows.y2 + shared),
            p=gain * (memory.p + spread * rows.y12 + x.cosine * shared),
        )

    def backward(self, g: GradientState, x: TokenState, memory: TokenState) -> tuple[GradientState, GradientState]:
        """Return the moments of the gradients at the queries and at the memory."""
        rows, n, m = self._rows(x, memory), self.n_queries, self.n_memory
        spread, coupling = memory.q - memory.p, self._coupling
        noisy = spread + self._lost * memory.q
        gain = self._gain * (1.0 if self.projected else self._width / self.d_model)
        selected = spread * self._direction(rows)
        queries = GradientState(
            J=gain * coupling * spread * (selected + noisy * rows.score) * g.J,
            K=gain * coupling * spread * (selected + spread * rows.score_pair) * g.K,
        )
        values = (n / m) * (rows.y2 * g.J + (n - 1) * rows.y12 * g.K)
        keys = coupling * (n / m) * (x.q * noisy * rows.score * g.J + x.p * spread * (n - 1) * rows.score_pair * g.K)
        total = (n / m) * (g.J + (n - 1) * g.K)
        return queries, GradientState(
            J=gain * (values + self._lost * (n / m) * rows.y2 * g.J + keys),
            K=gain * (total - values - keys) / (m - 1),
        )

    @property
    def _width(self) -> int:
        return self.d_model if self.d_head is None else self.d_head * self.branch.n_heads

    @property
    def _gain(self) -> Any:
        return (self.branch.value * (self.branch.output if self.projected else 1.0)) ** 2

    @property
    def _coupling(self) -> Any:
        return (self.branch.query * self.branch.key * self.branch.score_multiplier) ** 2

    @property
    def _lost(self) -> Any:
        return self.branch.attention_dropout / (1 - self.branch.attention_dropout)

    def _variance(self, x: TokenState, memory: TokenState) -> Any:
        return self._coupling * x.q * (memory.q - memory.p)

    def _rows(self, x: TokenState, memory: TokenState) -> AttentionStatistics:
        check_moments(self.n_queries, x.q, x.p)
        check_moments(self.n_memory, memory.q, memory.p)
        closure = self.closure
        if self.finite_width:
            closure = HeadWidth(closure, self._width // self.branch.n_heads, self.d_model)
        return closure.statistics(self.n_memory, self._variance(x, memory), x.cosine, entropy=False)

    def _direction(self, rows: AttentionStatistics) -> Any:
        return selected_direction(rows.y2, self.d_model) if self.finite_width else 0.0
