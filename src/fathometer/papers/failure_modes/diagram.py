"""The trainability diagram: inverse temperature against skip scale, 60 blocks, 512 tokens of text.

The published theory draws entropy collapse where attention of infinitely many tokens condenses. Beside it are true
averages over rows of 512 keys, where the border is a crossover: participation above a tenth, or half the entropy lost.
The weakest skip that avoids rank collapse does not depend on the temperature as long as attention is spread.

Source: Giorlandino and Goldt, arXiv:2505.24333. The labels and thresholds of its diagram could not be confirmed; ours
are those of :func:`fathometer.observables.failure_modes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import critical_beta
from fathometer.observables import MODES, Criteria, critical_skip_scale, failure_modes
from fathometer.papers.failure_modes.architecture import (
    TEXT_COSINE,
    described,
    network,
    simulated_cosines,
    simulated_width,
)
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.spec import Transformer

N_LAYERS = 60
BETA_RANGE, SKIP_RANGE = (0.0, 3.0), (0.0, 3.0)
#: Name of a labelling to closure and criterion.
LABELLINGS = {
    "asymptotic": ("random_energy", "condensation"),
    "participation": ("exact", "participation"),
    "entropy": ("exact", "entropy"),
}
CLOSURES = ("random_energy", "exact")
#: Inverse temperatures and skip scales of the networks, all pairs.
NETWORKS = ((0.4, 1.1, 1.9, 2.6), (0.6, 1.2, 1.8, 2.6))
DEPTHS = (3, 6, 12, 24, 36, 60, 100, 150)
DEPTH_BETAS = (0.5, 3.0)
_LINE_POINTS = 49
_WEAKEST = 1e-3  # skip that is searched for
_FINEST = 256


@dataclass(frozen=True, kw_only=True)
class Trainability:
    """The diagram; maps have shape ``(len(skip_scales), len(betas))``.

    Attributes:
        betas, skip_scales: Axes of the maps.
        modes: Names of the labels.
        labels: By labelling, positions in ``modes``.
        cosine: p/q after the last block, by closure.
        crossovers: By criterion, the inverse temperature at which the first attention passes it.
        line_betas, critical: Weakest skip without rank collapse, by closure, at these inverse temperatures.
        depths, depth_betas, critical_over_depth: The same over the number of blocks, at two inverse temperatures; shape
            ``(n_depths, 2)``. Zero where no skip is needed.
        points: Inverse temperature, skip scale and final cosine of networks, shape ``(n_networks, 3)``.
        predicted: Final cosine of the networks by closure.
        about: Sizes.
    """

    betas: FloatArray
    skip_scales: FloatArray
    modes: tuple[str, ...]
    labels: dict[str, NDArray[np.int64]]
    cosine: dict[str, FloatArray]
    crossovers: dict[str, float]
    line_betas: FloatArray
    critical: dict[str, FloatArray]
    depths: tuple[int, ...]
    depth_betas: tuple[float, ...]
    critical_over_depth: dict[str, FloatArray]
    points: FloatArray
    predicted: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return critical skips, crossovers and the final cosines of networks."""
        rows: list[tuple[Cell, ...]] = []
        for k, depth in enumerate(self.depths):
            for i, beta in enumerate(self.depth_betas):
                values = [float(self.critical_over_depth[closure][k, i]) for closure in CLOSURES]
                rows.append((f"weakest skip, {depth} blocks, beta {beta:g}", *values, ""))
        for name, beta in self.crossovers.items():
            asymptotic = name == "condensation"
            rows.append(
                (f"beta of entropy collapse by {name}", beta if asymptotic else "", "" if asymptotic else beta, "")
            )
        for k, (beta, skip, seen) in enumerate(self.points.tolist()):
            values = [float(self.predicted[closure][k]) for closure in CLOSURES]
            rows.append((f"cosine at beta {beta:g}, skip {skip:g}", *values, seen))
        return Table(
            title="Trainability at initialisation",
            headings=("number", "asymptotic", "exact", "one network"),
            rows=tuple(rows),
        )


def diagram(
    size: Size, progress: Progress = silent, *, networks: tuple[Sequence[float], Sequence[float]] = NETWORKS
) -> Trainability:
    """Label a grid as fine as the size's, at most 256 x 256, and simulate one network for each of a few points.

    Networks are twice as wide as the size, at most 512, with as many tokens; the theory has the same number of tokens.

    Args:
        size: See there.
        progress: Told about every network.
        networks: Inverse temperatures and skip scales of networks.
    """
    width = min(2 * simulated_width(size), 512)
    tokens: dict[str, Any] = {"n_tokens": width, "cosine": TEXT_COSINE}
    fineness = min(size.grid, _FINEST)
    betas, skips = np.linspace(*BETA_RANGE, fineness), np.linspace(*SKIP_RANGE, fineness)

    def at(beta: Any, skip_scale: Any) -> Transformer:
        return network(n_layers=N_LAYERS, d_model=width, n_tokens=width, beta=beta, skip_scale=skip_scale)

    grid = at(betas[None, :], skips[:, None])
    found = {
        name: failure_modes(grid, **tokens, closure=closure, criteria=Criteria(entropy=criterion))
        for name, (closure, criterion) in LABELLINGS.items()
    }
    line_betas = np.linspace(*BETA_RANGE, _LINE_POINTS)
    pairs = [(beta, skip) for beta in networks[0] for skip in networks[1]]
    line, two, chosen = at(line_betas, 1.0), at(np.array(DEPTH_BETAS), 1.0), at(*np.array(pairs).T)
    points = []
    for k, (beta, skip) in enumerate(pairs):
        seen = simulated_cosines(at(beta, skip), n_tokens=width, q=1.0, cosine=TEXT_COSINE, draws=1, seed=100_000 * k)
        points.append((beta, skip, float(seen[0, -1])))
        progress(f"network at beta {beta:g}, skip {skip:g}", k + 1, len(pairs))
    first = found["participation"]
    return Trainability(
        betas=betas,
        skip_scales=skips,
        modes=MODES,
        labels={name: _codes(modes.mode) for name, modes in found.items()},
        cosine={"random_energy": found["asymptotic"].cosine, "exact": first.cosine},
        crossovers={
            "condensation": float(critical_beta(1.0, TEXT_COSINE)),
            "participation": float(np.interp(Criteria(entropy="participation").limit, first.participation[0], betas)),
            "entropy": float(np.interp(-Criteria(entropy="entropy").limit, -first.entropy[0], betas)),
        },
        line_betas=line_betas,
        critical={c: _critical(line, [N_LAYERS], tokens, c)[0] for c in CLOSURES},
        depths=DEPTHS,
        depth_betas=DEPTH_BETAS,
        critical_over_depth={c: _critical(two, DEPTHS, tokens, c) for c in CLOSURES},
        points=np.array(points),
        predicted={c: failure_modes(chosen, **tokens, closure=c).cosine for c in CLOSURES},
        about=described(size, n_layers=N_LAYERS, d_model=width, **tokens, rank=Criteria().rank),
    )


def _critical(spec: Transformer, depths: Sequence[int], tokens: dict[str, Any], closure: str) -> FloatArray:
    found = critical_skip_scale(spec, depths, **tokens, closure=closure, low=_WEAKEST)
    return np.where(found > _WEAKEST, found, 0.0)


def _codes(modes: NDArray[np.str_]) -> NDArray[np.int64]:
    out = np.zeros(modes.shape, dtype=np.int64)
    for code, name in enumerate(MODES):
        out[modes == name] = code
    return out
