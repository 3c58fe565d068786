r"""Moments of every component of every sublayer, forward and backward.

Forward, (q, p) of the stream fixes the moments at every place inside a sublayer. Backward, gradients at the output of a
sublayer with second moment J and overlap K reach the places inside it as follows, with
:math:`\hat q, \hat p` the slope averages of a norm and :math:`w = \tau^2` the squared branch scale.

.. math::
    \text{sum, added: } & (\hat q_s J,\; \hat p_s K) =: (J_s, K_s) \\
    \text{output\_norm: } & w\,(J_s/(1-\delta),\; K_s) \\
    \text{branch: } & w\,(\hat q_o J_s/(1-\delta),\; \hat p_o K_s) =: (J_b, K_b) \\
    \text{mixed: } & \sigma_O^2\,(J_b, K_b) \\
    \text{activation: } & \sigma_2^2\,(J_b, K_b)\, d/d_{mlp} \\
    \text{mlp\_in: } & \sigma_2^2\,(J_b\, E\dot f\dot f,\; K_b\, E\dot f\dot f')\, d/d_{mlp}

and, with ``n`` tokens, :math:`g = \sigma_O^2 \sigma_V^2`, :math:`\kappa` the score variance per unit of token overlaps,
:math:`s, s'` the closure's weights of the gradient through the scores, (q, p) the normed tokens and m the width of a
head over that of the stream,

.. math::
    \text{weights: } & \sigma_O^2 (\sigma_V^2 q + b_V^2)\, d_h\, (J_b, K_b) \\
    \text{scores: } & g\,(q-p)\, d_h\, (s J_b,\; s' K_b)/n \\
    \text{query: } & \frac{\kappa}{\sigma_Q^2}\, g\, (q-p)^2\, (s J_b,\; s' K_b) \\
    \text{key: } & J_k = \frac{\kappa}{\sigma_K^2}\, g\, (q-p)\, \bigl(s\, q J_b + (n-1)\, s'\, p K_b\bigr),
        \qquad K_k = -J_k/(n-1) \\
    \text{value: } & \sigma_O^2\,\bigl(Y_2 J_b + (n-1) Y_{12} K_b,\; \tfrac{1-Y_2}{n-1} J_b + (1-Y_{12}) K_b\bigr) .

The gradients of one query's scores sum to zero over keys, hence those of the keys over tokens.

Sources: the component table, A. Kedia et al., arXiv:2403.09635, in its leading order of wide layers; gradients of
queries, keys and scores, and exact softmax averages at finite n, derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.errors import DomainError, SpecError
from fathometer.kernels import activation_kernel, norm_kernel
from fathometer.observables.jacobian import backward
from fathometer.propagation import GramTrajectory, Moments, check_gram, check_moments, propagate_gram
from fathometer.propagation.along_depth import AlikeLayers, alike_layers, stream_path
from fathometer.propagation.branch_maps import AttentionMap, GatedMLPMap, MLPMap
from fathometer.propagation.exchangeable import HalfLayer, Record
from fathometer.results.moments import COMPONENTS, ComponentMoments, ModelMoments
from fathometer.spec import GatedMLP, SelfAttention, Sublayer, Transformer, hidden_width

FloatArray = NDArray[np.float64]


def moments(
    spec: Transformer,
    *,
    n_tokens: int | None = None,
    q: float | None = None,
    p: float | None = None,
    gram: Any = None,
    top_alignment: float = 0.0,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> ModelMoments:
    """Predict mean, second moments and gradients at every place inside every block.

    Give either ``n_tokens``, ``q`` and ``p`` (every token alike), or the ``gram`` matrix of the tokens at the first
    block. A causal spec always uses Gram matrices, and its moments are averages over positions; gradients of queries,
    keys, values, scores and weights are then left out (NaN).

    Args:
        spec: The transformer, with single numbers in every field. Dropout acts as in training.
        n_tokens: Number of tokens.
        q: Mean square per coordinate at the first block.
        p: Mean overlap of two different tokens there.
        gram: Overlaps ``x_a . x_b / d``, shape ``(*samples, n_tokens, n_tokens)``; moments are averages over samples.
        top_alignment: Mean cosine of the gradients of two tokens at the output of the last block: near 0 for losses
            of single tokens, 1 for a loss on the tokens' mean.
        closure: How the softmax is averaged, an instance or a name.
    Returns:
        The moments, ``source="theory"``. Cost at 1000 layers: about 10 ms, also where all layers differ in their
        scales, once the closure has its tables (:class:`fathometer.attention.Exact`: half a second to a second for a
        new number of tokens). Causal: one propagation of Gram matrices forward and back, O(n_layers n_tokens^2).
    Raises:
        SpecError: for arrays in the spec, or neither or both ways of giving the tokens.
        DomainError: for moments no set of tokens can have, an alignment outside ``[-1/(n_tokens - 1), 1]``, or a
            stream that overflows.

    >>> from fathometer.spec import preset
    >>> found = moments(preset("vit", n_layers=24), n_tokens=196, q=0.27, p=0.11)
    >>> round(float(found["mlp.activation"].mean[0]), 4)
    0.1072
    """
    groups = alike_layers(spec)
    if gram is None:
        if n_tokens is None or q is None or p is None:
            raise SpecError("moments need either gram, or all of n_tokens, q and p")
        start = check_moments(n_tokens, q, p)
        if np.ndim(start.q):
            raise DomainError("moments take single numbers q and p", value=np.shape(start.q))
        if spec.is_causal:
            gram = start.p + (start.q - start.p) * np.eye(n_tokens)
    elif n_tokens is not None or q is not None or p is not None:
        raise SpecError("moments take either gram, or n_tokens, q and p; not both")
    else:
        gram = check_gram(gram)
        n_tokens = gram.shape[-1]
    lowest = -1 / (n_tokens - 1) if n_tokens > 1 else 0.0
    if not lowest <= top_alignment <= 1:
        raise DomainError(
            f"top_alignment is a mean cosine of n_tokens gradients and must lie in [{lowest:.4g}, 1]; "
            f"got {top_alignment!r}",
            value=top_alignment,
        )
    chosen = as_closure(closure)
    about = {
        "closure": chosen.name,
        "n_tokens": int(n_tokens),
        "top_alignment": float(top_alignment),
        "representation": "exchangeable" if gram is None else "gram",
        "version": __version__,
    }
    alignment = float(top_alignment) if n_tokens > 1 else 0.0
    if gram is None:
        components = _exchangeable(spec, groups, int(n_tokens), start, alignment, chosen)
    else:
        components = _by_position(spec, groups, gram, alignment, chosen)
    return ModelMoments(source="theory", components=components, about=about)


@dataclass
class _Place:
    """Moments and gradients at one place of several layers; what is not known is NaN."""

    q: Any
    p: Any
    own: Any = np.nan
    shared: Any = np.nan
    mean: Any = 0.0


@dataclass
class _Gathering:
    """Places of all sublayers by name, put together in the end."""

    parts: dict[str, list[tuple[NDArray[np.int64], FloatArray]]] = field(default_factory=dict)

    def add(self, kind: str, layers: NDArray[np.int64], places: Mapping[str, _Place], unit: FloatArray) -> None:
        """Take the places of alike layers; their gradients are relative to ``exp(unit)``."""
        for name, place in places.items():
            rows = np.empty((5, len(layers)))
            with np.errstate(divide="ignore", invalid="ignore"):
                rows[0], rows[1], rows[2] = place.mean, place.q, place.p
                own = np.asarray(place.own, dtype=np.float64)
                rows[3] = unit + np.log(own)
                rows[4] = np.where(own > 0, place.shared / own, np.nan)
            self.parts.setdefault(f"{kind}.{name}", []).append((layers, rows))

    def components(self) -> dict[str, ComponentMoments]:
        """Return every component with its layers in order, in the order signals pass a block."""
        order = list(COMPONENTS)
        kinds = list(dict.fromkeys(name.partition(".")[0] for name in self.parts))
        out = {}
        for name in sorted(self.parts, key=lambda n: (kinds.index(n.partition(".")[0]), order.index(n.split(".")[1]))):
            layers = np.concatenate([part for part, _ in self.parts[name]])
            rows = np.concatenate([part for _, part in self.parts[name]], axis=1)
            out[name] = component(layers[np.argsort(layers)], rows[:, np.argsort(layers)])
        return out


def component(layers: NDArray[np.int64], rows: FloatArray) -> ComponentMoments:
    """Return a component from its mean, q, p, gradient_log and gradient_alignment, shape ``(5, n)``."""
    return ComponentMoments(
        layers=layers, mean=rows[0], q=rows[1], p=rows[2], gradient_log=rows[3], gradient_alignment=rows[4]
    )


def _exchangeable(
    spec: Transformer,
    groups: Sequence[AlikeLayers],
    n_tokens: int,
    start: Moments,
    alignment: float,
    closure: Closure,
) -> dict[str, ComponentMoments]:
    stream = stream_path(spec, n_tokens=n_tokens, start=start, closure=closure)
    transfer = np.empty((len(stream.q) - 1, 2, 2))
    passed: list[tuple[AlikeLayers, HalfLayer, Record, Moments]] = []
    for group in groups:
        step = HalfLayer(group.sublayer, n_tokens, closure)
        _, added, record = step.forward(Moments(stream.q[group.half], stream.p[group.half]))
        for i, row in enumerate(step.entries(record)):
            for j, entry in enumerate(row):
                transfer[group.half, i, j] = entry
        passed.append((group, step, record, added))
    gradients = backward(transfer, alignment=alignment)
    gathering = _Gathering()
    for group, step, record, added in passed:
        after = group.half + 1
        places = _places(step, record, added, gradients.alignment[after], spec.d_model, closure.others(n_tokens))
        gathering.add(group.name, group.layer, places, gradients.log_norm[after])
    at = np.concatenate([[0], np.cumsum([len(block.sublayers) for block in spec.layers()])])
    zero = np.zeros(len(at))
    rows = np.stack([zero, stream.q[at], stream.p[at], gradients.log_norm[at], gradients.alignment[at]])
    return {"stream": component(np.arange(len(at)), rows), **gathering.components()}


def _places(
    step: HalfLayer, record: Record, added: Moments, alignment: Any, d_model: int, others: int
) -> dict[str, _Place]:
    """Return every place of alike sublayers, gradients relative to J at their output.

    Args:
        step, record, added: The map, its forward pass, and what it adds.
        alignment: K/J at the output.
        d_model: Width of the stream.
        others: Number of other tokens.
    """
    sublayer, x = step.sublayer, record.normed
    weight = sublayer.branch_scale**2
    own, shared = _through_norm(sublayer.stream_norm, record.residual, 1.0, alignment)
    kept = weight * own / (1 - sublayer.dropout)
    places: dict[str, _Place] = {}
    at_branch = _through_norm(sublayer.output_norm, record.branch, kept, weight * shared)
    uncentred = step.at_branch(record, 1.0, alignment)
    if isinstance(step.map, AttentionMap):
        places |= _attention_places(step.map, x, record.known, uncentred, d_model, others)
    elif isinstance(step.map, (MLPMap, GatedMLPMap)):
        places |= _mlp_places(step.map, x, record.known, at_branch, d_model)
    matrix = step.map.transfer(x, record.known)
    if sublayer.input_norm is not None:
        normed = [matrix[i][0] * at_branch[0] + matrix[i][1] * at_branch[1] for i in range(2)]
        places["input_norm"] = _Place(x.q, x.p, *normed)
    places["branch"] = _Place(*record.branch, *at_branch)
    if sublayer.output_norm is not None:
        places["output_norm"] = _Place(*_behind_norm(sublayer.output_norm, record.branch), kept, weight * shared)
    places["added"] = _Place(*added, own, shared)
    places["sum"] = _Place(*record.residual, own, shared)
    if sublayer.stream_norm is not None:
        places["stream_norm"] = _Place(*_behind_norm(sublayer.stream_norm, record.residual), 1.0, alignment)
    return places


def _attention_places(
    branch_map: AttentionMap, x: Moments, known: Any, gradient: tuple[Any, Any], d_model: int, others: int
) -> dict[str, _Place]:
    b, n = branch_map.branch, branch_map.n_tokens
    statistics, coupling = known.statistics, known.coupling
    d_head, group = d_model / b.n_heads, b.n_heads / (b.n_kv_heads or b.n_heads)
    spread, noise = x.q - x.p, branch_map.dropout_variance
    kept = spread + noise * x.q
    own, shared = b.output**2 * gradient[0], b.output**2 * gradient[1]
    value_bias = b.value_bias**2
    value = Moments(b.value**2 * x.q + value_bias, b.value**2 * x.p + value_bias)
    through = b.value**2 * spread
    score, score_pair = statistics.score, statistics.score_pair
    if b.qk_norm:
        per_query, per_key = coupling / b.query**2, coupling / b.key**2
    else:
        per_query, per_key = (b.key * b.score_multiplier) ** 2, (b.query * b.score_multiplier) ** 2
    of_key = b.value**2 * per_key * group * (kept * score * x.q * own + others * spread * score_pair * x.p * shared)
    path = branch_map.closure.value_path(n, statistics)
    own_value = group * ((path.jj + noise * statistics.y2) * own + path.jk * shared)
    score_rows = b.value**2 * d_head / n
    return {
        "query": _Place(
            b.query**2 * x.q,
            b.query**2 * x.p,
            per_query * through * kept * score * own,
            per_query * through * spread * score_pair * shared,
        ),
        "key": _Place(b.key**2 * x.q, b.key**2 * x.p, of_key, -of_key / others if others else np.nan),
        "scores": _Place(
            coupling * x.q**2,
            coupling * x.q * x.p,
            score_rows * kept * score * own,
            score_rows * spread * score_pair * shared,
        ),
        "weights": _Place(
            statistics.y2 * (1 + noise) / n,
            statistics.y12 / n,
            d_head * value.q * own,
            d_head * value.q * shared,
            mean=1 / n,
        ),
        "value": _Place(value.q, value.p, own_value, group * (path.kj * own + path.kk * shared)),
        "mixed": _Place(
            b.value**2 * (x.p + kept * statistics.y2) + value_bias,
            b.value**2 * (x.p + spread * statistics.y12) + value_bias,
            own,
            shared,
        ),
    }


def _mlp_places(
    branch_map: MLPMap | GatedMLPMap, x: Moments, z: Moments, gradient: tuple[Any, Any], d_model: int
) -> dict[str, _Place]:
    b, f = branch_map.branch, branch_map.kernel
    narrowing = b.mlp_out**2 * d_model / hidden_width(b, d_model)
    own, shared = narrowing * gradient[0], narrowing * gradient[1]
    value, value_pair = f.overlap(z.q, z.q, z.q), f.overlap(z.q, z.q, z.p)
    slope, slope_pair = f.slope_overlap(z.q, z.q, z.q), f.slope_overlap(z.q, z.q, z.p)
    if isinstance(branch_map, MLPMap):
        return {
            "mlp_in": _Place(z.q, z.p, slope * own, slope_pair * shared),
            "activation": _Place(value, value_pair, own, shared, mean=f.mean(z.q)),
        }
    linear = Moments(b.mlp_in**2 * x.q, b.mlp_in**2 * x.p)
    return {
        "gate": _Place(z.q, z.p, slope * linear.q * own, slope_pair * linear.p * shared),
        "mlp_in": _Place(linear.q, linear.p, value * own, value_pair * shared),
        "activation": _Place(value * linear.q, value_pair * linear.p, own, shared),
    }


def _behind_norm(norm: Any, x: Moments) -> Moments:
    kernel = norm_kernel(norm)
    return Moments(kernel.overlap(x.q, x.q, x.q), kernel.overlap(x.q, x.q, x.p))


def _through_norm(norm: Any, x: Moments, own: Any, shared: Any) -> tuple[Any, Any]:
    """Carry (J, K) back through a norm that saw tokens of moments ``x``."""
    if norm is None:
        return own, shared
    kernel = norm_kernel(norm)
    return kernel.slope_overlap(x.q, x.q, x.q) * own, kernel.slope_overlap(x.q, x.q, x.p) * shared


def _by_position(
    spec: Transformer, groups: Sequence[AlikeLayers], gram: FloatArray, alignment: float, closure: Closure
) -> dict[str, ComponentMoments]:
    """Return averages over positions and samples of what full Gram matrices give."""
    trajectory = propagate_gram(spec, gram, closure=closure)
    n = trajectory.n_tokens
    ((log_norm, matrices),) = trajectory.backward(alignment + (1 - alignment) * np.eye(n))
    level = log_norm.reshape(len(log_norm), -1).max(axis=1)  # samples share the gradient at the output
    matrices = matrices * np.exp(log_norm - level.reshape(-1, *(1,) * (log_norm.ndim - 1)))[..., None, None]
    gathering = _Gathering()
    attention = np.cumsum(trajectory.is_attention) - 1
    every = [sublayer for block in spec.layers() for sublayer in block.sublayers]
    for group in groups:
        for half, layer in zip(group.half.tolist(), group.layer, strict=True):
            rows = {key: float(row[attention[half]].mean()) for key, row in trajectory.attention.items()}
            at_input = np.exp(level[half] - level[half + 1]) * matrices[half]
            places = _gram_places(every[half], trajectory, half, rows, at_input, matrices[half + 1])
            gathering.add(group.name, np.array([layer]), places, level[half + 1 : half + 2])
    at = trajectory.borders
    borders = np.array(
        [
            [0.0, _own(g), _shared(g), np.log(_own(m)) + unit, _shared(m) / _own(m)]
            for g, m, unit in zip(trajectory.grams[at], matrices[at], level[at], strict=True)
        ]
    )
    return {"stream": component(np.arange(len(at)), borders.T), **gathering.components()}


def _gram_places(
    sublayer: Sublayer,
    trajectory: GramTrajectory,
    half: int,
    rows: Mapping[str, float],
    at_input: FloatArray,
    at_output: FloatArray,
) -> dict[str, _Place]:
    """Return the places of one sublayer; ``rows`` are its mean attention statistics."""
    branch, n = sublayer.branch, trajectory.n_tokens
    gram, added = trajectory.grams[half], trajectory.added[half]
    weight, keep = sublayer.branch_scale**2, 1 - sublayer.dropout
    normed = gram if sublayer.input_norm is None else _over(norm_kernel(sublayer.input_norm).overlap, gram)
    residual = sublayer.skip_scale**2 * gram + added
    after = at_output
    if sublayer.stream_norm is not None:
        after = at_output * _over(norm_kernel(sublayer.stream_norm).slope_overlap, residual)
    at_branch = _kept_diagonal(weight * after, 1 / keep)
    places: dict[str, _Place] = {}

    def place(name: str, forward: FloatArray, gradient: FloatArray | None, mean: Any = 0.0) -> None:
        own, shared = (np.nan, np.nan) if gradient is None else (_own(gradient), _shared(gradient))
        places[name] = _Place(_own(forward), _shared(forward), own, shared, mean)

    if sublayer.input_norm is not None:
        slope = _over(norm_kernel(sublayer.input_norm).slope_overlap, gram)
        place("input_norm", normed, (at_input - sublayer.skip_scale**2 * after) / slope)
    plain = weight > 0 and sublayer.output_norm is None
    made = _kept_diagonal(added, keep) / weight if plain else None
    if isinstance(branch, SelfAttention):
        place("query", branch.query**2 * normed, None)
        place("key", branch.key**2 * normed, None)
        places["weights"] = _Place(
            rows["inverse_participation"] / (1 - branch.attention_dropout) / n, rows["row_overlap"] / n, mean=1 / n
        )
        place("value", branch.value**2 * normed + branch.value_bias**2, None)
        if made is not None and branch.output > 0:
            place("mixed", (made - branch.output_bias**2) / branch.output**2, branch.output**2 * at_branch)
    else:
        _gram_mlp_places(place, branch, normed, at_branch if plain else None, trajectory.spec.d_model)
    if made is not None:
        place("branch", made, at_branch)
    place("added", added, after)
    place("sum", residual, after)
    if sublayer.stream_norm is not None:
        place("stream_norm", trajectory.grams[half + 1], at_output)
    return places


def _gram_mlp_places(place: Any, branch: Any, normed: FloatArray, gradient: FloatArray | None, d_model: int) -> None:
    kernel = activation_kernel(branch.activation)
    gated = isinstance(branch, GatedMLP)
    z = branch.gate**2 * normed if gated else branch.mlp_in**2 * normed + branch.in_bias**2
    hidden, slope = _over(kernel.overlap, z), _over(kernel.slope_overlap, z)
    back = None if gradient is None else branch.mlp_out**2 * d_model / hidden_width(branch, d_model) * gradient
    if not gated:
        place("mlp_in", z, None if back is None else back * slope)
        place("activation", hidden, back, float(np.mean(kernel.mean(np.diagonal(z, axis1=-2, axis2=-1)))))
        return
    linear = branch.mlp_in**2 * normed
    place("gate", z, None if back is None else back * slope * linear)
    place("mlp_in", linear, None if back is None else back * hidden)
    place("activation", hidden * linear, back)


def _over(function: Any, gram: FloatArray) -> FloatArray:
    """Apply a pairwise kernel to Gram matrices."""
    own = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.asarray(function(own[..., :, None], own[..., None, :], gram))


def _kept_diagonal(gram: FloatArray, factor: Any) -> FloatArray:
    """Return matrices with their diagonals multiplied, as dropout does."""
    return np.asarray(gram * (1 + (factor - 1) * np.eye(gram.shape[-1])))


def _own(grams: FloatArray) -> float:
    """Return the mean of the diagonal entries, over samples too."""
    return float(np.mean(np.diagonal(grams, axis1=-2, axis2=-1)))


def _shared(grams: FloatArray) -> float:
    """Return the mean of the other entries, over samples too."""
    n = grams.shape[-1]
    return (float(np.mean(grams)) * n - _own(grams)) / (n - 1) if n > 1 else 0.0
