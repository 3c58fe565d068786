r"""How gradients grow with depth: the class of a stack, its constants and how sure they are.

With :math:`\chi_l = J^{l+1,0}/J^{l,0}` the growth per block,

* **ordered** (chaotic): :math:`\chi_l \to \chi^* < 1` (:math:`> 1`); J is exponential with correlation length
  :math:`\xi = 1/|\ln\chi^*|`;
* **critical**: :math:`\chi_l - 1 \sim \zeta/l`; J is a power law, :math:`J \sim L^\zeta`;
* **bounded**: :math:`\chi_l \to 1` so fast that J tends to a constant;
* **subcritical**: :math:`\chi_l - 1 \sim l^{-b}`, 0 < b < 1; J is a stretched exponential, :math:`\ln J \sim
(L/\lambda)^{1-b}`.

The constants come in closed form for pre-norm stacks with LayerNorm or RMSNorm (critical at every weight scale) and
with saturating norms, DyT and Derf (subcritical, b = 1/2); everything else is fitted on a long run of the recursion,
with an error.

Sources: the classes, Doshi et al., arXiv:2111.12143, and Alekseev, arXiv:2604.11890v3; constants for general
    activations, finite token number and DyT, derived in the documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.kernels import activation_kernel
from fathometer.observables.jacobian import forward
from fathometer.propagation import propagate
from fathometer.propagation.exchangeable import without_memory
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    Derf,
    DyT,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
)

FloatArray = NDArray[np.float64]

#: ``(2 pi)^(-1/2) * integral of N'(x)^2`` per unit alpha: the large-q limit of ``sqrt(q) * E N'(u)^2``.
TAIL_CONSTANT = {DyT: 4 / 3 / math.sqrt(2 * math.pi), Derf: 2 / math.pi}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The growth class of a stack.

    Attributes:
        kind: ``"ordered"``, ``"chaotic"``, ``"critical"``, ``"subcritical"`` or ``"bounded"``.
        decay: Fitted b in ``chi_l - 1 ~ l^-b`` with its error; near 0 exponential, near 1 a power law.
        constants: Closed-form constants by name, empty where none is known. Critical: ``zeta`` (token gradients),
            ``zeta_coherent`` (shared gradients), ``velocity`` (dq/dl), ``cosine`` (limit). Subcritical: ``lambda``,
            ``lambda_infinite`` (no ``1/n`` terms), ``velocity``, ``cosine``, ``alignment_exponent`` (growth of K
            before it dies out). Exponential: ``chi``.
        fitted: The main constant (zeta, lambda or the correlation length) as the last half decade of the run shows
            it, and by how much it changed from the half decade before: it may still be on its way to the closed
            form, slowly so when critical.
        crossover: Block at which ``alpha^2 q`` passes one, for saturating norms; ``None`` otherwise.
        coherent_depth: Depth ratio ``L/l`` beyond which the mode shared by all tokens dominates J, for critical stacks.
        depth: Depth of the run the fit used.
    """

    kind: str
    decay: tuple[float, float]
    constants: dict[str, float]
    fitted: tuple[float, float]
    crossover: int | None
    coherent_depth: float | None
    depth: int

    @property
    def sentence(self) -> str:
        """One line for people."""
        value, error = self.fitted
        c = self.constants
        if self.kind == "bounded":
            return f"bounded: J tends to a constant, {value:.4g} at depth {self.depth}"
        if self.kind == "critical":
            closed = f", zeta = {c['zeta']:.4g}" if "zeta" in c else ""
            return (
                f"critical: J grows like a power of depth{closed}; the local exponent near depth {self.depth} is "
                f"{value:.4g} (changing by {error:.1g} per half decade)"
            )
        if self.kind == "subcritical":
            power = 0.5 if "lambda" in c else 1 - self.decay[0]
            closed = f", lambda = {c['lambda']:.4g}" if "lambda" in c else ""
            return (
                f"subcritical: ln J grows like (depth/lambda)^{power:.2g}{closed}; the local lambda near depth "
                f"{self.depth} is {value:.4g} (changing by {error:.1g} per half decade)"
            )
        return (
            f"{self.kind}: J changes by a factor {c['chi']:.5g} a block, "
            f"correlation length {value:.4g} +- {error:.2g} blocks"
        )


def growth(
    spec: Transformer,
    *,
    n_tokens: int,
    q: float,
    p: float,
    closure: Closure | str = DEFAULT_CLOSURE,
    depth: int = 10_000,
) -> Growth:
    """Classify how gradients grow when the last block of ``spec`` is repeated.

    Args:
        spec: The transformer, scalar fields. Causal masks are dropped: late positions stand in for all.
        n_tokens, q, p: Token number and moments at the first block.
        closure: How the softmax is averaged.
        depth: Length of the run that is fitted; b and the constants are read on its last decade. With dropout there
            are no closed forms and all constants are fitted.
    Returns:
        The class. Cost: one scalar prediction of ``depth`` blocks, about 25 ms per thousand in closed form.
    """
    long = spec.bidirectional().with_depth(depth)
    trajectory = propagate(long, n_tokens=n_tokens, q=q, p=p, closure=as_closure(closure))
    at = trajectory.borders
    log_apjn = forward(trajectory.transfer, trajectory.n_others).log_norm[at]
    block = long.blocks[-1]
    levels = trajectory.q[at]
    layers = np.arange(1.0, depth + 1)
    steps = np.diff(log_apjn)
    decay = _decay(layers, steps)
    constants = {} if spec.has_dropout else closed_form(block, n_tokens)
    kind = _kind(decay[0], float(steps[-1]))
    if "zeta" in constants:
        kind = "critical"
    elif "lambda" in constants:
        kind = "subcritical"
    if kind in ("ordered", "chaotic"):
        constants = {**constants, "chi": float(np.exp(np.mean(steps[-max(depth // 10, 1) :])))}
    return Growth(
        kind=kind,
        decay=decay,
        constants=constants,
        fitted=_fit(kind, decay[0], layers, log_apjn),
        crossover=_crossover(block, levels),
        coherent_depth=_coherent_depth(constants, n_tokens),
        depth=depth,
    )


def closed_form(block: Block, n_tokens: int | None = None) -> dict[str, float]:
    r"""Return the asymptotic constants of a pre-norm block with unit skips, or nothing where none are known.

    For LayerNorm and RMSNorm, with ``S`` the attention gain ``sigma_OV^2``, ``V`` and ``A`` the second moment and
    slope moment the MLP adds at a unit-normalised input, the limit cosine solves ``c = (S c + V(c)) / (S c +
    V(1))``, q grows at ``v = S c + V`` and

    .. math:: \zeta = A / v, \qquad \zeta_{coherent} = (S + A(c)) / v .

    For a norm that saturates at its gain, ``c`` inside is replaced by ``(2/pi) asin c`` and

    .. math:: \lambda = \frac{v}{4 C^2 (A + S/n)^2}, \qquad C = \alpha \times \text{the tail constant of the norm}.
    """
    norms = [s.input_norm for s in block.sublayers]
    plain = all(float(s.skip_scale) == 1.0 and s.output_norm is None and s.stream_norm is None for s in block.sublayers)
    if any(isinstance(s.branch, SelfAttention) and s.branch.centred for s in block.sublayers):
        return {}
    biased = any(
        float(getattr(s.branch, name, 0.0)) != 0
        for s in block.sublayers
        for name in ("in_bias", "out_bias", "value_bias", "output_bias")
    )
    if biased or not plain or any(isinstance(s.branch, GatedMLP) and s.input_norm is None for s in block.sublayers):
        return {}
    if all(isinstance(norm, (LayerNorm, RMSNorm)) for norm in norms):
        return _critical(block)
    if all(isinstance(norm, (DyT, Derf)) for norm in norms) and all(
        not (isinstance(norm, Derf) and norm.shift != 0) for norm in norms
    ):
        return _subcritical(block, n_tokens)
    return {}


def _critical(block: Block) -> dict[str, float]:
    cosine = _limit_cosine(block, lambda c: c)
    level, token, coherent = rates(block, cosine)
    return {
        "zeta": token / level,
        "zeta_coherent": coherent / level,
        "velocity": level,
        "cosine": cosine,
    }


def rates(block: Block, cosine: float) -> tuple[float, float, float]:
    """Return per block, for many tokens of a cosine under LayerNorm: growth of q, token and coherent slope times q."""
    level, _ = _added(block, cosine, cosine)
    return (level, *_slopes(block, cosine))


def _subcritical(block: Block, n_tokens: int | None) -> dict[str, float]:
    def inner(c: float) -> float:
        return 2 / math.pi * math.asin(min(c, 1.0))

    cosine = _limit_cosine(block, inner)
    level, _ = _added(block, inner(cosine), cosine)
    attention, rates, coherent = 0.0, 0.0, 0.0
    for s in block.sublayers:
        norm = s.input_norm
        assert isinstance(norm, (DyT, Derf))
        tail = float(norm.alpha) * TAIL_CONSTANT[type(norm)] * float(norm.gain) ** 2
        token, shared = _sublayer_slopes(s, inner(cosine))
        if isinstance(s.branch, SelfAttention):
            attention += tail * shared
        else:
            rates += tail * token
        coherent += float(norm.gain) ** 2 * shared / (math.pi / 2 * math.sqrt(max(1 - cosine**2, 1e-300)))
    finite = rates + (attention / n_tokens if n_tokens else 0.0)
    out = {
        "lambda": level / (4 * finite**2) if finite else math.inf,
        "lambda_infinite": level / (4 * rates**2) if rates else math.inf,
        "velocity": level,
        "cosine": cosine,
    }
    if cosine < 1:
        out["alignment_exponent"] = coherent / level
    return out


def _limit_cosine(block: Block, inner: Any) -> float:
    """Return the limit of p/q: the attracting root of c = added overlap / added square, 1 if there is no other."""

    def excess(c: float) -> float:
        level, overlap = _added(block, inner(c), c)
        return overlap / level - c if level > 0 else 0.0

    grid = 1 - np.concatenate([np.geomspace(1e-9, 0.5, 200), np.linspace(0.5, 1.0, 101)[1:]])
    values = np.array([excess(float(c)) for c in grid])
    if values[0] >= 0:
        return 1.0
    rising = np.flatnonzero(values > 0)
    if rising.size == 0:
        return 0.0
    i = int(rising[0])
    return float(brentq(excess, grid[i], grid[i - 1], xtol=1e-14))


def _added(block: Block, overlap: float, cosine: float) -> tuple[float, float]:
    """Return what a block adds to (q, p) at unit-normalised tokens of the given overlap, for many tokens."""
    level = shared = 0.0
    for s in block.sublayers:
        gain = float(getattr(s.input_norm, "gain", 1.0)) ** 2
        weight = float(s.branch_scale) ** 2
        branch = s.branch
        if isinstance(branch, SelfAttention):
            out = (float(branch.value) * float(branch.output)) ** 2 * gain * overlap
            level, shared = level + weight * out, shared + weight * out
            continue
        if isinstance(branch, CrossAttention):
            raise without_memory()
        f = activation_kernel(branch.activation)
        scale = (float(branch.mlp_in if isinstance(branch, MLP) else branch.gate)) ** 2 * gain
        out_scale = float(branch.mlp_out) ** 2
        if isinstance(branch, GatedMLP):
            out_scale *= float(branch.mlp_in) ** 2 * gain
        square = out_scale * float(f.overlap(scale, scale, scale))
        pair = out_scale * float(f.overlap(scale, scale, scale * overlap))
        if isinstance(branch, GatedMLP):
            pair *= overlap
        level, shared = level + weight * square, shared + weight * pair
    return level, shared


def _slopes(block: Block, overlap: float) -> tuple[float, float]:
    """Return the token and coherent slope sums of a block: attention enters the coherent one only."""
    token = coherent = 0.0
    for s in block.sublayers:
        gain = float(getattr(s.input_norm, "gain", 1.0)) ** 2
        own, shared = _sublayer_slopes(s, overlap)
        token += gain * own
        coherent += gain * shared
    return token, coherent


def _sublayer_slopes(s: Sublayer, overlap: float) -> tuple[float, float]:
    branch, weight = s.branch, float(s.branch_scale) ** 2
    gain = float(getattr(s.input_norm, "gain", 1.0)) ** 2
    if isinstance(branch, SelfAttention):
        return 0.0, weight * (float(branch.value) * float(branch.output)) ** 2
    if isinstance(branch, CrossAttention):
        raise without_memory()
    f = activation_kernel(branch.activation)
    if isinstance(branch, MLP):
        z = float(branch.mlp_in) ** 2 * gain
        scale = weight * (float(branch.mlp_in) * float(branch.mlp_out)) ** 2
        return scale * float(f.slope_overlap(z, z, z)), scale * float(f.slope_overlap(z, z, z * overlap))
    gate = float(branch.gate) ** 2
    z = gate * gain
    scale = weight * (float(branch.mlp_in) * float(branch.mlp_out)) ** 2
    own = scale * (gate * float(f.slope_overlap(z, z, z)) * gain + float(f.overlap(z, z, z)))
    pair = z * overlap
    shared = scale * (gate * float(f.slope_overlap(z, z, pair)) * gain * overlap + float(f.overlap(z, z, pair)))
    return own, shared


def _coherent_depth(constants: dict[str, float], n_tokens: int) -> float | None:
    """Return ``n^(1/(zeta_coherent - zeta))``, where the two modes of a critical stack contribute alike to J."""
    gap = constants.get("zeta_coherent", 0.0) - constants.get("zeta", 0.0)
    return float(n_tokens ** (1 / gap)) if gap > 0 else None


def _decay(layers: FloatArray, steps: FloatArray) -> tuple[float, float]:
    """Fit b in |ln chi_l| ~ l^-b on the last decade; the error is half the change between its two halves."""
    size = np.abs(np.expm1(steps))
    tail = (layers >= layers[-1] / 10) & (size > 1e-14)
    if np.count_nonzero(tail) < 8:
        return math.inf, 0.0
    x, y = np.log(layers[tail]), np.log(size[tail])
    middle = (x[0] + x[-1]) / 2
    halves = [np.polyfit(x[part], y[part], 1)[0] for part in (x <= middle, x > middle) if np.count_nonzero(part) > 3]
    slope = float(np.polyfit(x, y, 1)[0])
    error = abs(halves[-1] - halves[0]) / 2 if len(halves) == 2 else 0.0
    return -slope, float(error)


def _kind(decay: float, last: float) -> str:
    if decay < 0.1:
        return "chaotic" if last > 0 else "ordered"
    if decay > 1.2:
        return "bounded"
    return "critical" if decay > 0.9 else "subcritical"


def _fit(kind: str, decay: float, layers: FloatArray, log_apjn: FloatArray) -> tuple[float, float]:
    """Return the main constant on the last decade and half its change between the halves."""
    depth = len(layers)
    power = 1 - (0.5 if abs(decay - 0.5) < 0.1 else decay)
    if kind == "bounded":
        return float(np.exp(log_apjn[-1])), float(np.exp(log_apjn[-1]) * abs(log_apjn[-1] - log_apjn[depth // 3]))
    values = []
    for first, last in ((depth // 10, depth // 3), (depth // 3, depth), (depth // 10, depth)):
        rise = float(log_apjn[last] - log_apjn[first])
        if kind == "critical":
            values.append(rise / math.log(last / first))
        elif kind == "subcritical":
            values.append((rise / (last**power - first**power)) ** (-1 / power) if rise > 0 else math.inf)
        else:
            values.append((last - first) / abs(rise) if rise else math.inf)
    return values[1], abs(values[1] - values[0]) / 2


def _crossover(block: Block, levels: FloatArray) -> int | None:
    alphas = [float(s.input_norm.alpha) for s in block.sublayers if isinstance(s.input_norm, (DyT, Derf))]
    if not alphas:
        return None
    past = np.flatnonzero(max(alphas) ** 2 * levels >= 1)
    return int(past[0]) if past.size else None
