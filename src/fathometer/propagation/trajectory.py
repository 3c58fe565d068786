"""What propagation returns, in either representation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import DomainError
from fathometer.spec import Transformer

FloatArray = NDArray[np.float64]


class StreamOverflowError(DomainError):
    """The stream grows beyond what numbers hold; ``index`` is the sublayer or layer where it does."""


def vanished_gradient(half: int) -> DomainError:
    """Return the error for a gradient of zero at the input of sublayer ``half``."""
    return DomainError(
        f"the gradient vanishes in front of sublayer {half}: nothing passes it, as where its skip_scale and the scales "
        "of its branch are zero",
        value=0.0,
        index=(half,),
    )


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Moments at every sublayer border and the transfer matrices between them.

    Attributes:
        spec: The transformer that was propagated.
        n_tokens: Number of tokens.
        n_others: Weight of the other tokens in the pairing of gradients and perturbations, ``n_tokens - 1``.
        closure: Name of the closure.
        borders: Half-layer index at which each block starts, and the end; shape ``(n_layers + 1,)``.
        q, p: Moments of the stream at sublayer borders; shape ``(n_half + 1, *batch)``.
        added_q, added_p: Moments of what each sublayer's branch adds to the stream; shape ``(n_half, *batch)``.
        is_attention: Which sublayers mix tokens; shape ``(n_half,)``.
        transfer: Backward transfer matrices on (J, K); shape ``(n_half, 2, 2, *batch)``.
        attention: ``attention_entropy`` (nats), ``inverse_participation``, ``row_overlap`` and ``logit_variance`` of
            the attention sublayers, in order; each of shape ``(n_attention, *batch)``.
        to_memory: Matrices from (J, K) behind each sublayer to what its cross attention adds to the gradients of the
            memory, zero for other sublayers; shape as ``transfer``, ``None`` where there is no memory.
    """

    spec: Transformer
    n_tokens: int
    n_others: int
    closure: str
    borders: NDArray[np.int64]
    q: FloatArray
    p: FloatArray
    added_q: FloatArray
    added_p: FloatArray
    is_attention: NDArray[np.bool_]
    transfer: FloatArray
    attention: Mapping[str, FloatArray]
    to_memory: FloatArray | None = None

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.borders) - 1

    @property
    def status(self) -> NDArray[np.str_]:
        """``"ok"``, ``"overflow"`` or ``"vanished"`` (a stream of zeros) for every point of the batch."""
        fits = np.all(np.isfinite(self.q), axis=0)
        return np.where(np.any(self.q == 0, axis=0), "vanished", np.where(fits, "ok", "overflow"))
