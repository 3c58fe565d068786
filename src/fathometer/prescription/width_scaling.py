r"""Initialisation variances and learning rates that keep a transformer's function learning at one pace at any width.

One rule for every parameter with :math:`f_i` inputs and :math:`f_o` outputs, where biases, norms and tables that are
looked up have :math:`f_i = 1`, and :math:`n` is the width of the stream:

.. math::

    \sigma^2 = \frac{C}{f_i}, \qquad
    \lambda_{\rm SGD} = \frac{n^{s}}{f_i}, \qquad
    \lambda_{\rm AdamW} = \frac{n^{s/2}}{f_i \sqrt{f_o}}

The head instead has :math:`\sigma^2 = C\, n^{-s}/f_i` and no factor of :math:`n^s` in its rates. The tangent kernel at
initialisation is of order one for every :math:`s`; hidden features move by :math:`n^{-(1-s)/2}` a step: :math:`s=0` is
the neural-tangent scaling, :math:`s=1` the maximal-update one.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.25-1.34 (variances), 1.99-1.107 (SGD), 1.108-1.116
(AdamW), footnote 26 (s), Eqs. 1.91-1.94 (weight decay). The single formula, biases, norms, class tokens, gates, shared
keys and values, ratios to a base width and the scaling of epsilon are derived in the documentation. The depth option
at s = 1 and exponent 1 is the scheme of N. Dey et al., arXiv:2505.01618 (CompleteP).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from fathometer.errors import DomainError, SpecError, nearest

Optimizer = Literal["sgd", "adamw"]
FixedHeads = Literal["d_head", "n_heads"]

#: What looks rows up in a table, or is added to the stream in front of the blocks: effective fan-in one.
TABLES = ("token_embedding", "position_embedding", "segment_embedding", "class_token")
HIDDEN = ("query", "key", "value", "output", "gate", "mlp_in", "mlp_out", "stem_hidden", "head_hidden")
GAINS = ("norm_gain", "norm_bias")
#: Parameters that feed other than d_model units; the paper has none of them. Their own count replaces n in n^s.
NARROW = ("relative_position", "qk_norm_gain", "qk_norm_bias", "layer_scale", "norm_shape")
_BIASED = (*HIDDEN, "patch_embedding", "head")
SCALED_ROLES = (*TABLES, *HIDDEN, "patch_embedding", "head", *(f"{r}_bias" for r in _BIASED), *GAINS, *NARROW)


@dataclass(frozen=True, kw_only=True)
class ScalingScheme:
    """How variances and learning rates follow width and depth.

    Attributes:
        name: What it is called.
        s: Between 0 (neural tangent) and 1 (maximal update).
        strict_m: Whether absolute rates of MLP matrices contain the ratio M of hidden width to width, as the theory
            has it, or not, as in the paper's experiments. Ratios to a base width do not depend on it.
        residual_exponent: p of a factor ``n_layers^(-p)`` on every branch; 0 leaves branches as they are.
        depth_rates: Whether rates inside the blocks follow depth, so that the kernel stays of order one.
    """

    name: str
    s: float
    strict_m: bool = True
    residual_exponent: float = 0.0
    depth_rates: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.s <= 1:
            raise DomainError(
                f"s must lie in [0, 1], 0 neural tangent and 1 maximal update; got {self.s!r}", value=self.s
            )
        p = self.residual_exponent
        if not (p == 0 or 0.5 <= p <= 1):
            raise DomainError(f"residual_exponent must be 0 or lie in [1/2, 1]; got {p!r}", value=p)

    def depth_exponents(self, optimizer: Optimizer) -> tuple[float, float]:
        r"""Return the exponents of ``n_layers`` in the rate and in the gradient of block parameters.

        Unscaled pre-norm branches: the gradient falls like :math:`L^{-1/2}`, and the AdamW kernel, a sum of absolute
        gradients, grows like :math:`L^{1/2}`; the SGD kernel grows only like :math:`\ln L`, which needs no factor.
        Branches times :math:`L^{-p}`: the stream stays of order one and gradients are :math:`L^{-p}`, so AdamW needs
        :math:`L^{p-1}` and SGD :math:`L^{2p-1}`.
        """
        p = self.residual_exponent
        if p == 0:
            return (-0.5 if optimizer == "adamw" else 0.0) if self.depth_rates else 0.0, -0.5
        rate = p - 1 if optimizer == "adamw" else 2 * p - 1
        return rate if self.depth_rates else 0.0, -p


#: The schemes by name.
SCALINGS = {
    scheme.name: scheme
    for scheme in (
        ScalingScheme(name="neural-tangent", s=0.0),
        ScalingScheme(name="hybrid", s=0.5),
        ScalingScheme(name="maximal-update", s=1.0),
        ScalingScheme(name="complete-p", s=1.0, residual_exponent=1.0, depth_rates=True),
    )
}


def scaling_scheme(scheme: str | float | ScalingScheme) -> ScalingScheme:
    """Return a scheme by its name, by its s, or as it is.

    Raises:
        SpecError: for an unknown name (the nearest one is suggested).
        DomainError: for s outside [0, 1].

    >>> scaling_scheme("hybrid").s
    0.5
    """
    if isinstance(scheme, ScalingScheme):
        return scheme
    if isinstance(scheme, str):
        if scheme not in SCALINGS:
            raise SpecError(f"there is no scaling scheme {scheme!r}{nearest(scheme, SCALINGS)}")
        return SCALINGS[scheme]
    return ScalingScheme(name=f"s = {float(scheme):g}", s=float(scheme))


class WidthRule(NamedTuple):
    """What the rule gives one parameter: absolute numbers, each defined up to a factor that no width changes.

    Attributes:
        variance: Of an entry, over its constant C. Biases start at zero and gains at one whatever stands here.
        rate: Learning-rate factor.
        gradient: Size of a gradient entry, with which the epsilon of AdamW must go.
    """

    variance: float
    rate: float
    gradient: float


def width_rule(
    role: str,
    *,
    fan_in: float,
    fan_out: float,
    d_model: float,
    s: float,
    optimizer: Optimizer = "adamw",
    strict_m: bool = True,
) -> WidthRule:
    """Return variance, learning-rate factor and gradient size of a parameter by the module's formula.

    Args:
        role: One of :data:`SCALED_ROLES`.
        fan_in: Terms in the sum that makes one output; one for biases, norms and tables.
        fan_out: Number of outputs.
        d_model: Width of the stream.
        s: Between 0 and 1.
        optimizer: ``"sgd"`` or ``"adamw"``.
        strict_m: Whether MLP matrices count their hidden width, or the width of the stream in its place.
    Raises:
        SpecError: for an unknown role or optimizer.
        DomainError: for s outside [0, 1] or fans that are not positive.

    >>> rule = width_rule("query", fan_in=256, fan_out=256, d_model=256, s=0)
    >>> rule.variance == 1 / 256 and rule.rate == 256**-1.5
    True
    """
    if role not in SCALED_ROLES:
        raise SpecError(f"there is no scaling rule for the role {role!r}{nearest(role, SCALED_ROLES)}")
    if optimizer not in get_args(Optimizer):
        raise SpecError(f"optimizer must be 'sgd' or 'adamw'; got {optimizer!r}")
    scaling_scheme(s)
    for name, value in (("fan_in", fan_in), ("fan_out", fan_out), ("d_model", d_model)):
        if not (math.isfinite(value) and value > 0):
            raise DomainError(f"{name} must be positive and finite; got {value!r}", value=value)
    last = role in ("head", "head_bias")
    gradient = fan_out**-0.5 * (1.0 if last else d_model ** (-s / 2))
    variance = d_model ** (-s if role == "head" else 0) / fan_in
    inputs, outputs = fan_in, fan_out
    if not strict_m:
        inputs = d_model if role == "mlp_out" else inputs
        outputs = d_model if role.removesuffix("_bias") in ("gate", "mlp_in") else outputs
    units = 1.0 if last else fan_out if role in NARROW else d_model
    if optimizer == "sgd":
        return WidthRule(variance, units**s / inputs, gradient)
    return WidthRule(variance, units ** (s / 2) / (inputs * outputs**0.5), gradient)


class Factors(NamedTuple):
    """Target over base: of a standard deviation, a learning rate, a weight decay and the epsilon of AdamW.

    The decay is zero for what is not decayed at all: biases, norms and elementwise factors.
    """

    std: float
    rate: float
    decay: float
    epsilon: float


class Sizes(NamedTuple):
    """One parameter as the rule sees it: role, fans at the target width, and whether a block holds it."""

    role: str
    fan_in: int
    fan_out: int
    in_blocks: bool


def width_factors(
    parameter: Sizes,
    scheme: ScalingScheme,
    *,
    d_model: int,
    base_width: float | None,
    optimizer: Optimizer = "adamw",
    fixed: FixedHeads = "d_head",
    n_layers: int = 1,
    base_layers: int = 1,
) -> Factors:
    """Return what changes for one parameter from the base to the target model: factors of one where sizes agree.

    Fans that follow the width are those of the stream, of heads and of hidden layers; patch sizes, vocabularies and
    numbers of outputs stay. Weight decay goes against the rate, so that ``lr * weight_decay`` is that of the base.

    Args:
        parameter: At the target width.
        scheme: A scheme.
        d_model, base_width: Target and base width of the stream. Without a base, factors are the paper's absolute ones,
            to be used with one learning rate for all, some ``n^(3/2)`` times the usual number.
        optimizer: ``"sgd"`` or ``"adamw"``.
        fixed: What stays while the width changes, the width of a head or the number of heads; it matters for
            parameters of one head only.
        n_layers, base_layers: Blocks of the target and the base.
    """

    def rule(ratio: float) -> WidthRule:
        return width_rule(
            parameter.role,
            **_fans(parameter, ratio, fixed),
            d_model=ratio * d_model,
            s=scheme.s,
            optimizer=optimizer,
            strict_m=scheme.strict_m,
        )

    here, base = rule(1.0), WidthRule(1.0, 1.0, 1.0) if base_width is None else rule(base_width / d_model)
    rate, gradient = here.rate / base.rate, here.gradient / base.gradient
    if parameter.in_blocks:
        by_rate, by_gradient = scheme.depth_exponents(optimizer)
        rate *= (n_layers / base_layers) ** by_rate
        gradient *= (n_layers / base_layers) ** by_gradient
    return Factors(
        std=math.sqrt(here.variance / base.variance),
        rate=rate,
        decay=1 / rate if is_weight(parameter.role) else 0.0,
        epsilon=gradient,
    )


def is_weight(role: str) -> bool:
    """Return whether a role is a matrix or a table: drawn at random and decayed, unlike biases, norms and factors."""
    return role == "relative_position" or not (role.endswith("_bias") or role in (*GAINS, *NARROW))


def check_widths(
    *, d_model: int, base_width: int, n_heads: Sequence[int], d_head: int | None = None, fixed: FixedHeads = "d_head"
) -> None:
    """Refuse widths that heads do not fit.

    Raises:
        DomainError: for sizes that are not positive whole numbers.
        SpecError: where heads do not divide a width, or the base would have broken heads.
    """
    for name, value in (("d_model", d_model), ("base_width", base_width), *(("n_heads", heads) for heads in n_heads)):
        check_count(name, value)
    if fixed not in get_args(FixedHeads):
        raise SpecError(f"fixed must be 'd_head' or 'n_heads'; got {fixed!r}")
    for heads in n_heads:
        if d_head is None and d_model % heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {d_model} and {heads}")
        if fixed == "d_head" and heads * base_width % d_model:
            raise SpecError(
                f"at base_width {base_width} and the same width of a head, {heads} heads of d_model {d_model} become "
                f"{heads * base_width / d_model:g}; choose a multiple of {d_model // math.gcd(heads, d_model)}, "
                "or fixed='n_heads'"
            )
    size = d_head or d_model // max(n_heads, default=1)
    if n_heads and fixed == "n_heads" and size * base_width % d_model:
        raise SpecError(
            f"at base_width {base_width} and {max(n_heads)} heads, a head of width {size} becomes "
            f"{size * base_width / d_model:g} wide; choose a multiple of {d_model // math.gcd(size, d_model)}, "
            "or fixed='d_head'"
        )


def check_count(name: str, value: object) -> None:
    """Refuse what is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DomainError(f"{name} must be a positive whole number; got {value!r}", value=value)


def _fans(parameter: Sizes, ratio: float, fixed: FixedHeads) -> dict[str, float]:
    """Return a parameter's fans at ``ratio`` times the target width."""
    role, fan_in, fan_out = parameter.role, float(parameter.fan_in), float(parameter.fan_out)
    if role in HIDDEN or role == "head":
        fan_in *= ratio
    per_head = role in ("qk_norm_gain", "qk_norm_bias")
    follows = {"relative_position": fixed == "d_head"}.get(role, fixed == "n_heads" if per_head else True)
    if follows and role not in ("head", "head_bias") and parameter.fan_out > 1:
        fan_out *= ratio
    return {"fan_in": fan_in, "fan_out": fan_out}
