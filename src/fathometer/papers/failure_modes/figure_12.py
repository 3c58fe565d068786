r"""Where LayerNorm sits, and gain control: cosine over depth, and how condensed attention becomes on the way.

Without LayerNorm tokens grow, so that scores spread until attention condenses, ``b = \sqrt{v/(2 \ln n)} > 1``. Behind
the sum it keeps them at unit size, and the cosine tends to one exponentially; in front of the branches the stream grows
linearly, and the cosine tends to one as a power of the depth. Gain control subtracts from what attention adds its mean
over tokens, so that only the MLP draws them together.

Close to rank collapse the published limit fails: it lets the rows of different tokens pick different keys as soon as
they condense, but rows of nearly equal tokens pick the same one. True averages and networks without LayerNorm collapse
in both ways at once.

Source: Giorlandino and Goldt, arXiv:2505.24333, and the setting of the authors' notebook: sigma_v = 1 without value
bias, sigma_w^2 = 0.2, beta = 0.1, unit skips, q = 1 and p = 0.2 at the first of 100 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import CLOSURES, condensation
from fathometer.papers.failure_modes.architecture import (
    described,
    network,
    simulated_cosines,
    simulated_width,
    weight_draws,
)
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import Trajectory, propagate
from fathometer.spec import Transformer

N_LAYERS = 100
BETA = 0.1
Q, P = 1.0, 0.2
#: Name to placement of LayerNorm, and whether attention is gain-controlled.
VARIANTS = {
    "post-LN": ("post", False),
    "pre-LN": ("pre", False),
    "no LN": ("none", False),
    "post-LN, gain control": ("post", True),
    "pre-LN, gain control": ("pre", True),
}
NAMES = ("random_energy", "exact", "annealed")
SHOWN_LAYERS = (5, 20, 100)
_RESOLVED = 1e-12  # relative difference of q and p that float64 still resolves


@dataclass(frozen=True, kw_only=True)
class Placements:
    """Curves over depth for every variant.

    Attributes:
        variants: Names, first axis of every array.
        theory: p/q by closure, shape ``(n_variants, n_layers + 1)``.
        condensation: b of the attention of every block by closure, shape ``(n_variants, n_layers)``; NaN where tokens
            agree to rounding.
        simulated, errors: Mean and standard error of p/q over networks, shape ``(n_variants, n_layers + 1)``.
        about: Sizes.
    """

    variants: tuple[str, ...]
    theory: dict[str, FloatArray]
    condensation: dict[str, FloatArray]
    simulated: FloatArray
    errors: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return cosines at three depths, and the first condensed block."""
        rows: list[tuple[Cell, ...]] = []
        for i, variant in enumerate(self.variants):
            for layer in SHOWN_LAYERS:
                cells = [f"{self.theory[name][i, layer]:.6f}" for name in NAMES]
                condensed = np.flatnonzero(self.condensation["exact"][i] > 1)
                first = f"{condensed[0] + 1}" if condensed.size else "none"
                seen = (float(self.simulated[i, layer]), float(self.errors[i, layer]))
                rows.append((variant, f"{layer}", *cells, seen, first))
        return Table(
            title="Mean cosine behind a block; first block with condensed attention (exact theory)",
            headings=("variant", "block", "asymptotic", "exact", "annealed", "simulated", "condensed from"),
            rows=tuple(rows),
        )


def figure_12(size: Size, progress: Progress = silent) -> Placements:
    """Predict and simulate 100 blocks at the width of the size, at most 512, with as many tokens."""
    width, draws = simulated_width(size), weight_draws(size, per_seed=2)
    cosines: dict[str, list[FloatArray]] = {name: [] for name in NAMES}
    condensations: dict[str, list[FloatArray]] = {name: [] for name in NAMES}
    simulated, errors = [], []
    for i, variant in enumerate(VARIANTS):
        spec = notebook(variant, d_model=width, n_tokens=width)
        for name in NAMES:
            run = propagate(spec, n_tokens=width, q=Q, p=P, closure=CLOSURES[name])
            cosines[name].append((run.p / run.q)[run.borders])
            condensations[name].append(_condensation(run))
        seen = simulated_cosines(spec, n_tokens=width, q=Q, cosine=P / Q, draws=draws, seed=100_000 * i)
        simulated.append(seen.mean(axis=0))
        errors.append(seen.std(axis=0, ddof=1) / np.sqrt(draws))
        progress(variant, i + 1, len(VARIANTS))
    return Placements(
        variants=tuple(VARIANTS),
        theory={name: np.stack(curves) for name, curves in cosines.items()},
        condensation={name: np.stack(curves) for name, curves in condensations.items()},
        simulated=np.stack(simulated),
        errors=np.stack(errors),
        about=described(size, d_model=width, n_tokens=width, n_layers=N_LAYERS, weight_draws=draws, q=Q, p=P),
    )


def _condensation(run: Trajectory) -> FloatArray:
    b = condensation(run.attention["logit_variance"], run.n_tokens)
    q, p = run.q[run.borders[:-1]], run.p[run.borders[:-1]]
    return np.where(q - p > _RESOLVED * q, b, np.nan)


def notebook(variant: str, *, d_model: int, n_tokens: int) -> Transformer:
    """Return the network of one variant."""
    placement, centred = VARIANTS[variant]
    return network(
        n_layers=N_LAYERS,
        d_model=d_model,
        n_tokens=n_tokens,
        beta=BETA,
        sigma_v=1.0,
        value_bias=0.0,
        placement=placement,
        centred=centred,
    )
