r"""Averages over softmax rows against the score variance, and where each closed form gives the output of attention.

The score variance is counted as :math:`b = \sqrt{v/(2 \ln n)}`, one where a random energy model condenses. Shown are
participation :math:`Y_2`, entropy over ``ln n``, overlap of two rows :math:`Y_{12}` and the weight of score gradients
:math:`G`. The maps compare attention outputs, with :math:`y = p + (q-p) Y_2` and :math:`y' = p + (q-p) Y_{12}`: their
mean square ``y`` and cosine ``y'/y``, each against true averages. A wrong curve may cross the true one, which makes
narrow regions of chance agreement.

Source: the random energy limits, Giorlandino and Goldt, arXiv:2505.24333; annealed averages, Cowsik et al.,
arXiv:2403.02579; true averages as derived in the documentation. Which figure of the paper shows what could not be
confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import CLOSURES
from fathometer.papers.apjn.sampled import Sampled
from fathometer.papers.failure_modes.architecture import described
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent

STATISTICS = ("y2", "entropy", "y12", "score")
COUNTS = (16, 64, 512, 4096)
NAMES = ("exact", "annealed", "random_energy")
#: Correlation of two rows, and cosine of the tokens of the map: that of two tokens in the paper's comparison of norms.
CORRELATION = 0.2
TOLERANCE = 0.05
MAP_EXPONENTS = (3, 20)
_LARGEST_B, _LARGEST_MAP_B = 2.0, 3.0
_BATCHES = 24  # of sampled rows, whose means give the error


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """Averages of rows, and ratios of attention outputs.

    Attributes:
        counts: Numbers of keys, first axis of the next three.
        b: Score variance, counted as above.
        theory: By closure and statistic, shape ``(n_counts, len(b))``; entropy over ``ln n``.
        at: Sampled points in b.
        sampled, errors: Means over sampled rows with standard errors, by statistic, shape ``(n_counts, len(at))``.
        map_counts, map_b: Axes of the map.
        mean_square, cosine: Of the attention output over its true value, by closure, shape ``(len(map_counts),
            len(map_b))``.
        about: Sizes.
    """

    counts: tuple[int, ...]
    b: FloatArray
    theory: dict[str, dict[str, FloatArray]]
    at: FloatArray
    sampled: dict[str, FloatArray]
    errors: dict[str, FloatArray]
    map_counts: FloatArray
    map_b: FloatArray
    mean_square: dict[str, FloatArray]
    cosine: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def reach(self, ratios: FloatArray, count: int) -> float:
        """Return the smallest b on the map at which a closed form is wrong by more than the tolerance."""
        wrong = np.abs(ratios[count] - 1) > TOLERANCE
        return float(self.map_b[int(np.argmax(wrong))]) if wrong.any() else float("inf")

    def table(self) -> Table:
        """Return, for each closed form, up to which b its output is within the tolerance, and the sampled check."""
        rows: list[tuple[Cell, ...]] = []
        for n in self.counts:
            row = int(np.argmin(np.abs(np.log(self.map_counts / n))))
            cells = [
                f"{self.reach(ratios[name], row):.2f}"
                for ratios in (self.mean_square, self.cosine)
                for name in NAMES[1:]
            ]
            i = self.counts.index(n)
            pulls = [
                float(np.abs((self.sampled[s][i] - self._exact(s, i)) / self.errors[s][i]).max()) for s in STATISTICS
            ]
            rows.append((f"{n}", *cells, f"{max(pulls):.1f}"))
        return Table(
            title=f"Smallest b at which the output of attention is wrong by {TOLERANCE:.0%}, cosine {CORRELATION:g}",
            headings=(
                "keys",
                "q, annealed",
                "q, asymptotic",
                "p/q, annealed",
                "p/q, asymptotic",
                "exact off samples, in SE",
            ),
            rows=tuple(rows),
        )

    def _exact(self, statistic: str, count: int) -> FloatArray:
        return np.asarray(np.interp(self.at, self.b, self.theory["exact"][statistic][count]))


def figure_4(
    size: Size,
    progress: Progress = silent,
    *,
    counts: tuple[int, ...] = COUNTS,
    exponents: tuple[int, int] = MAP_EXPONENTS,
) -> RowStatistics:
    """Compute averages on a grid as fine as the size's, and sample more rows for a finer one.

    Args:
        size: See there.
        progress: Told about every batch of rows.
        counts: Numbers of keys, powers of two.
        exponents: First and last power of two on the map.
    """
    at = np.linspace(0.25, _LARGEST_B, 8)
    b = np.union1d(np.linspace(0.0, _LARGEST_B, size.grid), at)
    theory = {name: _averages(CLOSURES[name], counts, b) for name in NAMES}
    theory["random_energy"]["entropy"] = np.tile(np.maximum(1 - b**2, 0.0), (len(counts), 1))  # without terms in 1/ln n
    sampled = {s: np.empty((len(counts), len(at))) for s in STATISTICS}
    errors = {s: np.empty((len(counts), len(at))) for s in STATISTICS}
    for i, n in enumerate(counts):
        seen = []
        for batch in range(_BATCHES):
            rows = Sampled(draws=2048 * size.grid // n + 2 * size.grid, seed=batch)
            seen.append(_averages(rows, (n,), at))
            progress(f"sampling rows of {n} keys", i * _BATCHES + batch + 1, len(counts) * _BATCHES)
        for s in STATISTICS:
            values = np.concatenate([one[s] for one in seen])
            sampled[s][i], errors[s][i] = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(_BATCHES)
    first, last = exponents
    map_counts = 2.0 ** np.linspace(first, last, 1 + (last - first) * (2 if size.grid > 100 else 1))
    map_b = np.linspace(0.0, _LARGEST_MAP_B, size.grid)
    outputs = {}
    for name in NAMES:
        rows_of = _averages(CLOSURES[name], tuple(map_counts.tolist()), map_b)
        y, other = (CORRELATION + (1 - CORRELATION) * rows_of[s] for s in ("y2", "y12"))
        outputs[name] = (y, other / y)
    return RowStatistics(
        counts=counts,
        b=b,
        theory=theory,
        at=at,
        sampled=sampled,
        errors=errors,
        map_counts=map_counts,
        map_b=map_b,
        mean_square={name: outputs[name][0] / outputs["exact"][0] for name in NAMES[1:]},
        cosine={name: outputs[name][1] / outputs["exact"][1] for name in NAMES[1:]},
        about=described(size, correlation=CORRELATION),
    )


def _averages(closure: Any, counts: tuple[float, ...], b: FloatArray) -> dict[str, FloatArray]:
    """Return every statistic, shape ``(n_counts, len(b))``; entropy over ``ln n``."""
    out: dict[str, list[FloatArray]] = {s: [] for s in STATISTICS}
    for n in counts:
        found = closure.statistics(n, 2 * np.log(n) * b**2, np.full_like(b, CORRELATION))
        for s in STATISTICS:
            values = np.broadcast_to(getattr(found, s), b.shape)
            out[s].append(values / np.log(n) if s == "entropy" else values)
    return {s: np.stack(values) for s, values in out.items()}
