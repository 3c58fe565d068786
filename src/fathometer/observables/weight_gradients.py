r"""How large the gradients of every weight matrix are.

With gradients of moments (J, K) at the output S of a branch, inputs of moments (q, p) behind the norm, ``n`` tokens
and :math:`\langle a, b\rangle = a J + (n-1)\, b\, K`, attention has the squared Frobenius norms

.. math::
    \frac{|\partial W_O|^2}{n d^2} &= \langle \sigma_V^2 y + b_V^2,\; \sigma_V^2 y' + b_V^2 \rangle, \qquad
    \frac{|\partial W_V|^2}{n d^2} = \sigma_O^2 \langle y, y' \rangle, \\
    \frac{|\partial W_Q|^2}{n d^2} &= m^2 \sigma_K^2\, \sigma_{OV}^2\, (q - p)^2\, \langle q\, G,\; p\, G_{12}\rangle,

with :math:`y = p + (q-p) Y_2`, :math:`y' = p + (q-p) Y_{12}` the moments of attention-averaged inputs, G the closure's
weights of the gradient through the scores and m the score multiplier; :math:`W_K` has :math:`\sigma_Q` in the place of
:math:`\sigma_K`. An MLP of N hidden units has

.. math::
    \frac{|\partial W_2|^2}{n d N} = \langle E f f, E f f' \rangle, \qquad
    \frac{|\partial W_1|^2}{n d^2} = \sigma_2^2 \langle q\, E \dot f \dot f,\; p\, E \dot f \dot f' \rangle .

The alignment K between tokens cannot be dropped: it is multiplied by ``n - 1``.

Sources: query, key and value gradients of one head, Giorlandino and Goldt, arXiv:2505.24333, whose statement holds with
    :math:`Y_2 - 2 Y_3 + Y_2^2` for the weight of the scores; the general form is derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import NotCoveredError, SpecError, nearest
from fathometer.observables.exponents import READOUTS
from fathometer.observables.jacobian import backward
from fathometer.propagation import Attending, Moments, propagate
from fathometer.propagation.branch_maps import AttentionMap, GatedMLPMap, MLPMap
from fathometer.propagation.cross import CrossAttentionMap
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.spec import Transformer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WeightGradients:
    r"""Squared Frobenius norms of weight gradients, as natural logarithms.

    They are those of one sample whose output gradients have mean square one per coordinate, :math:`\sum_a |g_a|^2 = n
    d`. A loss with :math:`\sum_a |g_a|^2 = s` multiplies them by :math:`s/(n d)`; independent samples add.

    Attributes:
        logs: By role (``"query"``, ``"key"``, ``"value"``, ``"output"``, ``"mlp_in"``, ``"gate"``, ``"mlp_out"``, those
            that occur), input first; each of shape ``(n_with_role, *batch)``. Minus infinity where no gradient arrives.
        layers: Block of every entry; by role, each of shape ``(n_with_role,)``.
        n_tokens: Number of tokens.
        readout: What the output gradients are like.
        closure: Name of the closure.
    """

    logs: Mapping[str, FloatArray]
    layers: Mapping[str, NDArray[np.int64]]
    n_tokens: int
    readout: str
    closure: str


def weight_gradients(
    spec: Transformer,
    *,
    n_tokens: int,
    q: Any,
    p: Any,
    readout: str = "isotropic",
    closure: Closure | str = DEFAULT_CLOSURE,
) -> WeightGradients:
    """Predict the squared Frobenius norm of the gradient of every weight matrix of every block.

    Leading order in the width at fixed depth and number of tokens. Two corrections to query and key gradients are
    larger than ``1/d_model``: random overlaps of about ``1/sqrt(d_model)`` between tokens, which real tokens and those
    of every block but the first have, add up to ``n_tokens / (d_model e^v)`` relatively, and few dimensions per head
    about ``v^2 / d_head``, with v the score variance.

    Args:
        spec: The transformer; fields may be arrays.
        n_tokens: Number of tokens.
        q, p: Second moment of the tokens at the first block, and overlap of two of them.
        readout: ``"isotropic"`` noise at the output, a loss on ``"one-token"``, or a mean-``"pooled"`` loss.
        closure: How the softmax is averaged.
    Returns:
        The norms. Cost: one prediction, and once more its forward maps, vectorised over equal blocks.
    Raises:
        SpecError: for an unknown read-out.
        NotCoveredError: for a causal mask, under which tokens are not alike.
        DomainError: for moments no set of tokens can have.

    >>> from fathometer.spec import preset
    >>> found = weight_gradients(preset("vit", n_layers=24), n_tokens=196, q=0.27, p=0.11)
    >>> sorted(found.logs)
    ['key', 'mlp_in', 'mlp_out', 'output', 'query', 'value']
    >>> bool(np.all(found.logs["query"] < found.logs["value"]))  # weak scores
    True
    """
    if readout not in READOUTS:
        raise SpecError(f"there is no read-out {readout!r}{nearest(readout, READOUTS)}")
    if spec.is_causal:
        raise NotCoveredError("weight gradients under a causal mask; spec.bidirectional() drops the mask")
    chosen = as_closure(closure)
    trajectory = propagate(spec, n_tokens=n_tokens, q=q, p=p, closure=chosen)
    gradients = backward(trajectory.transfer, alignment=READOUTS[readout] if n_tokens > 1 else 0.0)
    others = chosen.others(n_tokens) if n_tokens > 1 else 0
    positions: dict[str, list[NDArray[np.int64]]] = {}
    values: dict[str, list[FloatArray]] = {}
    start = 0
    for block in spec.blocks:
        count = len(block.sublayers)
        stop = start + count * block.repeat
        for offset, sublayer in enumerate(block.sublayers):
            before, after = slice(start + offset, stop, count), slice(start + offset + 1, stop + 1, count)
            step = HalfLayer(sublayer, n_tokens, chosen)
            assert not isinstance(step.map, CrossAttentionMap)  # which is refused without a memory
            _, _, record = step.forward(Moments(trajectory.q[before], trajectory.p[before]))
            own, shared = step.at_branch(record, 1.0, gradients.alignment[after])
            norms = _branch_norms(step.map, record.normed, record.known, own, others * shared, spec.d_model)
            unit = gradients.log_norm[after] + np.log(n_tokens) + np.log(spec.d_model)
            for role, norm in norms.items():
                with np.errstate(divide="ignore"):
                    values.setdefault(role, []).append(unit + np.log(np.maximum(norm, 0.0)))
                positions.setdefault(role, []).append(np.arange(start + offset, stop, count))
        start = stop
    logs, layers = {}, {}
    for role, parts in values.items():
        place = np.concatenate(positions[role])
        order = np.argsort(place)
        logs[role] = np.concatenate(parts)[order]
        layers[role] = np.searchsorted(trajectory.borders, place[order], side="right") - 1
    return WeightGradients(logs=logs, layers=layers, n_tokens=n_tokens, readout=readout, closure=chosen.name)


def _branch_norms(
    branch_map: AttentionMap | MLPMap | GatedMLPMap, x: Moments, known: Any, own: Any, shared: Any, d_model: int
) -> dict[str, Any]:
    """Return squared norms over ``n_tokens * d_model``, by role.

    Args:
        branch_map: The branch.
        x: Moments of the normed tokens.
        known: What the branch's forward map knows.
        own, shared: J, and K times the number of other tokens, of gradients at the branch output.
        d_model: Width of the stream.
    """

    def paired(same: Any, different: Any) -> Any:
        return own * same + shared * different

    if isinstance(branch_map, AttentionMap):
        return {role: d_model * norm for role, norm in _attention_norms(branch_map, x, known, paired).items()}
    branch, f, z = branch_map.branch, branch_map.kernel, known
    back = d_model * branch.mlp_out**2
    hidden = np.maximum(1, np.rint(branch.ratio * d_model))
    value, value_pair = f.overlap(z.q, z.q, z.q), f.overlap(z.q, z.q, z.p)
    slope, slope_pair = f.slope_overlap(z.q, z.q, z.q), f.slope_overlap(z.q, z.q, z.p)
    if isinstance(branch_map, MLPMap):
        return {
            "mlp_in": back * paired(x.q * slope, x.p * slope_pair),
            "mlp_out": hidden * paired(value, value_pair),
        }
    linear = branch_map.branch.mlp_in**2
    return {
        "mlp_in": back * paired(x.q * value, x.p * value_pair),
        "gate": back * linear * paired(x.q**2 * slope, x.p**2 * slope_pair),
        "mlp_out": hidden * linear * paired(x.q * value, x.p * value_pair),
    }


def _attention_norms(branch_map: AttentionMap, x: Moments, known: Attending, paired: Any) -> dict[str, Any]:
    """Return squared norms over ``n_tokens * d_model**2``, by role."""
    b, statistics = branch_map.branch, known.statistics
    spread = x.q - x.p
    kept = spread + branch_map.dropout_variance * x.q
    mixed, mixed_pair = x.p + kept * statistics.y2, x.p + spread * statistics.y12
    scores = (b.score_multiplier * b.value * b.output) ** 2 * spread
    scores = scores * paired(kept * x.q * statistics.score, spread * x.p * statistics.score_pair)
    if b.qk_norm:  # queries are divided by sigma_Q sqrt(q), and so are their gradients
        query, key = (scores / (scale * x.q) ** 2 for scale in (b.query, b.key))
    else:
        query, key = scores * b.key**2, scores * b.query**2
    bias = b.value_bias**2
    return {
        "query": query,
        "key": key,
        "value": b.output**2 * paired(mixed, mixed_pair),
        "output": paired(b.value**2 * mixed + bias, b.value**2 * mixed_pair + bias),
    }
