r"""Tangent kernels carried through the blocks: one matrix per parameter group, by the map that carries perturbations.

The tangent kernel of a group of parameters and of tokens a, b is the mean of
:math:`\lambda \sum_\mu (\partial z_{a,i}/\partial\theta_\mu)(\partial z_{b,i}/\partial\theta_\mu)`, the same for every
coordinate i. A perturbation of a parameter deep in the stack is a perturbation of the stream from there on, so all
groups go through one linear map, :meth:`GramHalfLayer.forward`; every sublayer adds the kernels of its own parameters.

With F the Gram matrix of the tokens that enter the branch, ``S1`` and ``S2`` the attention operators,
:math:`\lambda = \Lambda/\text{fan-in}` for matrices and :math:`\Lambda` for vectors, attention adds at its output

.. math::
    \Theta_O &= S_1[\sigma_V^2 F + b_V^2], \quad \Theta_V = \sigma_O^2 S_1[F], \quad
    \Theta_Q = m^2 \sigma_{OV}^2 \sigma_K^2\, F \circ S_2[F], \quad
    \Theta_K = m^2 \sigma_{OV}^2 \sigma_Q^2\, F \circ S_2[F], \\
    \Theta_{b_O} &= 1, \quad \Theta_{b_V} = \sigma_O^2, \quad \Theta_{b_Q} = m^2 \sigma_{OV}^2\sigma_K^2\, S_2[F],
    \quad \Theta_{b_K} = 0,

and an MLP of activation kernels :math:`K = E f f`, :math:`\dot K = E f' f'` adds :math:`\Theta_2 = K`,
:math:`\Theta_1 = \sigma_2^2 \dot K \circ F`. A gated MLP, whose hidden layer has the Gram matrix
:math:`\sigma_1^2 K \circ F`, adds :math:`\Theta_2 = \sigma_1^2 K \circ F`, :math:`\Theta_1 = \sigma_2^2 K \circ F` and
:math:`\Theta_3 = \sigma_2^2 \sigma_1^2 \dot K \circ F \circ F`. The gain of a norm adds what the map makes of the
unit-gain Gram matrix behind that norm, its offset what it makes of ones.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.98, 1.117, 1.151-1.155, 1.161-1.173; biases, norms,
gated MLPs and normalised queries and keys derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import Closure, JointRows, Visibility
from fathometer.errors import NotCoveredError
from fathometer.propagation.gram_half_layer import GramHalfLayer
from fathometer.propagation.trajectory import StreamOverflowError
from fathometer.spec import MLP, GatedMLP, PointwiseNorm, SelfAttention, Transformer, refuse_arrays

FloatArray = NDArray[np.float64]
Place = tuple[str, int | None]  # of two stacks: "encoder" or "decoder", and the layer
Group = tuple[str, int | Place | None]  # a parameter role, and its layer

_TOGETHER = 1 << 20  # matrix entries pushed through a map at a time


@dataclass(frozen=True, kw_only=True)
class TangentTrajectory:
    r"""What the blocks make of tokens and of the tangent kernels at their input.

    Attributes:
        gram: Gram matrix of the stream behind the last block, shape ``(n, n)``.
        kernels: By parameter role and layer (``None`` for groups that entered with the tokens), the tangent kernel of
            the stream per unit :math:`\Lambda`; each of shape ``(n, n)``.
    """

    gram: FloatArray
    kernels: Mapping[Group, FloatArray]


def propagate_tangent(
    trunk: Transformer,
    gram: FloatArray,
    *,
    averaging: Closure | JointRows,
    kernels: Mapping[str, FloatArray],
    n_samples: int = 1,
    norm_epsilon: float = 0.0,
) -> TangentTrajectory:
    """Carry the Gram matrix of several samples' tokens and the tangent kernels of all parameters through the blocks.

    Args:
        trunk: The blocks, scalar fields; dropout is off.
        gram: Joint Gram matrix at the first block, samples of equal length one after the other; shape ``(n, n)``.
        averaging: How the softmax is averaged: a closure, or all pairs of rows jointly.
        kernels: Tangent kernels of the stem by role, each of shape ``(n, n)``.
        n_samples: Number of samples.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
    Returns:
        The kernels behind the last block. Cost: every sublayer maps all groups born before it, about ten a block, so
        the work grows as ``10 n_layers^2`` applications of its map (O(n^2) each for an MLP; O(K n^2) with a closure's K
        interpolation nodes, ``n^2 T^2`` jointly), and memory holds ``20 n_layers`` matrices.
    Raises:
        SpecError: for fields that are arrays.
        NotCoveredError: for branches without a map on full Gram matrices.
        DomainError: if the stream overflows.
    """
    refuse_arrays(trunk, "propagation on full Gram matrices", "trunk")
    n = gram.shape[-1]
    visible = {flag: Visibility(n, causal=flag, n_samples=n_samples) for flag in (False, True)}
    current = gram[None]
    groups: list[Group] = [(role, None) for role in kernels]
    stack = np.array(list(kernels.values())).reshape(-1, n, n)
    for layer, block in enumerate(trunk.without_dropout().layers()):
        born: dict[str, FloatArray] = {}
        first = len(groups)
        for sublayer in block.sublayers:
            causal = isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal
            step = GramHalfLayer(sublayer, current, averaging, visible[causal], norm_epsilon=norm_epsilon)
            stack = pushed(step.forward, stack)
            for role, kernel in sublayer_kernels(step):
                added = kernel.reshape(1, n, n)
                if role in born:
                    stack[first + list(born).index(role)] += added[0]
                else:
                    born[role] = added
                    groups.append((role, layer))
                    stack = np.concatenate([stack, added])
            current = step.output
            if not np.all(np.isfinite(current)):
                raise StreamOverflowError(f"the stream overflows in layer {layer}", index=(layer,))
    return TangentTrajectory(gram=current[0], kernels=dict(zip(groups, stack, strict=True)))


def sublayer_kernels(step: GramHalfLayer) -> Iterator[tuple[str, FloatArray]]:
    """Yield the tangent kernels of a sublayer's own parameters at its output, per unit learning-rate factor."""
    branch = step.sublayer.branch
    if isinstance(branch, SelfAttention):
        own = _attention_kernels(step, branch)
    elif isinstance(branch, MLP):
        own = _mlp_kernels(step, branch)
    elif isinstance(branch, GatedMLP):
        own = _gated_kernels(step, branch)
    else:
        raise NotCoveredError(f"the tangent kernel of {type(branch).__name__}")
    for role, kernel in own.items():
        yield role, step.emit(kernel)
    ones = np.ones(step.normed.shape)
    for norm, seen, push in step.norms():
        if not isinstance(norm, PointwiseNorm):
            yield "norm_gain", push(step.normalised(replace(norm, gain=1.0), seen))
            yield "norm_bias", push(ones)


def _attention_kernels(step: GramHalfLayer, branch: SelfAttention) -> dict[str, FloatArray]:
    normed, scores = step.normed, step.score_gram
    ones = np.ones(normed.shape)
    gain = (branch.score_multiplier * branch.value * branch.output) ** 2
    query, key, unit = branch.key**2, branch.query**2, ones
    if branch.qk_norm:  # the size of queries and keys divides out, and with it their scales
        for name in ("query", "key"):
            if not getattr(branch, name):
                raise NotCoveredError(f"the tangent kernel of normalised queries and keys with a {name} scale of 0")
        query, key, unit = branch.query**-2, branch.key**-2, ones / step.key_size
    response, key_path = step.score_paths(scores)
    return {
        "query": gain * query * scores * response,
        "key": gain * key * key_path,
        "value": branch.output**2 * step.mixed(normed),
        "output": step.mixed(branch.value**2 * normed + branch.value_bias**2),
        "query_bias": gain * query * unit * response,
        "key_bias": gain * key * step.score_paths(unit)[1] if branch.qk_norm else 0.0 * ones,
        "value_bias": branch.output**2 * ones,
        "output_bias": ones,
    }


def _mlp_kernels(step: GramHalfLayer, branch: MLP) -> dict[str, FloatArray]:
    overlap, slope = step.hidden
    scale = branch.mlp_out**2
    return {
        "mlp_in": scale * slope * step.normed,
        "mlp_out": overlap,
        "mlp_in_bias": scale * slope,
        "mlp_out_bias": np.ones(overlap.shape),
    }


def _gated_kernels(step: GramHalfLayer, branch: GatedMLP) -> dict[str, FloatArray]:
    overlap, slope = step.hidden
    into, out = branch.mlp_in**2, branch.mlp_out**2
    through_gate = into * out * slope * step.normed
    return {
        "gate": through_gate * step.normed,
        "mlp_in": out * overlap * step.normed,
        "mlp_out": into * overlap * step.normed,
        "gate_bias": through_gate,
        "mlp_in_bias": out * overlap,
        "mlp_out_bias": np.ones(overlap.shape),
    }


def pushed(forward: Callable[[FloatArray], FloatArray], stack: FloatArray) -> FloatArray:
    """Carry a stack of tangent kernels through a sublayer's map, a bounded number at a time."""
    size = max(1, _TOGETHER // stack[0].size) if len(stack) else 1
    parts = [forward(stack[first : first + size]) for first in range(0, len(stack), size)]
    return np.concatenate(parts) if parts else stack
