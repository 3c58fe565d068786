"""Feed-forward and attention blocks, and the head that reads tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fathometer.attention import DEFAULT_CLOSURE, Closure
from fathometer.errors import SpecError
from fathometer.kernels import activation_kernel
from fathometer.observables.components.attention import Attention
from fathometer.observables.components.composition import Chain
from fathometer.observables.components.elementwise import Dropout, GatedUnit, Linear
from fathometer.observables.components.norms import NormMap
from fathometer.observables.components.state import Component, Form, GradientState, TokenState
from fathometer.propagation.branch_maps import MLPMap
from fathometer.spec import MLP, GatedMLP, Head, SelfAttention, TokenStem
from fathometer.spec.arrays import Scale


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """An MLP from stream to stream, as in the recursion over layers; exact for Gaussian tokens of one norm."""

    branch: MLP

    def _map(self) -> MLPMap:
        return MLPMap(self.branch, activation_kernel(self.branch.activation))

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        maps = self._map()
        q, p = maps.forward(x.moments, maps.inspect(x.moments))
        return TokenState(q=q, p=p)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        maps = self._map()
        (own, _), (_, shared) = maps.transfer(x.moments, maps.inspect(x.moments))
        return GradientState(J=own * g.J, K=shared * g.K)


def feed_forward_block(branch: MLP | GatedMLP, *, dropout: Scale = 0.0, d_model: int | None = None) -> Component:
    """Return an MLP or gated MLP followed by dropout.

    Args:
        branch: The MLP.
        dropout: Rate on the output.
        d_model: For a gated MLP, see :class:`GatedUnit`.
    """
    if isinstance(branch, MLP):
        return Chain((FeedForward(branch=branch), Dropout(rate=dropout)))
    unit = GatedUnit(
        gate=branch.gate,
        mlp_in=branch.mlp_in,
        activation=branch.activation,
        ratio=branch.ratio,
        d_model=d_model,
    )
    return Chain((unit, Linear(scale=branch.mlp_out, ratio=1 / branch.ratio), Dropout(rate=dropout)))


def attention_block(
    branch: SelfAttention,
    *,
    n_tokens: int,
    d_model: int,
    dropout: Scale = 0.0,
    form: Form = "refined",
    finite_width: bool = True,
    closure: Closure = DEFAULT_CLOSURE,
) -> Component:
    """Return attention with its output matrix, followed by dropout.

    Args:
        branch, n_tokens, d_model, finite_width, closure: See :class:`Attention`.
        dropout: Rate on the output.
        form: As for :class:`Attention`; the published tables of blocks use ``"leading"``.
    """
    attention = Attention(
        branch=branch, n_tokens=n_tokens, d_model=d_model, form=form, finite_width=finite_width, closure=closure
    )
    return Chain((attention, Dropout(rate=dropout)))


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """The mean over tokens, or the first of them: one vector a sequence, whose ``p`` equals ``q``.

    Args:
        kind: ``"mean"`` or ``"first"``.
        n_tokens: Number of tokens pooled.
    """

    kind: str
    n_tokens: int

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "first"):
            raise SpecError(f"Pooling.kind must be 'mean' or 'first'; got {self.kind!r}")

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        n = self.n_tokens
        q = (x.q + (n - 1) * x.p) / n if self.kind == "mean" else x.q
        return TokenState(q=q, p=q, mean=x.mean)

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`; averages over tokens and their pairs."""
        if self.kind == "mean":
            return GradientState(J=g.J / self.n_tokens**2, K=g.J / self.n_tokens**2)
        return GradientState(J=g.J / self.n_tokens, K=0.0 * g.J)


def head_map(
    head: Head,
    *,
    d_model: int,
    n_outputs: int,
    n_tokens: int,
    stem: TokenStem | None = None,
    form: Form = "refined",
) -> Component:
    """Return the head as a component from tokens to logits.

    Args:
        head: The head.
        d_model, n_outputs, n_tokens: Sizes.
        stem: The stem whose token table a tied head shares. What the tokens still know of their own row of the table
            is neglected.
        form: Of the final norm.
    Raises:
        SpecError: for a tied head without a stem.
    """
    scale: Any = head.scale
    if head.tied:
        if stem is None:
            raise SpecError("a tied head needs the stem whose token table it shares")
        scale = stem.token * d_model**0.5
    parts: list[Component] = []
    if head.norm is not None:
        parts.append(NormMap(norm=head.norm, d_model=d_model, form=form))
    if head.pooling != "none":
        parts.append(Pooling(kind=head.pooling, n_tokens=n_tokens))
    parts.append(Linear(scale=scale * head.multiplier, ratio=n_outputs / d_model))
    return Chain(tuple(parts))
