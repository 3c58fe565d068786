"""The panels with a curve over layers. Each takes a report or profiles, and axes or none, and returns the axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fathometer.plotting.canvas import FIRST, SECOND, THIRD, axes_or_new, dress
from fathometer.plotting.marks import (
    bitten,
    finish,
    key,
    left_out,
    limit_line,
    measured_points,
    nothing,
    theory_line,
)
from fathometer.plotting.scales import LOG_RANGE, Scale, Series, scale_for, series
from fathometer.plotting.subject import Drawable, Subject, subject_of
from fathometer.results import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = NDArray[np.float64]
Quantity = tuple[str, str, str]  # curve, label, colour

_STREAM: tuple[Quantity, ...] = (("q", "q", FIRST), ("p", "p", SECOND))
_GRADIENTS: tuple[Quantity, ...] = (
    ("apjn_log", "token (APJN)", FIRST),
    ("gradient_log", "pooled loss", SECOND),
)
_BRANCHES: tuple[Quantity, ...] = (("attention_added_q", "attention", FIRST), ("mlp_added_q", "MLP", SECOND))


def draw_stream(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the mean square ``q`` and the overlap ``p`` of tokens on the stream.

    Args:
        source: A report, a profile, or theory and measurement.
        ax: Where to draw; new axes if ``None``.
        sources: Whether the key says what lines and points mean.
    """
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Stream", ylabel="mean square and overlap per coordinate")
    scale = _draw(ax, subject, _STREAM)
    if scale is not Scale.EXPONENT and "level_high" in subject.limits:
        limit_line(ax, subject.limits["level_high"])
    return _close(ax, subject, _STREAM, ("signal_growth",), sources)


def draw_cosine(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the cosine between tokens; where tokens all but coincide, draw ``1 - cosine`` on a logarithmic axis."""
    subject, ax = subject_of(source), axes_or_new(ax)
    collapsing = _angle_range(subject) > LOG_RANGE
    dress(ax, "Angle between tokens", ylabel="1 − cosine" if collapsing else "cosine")
    if not subject.has("cosine"):
        nothing(ax, "no cosine in this profile")
        return ax
    for profile in subject.profiles:
        curve = series(profile, "cosine", Scale.LINEAR)
        if collapsing:
            curve = Series(1 - curve.values, 1 - curve.high, 1 - curve.low)
        _mark(ax, profile.source, curve, FIRST, "cosine")
    scale = Scale.LOG if collapsing else Scale.LINEAR
    finish(ax, scale, subject.n_layers, bounds=None if collapsing else (0.0, 1.0))
    if "angle_low" in subject.limits:
        low = subject.limits["angle_low"]
        limit_line(ax, low if collapsing else 1 - low)
    return _close(ax, subject, (("cosine", "cosine", FIRST),), ("rank_collapse",), sources)


def draw_gradients(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw how much gradients grow from the output back to each block, for one token and for a mean-pooled loss.

    Where gradients vanish, the criterion reads the part of J that tells tokens apart, J - K; then that is drawn too.
    """
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Gradients, output to input")
    vanishing = bool(subject.found("vanishing_gradients"))
    scale = _draw(ax, subject, _GRADIENTS, logarithmic=vanishing)
    ax.set_ylabel("log10 of growth" if scale is Scale.EXPONENT else "mean square, relative to the output")
    if vanishing:
        for profile in subject.profiles:
            if {"apjn_log", "gradient_alignment"} <= set(profile.curves):
                _mark(ax, profile.source, _resolved(profile, scale), THIRD, "apart (J − K)")
        if scale is not Scale.EXPONENT and "resolved_low" in subject.limits:
            limit_line(ax, subject.limits["resolved_low"])
    if scale is not Scale.EXPONENT and (limit := _gradient_limit(subject)) is not None:
        limit_line(ax, limit)
    shown = (*_GRADIENTS, ("gradient_alignment", "apart (J − K)", THIRD)) if vanishing else _GRADIENTS
    return _close(ax, subject, shown, ("exploding_gradients", "vanishing_gradients"), sources)


def draw_forward(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw how much a small perturbation of the first block's input grows on the way down (forward APJN)."""
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Perturbations, input to output")
    quantity = (("apjn_forward_log", "forward APJN", FIRST),)
    scale = _draw(ax, subject, quantity)
    ax.set_ylabel("log10 of growth" if scale is Scale.EXPONENT else "mean square, relative to the input")
    return _close(ax, subject, quantity, (), sources)


def draw_tokens(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the APJN from the input to the output for every token position."""
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Gradients by token, at the first block", xlabel="position", ylabel="mean square, relative to the output")
    name = "apjn_token_log"
    if not subject.has(name):
        nothing(ax, "not measured" if subject.measured is not None else "not predicted")
        return ax
    scale = scale_for(subject, [name])
    drawn = [profile for profile in subject.profiles if name in profile.curves]
    for profile in drawn:
        _mark(ax, profile.source, series(profile, name, scale), FIRST, "APJN")
    finish(ax, scale, len(drawn[0].curves[name]) - 1)
    return _close(ax, subject, ((name, "APJN of a token", FIRST),), (), sources)


def draw_branches(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the mean square that attention and the MLP add to the stream in each block."""
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "What branches add", ylabel="mean square added per block")
    _draw(ax, subject, _BRANCHES)
    return _close(ax, subject, _BRANCHES, ("dominant_branch", "negligible_branch"), sources)


def draw_attention_entropy(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the entropy of attention rows, relative to uniform attention."""
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Attention entropy", ylabel="share of the entropy of uniform attention")
    quantity = (("attention_entropy_relative", "entropy", FIRST),)
    _draw(ax, subject, quantity, bounds=(0.0, 1.05))
    if "entropy_low" in subject.limits and subject.has("attention_entropy_relative"):
        limit_line(ax, subject.limits["entropy_low"])
    return _close(ax, subject, quantity, ("attention_concentrated",), sources)


def draw_score_variance(source: Drawable | Subject, ax: Axes | None = None, *, sources: bool = True) -> Axes:
    """Draw the variance of attention scores over the keys a query sees."""
    subject, ax = subject_of(source), axes_or_new(ax)
    dress(ax, "Attention score variance", ylabel="variance over visible keys")
    quantity = (("logit_variance", "score variance", FIRST),)
    _draw(ax, subject, quantity)
    return _close(ax, subject, quantity, (), sources)


def _draw(
    ax: Axes,
    subject: Subject,
    quantities: Sequence[Quantity],
    *,
    bounds: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Scale:
    names = [name for name, _, _ in quantities]
    if not subject.has(*names):
        nothing(ax, "not measured" if subject.measured is not None else "not predicted")
        return Scale.LINEAR
    curves = [_shown(profile, name) for profile in subject.profiles for name in names if name in profile.curves]
    if not any(np.isfinite(curve).any() for curve in curves):
        nothing(ax, "no finite values")
        return Scale.LINEAR
    alternating = quantities is _BRANCHES and _alternating(subject)
    scale = Scale.LINEAR if bounds is not None else scale_for(subject, names)
    if logarithmic and scale is Scale.LINEAR:
        scale = Scale.LOG
    for profile in subject.profiles:
        for name, label, colour in quantities:
            if name in profile.curves:
                curve = series(profile, name, scale)
                if alternating:
                    curve = replace(curve, only=np.flatnonzero(profile.curves[name]))
                _mark(ax, profile.source, curve, colour, label)
    finish(ax, scale, subject.n_layers, bounds=bounds)
    left_out(ax, curves, scale)
    return scale


def _mark(ax: Axes, source: str, curve: Series, colour: str, label: str) -> None:
    if source == "theory":
        theory_line(ax, curve, colour, label)
    else:
        measured_points(ax, curve, colour, label)


def _alternating(subject: Subject) -> bool:
    """Whether every block is either attention or an MLP; then what the other would add, nothing, is not drawn."""
    names = [name for name, _, _ in _BRANCHES]
    showing = [profile for profile in subject.profiles if any(name in profile.curves for name in names)]
    if not all(name in profile.curves for profile in showing for name in names):
        return False
    pairs = [[profile.curves[name] != 0 for name in names] for profile in showing]
    return all(bool(np.all(one != other)) and one.any() and other.any() for one, other in pairs)


def _shown(profile: Profile, name: str) -> FloatArray:
    """Return a curve as far as its sign matters on an axis; what a ``_log`` curve stands for is always positive."""
    curve = np.asarray(profile.curves[name], dtype=np.float64)
    return np.where(np.isfinite(curve), 1.0, np.nan) if name.endswith("_log") else curve


def _close(ax: Axes, subject: Subject, quantities: Sequence[Quantity], findings: Sequence[str], sources: bool) -> Axes:
    shown = [(label, colour) for name, label, colour in quantities if subject.has(name)]
    if shown:
        bitten(ax, subject.found(*findings), subject.n_layers)
        key(ax, shown, subject, sources=sources)
    return ax


def _angle_range(subject: Subject) -> float:
    angles = [1 - profile.curves["cosine"] for profile in subject.profiles if "cosine" in profile.curves]
    everything = np.concatenate(angles) if angles else np.ones(1)
    everything = everything[np.isfinite(everything) & (everything > 0)]
    return float(everything.max() / everything.min()) if everything.size else 1.0


def _resolved(profile: Profile, scale: Scale) -> Series:
    """Return ``J - K`` on the axis of J; its error is not known."""
    apart = np.clip(1 - profile.curves["gradient_alignment"], 1e-12, None)
    logs = profile.curves["apjn_log"] + np.log(apart)
    values = logs / np.log(10) if scale is Scale.EXPONENT else np.exp(logs)
    return Series(values, values, values)


def _gradient_limit(subject: Subject) -> FloatArray | None:
    """Return the limit of exploding gradients on the axis of J; it weighs J with the growth q_l / q_L."""
    limits, profile = subject.limits, subject.profiles[0]
    if not {"sensitivity_high", "amplification_high"} <= set(limits) or "q" not in profile.curves:
        return None
    with np.errstate(all="ignore"):
        high = limits["sensitivity_high"] * profile.curves["q"][-1] / profile.curves["q"]
    high = np.minimum(high, limits["amplification_high"])
    high[0] = np.nan  # the first block is judged by its sensitivity alone
    return np.asarray(high)
