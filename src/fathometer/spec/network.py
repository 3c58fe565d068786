"""What surrounds the blocks: the stem that makes tokens, the head that reads them, and all three as one network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fathometer.errors import SpecError
from fathometer.spec.arrays import Scale, checked, checked_flag, checked_rate
from fathometer.spec.norms import LayerNorm, Norm
from fathometer.spec.transformer import Transformer

POOLINGS = ("none", "mean", "first")


@dataclass(frozen=True, kw_only=True)
class TokenStem:
    """Sums of rows of lookup tables: one for the token, one for its position, one for its segment.

    Args:
        token, position, segment: Standard deviation of a table's entries; 0 where there is no such table.
        dropout: Rate of the dropout on the sum.
    """

    token: Scale
    position: Scale = 0.0
    segment: Scale = 0.0
    dropout: Scale = 0.0

    def __post_init__(self) -> None:
        for name in ("token", "position", "segment"):
            checked(self, name)
        checked_rate(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class PatchStem:
    """One linear map of every patch, a position table, and perhaps a class token in front.

    Args:
        patch: Weight scale ``std * sqrt(fan_in)`` of the map, dimensionless.
        position: Standard deviation of the position table's entries.
        class_token: Standard deviation of the class token's entries; ``None`` where there is none.
        dropout: Rate of the dropout on the sum.
    """

    patch: Scale
    position: Scale = 0.0
    class_token: Scale | None = None
    dropout: Scale = 0.0

    def __post_init__(self) -> None:
        for name in ("patch", "position"):
            checked(self, name)
        if self.class_token is not None:
            checked(self, "class_token")
        checked_rate(self, "dropout")


Stem: TypeAlias = TokenStem | PatchStem


@dataclass(frozen=True, kw_only=True)
class Head:
    """The final norm, and a linear map of each token.

    Args:
        scale: Weight scale ``std * sqrt(fan_in)`` of an untied map; ignored when tied.
        tied: Whether the map is the transposed token table of the stem.
        multiplier: Factor on the tokens in front of the map.
        pooling: What is read: every token (``"none"``), the tokens' ``"mean"``, or the ``"first"`` token.
        norm: The final norm, ``None`` where there is none.
    """

    scale: Scale = 1.0
    tied: bool = False
    multiplier: Scale = 1.0
    pooling: Literal["none", "mean", "first"] = "none"
    norm: Norm | None = field(default_factory=LayerNorm)

    def __post_init__(self) -> None:
        for name in ("scale", "multiplier"):
            checked(self, name)
        checked_flag(self, "tied")
        if self.pooling not in POOLINGS:
            raise SpecError(f"Head.pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A stem, the blocks and a head. Lives in Python only: files hold its ``trunk``."""

    stem: Stem
    trunk: Transformer
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        for name, kinds, accepted in (
            ("stem", (TokenStem, PatchStem), "a TokenStem or PatchStem"),
            ("trunk", Transformer, "a Transformer"),
            ("head", Head, "a Head"),
        ):
            part = getattr(self, name)
            if not isinstance(part, kinds):
                raise SpecError(f"Network.{name} must be {accepted}; got {type(part).__name__}")
        if self.trunk.has_cross_attention:
            raise SpecError("Network.trunk has cross attention, which reads a memory; build an EncoderDecoder")
        if self.head.tied and not isinstance(self.stem, TokenStem):
            raise SpecError("a tied head shares the token table of its stem; a PatchStem has none")
