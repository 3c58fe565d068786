r"""How far one step of AdamW moves a network that reads a single token.

AdamW divides every component of the gradient by its own size, so one step moves an output by the sum of *absolute*
gradients. Its tangent kernel is :math:`\tilde\Theta_G = \tilde\lambda_G \sum_\mu |\partial_\mu z|`, of order one
at every width for rates

.. math:: \tilde\lambda_G = \frac{\tilde\Lambda_G}{\text{fan-in} \sqrt{\text{fan-out}}} .

For one token a weight's gradient is the product of what arrives at its output and what enters it, both Gaussian and
independent at leading order, and :math:`E|g| = k \sqrt{E g^2}` with :math:`k = \sqrt{2/\pi}`. With the tangent
kernels :math:`\Theta_b` of gradient descent for the bias at the same place (rates one), F the mean square of the
tokens that enter the branch and averages over a Gaussian pre-activation,

.. math::
    \tilde\Theta_{b} &= k \sqrt{\Theta_b}, \qquad
    \tilde\Theta_O = k^2 \sqrt{\Theta_{b_O} (\sigma_V^2 F + b_V^2)}, \qquad
    \tilde\Theta_V = k^2 \sqrt{\Theta_{b_V} F}, \\
    \tilde\Theta_2 &= k \sqrt{\Theta_{b_2}}\, E|f|, \qquad
    \tilde\Theta_1 = k^2 \sqrt{\sigma_2^2\, \Theta_{b_2} F}\, E|f'| .

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.95 and 1.108-1.116 for the kernel and the rates; the
closed forms are derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import pi, sqrt
from typing import Any

import numpy as np

from fathometer.attention import Uniform, Visibility
from fathometer.errors import BatchError, DomainError, NotCoveredError
from fathometer.kernels.activations import activation_functions
from fathometer.kernels.quadrature import standard_normal_grid
from fathometer.observables.tangent import checked_network
from fathometer.propagation.gram_half_layer import GramHalfLayer, norm_gram, norm_slope
from fathometer.propagation.stem import StemGram, stem_gram
from fathometer.propagation.tangent import Group, sublayer_kernels
from fathometer.spec import (
    MLP,
    Activation,
    GatedMLP,
    LayerNorm,
    Network,
    RMSNorm,
    SelfAttention,
    TokenStem,
)

_MEAN = sqrt(2 / pi)  # of the size of a standard Gaussian
_POINTS = 4000  # on either side; kinks cost 1e-6


@dataclass(frozen=True, kw_only=True)
class AdamWTangentKernel:
    """How one step of AdamW on an output moves it, over its learning rate.

    Attributes:
        groups: By parameter role and layer; ``None`` is the layer of stem, head and final norm.
    """

    groups: dict[Group, float]

    @property
    def roles(self) -> dict[str, float]:
        """By parameter role, summed over layers."""
        roles: dict[str, float] = {}
        for (role, _), size in self.groups.items():
            roles[role] = roles.get(role, 0.0) + size
        return roles


def adamw_tangent_kernel(
    network: Network,
    *,
    n_out: int,
    tokens: Any | None = None,
    patches: Any | None = None,
    norm_epsilon: float = 0.0,
) -> AdamWTangentKernel:
    r"""Predict the tangent kernel of AdamW for a network that reads one token, every group at unit rate factor.

    The loss is one output, the moments of AdamW are those of its first step and its epsilon is negligible. Leading
    order in the width: within one percent at a width of 256. Valid for one token only: gradients that several tokens
    share are not products of Gaussians, and for those the rates promise no more than order one. Queries and keys of a
    single token have no gradient.

    Args:
        network: Stem, blocks and head, scalar fields.
        n_out: Number of outputs of the head, over which its rates assume the gradient to be spread.
        tokens: For a :class:`TokenStem`: one vocabulary index, shape ``(1,)``.
        patches: For a :class:`PatchStem` without class token: one patch vector, shape ``(1, fan_in)``.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    Returns:
        The kernels of weights, biases and the gains of LayerNorm and RMSNorm. Cost: O(n_layers), milliseconds.
    Raises:
        BatchError: for more than one token.
        NotCoveredError: for norms that act on each entry, behind which neither tokens nor gradients are Gaussian.
        DomainError: for ``n_out`` below one.
        SpecError, NotCoveredError: see :func:`tangent_kernel`.

    >>> from fathometer.spec import Block, Head, Sublayer, Transformer
    >>> perceptron = Sublayer(branch=MLP(mlp_in=1.0, mlp_out=1.0), input_norm=LayerNorm())
    >>> trunk = Transformer(blocks=(Block(sublayers=(perceptron,)),), d_model=64)
    >>> network = Network(stem=TokenStem(token=1.0), trunk=trunk, head=Head())
    >>> round(adamw_tangent_kernel(network, n_out=1, tokens=[0]).roles["head"], 4)
    0.7979
    """
    checked_network(network, norm_epsilon)
    if isinstance(n_out, bool) or not isinstance(n_out, int) or n_out < 1:
        raise DomainError(f"n_out must be an integer >= 1; got {n_out!r}", value=n_out)
    _refuse_pointwise_norms(network)
    stem = stem_gram(network.stem, tokens=tokens, patches=patches)
    if stem.gram.size != 1:
        raise BatchError(f"the tangent kernel of AdamW is known for one token; got {len(stem.gram)}")
    visible = Visibility(1, causal=False)
    current, steps = stem.gram, []
    for layer, block in enumerate(network.trunk.without_dropout().layers()):
        for sublayer in block.sublayers:
            step = GramHalfLayer(sublayer, current, Uniform(), visible, norm_epsilon=norm_epsilon)
            steps.append((layer, step))
            current = step.output
    groups: dict[Group, float] = {}

    def add(role: str, layer: int | None, size: float) -> None:
        groups[role, layer] = groups.get((role, layer), 0.0) + size

    reach = _add_head(network, stem, current, n_out, norm_epsilon, add)  # of a perturbation of the stream, squared
    for layer, step in reversed(steps):
        for role, size in _sublayer_sizes(step, reach):
            add(role, layer, size)
        reach *= float(step.forward(np.ones((1, 1)))[0, 0])
    for role, overlap in stem.overlaps.items():
        if overlap[0, 0] > 0:
            add(role, None, _MEAN * sqrt(reach) * _input_size(role, patches))
    return AdamWTangentKernel(groups=groups)


def _add_head(network: Network, stem: StemGram, gram: Any, n_out: int, epsilon: float, add: Any) -> float:
    """Add the groups of head and final norm; return the squared response of an output to the stream."""
    head, token = network.head, gram
    slope = 1.0
    assert head.norm is None or isinstance(head.norm, (LayerNorm, RMSNorm))  # others are refused
    if head.norm is not None:
        token = norm_gram(head.norm, gram, epsilon=epsilon)
        slope = float(norm_slope(head.norm, gram, epsilon=epsilon)[0, 0])
    size = _MEAN * sqrt(float(token[0, 0])) * float(head.multiplier)
    scale = (float(head.multiplier) * float(head.scale)) ** 2
    if head.tied and isinstance(network.stem, TokenStem):
        width = network.trunk.d_model
        scale = float(head.multiplier) ** 2 * width * float(network.stem.token) ** 2
        add("token_embedding", None, size * sqrt(width))
    else:
        add("head", None, size / sqrt(n_out))
    add("head_bias", None, 1 / sqrt(n_out))
    if head.norm is not None:
        add("norm_bias", None, _MEAN * sqrt(scale))
        unit = norm_gram(replace(head.norm, gain=1.0), gram, epsilon=epsilon)
        add("norm_gain", None, _MEAN**2 * sqrt(scale * float(unit[0, 0])))
    return scale * slope


def _refuse_pointwise_norms(network: Network) -> None:
    norms = [network.head.norm]
    for block in network.trunk.blocks:
        for sublayer in block.sublayers:
            norms += [sublayer.input_norm, sublayer.output_norm, sublayer.stream_norm]
    for norm in norms:
        if norm is not None and not isinstance(norm, (LayerNorm, RMSNorm)):
            raise NotCoveredError(
                f"the tangent kernel of AdamW behind {type(norm).__name__}: what leaves a norm that acts on each entry "
                "is not Gaussian; LayerNorm and RMSNorm are covered"
            )


def _input_size(role: str, patches: Any) -> float:
    """Return the mean size of what multiplies a stem's parameter."""
    return float(np.mean(np.abs(np.asarray(patches, dtype=np.float64)))) if role == "patch_embedding" else 1.0


def _sublayer_sizes(step: GramHalfLayer, reach: float) -> Iterator[tuple[str, float]]:
    """Yield the AdamW kernels of a sublayer's parameters, for a squared response ``reach`` to the stream behind it."""
    branch = step.sublayer.branch
    kernels = [(role, reach * float(kernel[0, 0])) for role, kernel in sublayer_kernels(step)]
    known = dict(kernels)
    token = float(step.normed[0, 0])
    if isinstance(branch, SelfAttention):
        value = float(branch.value) ** 2 * token + float(branch.value_bias) ** 2
        yield from ((role, 0.0) for role in ("query", "key", "query_bias", "key_bias"))
        yield "value", _MEAN**2 * sqrt(known["value_bias"] * token)
        yield "output", _MEAN**2 * sqrt(known["output_bias"] * value)
        yield "value_bias", _MEAN * sqrt(known["value_bias"])
        yield "output_bias", _MEAN * sqrt(known["output_bias"])
    else:
        yield from _perceptron_sizes(branch, token, known["mlp_out_bias"])
    for role, kernel in kernels:  # one pair for each norm
        if role == "norm_bias":
            yield role, _MEAN * sqrt(kernel)
        elif role == "norm_gain":
            yield role, _MEAN**2 * sqrt(kernel)


def _perceptron_sizes(branch: Any, token: float, reach: float) -> Iterator[tuple[str, float]]:
    back = _MEAN * float(branch.mlp_out) * sqrt(reach)  # mean size of the gradients at the hidden units
    entering = _MEAN * sqrt(token)
    yield "mlp_out_bias", _MEAN * sqrt(reach)
    if isinstance(branch, MLP):
        value, slope = _mean_sizes(branch.activation, float(branch.mlp_in) ** 2 * token + float(branch.in_bias) ** 2)
        yield "mlp_out", _MEAN * sqrt(reach) * value
        yield "mlp_in", back * slope * entering
        yield "mlp_in_bias", back * slope
        return
    assert isinstance(branch, GatedMLP)
    value, slope = _mean_sizes(branch.activation, float(branch.gate) ** 2 * token)
    linear = float(branch.mlp_in) * entering
    yield "mlp_out", _MEAN * sqrt(reach) * value * linear
    yield "mlp_in", back * value * entering
    yield "mlp_in_bias", back * value
    yield "gate", back * slope * linear * entering
    yield "gate_bias", back * slope * linear


def _mean_sizes(activation: Activation, q: float) -> tuple[float, float]:
    """Return E|f(u)| and E|f'(u)| for u of mean square q."""
    nodes, weights = standard_normal_grid(_POINTS)
    value, slope = (float(weights @ np.abs(f(sqrt(q) * nodes))) for f in activation_functions(activation))
    return value, slope
