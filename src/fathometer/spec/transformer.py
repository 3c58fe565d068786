"""What a transformer is, as data: Transformer > Block > Sublayer > branch and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fathometer.errors import SpecError
from fathometer.spec.arrays import Scale, checked, checked_count, checked_rate, first_bad
from fathometer.spec.branches import MLP, Activation, Branch, CrossAttention, GatedMLP, SelfAttention
from fathometer.spec.norms import Norm


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    r"""One residual step of the stream.

    .. math:: x \leftarrow N_\mathrm{stream}\bigl(\mu\, x +
              \tau\, \mathrm{drop}(N_\mathrm{out}(B(N_\mathrm{in}(x))))\bigr)

    Where the norm sits is which of the three slots is filled: pre-norm fills ``input_norm``, post-norm
    ``stream_norm``, a sandwich ``input_norm`` and ``output_norm``.

    Args:
        branch: The map B.
        input_norm, output_norm, stream_norm: The norms, ``None`` where there is none.
        skip_scale: The factor mu on the stream.
        branch_scale: The factor tau on the branch.
        dropout: Rate of the dropout on what the branch adds; kept entries are divided by ``1 - dropout``.
    """

    branch: Branch
    input_norm: Norm | None = None
    output_norm: Norm | None = None
    stream_norm: Norm | None = None
    skip_scale: Scale = 1.0
    branch_scale: Scale = 1.0
    dropout: Scale = 0.0

    def __post_init__(self) -> None:
        checked(self, "skip_scale")
        checked(self, "branch_scale")
        checked_rate(self, "dropout")

    @classmethod
    def pre_norm(cls, branch: Branch, norm: Norm | None) -> Sublayer:
        """Return ``x + B(N(x))``."""
        return cls(branch=branch, input_norm=norm)

    @classmethod
    def post_norm(cls, branch: Branch, norm: Norm | None) -> Sublayer:
        """Return ``N(x + B(x))``."""
        return cls(branch=branch, stream_norm=norm)

    @classmethod
    def sandwich(cls, branch: Branch, norm: Norm | None) -> Sublayer:
        """Return ``x + N(B(N(x)))``."""
        return cls(branch=branch, input_norm=norm, output_norm=norm)

    def with_residual_strength(self, strength: Scale) -> Sublayer:
        r"""Return the sublayer with residual factors that preserve the norm of unit tokens.

        .. math:: \mu = \sqrt{1 - \alpha^2}, \qquad \tau = \alpha

        Args:
            strength: alpha in ``[0, 1]``, a number or an array.
        Raises:
            SpecError: outside that range.
        """
        alpha = np.asarray(strength, dtype=np.float64)
        bad = ~((alpha >= 0) & (alpha <= 1))
        if np.any(bad):
            raise SpecError(f"residual_strength must lie in [0, 1]; got {first_bad(alpha, bad)}")
        return replace(self, skip_scale=np.sqrt((1 - alpha) * (1 + alpha)), branch_scale=alpha)

    @property
    def residual_strength(self) -> Scale:
        """The alpha of norm-preserving residual factors.

        Raises:
            SpecError: if ``skip_scale^2 + branch_scale^2`` is not one.
        """
        total = np.asarray(self.skip_scale) ** 2 + np.asarray(self.branch_scale) ** 2
        if not np.allclose(total, 1.0, rtol=0, atol=1e-9):
            raise SpecError(
                "residual_strength belongs to skip_scale^2 + branch_scale^2 = 1; here the sum is "
                f"{first_bad(total, abs(total - 1) > 1e-9)}"
            )
        return self.branch_scale

    @property
    def is_attention(self) -> bool:
        """Whether the branch mixes tokens, those of the stream or of a memory."""
        return isinstance(self.branch, (SelfAttention, CrossAttention))


def branch_names(sublayers: Sequence[Sublayer]) -> list[str]:
    """Return ``"attention"``, ``"mlp"``, ``"attention_2"`` and so on for the sublayers of a block."""
    counts: dict[str, int] = {}
    names = []
    for sublayer in sublayers:
        kind = "attention" if sublayer.is_attention else "mlp"
        counts[kind] = counts.get(kind, 0) + 1
        names.append(kind if counts[kind] == 1 else f"{kind}_{counts[kind]}")
    return names


Placement = Callable[[Branch, Norm | None], Sublayer]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of ``repeat`` identically described (independently drawn) blocks."""

    sublayers: tuple[Sublayer, ...]
    repeat: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        if not self.sublayers:
            raise SpecError("Block.sublayers must not be empty")
        checked_count(self, "repeat")


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Weight scales ``std * sqrt(fan_in)`` shared by all layers, dimensionless. ``gate`` makes the MLP gated."""

    query: Scale
    key: Scale
    value: Scale
    output: Scale
    mlp_in: Scale
    mlp_out: Scale
    gate: Scale | None = None

    @classmethod
    def from_std(cls, std: float, *, d_model: int, d_mlp: int, gated: bool = False) -> Scales:
        """Return the scales of a model whose every block matrix has entries of standard deviation ``std``."""
        wide = std * float(np.sqrt(d_model))
        return cls(
            query=wide,
            key=wide,
            value=wide,
            output=wide,
            mlp_in=wide,
            mlp_out=std * float(np.sqrt(d_mlp)),
            gate=wide if gated else None,
        )


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A stack of blocks acting on tokens of width ``d_model``."""

    blocks: tuple[Block, ...]
    d_model: int
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise SpecError("Transformer.blocks must not be empty")
        checked_count(self, "d_model")
        if self.schema != 1:
            raise SpecError(f"Transformer.schema {self.schema!r} is not known to this version; accepted: 1")
        if self.n_layers > 10_000_000:
            raise SpecError(f"Transformer has {self.n_layers} blocks; at most 10000000 are accepted")

    @classmethod
    def uniform(
        cls,
        *,
        n_layers: int,
        d_model: int,
        n_heads: int,
        norm: Norm | None,
        scales: Scales,
        activation: Activation = "gelu",
        causal: bool = False,
        n_kv_heads: int | None = None,
        ratio: float = 4.0,
        placement: Placement = Sublayer.pre_norm,
        skip_scale: Scale = 1.0,
        branch_scale: Scale = 1.0,
        dropout: Scale = 0.0,
        attention_dropout: Scale = 0.0,
    ) -> Transformer:
        """Return ``n_layers`` blocks of self-attention followed by an MLP, all described alike.

        Args:
            n_layers: Number of blocks.
            d_model: Width of the stream.
            n_heads, n_kv_heads: Query heads; key and value heads when grouped.
            norm: The norm used in every slot the placement fills.
            scales: Weight scales; a ``gate`` scale makes the MLP gated.
            activation: Activation of the MLP.
            causal: Whether attention is causal.
            ratio: Hidden width of the MLP over ``d_model``.
            placement: ``Sublayer.pre_norm``, ``Sublayer.post_norm``, ``Sublayer.sandwich``, or your own.
            skip_scale, branch_scale: Residual factors mu and tau of every sublayer.
            dropout: Rate of the dropout on what every branch adds.
            attention_dropout: Rate of the dropout on attention weights.
        """
        if d_model % n_heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {d_model} and {n_heads}")
        attention = SelfAttention(
            query=scales.query,
            key=scales.key,
            value=scales.value,
            output=scales.output,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            causal=causal,
            attention_dropout=attention_dropout,
        )
        mlp: Branch
        if scales.gate is None:
            mlp = MLP(mlp_in=scales.mlp_in, mlp_out=scales.mlp_out, activation=activation, ratio=ratio)
        else:
            mlp = GatedMLP(
                gate=scales.gate, mlp_in=scales.mlp_in, mlp_out=scales.mlp_out, activation=activation, ratio=ratio
            )
        sublayers = tuple(
            replace(placement(branch, norm), skip_scale=skip_scale, branch_scale=branch_scale, dropout=dropout)
            for branch in (attention, mlp)
        )
        return cls(blocks=(Block(sublayers=sublayers, repeat=n_layers),), d_model=d_model)

    @property
    def n_layers(self) -> int:
        """Total number of blocks."""
        return sum(block.repeat for block in self.blocks)

    @property
    def is_causal(self) -> bool:
        """Whether any attention is causal, so that token positions are not alike."""
        return any(isinstance(s.branch, SelfAttention) and s.branch.causal for b in self.blocks for s in b.sublayers)

    @property
    def has_cross_attention(self) -> bool:
        """Whether any sublayer attends to a memory, which makes this the decoder of an encoder-decoder."""
        return any(isinstance(s.branch, CrossAttention) for b in self.blocks for s in b.sublayers)

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout rate is positive."""
        rates = (
            rate
            for block in self.blocks
            for s in block.sublayers
            for rate in (s.dropout, getattr(s.branch, "attention_dropout", 0.0))
        )
        return any(bool(np.any(np.asarray(rate) > 0)) for rate in rates)

    def layers(self) -> Iterator[Block]:
        """Yield the block of every layer in order; repeated blocks are the same object."""
        for block in self.blocks:
            for _ in range(block.repeat):
                yield block

    def with_depth(self, n_layers: int) -> Transformer:
        """Return the same architecture at another depth.

        A longer stack repeats its last block; a shorter one is cut from the end.
        """
        if isinstance(n_layers, bool) or not isinstance(n_layers, int) or n_layers < 1:
            raise SpecError(f"n_layers must be a positive integer; got {n_layers!r}")
        kept: list[Block] = []
        left = n_layers
        for block in self.blocks:
            if left == 0:
                break
            kept.append(replace(block, repeat=min(block.repeat, left)))
            left -= kept[-1].repeat
        if left:
            kept[-1] = replace(kept[-1], repeat=kept[-1].repeat + left)
        return replace(self, blocks=tuple(kept))

    def without_dropout(self) -> Transformer:
        """Return the same transformer in evaluation mode."""

        def keep_all(sublayer: Sublayer) -> Sublayer:
            branch = sublayer.branch
            if isinstance(branch, (SelfAttention, CrossAttention)):
                branch = replace(branch, attention_dropout=0.0)
            return replace(sublayer, branch=branch, dropout=0.0)

        return self.map_sublayers(keep_all)

    def bidirectional(self) -> Transformer:
        """Return the same transformer without causal masks: late positions standing in for all."""

        def unmask(sublayer: Sublayer) -> Sublayer:
            if isinstance(sublayer.branch, SelfAttention):
                return replace(sublayer, branch=replace(sublayer.branch, causal=False))
            return sublayer

        return self.map_sublayers(unmask)

    def map_sublayers(self, change: Callable[[Sublayer], Sublayer]) -> Transformer:
        """Return the transformer with ``change`` applied to every sublayer."""
        return replace(
            self,
            blocks=tuple(replace(block, sublayers=tuple(map(change, block.sublayers))) for block in self.blocks),
        )
