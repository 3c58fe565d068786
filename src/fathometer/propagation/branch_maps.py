r"""What attention and MLPs do to the moments of exchangeable tokens, and their transfer matrices on (J, K).

A branch looks at the normed tokens once (``inspect``); its forward map and its transfer matrix share what it saw.

Sources: forward maps and the MLP transfer, Alekseev, arXiv:2604.11890v3; centred attention, Giorlandino and Goldt,
arXiv:2505.24333; exact finite-n attention transfer, the score path and centring at finite n, derived in the
documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fathometer.attention import (
    AttentionStatistics,
    Closure,
)
from fathometer.kernels import PairKernel
from fathometer.spec import MLP, CrossAttention, GatedMLP, SelfAttention

#: Beyond this a score variance is taken as overflow.
LARGEST_VARIANCE = 1e300
_SMALLEST = 1e-150  # second moment of tokens whose queries and keys are normalised


class Moments(NamedTuple):
    """Second moment of a token and overlap of two tokens."""

    q: Any
    p: Any


class Attending(NamedTuple):
    """What attention knows of normed tokens: its averages, the score variance and the coupling sigma_QK^2."""

    statistics: AttentionStatistics
    variance: Any
    coupling: Any


@dataclass(frozen=True)
class AttentionMap:
    """Self-attention acting on moments."""

    branch: SelfAttention
    n_tokens: int
    closure: Closure

    @property
    def dropout_variance(self) -> Any:
        """Variance that dropout gives every attention weight, relative to its square."""
        return dropout_variance(self.branch.attention_dropout)

    def inspect(self, x: Moments, *, entropy: bool = False) -> Attending:
        """Return what the maps below need of the normed tokens."""
        coupling = effective_coupling(self.branch, x.q)
        variance, correlation = row_moments(x, coupling * np.maximum(x.q - x.p, 0.0))
        statistics = self.closure.statistics(self.n_tokens, variance, correlation, entropy=entropy)
        return Attending(statistics, variance, coupling)

    def forward(self, x: Moments, known: Attending) -> Moments:
        """Map the moments of the normed tokens to those of the branch output."""
        b = self.branch
        spread = x.q - x.p
        gain, bias = (b.value * b.output) ** 2, attention_bias(b)
        y2, y12 = known.statistics.y2, known.statistics.y12
        if b.centred:
            share = gain * spread * np.maximum(y2 - y12, 0.0) / self.n_tokens
            others = self.n_tokens - 1
            return Moments(share * others, -share if others else 0.0 * share)
        own = x.p + (spread + self.dropout_variance * x.q) * y2
        return Moments(gain * own + bias, gain * (x.p + spread * y12) + bias)

    def transfer(self, x: Moments, known: Attending) -> list[list[Any]]:
        """Return the 2 x 2 transfer matrix from gradients at the branch output to gradients at the normed tokens."""
        matrix = self._uncentred_transfer(x, known)
        if not self.branch.centred:
            return matrix
        own, shared = self.before_centring(1.0, 0.0)  # and the opposite for (0, 1): a shared gradient is lost
        column = [row[0] * own + row[1] * shared for row in matrix]
        return [[entry, -entry] for entry in column]

    def before_centring(self, own: Any, shared: Any) -> tuple[Any, Any]:
        """Return (J, K) of gradients at the output whose mean over tokens has not been subtracted yet.

        Args:
            own, shared: J and K of gradients at the branch output.
        """
        if not self.branch.centred:
            return own, shared
        share = (own - shared) / self.n_tokens if self.n_tokens > 1 else 0.0 * own
        return self.closure.others(self.n_tokens) * share, -share

    def _uncentred_transfer(self, x: Moments, known: Attending) -> list[list[Any]]:
        statistics = known.statistics
        gain = (self.branch.value * self.branch.output) ** 2
        path = self.closure.value_path(self.n_tokens, statistics)
        own = path.jj + self.dropout_variance * statistics.y2
        if isinstance(statistics.score, float) and statistics.score == 0.0:
            return [[gain * own, gain * path.jk], [gain * path.kj, gain * path.kk]]
        others = self.n_tokens - 1
        spread = x.q - x.p
        s = known.coupling * (spread + self.dropout_variance * x.q) * statistics.score
        sc = known.coupling * spread * statistics.score_pair
        back = x.q * s / others if others else 0.0 * s
        return [
            [gain * (own + s * (2 * x.q - x.p)), gain * (path.jk + others * sc * x.p)],
            [gain * (path.kj - back), gain * (path.kk + sc * (x.q - 2 * x.p))],
        ]


@dataclass(frozen=True)
class MLPMap:
    """An MLP acting on moments."""

    branch: MLP
    kernel: PairKernel

    def inspect(self, x: Moments) -> Moments:
        """Return the moments of the pre-activation."""
        scale, bias = self.branch.mlp_in**2, self.branch.in_bias**2
        return Moments(scale * x.q + bias, scale * x.p + bias)

    def forward(self, x: Moments, z: Moments) -> Moments:
        """Map the moments of the normed tokens to those of the branch output."""
        out, bias = self.branch.mlp_out**2, self.branch.out_bias**2
        f = self.kernel
        return Moments(out * f.overlap(z.q, z.q, z.q) + bias, out * f.overlap(z.q, z.q, z.p) + bias)

    def transfer(self, x: Moments, z: Moments) -> list[list[Any]]:
        """Return the (diagonal) transfer matrix."""
        f = self.kernel
        scale = (self.branch.mlp_in * self.branch.mlp_out) ** 2
        return [
            [scale * f.slope_overlap(z.q, z.q, z.q), 0.0],
            [0.0, scale * f.slope_overlap(z.q, z.q, z.p)],
        ]


@dataclass(frozen=True)
class GatedMLPMap:
    """A gated MLP acting on moments."""

    branch: GatedMLP
    kernel: PairKernel

    def inspect(self, x: Moments) -> Moments:
        """Return the moments of the gate's pre-activation."""
        gate = self.branch.gate**2
        return Moments(gate * x.q, gate * x.p)

    def forward(self, x: Moments, z: Moments) -> Moments:
        """Map the moments of the normed tokens to those of the branch output."""
        f = self.kernel
        scale = (self.branch.mlp_in * self.branch.mlp_out) ** 2
        return Moments(scale * f.overlap(z.q, z.q, z.q) * x.q, scale * f.overlap(z.q, z.q, z.p) * x.p)

    def transfer(self, x: Moments, z: Moments) -> list[list[Any]]:
        """Return the (diagonal) transfer matrix."""
        f, gate = self.kernel, self.branch.gate**2
        scale = (self.branch.mlp_in * self.branch.mlp_out) ** 2
        return [
            [scale * (gate * f.slope_overlap(z.q, z.q, z.q) * x.q + f.overlap(z.q, z.q, z.q)), 0.0],
            [0.0, scale * (gate * f.slope_overlap(z.q, z.q, z.p) * x.p + f.overlap(z.q, z.q, z.p))],
        ]


def effective_coupling(branch: SelfAttention | CrossAttention, q: Any) -> Any:
    """Return ``sigma_QK^2``, the score variance per unit of token overlaps.

    With normalised queries and keys the weight scales drop out: the score covariance is that of unit tokens, so the
    coupling is the squared score multiplier over the squared second moment of a token. Tokens of zeros have scores of
    zero.
    """
    if isinstance(branch, SelfAttention) and branch.qk_norm:
        return branch.score_multiplier**2 / np.maximum(q, _SMALLEST) ** 2
    return (branch.query * branch.key * branch.score_multiplier) ** 2


def dropout_variance(rate: Any) -> Any:
    """Return the variance of inverted dropout's factor, ``p / (1 - p)``."""
    return rate / (1 - rate)


def row_moments(x: Moments, spread: Any) -> tuple[Any, Any]:
    """Return the variance of a row of scores and the correlation of two rows, zero where the tokens x are zeros.

    Args:
        x: Moments of the tokens that ask.
        spread: sigma_QK^2 times the spread of the tokens that are read.
    """
    variance = x.q * spread
    if np.max(variance, initial=0.0) <= LARGEST_VARIANCE and np.min(x.q, initial=np.inf) > 0:
        return variance, x.p / x.q
    # The stream overflows or has vanished, which is reported by whoever carries it, or a norm has gain 0.
    known = (variance <= LARGEST_VARIANCE) & (np.asarray(x.q) > 0)
    return np.where(known, variance, 0.0), np.where(known, x.p, 0.0) / np.where(known, x.q, 1.0)


def attention_bias(branch: SelfAttention | CrossAttention) -> Any:
    """Return what value and output biases add to every overlap; rows of attention sum to one."""
    return (branch.value_bias * branch.output) ** 2 + branch.output_bias**2
