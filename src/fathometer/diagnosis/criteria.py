"""The criteria: each reads curves and says whether a failure is there, how large, and at what depth it begins.

A criterion takes a plain mapping of curves, so the same code judges the measured average, every single weight draw,
and the theory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fathometer.diagnosis.thresholds import Thresholds

FloatArray = NDArray[np.float64]
Curves = Mapping[str, FloatArray]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A failed criterion.

    Attributes:
        value: The offending number.
        limit: The threshold it crossed.
        depth: Number of blocks at which it begins: the depth this model could have.
        text: One sentence with the numbers.
    """

    value: float
    limit: float
    depth: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A named failure and the test for it."""

    name: str
    title: str
    test: Callable[[Curves, Thresholds, FloatArray | None], Evidence | None]


def sensitivity_log(curves: Curves) -> FloatArray:
    """Return ``ln(J^{L,l} q_l / q_L)`` at every border."""
    q = curves["q"]
    return np.asarray(curves["apjn_log"] + np.log(q) - np.log(q[-1]))


def _exploding(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    relative, plain = sensitivity_log(curves), curves["apjn_log"]
    bad = relative > np.log(limits.sensitivity_high)
    bad[1:] |= plain[1:] > np.log(limits.amplification_high)
    if not np.any(bad):
        return None
    worst = int(np.argmax(relative))
    last = int(np.flatnonzero(bad)[-1])
    return Evidence(
        value=float(np.exp(relative[worst])),
        limit=limits.sensitivity_high,
        depth=len(plain) - 1 - last,
        text=(
            f"gradients grow {_number(np.exp(plain[worst]))}-fold in mean square from the output to block {worst} "
            f"({_number(np.exp(relative[worst]))}-fold relative to the stream; limit {limits.sensitivity_high:g}); "
            f"{len(plain) - 1 - last} blocks cross it"
        ),
    )


def _vanishing(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    apart = np.clip(1 - curves["gradient_alignment"], 1e-12, None)
    resolved = curves["apjn_log"] + np.log(apart)
    bad = resolved < np.log(limits.resolved_low)
    if not np.any(bad):
        return None
    worst = int(np.argmin(resolved))
    last = int(np.flatnonzero(bad)[-1])
    return Evidence(
        value=float(np.exp(resolved[worst])),
        limit=limits.resolved_low,
        depth=len(resolved) - 1 - last,
        text=(
            f"what tells tokens apart in the gradient shrinks to {np.exp(resolved[worst]):.2g} of its mean "
            f"square at block {worst} (limit {limits.resolved_low:g}); {len(resolved) - 1 - last} blocks cross it"
        ),
    )


def _collapse(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    angle = 1 - curves["cosine"]
    start = max(float(angle[0]), 1e-12)
    bad = (angle < limits.angle_low) & (angle < limits.angle_shrink * start)
    if not np.any(bad):
        return None
    first = int(np.flatnonzero(bad)[0])
    return Evidence(
        value=float(angle.min()),
        limit=limits.angle_low,
        depth=first,
        text=(
            f"tokens become parallel: 1 - cosine falls from {start:.2g} to {float(angle.min()):.2g} "
            f"(limit {limits.angle_low:g}), crossed at block {first}"
        ),
    )


def _concentrated(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    entropy = curves.get("attention_entropy_relative")
    if entropy is None or not np.any(entropy < limits.entropy_low):
        return None
    first = int(np.flatnonzero(entropy < limits.entropy_low)[0])
    lowest = float(entropy.min())
    at = int(np.argmin(entropy))
    variance, condensation = (float(curves[name][at]) for name in ("logit_variance", "condensation"))
    return Evidence(
        value=lowest,
        limit=limits.entropy_low,
        depth=first,
        text=(
            f"attention rows keep {100 * lowest:.0f}% of the entropy of uniform attention (limit "
            f"{100 * limits.entropy_low:.0f}%), from block {first} on; score variance {variance:.3g}, "
            f"{condensation:.2f} of the spread at which attention condenses on single keys"
        ),
    )


def _growth(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    q = curves["q"]
    half = max((len(q) - 1) // 2, 1)
    growth = float(q[-1] / q[half])
    high = np.flatnonzero(q > limits.level_high)
    if growth <= limits.growth_high and high.size == 0:
        return None
    if growth > limits.growth_high:
        rate = np.log(growth) / max(len(q) - 1 - half, 1)
        depth = int(np.argmax(np.log(q / q[min(1, len(q) - 1)]) > np.log(limits.growth_high)))
        text = (
            f"the stream's mean square grows {_number(growth)}-fold over the second half of the depth, "
            f"{100 * (np.exp(rate) - 1):.0f}% a block (limit {limits.growth_high:g}-fold; linear growth gives 2)"
        )
        return Evidence(value=growth, limit=limits.growth_high, depth=depth, text=text)
    return Evidence(
        value=float(q.max()),
        limit=limits.level_high,
        depth=int(high[0]),
        text=(
            f"the stream's mean square reaches {_number(q.max())} (limit "
            f"{_number(limits.level_high)}), at block {high[0]}"
        ),
    )


def _negligible(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    added = {kind: curves[f"{kind}_added_q"] for kind in ("attention", "mlp") if f"{kind}_added_q" in curves}
    if not added:
        return None
    everything = np.sum(list(added.values()), axis=0)
    depth = len(everything)
    if len(added) == 2:
        kind = min(added, key=lambda name: float(added[name].sum()))
        share = float(added[kind].sum() / everything.sum()) if everything.sum() > 0 else 0.0
        if share < limits.share_low:
            label = "the MLP" if kind == "mlp" else "attention"
            text = (
                f"{label} adds {100 * share:.2g}% of what branches add to the stream (limit "
                f"{100 * limits.share_low:g}%): "
                f"{np.sqrt((1 - share) / max(share, 1e-300)):.0f} times less in amplitude than the other"
            )
            return Evidence(value=share, limit=limits.share_low, depth=0, text=text)
    total = float(np.sum(everything / curves["q"][:-1]))
    if total < limits.contribution_low:
        text = (
            f"over {depth} blocks all branches together add {100 * total:.2g}% of the stream's mean square (limit "
            f"{100 * limits.contribution_low:g}%): the stack is close to the identity"
        )
        return Evidence(value=total, limit=limits.contribution_low, depth=0, text=text)
    return None


def _dominant(curves: Curves, limits: Thresholds, skips: FloatArray | None) -> Evidence | None:
    added = [curves[f"{kind}_added_q"] for kind in ("attention", "mlp") if f"{kind}_added_q" in curves]
    if not added:
        return None
    everything = np.sum(added, axis=0)
    kept = curves["q"][:-1] * (1.0 if skips is None else skips)
    share = everything / (everything + kept)
    deep = share[len(share) // 2 :]
    if len(share) < 2 or float(np.mean(deep > limits.dominance_high)) <= 0.5:
        return None
    first = int(np.flatnonzero(share > limits.dominance_high)[0])
    return Evidence(
        value=float(np.median(deep)),
        limit=limits.dominance_high,
        depth=first,
        text=(
            f"branches make up {100 * float(np.median(deep)):.1f}% of the stream they write to (limit "
            f"{100 * limits.dominance_high:g}%): the skip connection carries next to nothing"
        ),
    )


CRITERIA = (
    Criterion(name="exploding_gradients", title="Exploding gradients", test=_exploding),
    Criterion(name="vanishing_gradients", title="Vanishing gradients", test=_vanishing),
    Criterion(name="rank_collapse", title="Rank collapse", test=_collapse),
    Criterion(name="attention_concentrated", title="Attention too concentrated", test=_concentrated),
    Criterion(name="signal_growth", title="Signal growth", test=_growth),
    Criterion(name="dominant_branch", title="Dominant branch", test=_dominant),
    Criterion(name="negligible_branch", title="Negligible branch", test=_negligible),
)


def _number(value: float) -> str:
    value = float(value)
    return f"{value:.3g}" if value < 1e4 else f"{value:.1e}"
