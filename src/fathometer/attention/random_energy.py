r"""Softmax rows of infinitely many keys: the random energy model.

With ``\ln n`` degrees of freedom a row is the Boltzmann law of a random energy model at inverse temperature

.. math:: b = \sqrt{v / (2 \ln n)}

in units of the critical one. Below one the weight spreads over ``n^{1 - b^2}`` keys; above one it condenses on a few,
with weights distributed by the Poisson-Dirichlet law of parameter ``m = 1/b``. Source: Giorlandino and Goldt,
arXiv:2505.24333. The limit is approached like ``1/\ln n``; for a finite number of tokens use
:class:`~fathometer.attention.exact.Exact`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import digamma, gammaln

from fathometer.attention.closure import AttentionStatistics, ValuePath, exact_value_path
from fathometer.attention.softmax_rows import check_scores
from fathometer.errors import DomainError


def critical_beta(q: Any, p: Any) -> Any:
    r"""Return the inverse temperature ``\sqrt{2/(q (q - p))}`` at which attention condenses; infinite at collapse.

    It is counted as in arXiv:2505.24333, where ``v = \beta^2 \ln n\, q (q - p)`` and ``q``, ``p`` are the moments of
    the tokens that attention receives.

    Raises:
        DomainError: if a second moment ``q`` is not positive and finite, or an overlap exceeds it.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if not np.all((q > 0) & np.isfinite(q)):
        raise DomainError(f"second moments must be positive and finite; got {q}", value=q)
    if not np.all(np.abs(p) <= q * (1 + 1e-9)):
        raise DomainError(f"overlaps must lie in [-q, q]; got {p}", value=p)
    room = q * np.maximum(q - p, 0.0)
    return np.where(room > 0, np.sqrt(2 / np.where(room > 0, room, 1.0)), np.inf)[()]


def condensation(variance: Any, n_keys: Any) -> Any:
    r"""Return ``b = \sqrt{v/(2 \ln n)}``, in units of the critical one; infinite for a single key.

    Raises:
        DomainError: if there is no key, or the variance is negative or not finite.
    """
    check_scores(n_keys, variance)
    log_n = np.log(np.asarray(n_keys, dtype=np.float64))
    return np.where(log_n > 0, np.sqrt(variance / (2 * np.where(log_n > 0, log_n, 1.0))), np.inf)[()]


def poisson_dirichlet_moment(k: Any, m: Any) -> Any:
    r"""Return ``E \sum_b A_b^k = \Gamma(k - m)/(\Gamma(k) \Gamma(1 - m))`` for weights of the Poisson-Dirichlet law.

    Args:
        k: The power, at least one.
        m: Parameter of the law, in [0, 1).

    Raises:
        DomainError: outside these ranges.

    >>> float(poisson_dirichlet_moment(2, 0.25))
    0.75
    """
    k, m = np.asarray(k, dtype=np.float64), np.asarray(m, dtype=np.float64)
    if not (np.all(k >= 1) and np.all((m >= 0) & (m < 1))):
        raise DomainError(f"moments exist for k >= 1 and 0 <= m < 1; got k={k}, m={m}", value=(k, m))
    return np.exp(gammaln(k - m) - gammaln(k) - gammaln(1 - m))


@dataclass(frozen=True)
class RandomEnergy:
    r"""Averages over rows of infinitely many keys at fixed ``b``.

    .. math:: Y_2 = 1 - m, \quad E[Y_2 - 2 Y_3 + Y_2^2] = \frac{m (1 - m)}3, \quad
              H = \psi(1) - \psi(1 - m) \qquad (m = 1/b < 1)

    and ``0``, ``0``, ``(1 - b^2) \ln n`` for ``b <= 1``. Rows do not overlap in either phase: ``Y12`` and its score
    weight vanish. ``Y_2`` and ``Y12`` are published in arXiv:2505.24333; the other two follow from the random energy
    model and the Poisson-Dirichlet law. Around ``b = 1``, within ``1/\sqrt{\ln n}``, the two expressions for ``H`` tend
    to zero and to infinity; both are cut at ``\sqrt{\ln n}``, within 9 % of the true entropy at ``b = 1`` for n from 64
    to 1e12.

    Forward, these are the published limits. Backward they are kept together with row normalisation: the smallest
    participation and the overlap of independent rows, ``1/n``, replace zero. Without condensation the value path is
    that of uniform attention, with ``(n-1) Y12 = 1 - 1/n``. True overlaps grow like ``n Y12 = e^{cv}`` at small ``b``,
    from keys that attract many queries; that is of order ``1/n`` in ``Y12`` and no part of the limit.
    """

    name: str = "random_energy"

    def statistics(
        self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True
    ) -> AttentionStatistics:
        """See :class:`~fathometer.attention.closure.Closure`; ``correlation`` only takes part in the shape.

        Raises:
            DomainError: if there is no token, the variance is negative or not finite, or the correlation not one.
        """
        check_scores(n_tokens, variance, correlation, rounding=1e-9)
        b = np.asarray(condensation(variance, n_tokens))
        b = np.broadcast_to(b, np.broadcast_shapes(b.shape, np.shape(correlation)))
        m = 1 / np.maximum(b, 1.0)
        zero = 0.0 * m
        return AttentionStatistics(
            y2=1 - m,
            y12=zero,
            score=m * (1 - m) / 3,
            score_pair=zero,
            entropy=_entropy(np.log(n_tokens), b, m) if entropy else None,
        )

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> ValuePath:
        """See :class:`~fathometer.attention.closure.Closure`."""
        floor = 1 / n_tokens
        kept = statistics._replace(y2=floor + (1 - floor) * statistics.y2, y12=floor + statistics.y12)
        return exact_value_path(n_tokens, kept)

    def others(self, n_tokens: int) -> int:
        """See :class:`~fathometer.attention.closure.Closure`."""
        return max(n_tokens - 1, 1)


def _entropy(log_n: Any, b: Any, m: Any) -> Any:
    spread = log_n * (1 - np.minimum(b, 1.0) ** 2)
    condensed = digamma(1.0) - digamma(1 - m)
    return np.maximum(spread, np.minimum(condensed, np.minimum(np.sqrt(log_n), log_n)))
