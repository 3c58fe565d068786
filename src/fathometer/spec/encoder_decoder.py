"""An encoder, and a decoder whose cross attention reads the encoder's output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fathometer.errors import SpecError
from fathometer.spec.branches import CrossAttention
from fathometer.spec.norms import LayerNorm, Norm
from fathometer.spec.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder:
    """Two stacks: the memory is the encoder's output behind ``memory_norm``, and every decoder layer reads it.

    Args:
        encoder: A stack without cross attention.
        decoder: A stack with cross attention to a memory of the encoder's width.
        memory_norm: The norm at the end of the encoder, ``None`` where there is none (as after post-norm).
    """

    encoder: Transformer
    decoder: Transformer
    memory_norm: Norm | None = field(default_factory=LayerNorm)
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            stack = getattr(self, name)
            if not isinstance(stack, Transformer):
                raise SpecError(f"EncoderDecoder.{name} must be a Transformer; got {type(stack).__name__}")
        if self.schema != 1:
            raise SpecError(f"EncoderDecoder.schema {self.schema!r} is not known to this version; accepted: 1")
        if self.encoder.has_cross_attention:
            raise SpecError("EncoderDecoder.encoder has cross attention; an encoder has no memory to attend to")
        if not self.decoder.has_cross_attention:
            raise SpecError("EncoderDecoder.decoder has no cross attention: nothing would read the encoder")
        for i, block in enumerate(self.decoder.blocks):
            for j, sublayer in enumerate(block.sublayers):
                branch = sublayer.branch
                if not isinstance(branch, CrossAttention):
                    continue
                width = memory_width(branch, self.decoder.d_model)
                if width != self.encoder.d_model:
                    raise SpecError(
                        f"decoder.blocks[{i}].sublayers[{j}] attends to a memory of width {width}, but the encoder's "
                        f"is {self.encoder.d_model}; set CrossAttention.d_memory={self.encoder.d_model}"
                    )

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout rate is positive."""
        return self.encoder.has_dropout or self.decoder.has_dropout

    def without_dropout(self) -> EncoderDecoder:
        """Return the same network in evaluation mode."""
        return replace(self, encoder=self.encoder.without_dropout(), decoder=self.decoder.without_dropout())

    def bidirectional(self) -> EncoderDecoder:
        """Return the same network without causal masks."""
        return replace(self, encoder=self.encoder.bidirectional(), decoder=self.decoder.bidirectional())


def memory_width(branch: CrossAttention, d_model: int) -> int:
    """Return the width of the memory that a cross attention in a decoder of width ``d_model`` reads."""
    return d_model if branch.d_memory is None else branch.d_memory
