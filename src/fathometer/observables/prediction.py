"""From a spec to the curves a user reads: the theory's side of every comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure, condensation
from fathometer.errors import SpecError
from fathometer.observables.jacobian import backward, forward
from fathometer.propagation import GramTrajectory, Trajectory, check_moments, propagate, propagate_gram
from fathometer.results import Profile
from fathometer.spec import Transformer

FloatArray = NDArray[np.float64]


def predict(
    spec: Transformer,
    *,
    n_tokens: int | None = None,
    q: Any = None,
    p: Any = None,
    gram: Any = None,
    closure: Closure | str = DEFAULT_CLOSURE,
) -> Profile:
    """Predict activation and gradient statistics at every layer.

    Give either ``n_tokens``, ``q`` and ``p`` (every token alike; fields of the spec may then be arrays, which makes
    this a grid), or the ``gram`` matrix of the tokens at the first block. A causal spec always uses the Gram matrix,
    because its positions are not alike; from ``q`` and ``p`` it starts with equal tokens.

    Args:
        spec: The transformer.
        n_tokens: Number of tokens.
        q: Mean square per coordinate at the first block.
        p: Mean overlap of two different tokens there.
        gram: Overlaps ``x_a . x_b / d``, shape ``(*samples, n_tokens, n_tokens)``; curves average over samples.
        closure: How the softmax is averaged, an instance or a name.
    Returns:
        Curves over layers, ``source="theory"``; ``p`` and ``cosine`` of a single token are zero.

    >>> from fathometer.spec import preset
    >>> profile = predict(preset("vit", n_layers=24), n_tokens=196, q=0.27, p=0.11)
    >>> len(profile.q), bool(profile.apjn[0] > 1)
    (25, True)
    """
    chosen = as_closure(closure)
    if gram is None:
        if n_tokens is None or q is None or p is None:
            raise SpecError("predict needs either gram, or all of n_tokens, q and p")
        if not spec.is_causal:
            return profile_of(propagate(spec, n_tokens=n_tokens, q=q, p=p, closure=chosen))
        start = check_moments(n_tokens, q, p)
        if np.ndim(start.q) or np.ndim(start.p):
            raise SpecError("a causal spec is propagated on full Gram matrices: give scalar q and p")
        gram = start.p + (start.q - start.p) * np.eye(n_tokens)
    elif n_tokens is not None or q is not None or p is not None:
        raise SpecError("predict takes either gram, or n_tokens, q and p; not both")
    return profile_of(propagate_gram(spec, gram, closure=chosen))


def profile_of(trajectory: Trajectory | GramTrajectory) -> Profile:
    """Read the curves off a trajectory."""
    if isinstance(trajectory, GramTrajectory):
        return _profile_of_gram(trajectory)
    at = trajectory.borders
    isotropic = backward(trajectory.transfer)
    pooled = backward(trajectory.transfer, alignment=1.0 if trajectory.n_tokens > 1 else 0.0)
    ahead = forward(trajectory.transfer, trajectory.n_others)
    q, p = trajectory.q[at], trajectory.p[at]
    p = p if trajectory.n_tokens > 1 else np.zeros(p.shape)
    curves = {
        "q": q,
        "p": p,
        "cosine": p / q,
        "apjn_log": isotropic.log_norm[at],
        "apjn_forward_log": ahead.log_norm[at],
        "gradient_alignment": isotropic.alignment[at],
        "gradient_log": pooled.log_norm[at],
        **_added(trajectory.added_q, trajectory),
    }
    if trajectory.attention and _one_attention_per_block(trajectory):
        entropy = trajectory.attention["attention_entropy"]
        curves |= {
            "attention_entropy": entropy,
            "attention_entropy_relative": entropy / np.log(trajectory.n_tokens)
            if trajectory.n_tokens > 1
            else 1 + entropy,
            "participation": _participation(trajectory.attention["inverse_participation"], trajectory.n_tokens),
            "row_overlap": trajectory.attention["row_overlap"],
            "logit_variance": trajectory.attention["logit_variance"],
            "condensation": condensation(trajectory.attention["logit_variance"], max(trajectory.n_tokens, 2)),
        }
    return Profile(source="theory", curves=curves, about=_about(trajectory))


def _profile_of_gram(trajectory: GramTrajectory) -> Profile:
    at = trajectory.borders
    n = trajectory.n_tokens
    samples = tuple(range(1, trajectory.grams.ndim - 2))
    q, p = _diagonal_mean(trajectory.grams), _off_diagonal_mean(trajectory.grams)
    (log_norm, matrices), (pooled, _) = trajectory.backward(None, np.ones((n, n)))
    q_mean, p_mean = _mean(q, samples), _mean(p, samples)
    level = np.exp(log_norm - np.max(log_norm, axis=samples, keepdims=True)) if samples else np.ones_like(log_norm)
    alignment = _mean(level * _off_diagonal_mean(matrices), samples) / _mean(level, samples)
    log_mean = _log_mean(log_norm, samples)
    curves = {
        "q": q_mean[at],
        "p": p_mean[at],
        "cosine": (p_mean / q_mean)[at],
        "apjn_log": log_mean[at],
        "gradient_alignment": alignment[at],
        "gradient_log": _log_mean(pooled, samples)[at],
        "apjn_forward_log": _log_mean(trajectory.forward_log, samples)[at],
        "apjn_token_log": _token_log(log_norm[0], matrices[0]),
        **_added(_mean(_diagonal_mean(trajectory.added), samples), trajectory),
    }
    if trajectory.attention and _one_attention_per_block(trajectory):
        over = tuple(range(1, trajectory.attention["attention_entropy"].ndim))
        entropy, visible = (trajectory.attention[key] for key in ("attention_entropy", "visible_keys"))
        relative = np.where(visible > 1, entropy, np.nan) / np.log(np.maximum(visible, 2))
        curves |= {
            "attention_entropy": entropy.mean(axis=over),
            "attention_entropy_relative": np.nanmean(relative, axis=over) if n > 1 else np.ones(len(entropy)),
            "participation": _participation(trajectory.attention["inverse_participation"].mean(axis=over), n),
            "row_overlap": trajectory.attention["row_overlap"].mean(axis=over),
            "logit_variance": trajectory.attention["logit_variance"].mean(axis=over),
            "condensation": _condensation(trajectory.attention["logit_variance"], visible, over),
        }
    return Profile(source="theory", curves=curves, about=_about(trajectory))


def _token_log(log_norm: FloatArray, matrix: FloatArray) -> FloatArray:
    """Return the log mean square of every token's gradient at the input, averaged over samples."""
    logs = log_norm[..., None] + np.log(np.diagonal(matrix, axis1=-2, axis2=-1))
    return _log_mean(logs, tuple(range(logs.ndim - 1)))


def _added(added: FloatArray, trajectory: Trajectory | GramTrajectory) -> dict[str, FloatArray]:
    """Sum what branches add over the sublayers of each block, attention and MLP apart."""
    out = {}
    for name, chosen in (("attention_added_q", trajectory.is_attention), ("mlp_added_q", ~trajectory.is_attention)):
        if np.any(chosen):
            mask = chosen.reshape(-1, *(1,) * (added.ndim - 1))
            out[name] = np.add.reduceat(np.where(mask, added, 0.0), trajectory.borders[:-1], axis=0)
    return out


def _one_attention_per_block(trajectory: Trajectory | GramTrajectory) -> bool:
    counts = np.add.reduceat(trajectory.is_attention.astype(int), trajectory.borders[:-1])
    return bool(np.all(counts == 1))


def _condensation(variance: FloatArray, visible: FloatArray, over: tuple[int, ...]) -> FloatArray:
    """Return the root mean square of ``sqrt(v / (2 ln n))`` over the queries that see more than one key."""
    many = visible > 1
    square = np.where(many, condensation(variance, np.maximum(visible, 2)) ** 2, 0.0)
    return np.asarray(np.sqrt(square.sum(axis=over) / np.maximum(many.sum(axis=over), 1)))


def _participation(y2: FloatArray, n_tokens: int) -> FloatArray:
    return np.asarray(1 / np.where(y2 > 0, y2, 1 / n_tokens))


def _about(trajectory: Trajectory | GramTrajectory) -> dict[str, Any]:
    representation = "gram" if isinstance(trajectory, GramTrajectory) else "exchangeable"
    return {
        "closure": trajectory.closure,
        "n_tokens": trajectory.n_tokens,
        "representation": representation,
        "version": __version__,
    }


def _mean(values: FloatArray, axes: tuple[int, ...]) -> FloatArray:
    return np.asarray(values.mean(axis=axes)) if axes else values


def _log_mean(logs: FloatArray, axes: tuple[int, ...]) -> FloatArray:
    if not axes:
        return logs
    top = np.max(logs, axis=axes, keepdims=True)
    return np.asarray(np.log(np.mean(np.exp(logs - top), axis=axes)) + np.squeeze(top, axis=axes))


def _diagonal_mean(grams: FloatArray) -> FloatArray:
    return np.asarray(np.mean(np.diagonal(grams, axis1=-2, axis2=-1), axis=-1))


def _off_diagonal_mean(grams: FloatArray) -> FloatArray:
    n = grams.shape[-1]
    if n == 1:
        return np.zeros(grams.shape[:-2])
    total = grams.sum(axis=(-2, -1)) - n * _diagonal_mean(grams)
    return np.asarray(total / (n * (n - 1)))
