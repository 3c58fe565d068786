r"""Exponents per block: how fast angles close or open, and gradients shrink or grow.

All are logarithms of factors of *squared* quantities over one block (half of them for the quantity itself):

* the **angle exponent**: of 1 - cosine between nearly equal tokens;
* the **token exponent**: of gradients that differ between tokens (incoherent ones), for many tokens;
* the **coherent exponent**: of a gradient that all tokens share;
* the **gradient exponent** of a stack: ``ln(J_0 / J_L) / L`` at its actual depth and number of tokens, for a read-out.

The first three belong to a fixed point of the block. With T the transfer matrix on (J, K) there, token and coherent
exponents are the logarithms of its eigenvalues; at collapse the token exponent *is* the angle exponent. Gradients of a
finite stack cross over from the token to the coherent mode at a depth ``ln(n) / (coherent - token)``.

With norm-preserving residuals of strengths a = alpha_A^2, m = alpha_M^2 and LayerNorm the collapsed state has

.. math:: e^{\lambda_a} = (1-a)\Bigl(1-m + \frac{m\,\kappa_1}{q_A}\Bigr), \qquad
          q_A = \frac{a\,\sigma_{OV}^2 + (1-a)\,m\,\kappa_0}{1 - (1-a)(1-m)}

with the kernels kappa_0 = E f^2, kappa_1 = E f'^2 of the MLP, weights included. For plain residual sums the norm grows
without end and exponents become powers of depth: :func:`power_laws`.

Source: the angle exponent and the finite-depth gradient exponent, Cowsik et al., arXiv:2403.02579; closed forms, the
    split into token and coherent exponents, and general norms are derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import SpecError, nearest
from fathometer.observables.fixed_points import (
    StableState,
    angle_rate,
    exists,
    fixed_norm,
    last_block,
    stable_state,
    starting_norm,
)
from fathometer.observables.growth import rates
from fathometer.observables.jacobian import backward
from fathometer.propagation import Moments, propagate, propagate_ends
from fathometer.spec import LayerNorm, RMSNorm, Transformer

FloatArray = NDArray[np.float64]

#: Read-out to the mean cosine between the output gradients of two tokens. A loss on one token has, averaged over
#: tokens, that of isotropic noise.
READOUTS = {"isotropic": 0.0, "one-token": 0.0, "pooled": 1.0}

STATES = ("collapsed", "stable")


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """Exponents per block at a fixed point; arrays of the spec's batch shape.

    Attributes:
        state: ``"collapsed"`` or ``"stable"``.
        angle: The angle exponent. It belongs to the collapsed state, whatever ``state``.
        token, coherent: Gradient exponents at the state.
        q, cosine: The state.
        n_tokens: Number of tokens.
        status: ``"ok"``, or ``"no fixed point"`` where the norm grows for ever or dies out; there the numbers are NaN.
    """

    state: str
    angle: FloatArray
    token: FloatArray
    coherent: FloatArray
    q: FloatArray
    cosine: FloatArray
    n_tokens: int
    status: NDArray[np.str_]

    @property
    def crossover_depth(self) -> FloatArray:
        """Blocks after which the coherent mode dominates isotropic gradients; infinite if it never does."""
        gap = self.coherent - self.token
        return np.asarray(np.where(gap > 0, np.log(self.n_tokens) / np.where(gap > 0, gap, 1.0), np.inf))


@dataclass(frozen=True, kw_only=True)
class PowerLaws:
    """Exponents in depth l at collapse, for plain residual sums.

    Attributes:
        angle: z in ``1 - cosine ~ l^z``.
        token, coherent: Powers of squared gradients, ``~ L^token`` for what differs between tokens and ``~
            L^coherent`` for what they share.
        velocity: Growth of q per block.
    """

    angle: float
    token: float
    coherent: float
    velocity: float


def exponents(
    spec: Transformer,
    *,
    n_tokens: int,
    closure: Closure | str = DEFAULT_CLOSURE,
    state: str = "collapsed",
) -> Exponents:
    """Return the exponents of the last block of a spec, repeated for ever.

    Args:
        spec: The transformer; fields may be arrays.
        n_tokens: Number of tokens.
        closure: How the softmax is averaged. At collapse attention is uniform, and every closure agrees.
        state: Which fixed point: ``"collapsed"``, or the ``"stable"`` one.
    Returns:
        The exponents. Cost: a handful of evaluations of one block; see :func:`stable_state` for the stable one.
    Raises:
        DomainError: for fewer than two tokens.
        SpecError: for an unknown state.

    >>> from fathometer.spec import preset, with_field
    >>> spec = with_field(preset("vit"), "residual_strength", 0.35)
    >>> bool(exponents(spec, n_tokens=196).angle < 0)  # tokens collapse
    True
    """
    if state not in STATES:
        raise SpecError(f"there is no state {state!r}{nearest(state, STATES)}")
    block = last_block(spec, n_tokens, closure)
    end = fixed_norm(block, 1.0)
    settles = exists(end)
    safe = np.where(settles, end, 1.0)
    angle = angle_rate(block, safe)
    if state == "collapsed":
        q, cosine, transfer = safe, np.ones(safe.shape), block.transfer(Moments(safe, safe))
    else:
        found: StableState = stable_state(spec, n_tokens=n_tokens, closure=closure)
        q, cosine, transfer = found.q, found.cosine, found.transfer
    token, coherent = gradient_modes(transfer)
    shape = np.broadcast_shapes(np.shape(angle), np.shape(token))

    def shown(value: FloatArray) -> FloatArray:
        return np.asarray(np.where(settles, np.broadcast_to(value, shape), np.nan))

    with np.errstate(divide="ignore"):
        logs = [np.log(np.maximum(rate, 0.0)) for rate in (angle, token, coherent)]  # rounding may pass zero
    return Exponents(
        state=state,
        angle=shown(logs[0]),
        token=shown(logs[1]),
        coherent=shown(logs[2]),
        q=shown(q),
        cosine=shown(cosine),
        n_tokens=n_tokens,
        status=np.where(np.broadcast_to(settles, shape), "ok", "no fixed point"),
    )


def gradient_modes(transfer: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the token and the coherent eigenvalue of transfer matrices of shape ``(2, 2, *batch)``.

    For many tokens the matrix is triangular, with the token rate in place (J, J) and the coherent one in (K, K); at
    finite n the eigenvalue that belongs to the larger of the two is the larger one.
    """
    (jj, jk), (kj, kk) = transfer
    middle, half = (jj + kk) / 2, (jj - kk) / 2
    root = np.sqrt(np.maximum(half**2 + jk * kj, 0.0))
    above = middle + root
    below = (jj * kk - jk * kj) / above
    return np.asarray(np.where(half > 0, above, below)), np.asarray(np.where(half > 0, below, above))


def gradient_exponent(
    spec: Transformer,
    *,
    n_tokens: int,
    cosine: Any,
    q: Any = None,
    readout: str = "isotropic",
    closure: Closure | str = DEFAULT_CLOSURE,
) -> FloatArray:
    """Return ``ln(J_0/J_L)/L``, the growth of squared gradients per block over the whole depth of a spec.

    Args:
        spec: The transformer, at the depth in question; fields may be arrays. Causal masks are dropped.
        n_tokens: Number of tokens.
        cosine: p/q of the tokens at the first block.
        q: Their second moment; by default the one the last block preserves for equal tokens, so that no transient of
            the norm enters.
        readout: ``"isotropic"`` noise at the output, a loss on ``"one-token"``, or a mean-``"pooled"`` loss.
        closure: How the softmax is averaged.
    Returns:
        The exponent in nats per block, shape of the batch. Cost: one pass over the depth for the whole grid.
    Raises:
        SpecError: for an unknown read-out.
        DomainError: if ``q`` is not given and the norm grows for ever.
    """
    if readout not in READOUTS:
        raise SpecError(f"there is no read-out {readout!r}{nearest(readout, READOUTS)}")
    start = starting_norm(spec, n_tokens, closure) if q is None else np.asarray(q, dtype=np.float64)
    ends = propagate_ends(
        spec.bidirectional(), n_tokens=n_tokens, q=start, p=cosine * start, closure=as_closure(closure)
    )
    return np.asarray(ends.gradient_log(READOUTS[readout]) / spec.n_layers)


def equal_token_gradients(
    spec: Transformer, *, n_tokens: int, q: Any, closure: Closure | str = DEFAULT_CLOSURE
) -> tuple[FloatArray, FloatArray]:
    """Return what :func:`fathometer.measurement.measure_exponents` sees: gradients at equal tokens, layer by layer.

    Args:
        spec: The transformer.
        n_tokens, q: Number of tokens and their second moment at the first block.
        closure: How the softmax is averaged; equal tokens are attended to uniformly under every closure.
    Returns:
        Logarithms of the squared gradient at every block border relative to the output, shape ``(n_layers + 1,
        *batch)``: of what differs between tokens, and of what all tokens share.
    """
    trajectory = propagate(spec.bidirectional(), n_tokens=n_tokens, q=q, p=q, closure=as_closure(closure))
    token, coherent = (
        backward(trajectory.transfer, alignment=alignment).log_norm[trajectory.borders]
        for alignment in (-1.0 / trajectory.n_others, 1.0)
    )
    return token, coherent


def power_laws(spec: Transformer) -> PowerLaws:
    r"""Return the powers of depth of the last block of a pre-norm spec with unit skips, at collapse.

    With v the growth of q per block at equal tokens, A the slope the MLP adds and S that of attention,

    .. math:: 1 - c \sim l^{A/v - 1}, \qquad J \sim L^{A/v}\ \text{(token)},\quad L^{(S + A)/v}\ \text{(coherent)} .

    Raises:
        SpecError: unless every branch has a LayerNorm or RMSNorm in front of it and every skip scale is one.
    """
    block = spec.bidirectional().blocks[-1]
    plain = all(
        isinstance(s.input_norm, (LayerNorm, RMSNorm))
        and s.output_norm is None
        and s.stream_norm is None
        and np.all(np.asarray(s.skip_scale) == 1.0)
        for s in block.sublayers
    )
    if not plain:
        raise SpecError("power laws need a LayerNorm or RMSNorm in front of every branch, and skip scales of 1")
    velocity, token, coherent = rates(block, 1.0)
    return PowerLaws(
        angle=token / velocity - 1, token=token / velocity, coherent=coherent / velocity, velocity=velocity
    )
