r"""Attention from the tokens of a decoder to those of an encoder, the memory.

The maps of the recursion (:class:`~fathometer.propagation.cross.CrossAttentionMap`), at finite width with both parts of
:mod:`~fathometer.observables.components.finite_width`: averages over the fluctuation of the score variance v, and the
direction that the keys of one row share. With the memory's spread ``s = q_m - p_m`` and ``t = (1 - Y_2)^2`` that adds

.. math::
    \Delta q = \sigma_V^2\, s\, v\, \frac td, \qquad \Delta p = \frac pq\, \Delta q, \qquad
    \Delta T_{JJ} = \Delta T_{KK} = \sigma_V^2 \sigma_{QK}^2\, s^2\, \frac td

to the output and to the transfer matrix of the queries. Derived here, after A. Kedia et al., arXiv:2403.09635.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fathometer.attention import DEFAULT_CLOSURE, Closure
from fathometer.errors import NotCoveredError, SpecError
from fathometer.observables.components.finite_width import HeadWidth, selected_direction
from fathometer.observables.components.state import GradientState, TokenState
from fathometer.propagation import Memory, check_moments
from fathometer.propagation.branch_maps import Attending
from fathometer.propagation.cross import CrossAttentionMap
from fathometer.spec import CrossAttention, memory_width


@dataclass(frozen=True, kw_only=True)
class CrossAttentionMoments:
    """Attention of ``n_queries`` tokens to ``n_memory`` others, as a map on the former.

    Args:
        branch: Scales, heads, dropout on the weights.
        memory: Moments of the tokens that are read.
        n_queries, n_memory: Numbers of tokens.
        d_model: Width of the tokens that ask.
        d_head: Width of a head; by default ``d_model / n_heads``.
        projected: Whether the output matrix is part of it; without, the output is the concatenated heads.
        finite_width: Whether to correct for finite width.
        closure: How the softmax is averaged.
    Raises:
        SpecError: if heads do not divide the width.
        NotCoveredError: for corrections at finite width to a memory of another width.
        DomainError: for a memory that no tokens can have.
    """

    branch: CrossAttention
    memory: TokenState
    n_queries: int
    n_memory: int
    d_model: int
    d_head: int | None = None
    projected: bool = True
    finite_width: bool = True
    closure: Closure = DEFAULT_CLOSURE

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.branch.n_heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {self.d_model} and {self.branch.n_heads}")
        width = memory_width(self.branch, self.d_model)
        if self.finite_width and width != self.d_model:
            raise NotCoveredError(
                f"finite-width corrections of cross attention to a memory of width {width} from tokens of width "
                f"{self.d_model}; set finite_width=False"
            )
        check_moments(self.n_memory, self.memory.q, self.memory.p)

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`; ``x`` are the tokens that ask."""
        maps, known = self._inspect(x)
        q, p = maps.forward(x.moments, known)
        shift = self._direction(maps, known) * x.q
        return TokenState(q=q + shift, p=p + x.cosine * shift)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`; at the tokens that ask."""
        maps, known = self._inspect(x)
        (own, _), (_, shared) = maps.transfer(x.moments, known)
        shift = self._direction(maps, known)
        return GradientState(J=self._widening * (own + shift) * g.J, K=self._widening * (shared + shift) * g.K)

    def memory_backward(self, g: GradientState, x: TokenState) -> GradientState:
        """Return the moments of the gradient at the memory; K is zero for a single token."""
        maps, known = self._inspect(x)
        (jj, jk), (kj, kk) = maps.to_memory(x.moments, known)
        return GradientState(
            J=self._widening * (jj * g.J + jk * g.K),
            K=self._widening * (kj * g.J + kk * g.K),
        )

    @property
    def _head_width(self) -> int:
        return self.d_model // self.branch.n_heads if self.d_head is None else self.d_head

    @property
    def _widening(self) -> float:
        """Output features per input feature where the output matrix is missing: gradients sum over them."""
        return 1.0 if self.projected else self.branch.n_heads * self._head_width / self.d_model

    def _inspect(self, x: TokenState) -> tuple[CrossAttentionMap, Attending]:
        check_moments(self.n_queries, x.q, x.p)
        closure = HeadWidth(self.closure, self._head_width, self.d_model) if self.finite_width else self.closure
        memory = Memory(self.memory.moments, self.n_memory, self.d_model / memory_width(self.branch, self.d_model))
        branch = self.branch if self.projected else replace(self.branch, output=1.0, output_bias=0.0)
        maps = CrossAttentionMap(branch, self.n_queries, closure, memory)
        return maps, maps.inspect(x.moments)

    def _direction(self, maps: CrossAttentionMap, known: Attending) -> Any:
        """Return what the direction shared by a row's keys adds to the transfer matrix."""
        if not self.finite_width:
            return 0.0
        gain, spread = (maps.branch.value * maps.branch.output) ** 2, self.memory.q - self.memory.p
        return gain * known.coupling * spread**2 * selected_direction(known.statistics.y2, self.d_model)
