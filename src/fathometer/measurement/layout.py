"""Which axis of a stream tensor counts tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fathometer.models.trace import Trace


@dataclass(frozen=True)
class Layout:
    """How stream tensors are laid out.

    Attributes:
        sequence_first: Whether tokens run along the first axis and samples along the second.
    """

    sequence_first: bool = False

    def arranged(self, stream: Tensor) -> Tensor:
        """Return a view of shape ``(batch, n_tokens, d_model)``; grids of tokens are flattened."""
        if self.sequence_first:
            return stream.transpose(0, 1)
        return stream if stream.ndim == 3 else stream.flatten(1, -2)

    def shared_shape(self, stream: Tensor) -> tuple[int, ...]:
        """Return the shape of a tensor that is one vector for all tokens of a sample."""
        if self.sequence_first:
            return (1, stream.shape[1], stream.shape[2])
        return (stream.shape[0], *(1,) * (stream.ndim - 2), stream.shape[-1])


def layout_of(block: nn.Module, stream: Tensor, trace: Trace) -> Layout:
    """Tell the layout from how many keys a query sees; where both axes have that length, from the module's own flag."""
    if stream.ndim != 3 or not trace.attention:
        return Layout()
    keys = trace.attention[0].n_keys
    first, second = stream.shape[:2]
    if first == second:
        heads = [m for m in block.modules() if isinstance(m, nn.MultiheadAttention)]
        return Layout(sequence_first=bool(heads) and not heads[0].batch_first)
    return Layout(sequence_first=keys == first and keys != second)
