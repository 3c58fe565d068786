r"""How far theory and measurement part: the geometric mean fold error, by thirds of the depth.

.. math:: \mathrm{fold} = \exp\Bigl(\frac1L\sum_l \bigl|\ln \text{measured}_l - \ln \text{theory}_l\bigr|\Bigr)

Source: the metric of Alekseev, arXiv:2604.11890v3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.results import Profile

FloatArray = NDArray[np.float64]

COMPARED = ("q", "p", "apjn_log", "apjn_forward_log", "gradient_log", "attention_entropy", "logit_variance")


@dataclass(frozen=True, kw_only=True)
class FoldError:
    """Fold error of one curve: whole depth, each third of it, and the part that is weight scatter."""

    whole: float
    thirds: tuple[float, float, float]
    noise: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Fold errors by curve, and the reasons known for the larger ones."""

    folds: dict[str, FoldError]
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "folds": {k: {"whole": f.whole, "thirds": list(f.thirds), "noise": f.noise} for k, f in self.folds.items()},
            "reasons": list(self.reasons),
        }


def fold_error(
    measured: FloatArray, theory: FloatArray, *, logarithmic: bool
) -> tuple[float, tuple[float, float, float]]:
    """Return the fold error over the depth and over its thirds, leaving out layers without a positive value."""
    if logarithmic:
        distance = np.abs(measured - theory)
    else:
        good = (measured > 0) & (theory > 0)
        ratio = np.where(good, measured, 1.0) / np.where(good, theory, 1.0)
        distance = np.where(good, np.abs(np.log(ratio)), np.nan)
    parts = [_fold(part) for part in np.array_split(distance, 3)]
    return _fold(distance), (parts[0], parts[1], parts[2])


def compare(measured: Profile, theory: Profile, *, width: int, score_limit: float = 0.5) -> Comparison:
    """Compare the curves both profiles have.

    Args:
        measured: Averages over weight draws with standard errors.
        theory: The prediction from the measured input.
        width: d_model, for the finite-width remark.
        score_limit: Score variance beyond which the annealed closure is off by percents.
    """
    folds = {}
    for name in COMPARED:
        if name in measured.curves and name in theory.curves:
            logarithmic = name.endswith("_log")
            whole, thirds = fold_error(measured.curves[name], theory.curves[name], logarithmic=logarithmic)
            error = measured.errors.get(name)
            scale = 1.0 if logarithmic else np.maximum(np.abs(measured.curves[name]), 1e-300)
            noise = float("nan") if error is None else float(np.exp(np.mean(error / scale)))
            folds[name] = FoldError(whole=whole, thirds=thirds, noise=noise)
    return Comparison(folds=folds, reasons=tuple(_reasons(measured, theory, folds, width, score_limit)))


def _reasons(
    measured: Profile, theory: Profile, folds: dict[str, FoldError], width: int, score_limit: float
) -> Sequence[str]:
    worst = max((folds[name].whole for name in ("q", "apjn_log") if name in folds), default=1.0)
    if worst <= 1.05:
        return []
    out = []
    variance = theory.curves.get("logit_variance")
    if theory.about.get("closure") == "annealed" and variance is not None and float(np.max(variance)) > score_limit:
        out.append(
            f"score variance reaches {float(np.max(variance)):.2g}: averaging numerator and denominator of the softmax "
            f"apart (annealed closure) overstates how far attention concentrates above {score_limit:g}"
        )
    ratio = measured.n_layers / width
    if ratio > 0.1:
        out.append(f"depth over width is {ratio:.2g}: corrections of that order are not in the theory")
    noise = folds["apjn_log"].noise if "apjn_log" in folds else float("nan")
    if noise > 1.02:
        out.append(f"weight draws scatter: one standard error of the mean is a fold of {noise:.3f}; use more seeds")
    if not out:
        out.append("no cause known to this report; corrections at finite width and token number are not in the theory")
    return out


def _fold(distance: FloatArray) -> float:
    seen = distance[np.isfinite(distance)]
    return float(np.exp(np.mean(seen))) if seen.size else float("nan")
