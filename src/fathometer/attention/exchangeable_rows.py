r"""Two tokens that stand for any number of exchangeable ones.

A Gram matrix of n tokens that are all alike has two distinct entries, and so has everything attention makes of it. It
is carried by the 2 x 2 block of two tokens. On a block with diagonal d and off-diagonal s, and for values of diagonal q
and off-diagonal p,

.. math:: S_1: \; s + (d - s)\, Y, \qquad S_2: \; (q - p)(d - s)\, Y',

with Y the closure's ``Y2`` on the diagonal and ``Y12`` off it, and Y' its weights of the gradient through the scores.
Backwards, the pairing of gradients and perturbations counts the other tokens ``n - 1`` times. Derived in the
documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention.closure import Closure
from fathometer.attention.joint_rows import JointAverages
from fathometer.attention.mixing import Visibility
from fathometer.errors import DomainError

FloatArray = NDArray[np.float64]

_SMALLEST = 1e-300  # in place of the size of tokens of zeros, whose scores are all zero


@dataclass(frozen=True)
class ExchangeableRows:
    """A closure acting on the block of two tokens that stand for ``n_tokens``. Costs one call of the closure.

    Args:
        closure: How the softmax is averaged.
        n_tokens: Number of tokens that are all alike, at least two.
    """

    closure: Closure
    n_tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.n_tokens, bool) or not isinstance(self.n_tokens, int) or self.n_tokens < 2:
            raise DomainError(f"two tokens stand for n_tokens >= 2; got {self.n_tokens!r}", value=self.n_tokens)

    @property
    def name(self) -> str:
        """The name of the closure."""
        return self.closure.name

    def average(self, visible: Visibility, values: FloatArray, scores: FloatArray, coupling: float) -> JointAverages:
        """See :class:`JointRows`.

        Raises:
            DomainError: if there are not two tokens that are alike, or some token sees fewer keys than others.
        """
        if scores.shape != (2, 2) or visible.causal or visible.n_samples != 1:
            raise DomainError("two tokens of one sample without a causal mask stand for exchangeable ones")
        for gram in (values, scores):
            if abs(gram[0, 0] - gram[1, 1]) > 1e-9 * gram[0, 0]:
                raise DomainError(f"exchangeable tokens have equal mean squares; got {gram[0, 0]:g} and {gram[1, 1]:g}")
        q, p = scores[0, 0], scores[0, 1]
        found = self.closure.statistics(self.n_tokens, coupling * q * max(q - p, 0.0), p / max(q, _SMALLEST))
        sensitivity = (values[0, 0] - values[0, 1]) * _block(found.score, found.score_pair)
        entropy, participation = (np.full(2, float(x)) for x in (found.entropy, found.y2))
        mixing = ExchangeableMixing(_block(found.y2, found.y12), self.n_tokens)
        return JointAverages(mixing, ExchangeablePath(sensitivity, scores, self.n_tokens), entropy, participation)


class ExchangeableMixing:
    """S1 on blocks of shape ``(..., 2, 2)``."""

    def __init__(self, overlaps: FloatArray, n_tokens: int) -> None:
        self._overlaps = overlaps
        self._others = n_tokens - 1

    def forward(self, gram: FloatArray) -> FloatArray:
        """Return the block of the attention-averaged tokens."""
        own, shared = _entries(gram)
        return np.asarray(shared + (own - shared) * self._overlaps)

    def backward(self, gram: FloatArray) -> FloatArray:
        """Return the adjoint of :meth:`forward` on n tokens."""
        own, shared = _entries(gram)
        y2, y12 = self._overlaps[0]
        return _block(y2 * own + self._others * y12 * shared, (1 - y2) / self._others * own + (1 - y12) * shared)


class ExchangeablePath:
    """Gradients through the scores on blocks, per unit ``sigma_OV^2 sigma_QK^2``; as :class:`ScorePath`.

    Attributes:
        response: The factor of the query path, ``S2[C]``.
    """

    def __init__(self, sensitivity: FloatArray, scores: FloatArray, n_tokens: int) -> None:
        self._sensitivity, self._scores = sensitivity, scores
        self._others = n_tokens - 1
        self.response = sensitivity * (scores[0, 0] - scores[0, 1])

    def forward(self, tangent: FloatArray) -> FloatArray:
        """Map the block of a perturbation of the tokens to that of the output."""
        own, shared = _entries(tangent)
        return np.asarray(tangent * self.response + self._scores * (own - shared) * self._sensitivity)

    def backward(self, gradient: FloatArray) -> FloatArray:
        """Apply the adjoint on n tokens."""
        own, shared = _entries(gradient * self._scores * self._sensitivity)
        through_keys = own + self._others * shared
        return np.asarray(gradient * self.response + _block(through_keys, -through_keys / self._others))


def _entries(gram: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the diagonal and the off-diagonal entry, each of shape ``(..., 1, 1)``."""
    return gram[..., :1, :1], gram[..., :1, 1:]


def _block(own: Any, shared: Any) -> FloatArray:
    """Return the block with these entries; shapes ``(..., 1, 1)`` or numbers."""
    return np.asarray(own * np.eye(2) + shared * (1 - np.eye(2)))
