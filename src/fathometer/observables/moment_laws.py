r"""What the moments of a deep stack tend to: straight lines, hyperbolas and exponentials, as numbers.

Pre-norm. Behind the norm a block sees the cosine r alone, adds :math:`b_q(r)` to q and :math:`b_p(r)` to p, and r
settles where they have the ratio r:

.. math:: r^* = \frac{b_p(r^*)}{b_q(r^*)}, \qquad q_l \simeq q_0 + l\, b_q(r^*), \qquad
          \frac{K_l}{K_L} \simeq \left(\frac{q_L}{q_l}\right)^x, \quad x = \frac{G_K(r^*)}{b_q(r^*)}

with :math:`G_K/q` the gain of one block on the part K of gradients that tokens share. Forward growth is linear in
depth; with x near one, where a block passes back what it adds, gradients fall off hyperbolically. The mean square J
follows K up to a constant factor once K has built up. With
ReLU, values attended evenly and dropout at rate p, :math:`r^* = (1-p)\,(A r^* + F \kappa_1(r^*))/(A r^* + F)` for
branches of gains A and F: without dropout r tends to one, and it is dropout alone that keeps it below.

Post-norm. The norm sets q and r settles at a fixed point of the block, gradients in the direction that the block's
transfer matrix preserves, which fixes their alignment :math:`r_g^*`; their mean square then changes by

.. math:: \Lambda = \frac{1 + G_{attn}(r^*, r_g^*)}{1 + B_{attn}(r^*)} \cdot \frac{1 + G_{mlp}}{1 + B_{mlp}(r^*)}

a layer towards the input, exponentially in depth; B is what a branch adds and G its gain on gradients. ReLU has
:math:`G_{mlp} = B_{mlp}`, so that gradients vanish because attention passes on less than it adds whenever
:math:`r_g < r`. Where r and :math:`r_g` tend to one the exponent of ReLU is zero.

Source: the laws, A. Kedia et al., arXiv:2403.09635; their constants with exact softmax averages, derived in the
documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import DomainError, NotCoveredError
from fathometer.propagation import BlockMap, Moments, check_tokens
from fathometer.propagation.branch_maps import AttentionMap
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import LayerNorm, RMSNorm, SelfAttention, Transformer, refuse_arrays


@dataclass(frozen=True, kw_only=True)
class LinearGrowth:
    """The pre-norm law: ``q_l = q_0 + l * velocity``, shared gradients ``ln K_l/K_L = exponent * ln q_L/q_l``.

    Attributes:
        velocity: Second moment a block adds once the cosine has settled, per layer.
        cosine: Where it settles.
        exponent: Power of the hyperbola.
    """

    velocity: float
    cosine: float
    exponent: float

    def q(self, q: float, layer: float) -> float:
        """Return the second moment after ``layer`` blocks from a settled start at ``q``."""
        return q + layer * self.velocity

    def gradient_log(self, q: float, layer: float, n_layers: float) -> float:
        """Return ``ln K_l/K_L``: how the gradients that tokens share have grown from the output back to ``layer``."""
        return float(self.exponent * math.log(self.q(q, n_layers) / self.q(q, layer)))


def linear_growth(spec: Transformer, *, n_tokens: int, closure: Closure | str = DEFAULT_CLOSURE) -> LinearGrowth:
    """Return the law of a pre-norm stack that repeats the last block of ``spec``. Causal masks are dropped.

    Raises:
        NotCoveredError: unless every branch reads the stream through LayerNorm or RMSNorm, the skip factor is one, and
            no norm follows the sum.
        DomainError: if the block adds nothing.
        SpecError: for arrays in the spec.
    """
    check_tokens(n_tokens)
    refuse_arrays(spec, "the law of a deep stack")
    block, chosen = spec.bidirectional().blocks[-1], as_closure(closure)
    for s in block.sublayers:
        if not isinstance(s.input_norm, (LayerNorm, RMSNorm)) or s.stream_norm is not None or s.skip_scale != 1:
            raise NotCoveredError("linear growth of a stack that is not pre-norm with a skip scale of one")
    steps = [HalfLayer(s, n_tokens, chosen) for s in block.sublayers]

    def added(r: float) -> tuple[float, float]:
        parts = [step.forward(Moments(1.0, r))[1] for step in steps]
        return float(sum(part.q for part in parts)), float(sum(part.p for part in parts))

    if not added(0.5)[0] > 0:
        raise DomainError("the block adds nothing to the stream", value=0.0)

    def excess(r: float) -> float:
        own, shared = added(r)
        return shared / own - r

    top = 1 - 1e-9
    low = -1 / (n_tokens - 1) if n_tokens > 1 else 0.0
    cosine = 1.0 if excess(top) > -1e-9 else float(brentq(excess, low, top, xtol=1e-14))
    records = [step.forward(Moments(1.0, cosine))[2] for step in steps]
    passed = sum(float(step.entries(record)[1][1]) - 1 for step, record in zip(steps, records, strict=True))
    velocity, _ = added(cosine)
    return LinearGrowth(velocity=velocity, cosine=cosine, exponent=passed / velocity)


@dataclass(frozen=True, kw_only=True)
class ExponentialGradients:
    """The post-norm law: gradients change by ``exp(slope)`` a block towards the input.

    Attributes:
        slope: ``ln Lambda`` of the mean square of gradients, nats a block.
        cosine: Of two tokens, where it settles.
        alignment: Of the gradients of two tokens, where it settles.
    """

    slope: float
    cosine: float
    alignment: float


def exponential_gradients(
    spec: Transformer, *, n_tokens: int, closure: Closure | str = DEFAULT_CLOSURE
) -> ExponentialGradients:
    """Return the law of a post-norm stack that repeats the last block of ``spec``. Causal masks are dropped.

    Raises:
        NotCoveredError: unless LayerNorm or RMSNorm follows every residual sum.
        SpecError: for arrays in the spec.
    """
    check_tokens(n_tokens)
    refuse_arrays(spec, "the law of a deep stack")
    block = spec.bidirectional().blocks[-1]
    norm = block.sublayers[-1].stream_norm
    if not isinstance(norm, (LayerNorm, RMSNorm)) or any(
        not isinstance(s.stream_norm, (LayerNorm, RMSNorm)) for s in block.sublayers
    ):
        raise NotCoveredError("exponential gradients of a stack that is not post-norm")
    block_map = BlockMap(block, n_tokens, as_closure(closure))
    size = float(norm.gain) ** 2

    def excess(r: float) -> float:
        stream = block_map.forward(Moments(size, size * r))
        return float(stream.p / stream.q) - r

    cosine = _settled(excess, -1 / (n_tokens - 1) if n_tokens > 1 else 0.0)
    matrix = np.asarray(block_map.transfer(Moments(size, size * min(cosine, 1.0))), dtype=np.float64)
    values, vectors = np.linalg.eig(matrix)
    lead = int(np.argmax(values.real))
    vector = vectors[:, lead].real
    return ExponentialGradients(
        slope=math.log(values[lead].real), cosine=cosine, alignment=float(vector[1] / vector[0])
    )


def _settled(excess: Callable[[float], float], low: float) -> float:
    """Return the cosine that a stack starting at one half approaches: the next zero of the change of a block.

    Args:
        excess: Cosine behind a block less that in front of it.
        low: Lowest cosine tokens can have.
    """
    start = excess(0.5)
    # Zeros may lie close to one, where the angle is what changes by factors.
    ladder = 1 - np.geomspace(0.5, 1e-9, 200) if start > 0 else np.linspace(0.5, low, 200)
    before = float(ladder[0])
    for after in map(float, ladder[1:]):
        if excess(after) * start <= 0:
            return float(brentq(excess, before, after, xtol=1e-14))
        before = after
    return 1.0 if start > 0 else low


@dataclass(frozen=True, kw_only=True)
class SharpScores:
    """What strong scores do to one attention layer of unit value and output scales.

    Attributes:
        logit_variance: Score variance less the part all keys share, ``(1 - r) S``.
        participation: Effective number of keys a query attends to, ``1 / Y_2``.
        output_q, output_cosine: Second moment and cosine of the output, for unit tokens.
        gradient_gain: Mean square of gradients at the input over that at the output.
        relative_gain: The same over its value for attention that averages evenly, ``(1 + (n-1) r_g)/n``.
    """

    logit_variance: float
    participation: float
    output_q: float
    output_cosine: float
    gradient_gain: float
    relative_gain: float


def sharp_scores(
    score_variance: float,
    *,
    n_tokens: int,
    cosine: float,
    top_alignment: float = 0.0,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> SharpScores:
    r"""Return what scores of variance S do to tokens of unit second moment.

    .. math:: J = Y_2 + (n-1) Y_{12} r_g + S (1-r)\,s\,(2 - r) + (n-1)\, S\, (1-r)\, s'\, r\, r_g

    The last two terms grow like :math:`S e^{(1-r) S}/n` until one key takes all, at :math:`(1-r) S \simeq 2 \ln n`.

    Args:
        score_variance: S, of a single score.
        n_tokens: Number of tokens.
        cosine: r, of two tokens.
        top_alignment: r_g, of the gradients of two tokens at the output.
        closure: How the softmax is averaged.
    Raises:
        DomainError: for a negative variance or a cosine outside ``(-1/(n_tokens - 1), 1]``.
    """
    check_tokens(n_tokens)
    if not (math.isfinite(score_variance) and score_variance >= 0):
        raise DomainError(f"score_variance must be finite and >= 0; got {score_variance!r}", value=score_variance)
    low = -1 / (n_tokens - 1) if n_tokens > 1 else -1.0
    for name, value in (("cosine", cosine), ("top_alignment", top_alignment)):
        if not low < value <= 1:
            raise DomainError(f"{name} must lie in ({low:.4g}, 1]; got {value!r}", value=value)
    branch = SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, score_multiplier=math.sqrt(score_variance))
    attention, x = AttentionMap(branch, n_tokens, as_closure(closure)), Moments(1.0, float(cosine))
    known = attention.inspect(x)
    out, matrix = attention.forward(x, known), attention.transfer(x, known)
    gain = float(matrix[0][0] + matrix[0][1] * top_alignment)
    y2 = float(known.statistics.y2)
    return SharpScores(
        logit_variance=float(known.variance),
        participation=1 / y2 if y2 > 0 else math.inf,
        output_q=float(out.q),
        output_cosine=float(out.p / out.q),
        gradient_gain=gain,
        relative_gain=gain * n_tokens / (1 + (n_tokens - 1) * top_alignment),
    )
