r"""Cross attention on moments: tokens of a decoder read a memory of other tokens.

With moments :math:`(q_x, p_x)` of the ``n`` normed tokens that ask and :math:`(q_m, p_m)` of the ``N`` tokens of the
memory, scores have covariance :math:`\sigma_{QK}^2 H_{ab} M_{cd}`, hence

.. math:: v = \sigma_{QK}^2\, q_x (q_m - p_m), \qquad c = p_x / q_x

for the variance and the correlation of two rows, over ``N`` keys. Values come from the memory. Gradients go two ways:
to the tokens that ask, through the scores alone; to the memory, through values and keys. Dropout on attention weights
and finite N as in self-attention.

Source: the leading order, Kedia et al., arXiv:2403.09635, and, for full Gram matrices without gradients to the memory,
the footnote on encoder-decoders in Dinan, Yaida and Zhang, arXiv:2304.02034; the transfer matrices at finite numbers of
tokens, derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fathometer.attention import Closure, UniformLargeN
from fathometer.errors import NotCoveredError
from fathometer.propagation.branch_maps import (
    Attending,
    Moments,
    attention_bias,
    dropout_variance,
    effective_coupling,
    row_moments,
)
from fathometer.spec import CrossAttention


class Memory(NamedTuple):
    """What a decoder attends to: moments of its tokens, behind the encoder's last norm, and their number.

    ``width_ratio`` is the decoder's width over the memory's: gradients are mean squares over coordinates.
    """

    moments: Moments
    n_tokens: int
    width_ratio: float = 1.0


def check_closure(closure: Closure) -> None:
    """Refuse a closure that is stated for self-attention only."""
    if isinstance(closure, UniformLargeN):
        raise NotCoveredError(
            "the published large-n average is stated for self-attention; use Uniform() with cross attention"
        )


@dataclass(frozen=True)
class CrossAttentionMap:
    """Cross attention acting on the moments of the tokens that ask.

    Row correlations below ``-1/(N-1)``, possible for fewer tokens than keys, count as that one.
    """

    branch: CrossAttention
    n_tokens: int
    closure: Closure
    memory: Memory

    def __post_init__(self) -> None:
        check_closure(self.closure)

    @property
    def dropout_variance(self) -> Any:
        """Variance that dropout gives every attention weight, relative to its square."""
        return dropout_variance(self.branch.attention_dropout)

    def inspect(self, x: Moments, *, entropy: bool = False) -> Attending:
        """Return what the maps below need of the normed tokens."""
        m = self.memory.moments
        coupling = effective_coupling(self.branch, x.q)
        variance, correlation = row_moments(x, coupling * np.maximum(m.q - m.p, 0.0))
        statistics = self.closure.statistics(self.memory.n_tokens, variance, correlation, entropy=entropy)
        return Attending(statistics, variance, coupling)

    def forward(self, x: Moments, known: Attending) -> Moments:
        """Map the moments of the normed tokens to those of the branch output, which are those of averaged values."""
        b, m = self.branch, self.memory.moments
        gain, bias = (b.value * b.output) ** 2, attention_bias(b)
        spread = m.q - m.p
        own = m.p + (spread + self.dropout_variance * m.q) * known.statistics.y2
        return Moments(gain * own + bias, gain * (m.p + spread * known.statistics.y12) + bias)

    def transfer(self, x: Moments, known: Attending) -> list[list[Any]]:
        r"""Return the transfer matrix from gradients at the branch output to gradients at the normed tokens.

        .. math:: \sigma_{OV}^2 \sigma_{QK}^2 (q_m - p_m)\, \mathrm{diag}\bigl((q_m - p_m + \lambda q_m) S,
                  (q_m - p_m) S_{12}\bigr)
        """
        own, shared = self._score_weights(known)
        spread = self.memory.moments.q - self.memory.moments.p
        return [[own * spread, 0.0], [0.0, shared * spread]]

    def to_memory(self, x: Moments, known: Attending) -> list[list[Any]]:
        r"""Return the transfer matrix from gradients at the branch output to gradients at the memory's tokens.

        .. math:: \frac nN \sigma_{OV}^2 \begin{pmatrix}
                  Y_2 + k & (n-1)(Y_{12} + k_{12}) \\
                  \frac{1 - Y_2 - k}{N-1} & \frac{(n-1)(1 - Y_{12} - k_{12})}{N-1} \end{pmatrix}, \qquad
                  k = \sigma_{QK}^2 (q_m - p_m) q_x S, \quad k_{12} = \sigma_{QK}^2 (q_m - p_m) p_x S_{12}

        without dropout, and times the ratio of widths.
        """
        n, keys = self.n_tokens, self.memory.n_tokens
        gain = (self.branch.value * self.branch.output) ** 2
        y2, y12 = known.statistics.y2, known.statistics.y12
        own, shared = self._score_weights(known)
        own, shared = own * x.q, shared * x.p
        share = self.memory.width_ratio * n / keys
        apart = share / (keys - 1) if keys > 1 else 0.0
        return [
            [share * (gain * (1 + self.dropout_variance) * y2 + own), share * (n - 1) * (gain * y12 + shared)],
            [apart * (gain * (1 - y2) - own), apart * (n - 1) * (gain * (1 - y12) - shared)],
        ]

    def _score_weights(self, known: Attending) -> tuple[Any, Any]:
        """Return the gradient through the scores per unit overlap, for one query and for two."""
        m, statistics = self.memory.moments, known.statistics
        weight = (self.branch.value * self.branch.output) ** 2 * known.coupling
        spread = m.q - m.p
        noisy = spread + self.dropout_variance * m.q
        return weight * noisy * statistics.score, weight * spread * statistics.score_pair
