"""The cosine of tokens over depth, in the phase of spread and in that of condensed attention, for three skips.

Four theories beside networks: the published limit of infinitely many tokens (``random_energy``), true averages over
finite softmax rows (``exact``), the same with the correction of finite width (``finite_width``, in the table), and
annealed averages. Networks scatter: the product of a skip and a random branch moves the overlap of tokens by a relative
``1/sqrt(d)`` in every block, and with it the mean of a bounded cosine by something of the order of depth over width.

Source: Giorlandino and Goldt, arXiv:2505.24333. Its tokens are texts; ours are equiangular, of the same mean cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import Annealed, Closure, Exact, RandomEnergy
from fathometer.papers.failure_modes.architecture import (
    TEXT_COSINE,
    described,
    network,
    simulated_cosines,
    simulated_width,
    weight_draws,
)
from fathometer.papers.failure_modes.finite_width import FiniteWidth
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import BlockMap, Moments
from fathometer.spec import Transformer

BETAS = (0.5, 3.0)
SKIP_SCALES = (0.5, 1.0, 1.5)
N_LAYERS = 50


@dataclass(frozen=True, kw_only=True)
class CosineCurves:
    """Cosine over depth.

    Attributes:
        betas, skip_scales: First two axes of every array: inverse temperature and skip scale of attention.
        theory: By closure, shape ``(n_betas, n_skip_scales, n_layers + 1)``.
        simulated, errors: Mean and standard error over networks, same shape.
        about: Sizes.
    """

    betas: tuple[float, ...]
    skip_scales: tuple[float, ...]
    theory: dict[str, FloatArray]
    simulated: FloatArray
    errors: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def largest_errors(self, closure: str) -> FloatArray:
        """Return the largest distance of a theory from simulation over the depth, shape ``(n_betas, n_skips)``."""
        return np.asarray(np.abs(self.theory[closure] - self.simulated).max(axis=-1))

    def table(self) -> Table:
        """Return the largest error of every theory in every setting."""
        found = {closure: self.largest_errors(closure) for closure in self.theory}
        rows: list[tuple[Cell, ...]] = []
        for i, beta in enumerate(self.betas):
            for j, skip in enumerate(self.skip_scales):
                errors = [f"{found[closure][i, j]:.3f}" for closure in self.theory]
                rows.append((f"{beta:g}", f"{skip:g}", *errors, f"{self.errors[i, j].max():.3f}"))
        return Table(
            title="Largest error of the mean cosine over the depth, theory against networks",
            headings=("beta", "skip", *(name.replace("_", " ") for name in self.theory), "largest SE of networks"),
            rows=tuple(rows),
        )


def figure_1(
    size: Size,
    progress: Progress = silent,
    *,
    betas: tuple[float, ...] = BETAS,
    skip_scales: tuple[float, ...] = SKIP_SCALES,
) -> CosineCurves:
    """Predict and simulate 50 blocks at the width of the size, at most 512, with as many tokens."""
    width, draws, n_layers = simulated_width(size), weight_draws(size, per_seed=4), N_LAYERS
    closures: tuple[Closure, ...] = (RandomEnergy(), Exact(), FiniteWidth(d_model=width), Annealed())
    shape = (len(betas), len(skip_scales), n_layers + 1)
    theory = {closure.name: np.empty(shape) for closure in closures}
    simulated, errors = np.empty(shape), np.empty(shape)
    for i, beta in enumerate(betas):
        for j, skip_scale in enumerate(skip_scales):
            setting = i * len(skip_scales) + j
            spec = network(n_layers=n_layers, d_model=width, n_tokens=width, beta=beta, skip_scale=skip_scale)
            for closure in closures:
                theory[closure.name][i, j] = predicted(spec, width, closure)
            seen = simulated_cosines(
                spec, n_tokens=width, q=1.0, cosine=TEXT_COSINE, draws=draws, seed=100_000 * setting
            )
            simulated[i, j], errors[i, j] = seen.mean(axis=0), seen.std(axis=0, ddof=1) / np.sqrt(draws)
            progress(f"beta {beta:g}, skip {skip_scale:g}", setting + 1, len(betas) * len(skip_scales))
    return CosineCurves(
        betas=betas,
        skip_scales=skip_scales,
        theory=theory,
        simulated=simulated,
        errors=errors,
        about=described(size, d_model=width, n_tokens=width, n_layers=n_layers, weight_draws=draws, cosine=TEXT_COSINE),
    )


def predicted(spec: Transformer, n_tokens: int, closure: Closure, *, cosine: float = TEXT_COSINE) -> FloatArray:
    """Return p/q at every block border, from unit tokens."""
    stream = Moments(1.0, cosine)
    out = [cosine]
    for block in spec.layers():
        stream = BlockMap(block, n_tokens, closure).forward(stream)
        out.append(float(stream.p / stream.q))
    return np.array(out)
