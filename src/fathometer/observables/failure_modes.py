r"""Two ways to be untrainable at initialisation: all tokens become one, or attention picks its keys at random.

*Rank collapse*: the cosine between tokens reaches one with depth. Stronger skips cure it. *Entropy collapse*: the
scores spread so much that a query attends to the few keys its random weights prefer. In the random energy model this
is condensation, at

.. math:: b = \sqrt{\frac{v}{2 \ln n}} = \frac{\beta}{\beta_c} > 1, \qquad \beta = \frac{\sigma_{QK}}{\sqrt{\ln n}},
          \qquad \beta_c = \sqrt{\frac{2}{\tilde q(\tilde q - \tilde p)}},

and the published statement is that no skip cures it. What is left is the trainable region. For a finite number of
tokens the border is a crossover; criteria on participation or entropy say where. In our training check on 16 tokens
(``failure-modes/training``) strong skips did cure it: the label says how attention starts, not that nothing can be
learned.

Source: Giorlandino and Goldt, arXiv:2505.24333. Labels and thresholds are ours: the paper's could not be confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure, condensation
from fathometer.errors import DomainError, SpecError, nearest
from fathometer.propagation import Attending, Index, Moments, check_moments, propagate_ends
from fathometer.spec import SelfAttention, Transformer, batch_shape, with_field

FloatArray = NDArray[np.float64]

MODES = ("trainable", "rank collapse", "entropy collapse")
ENTROPY_CRITERIA = ("condensation", "participation", "entropy")


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Where trainable ends.

    Args:
        entropy: What marks entropy collapse: ``"condensation"`` (b above ``threshold``), ``"participation"`` (``E sum
            A^2`` above it) or ``"entropy"`` (entropy over ``ln n`` below it).
        threshold: By default 1, 0.1 and 0.5 respectively.
        anywhere: Whether any layer counts, or the first attention alone.
        rank: Rank collapse is a cosine above ``1 - rank`` after the last block.
    """

    entropy: str = "condensation"
    threshold: float | None = None
    anywhere: bool = False
    rank: float = 0.01

    def __post_init__(self) -> None:
        if self.entropy not in ENTROPY_CRITERIA:
            raise SpecError(f"there is no criterion {self.entropy!r}{nearest(self.entropy, ENTROPY_CRITERIA)}")
        if not 0 < self.rank < 1:
            raise DomainError(f"rank must lie in (0, 1); got {self.rank}", value=self.rank)
        if self.threshold is not None and not self.threshold > 0:
            raise DomainError(f"threshold must be positive; got {self.threshold}", value=self.threshold)

    @property
    def limit(self) -> float:
        """The threshold in force."""
        defaults = {"condensation": 1.0, "participation": 0.1, "entropy": 0.5}
        return defaults[self.entropy] if self.threshold is None else self.threshold


@dataclass(frozen=True, kw_only=True)
class FailureModes:
    """How every point of a grid fails, or that it does not; arrays of the batch shape.

    Attributes:
        mode: One of :data:`MODES`; entropy collapse first where both hold. A stream that overflows is judged by its
            last finite block, one that vanishes is ``"unknown"``.
        cosine: p/q after the last block.
        condensation, participation, entropy: b, ``E sum A^2`` and entropy over ``ln n`` of the first attention, or the
            most collapsed over all layers (criteria with ``anywhere``).
        condensed_layers: Number of attention layers with b above one.
        trainable_depth: Blocks before the cosine passes ``1 - rank`` for the first time; the depth of the spec where
            it never does.
        log_gradient: ln J_0/J_L of isotropic output gradients.
        criteria: What was applied.
        status: ``"ok"``, ``"overflow"`` or ``"vanished"``.
    """

    mode: NDArray[np.str_]
    cosine: FloatArray
    condensation: FloatArray
    participation: FloatArray
    entropy: FloatArray
    condensed_layers: NDArray[np.int64]
    trainable_depth: NDArray[np.int64]
    log_gradient: FloatArray
    criteria: Criteria
    status: NDArray[np.str_]


def failure_modes(
    spec: Transformer,
    *,
    n_tokens: int,
    q: Any = 1.0,
    cosine: Any = 0.03,
    criteria: Criteria | None = None,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> FailureModes:
    """Label every point of a grid of specs as trainable, rank-collapsed or entropy-collapsed.

    Args:
        spec: The transformer; fields may be arrays. Causal masks are dropped: late positions obey the same theory.
        n_tokens: Number of tokens; where most are padding, the number that are seen.
        q, cosine: Tokens at the first block. Random embeddings have a cosine near zero, text about 0.03.
        criteria: Where trainable ends.
        closure: How the softmax is averaged; ``RandomEnergy`` gives the published asymptotic theory.
    Returns:
        Labels and the numbers behind them. Cost: one pass over the depth, see :func:`propagate_ends`.
    Raises:
        DomainError: for fewer than two tokens, or moments no tokens have.
        SpecError: for a spec without attention.
    """
    if n_tokens < 2:
        raise DomainError(
            f"attention over one token cannot fail; n_tokens must be >= 2, got {n_tokens}", value=n_tokens
        )
    rules = criteria or Criteria()
    if not any(isinstance(s.branch, SelfAttention) for block in spec.blocks for s in block.sublayers):
        raise SpecError("this spec has no attention")
    averaging = as_closure(closure)
    start = np.asarray(q, dtype=np.float64)
    shape = np.broadcast_shapes(batch_shape(spec), start.shape, np.shape(cosine))
    seen = _Gathered(shape or (1,), spec, n_tokens, averaging, rules)
    ends = propagate_ends(
        spec.bidirectional(), n_tokens=n_tokens, q=start, p=cosine * start, closure=averaging, watch=seen.watch
    )
    with np.errstate(invalid="ignore"):
        final = ends.p / ends.q
    condensation, participation, entropy = (
        x.reshape(shape) for x in (seen.condensation, seen.participation, seen.entropy)
    )
    values = {"condensation": condensation, "participation": participation, "entropy": -entropy}
    limit = -rules.limit if rules.entropy == "entropy" else rules.limit
    mode = np.where(seen.collapsed.reshape(shape), MODES[1], MODES[0])
    mode = np.where(values[rules.entropy] > limit, MODES[2], mode)
    mode = np.where(ends.status == "vanished", "unknown", mode)
    return FailureModes(
        mode=mode,
        cosine=final,
        condensation=condensation,
        participation=participation,
        entropy=entropy,
        condensed_layers=seen.condensed.reshape(shape),
        trainable_depth=seen.depth.reshape(shape),
        log_gradient=ends.gradient_log(),
        criteria=rules,
        status=ends.status,
    )


class _Gathered:
    """What a run over the depth leaves behind, filled part by part."""

    def __init__(
        self, shape: tuple[int, ...], spec: Transformer, n_tokens: int, closure: Closure, criteria: Criteria
    ) -> None:
        self._n_tokens, self._closure, self._criteria = n_tokens, closure, criteria
        counts = [len(block.sublayers) for block in spec.layers()]
        self._block_of = {int(end) - 1: block for block, end in enumerate(np.cumsum(counts))}
        self.condensation = np.full(shape, -np.inf)
        self.participation = np.full(shape, -np.inf)
        self.entropy = np.full(shape, np.inf)
        self.condensed = np.zeros(shape, dtype=np.int64)
        self.depth = np.full(shape, len(counts), dtype=np.int64)
        self.collapsed = np.zeros(shape, dtype=np.bool_)

    def watch(self, index: Index, half: int, known: Attending | None, stream: Moments) -> None:
        """See :func:`fathometer.propagation.propagate_ends`."""
        if known is not None:
            b = condensation(known.variance, self._n_tokens)
            self.condensed[index] += b > 1
            if self._criteria.anywhere or np.all(np.isneginf(self.condensation[index])):
                self.condensation[index] = np.maximum(self.condensation[index], b)
                self.participation[index] = np.maximum(self.participation[index], known.statistics.y2)
                mean = self._closure.statistics(self._n_tokens, known.variance, 0.0 * known.variance).entropy
                self.entropy[index] = np.minimum(self.entropy[index], mean / np.log(self._n_tokens))
        block = self._block_of.get(half)
        if block is not None:
            finite = np.isfinite(stream.q)
            collapsed = finite & (stream.p >= (1 - self._criteria.rank) * stream.q)
            self.depth[index] = np.where(collapsed, np.minimum(self.depth[index], block), self.depth[index])
            self.collapsed[index] = np.where(finite, collapsed, self.collapsed[index])


def critical_skip_scale(
    spec: Transformer,
    depths: Sequence[int],
    *,
    n_tokens: int,
    q: float = 1.0,
    cosine: float = 0.03,
    rank: float = 0.01,
    field: str = "attention.skip_scale",
    low: float = 1e-3,
    high: float = 1e4,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> FloatArray:
    """Return the weakest skip that keeps a stack of every depth out of rank collapse.

    The cosine after the last block falls with the skip scale; it is bisected in its logarithm, for all points of the
    spec's grid together.

    Args:
        spec: The transformer; fields other than ``field`` may be arrays.
        depths: Numbers of blocks.
        n_tokens, q, cosine: Tokens at the first block.
        rank: Rank collapse is a cosine above ``1 - rank``.
        field: What is solved for.
        low, high: Range searched.
        closure: How the softmax is averaged.
    Returns:
        Shape ``(len(depths), *batch)``: ``low`` where even that does not collapse, infinite where even ``high`` does
        (the MLP alone collapses tokens).
    Raises:
        DomainError: for a range that is empty, or a stream that overflows before an answer is found.
    """
    if not 0 < low < high < np.inf:
        raise DomainError(f"the range must satisfy 0 < low < high; got [{low}, {high}]", value=(low, high))
    if not len(depths):
        raise DomainError("depths must not be empty")
    Criteria(rank=rank)
    check_moments(n_tokens, q, cosine * q)
    shape = batch_shape(spec)
    out = []
    for depth in depths:
        stack = spec.with_depth(int(depth))

        def collapses(log_scale: FloatArray, stack: Transformer = stack) -> NDArray[np.bool_]:
            described = with_field(stack, field, np.exp(log_scale) if shape else float(np.exp(log_scale)))
            ends = propagate_ends(
                described.bidirectional(), n_tokens=n_tokens, q=q, p=cosine * q, closure=as_closure(closure)
            )
            if not np.all(np.isfinite(ends.q)):
                worst = float(np.exp(np.max(log_scale)))
                raise DomainError(
                    f"the stream overflows in {stack.n_layers} blocks with {field} {worst:g}", value=worst
                )
            return np.asarray(ends.p >= (1 - rank) * ends.q)

        below, above = np.full(shape, np.log(low)), np.full(shape, np.log(min(max(1.0, low), high)))
        never, always = ~collapses(below), collapses(above)
        while np.any(always & (above < np.log(high))):  # no stronger than needed: streams without a norm may overflow
            below, above = (
                np.where(always, above, below),
                np.where(always, np.minimum(above + np.log(2), np.log(high)), above),
            )
            always = collapses(above)
        for _ in range(int(np.ceil(np.log2((np.log(high) - np.log(low)) / 1e-7)))):
            middle = (below + above) / 2
            fails = collapses(middle)
            below, above = np.where(fails, middle, below), np.where(fails, above, middle)
        out.append(np.where(always, np.inf, np.where(never, low, np.exp((below + above) / 2))))
    return np.stack(out)


def attention_beta(branch: SelfAttention, n_tokens: int, *, context: int | None = None) -> Any:
    r"""Return ``beta = sigma_QK / sqrt(ln n)`` of an attention layer.

    Args:
        branch: Its scales; ``query * key * score_multiplier`` is sigma_QK.
        n_tokens: Keys that a query sees: the context, less padding, or a position under a causal mask.
        context: Longest context of the model, if longer sequences are refused.
    Raises:
        DomainError: for a single key, or more keys than the model has positions.
        SpecError: if queries and keys are normalised, so that no temperature belongs to their weights.
    """
    if n_tokens < 2:
        raise DomainError(f"one key has no temperature; n_tokens must be >= 2, got {n_tokens}", value=n_tokens)
    if context is not None and n_tokens > context:
        raise DomainError(f"{n_tokens} tokens exceed the model's {context} positions", value=n_tokens)
    if branch.qk_norm:
        raise SpecError("queries and keys are normalised: their weight scales set no temperature")
    return branch.query * branch.key * branch.score_multiplier / np.sqrt(np.log(n_tokens))


def condensing_context(variance: Any) -> Any:
    """Return the number of keys below which attention at a score variance is condensed, ``exp(v / 2)``.

    Raises:
        DomainError: for a negative variance.
    """
    if np.any(np.asarray(variance) < 0):
        raise DomainError(f"a variance must not be negative; got {variance}", value=variance)
    return np.exp(np.asarray(variance, dtype=np.float64) / 2)
