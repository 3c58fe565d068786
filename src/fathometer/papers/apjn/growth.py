r"""Power law against stretched exponential: how ln J grows over very many blocks, and the constants of its limit.

.. math:: \text{LayerNorm: } \ln J \simeq \zeta \ln L, \qquad
          \text{Derf, DyT: } \ln J \simeq \sqrt{L/\lambda}

Both limits are approached as slowly as the cosine between tokens approaches its own limit c*, so the slope a run
shows at its end is still on its way. It is therefore also extrapolated: a least-squares fit of the local slope over
the last one and a half decades in powers of ``c* - p/q`` (and ``l^-1/2`` for the stretched exponential), taken to zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import Uniform
from fathometer.observables import forward
from fathometer.observables.growth import closed_form
from fathometer.papers.apjn.architecture import P0, Q0, VIT_BASE, described, name_of, network
from fathometer.papers.item import FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import propagate
from fathometer.spec import Derf, DyT, LayerNorm, Norm

#: Tokens of a run that stands for the limit of many; 1/n terms then lie below rounding at every depth used.
MANY = 10_000_000
N_TOKENS = 196
RUNS: tuple[tuple[Norm, int], ...] = (
    (LayerNorm(), MANY),
    (LayerNorm(), N_TOKENS),
    (Derf(alpha=0.5), N_TOKENS),
    (Derf(alpha=1.0), N_TOKENS),
    (Derf(alpha=2.0), N_TOKENS),
    (DyT(alpha=1.0), N_TOKENS),
)


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """One norm over very many blocks.

    Attributes:
        norm, n_tokens: What was run.
        law: ``"power"`` (slopes are against ln l) or ``"stretched"`` (against the square root of l).
        depths: Sampled depths.
        log_apjn: ``ln J^{l,0}`` there.
        slopes: Local slope there, from the neighbouring samples; the ends are one-sided.
        gap: ``c* - p/q`` there.
        limit: Slope in closed form, zeta or ``1/sqrt(lambda)``.
        last: Slope over the last octave of the run.
        extrapolated: Slope at ``c* = p/q``; NaN where J has a second mode that grows faster (LayerNorm, finite n).
    """

    norm: str
    n_tokens: int
    law: str
    depths: FloatArray
    log_apjn: FloatArray
    slopes: FloatArray
    gap: FloatArray
    limit: float
    last: float
    extrapolated: float


@dataclass(frozen=True, kw_only=True)
class GrowthRuns:
    """All runs."""

    runs: tuple[LongRun, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return closed-form and fitted slopes."""
        rows = []
        for run in self.runs:
            power = run.law == "power"
            constant = "ζ" if power else "λ"
            value = run.limit if power else run.limit**-2
            rows.append(
                (
                    run.norm,
                    "many" if run.n_tokens == MANY else str(run.n_tokens),
                    "ln J against ln l" if power else "ln J against √l",
                    f"{constant} = {value:.5g}",
                    f"{run.limit:.6f}",
                    f"{run.last:.6f}",
                    "-" if math.isnan(run.extrapolated) else f"{run.extrapolated:.6f}",
                    "-" if math.isnan(run.extrapolated) else f"{run.extrapolated / run.limit - 1:+.1e}",
                )
            )
        return Table(
            title="Slope of ln J: closed form, over the last octave of the run, and extrapolated",
            headings=("norm", "tokens", "axes", "constant", "closed form", "last octave", "extrapolated", "off by"),
            rows=tuple(rows),
        )


def growth(size: Size, progress: Progress = silent) -> GrowthRuns:
    """Run the recursion for ``size.run_depth`` blocks of ViT-base with each norm; uniform attention.

    Source: the power law and the stretched exponential, arXiv:2604.11890v3; constants at finite token number, for DyT
    and for general activations, derived in the documentation.
    """
    runs = []
    for i, (norm, n_tokens) in enumerate(RUNS):
        runs.append(long_run(size, norm, n_tokens))
        progress("long runs", i + 1, len(RUNS))
    return GrowthRuns(
        runs=tuple(runs), about=described(size, q=Q0, p=P0, scales="ViT-base, std 0.02", closure="uniform")
    )


def long_run(size: Size, norm: Norm, n_tokens: int) -> LongRun:
    """Run one norm and read off its slopes."""
    spec = network(size, norm, VIT_BASE).with_depth(size.run_depth)
    trajectory = propagate(spec, n_tokens=n_tokens, q=Q0, p=P0, closure=Uniform())
    at = trajectory.borders
    log_apjn = forward(trajectory.transfer, n_tokens).log_norm[at]
    cosine = (trajectory.p / trajectory.q)[at]
    constants = closed_form(spec.blocks[0], None if n_tokens == MANY else n_tokens)
    power = "zeta" in constants
    depth = size.run_depth
    depths = np.unique(np.geomspace(1, depth, 40 * math.ceil(math.log10(depth))).round().astype(int))
    axis = np.log(depths) if power else np.sqrt(depths)
    slopes = np.gradient(log_apjn[depths], axis)
    gap = constants["cosine"] - cosine[depths]
    octave = math.log(2) if power else math.sqrt(depth) - math.sqrt(depth // 2)
    coherent = power and n_tokens != MANY
    return LongRun(
        norm=name_of(norm),
        n_tokens=n_tokens,
        law="power" if power else "stretched",
        depths=depths.astype(np.float64),
        log_apjn=log_apjn[depths],
        slopes=slopes,
        gap=gap,
        limit=constants["zeta"] if power else constants["lambda"] ** -0.5,
        last=float(log_apjn[depth] - log_apjn[depth // 2]) / octave,
        extrapolated=math.nan if coherent else extrapolated_slope(depths.astype(np.float64), slopes, gap, power=power),
    )


def extrapolated_slope(depths: FloatArray, slopes: FloatArray, gap: FloatArray, *, power: bool) -> float:
    """Return the local slope taken to a vanishing gap, by least squares over the last one and a half decades."""
    tail = (depths >= depths[-1] / 30) & (depths < depths[-1])  # the last slope is one-sided
    g = gap[tail]
    terms = (g, g**2, g**3) if power else (g, g**2, depths[tail] ** -0.5)
    design = np.stack([np.ones_like(g), *terms], axis=1)
    return float(np.linalg.lstsq(design, slopes[tail], rcond=None)[0][0])
