"""The flow of token geometry over depth, in the plane of norm and cosine, and networks that follow it.

One block maps the mean square q of a token and the cosine p/q of two tokens to new ones. Ordered networks have one
attractor, at which all tokens are equal; chaotic ones leave it for a simplex. The paper's figure has alpha_A = alpha_M
= 8^(-1/2) and sixteen layers; its scales and starting points could not be confirmed, and those here are our choice.

Source: the map and the figure, Cowsik et al., arXiv:2403.02579.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.observables import fixed_points
from fathometer.papers.geometry.architecture import NETWORKS, described, gram_matrices, network, token_number
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import propagate
from fathometer.spec import Transformer

N_LAYERS = 16
#: (q, p/q) at the first block.
STARTS = ((0.4, 0.1), (1.4, 0.1), (0.4, 0.5), (1.4, 0.5), (0.4, 0.95), (1.4, 0.95))
_FIELD = 13  # arrows along each axis
_Q_RANGE = (0.3, 1.5)


@dataclass(frozen=True, kw_only=True)
class RestState:
    """A fixed point of the map.

    Attributes:
        q, cosine: Where.
        rate: Largest modulus of an eigenvalue of the map there.
        is_stable: Whether it attracts.
        kind: ``"collapsed"``, ``"simplex"`` or ``"orthogonal"``.
    """

    q: float
    cosine: float
    rate: float
    is_stable: bool
    kind: str


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One network: its map, and where it takes tokens.

    Attributes:
        name, sigma_w: Which network.
        field_q, field_cosine: Coordinates of the vector field, one-dimensional.
        step_q, step_cosine: What one block changes there, shape ``(len(field_cosine), len(field_q))``.
        theory_q, theory_cosine: Trajectories, shape ``(n_starts, n_layers + 1)``.
        simulated_q, simulated_cosine, error_q, error_cosine: Means and standard errors over networks, same shape.
        rest_states: Fixed points, by growing cosine.
    """

    name: str
    sigma_w: float
    field_q: FloatArray
    field_cosine: FloatArray
    step_q: FloatArray
    step_cosine: FloatArray
    theory_q: FloatArray
    theory_cosine: FloatArray
    simulated_q: FloatArray
    simulated_cosine: FloatArray
    error_q: FloatArray
    error_cosine: FloatArray
    rest_states: tuple[RestState, ...]


@dataclass(frozen=True, kw_only=True)
class Flows:
    """The networks, from the same starts."""

    flows: tuple[Flow, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return fixed points, and the last layer by theory and simulation."""
        rows: list[tuple[Cell, ...]] = []
        for flow in self.flows:
            for state in flow.rest_states:
                what = f"{state.kind}, {'stable' if state.is_stable else 'unstable'}"
                rows.append((flow.name, what, state.q, "", state.cosine, ""))
            for i, (q, cosine) in enumerate(STARTS):
                ends = [
                    (float(theory[i, -1]), (float(seen[i, -1]), float(error[i, -1])))
                    for theory, seen, error in (
                        (flow.theory_q, flow.simulated_q, flow.error_q),
                        (flow.theory_cosine, flow.simulated_cosine, flow.error_cosine),
                    )
                ]
                rows.append((flow.name, f"from ({q:g}, {cosine:g})", *ends[0], *ends[1]))
        return Table(
            title=f"Fixed points, and layer {self.about['n_layers']} from a start (q, p/q), theory and simulation",
            headings=("network", "state", "q", "simulated", "p/q", "simulated"),
            rows=tuple(rows),
        )


def figure_2(size: Size, progress: Progress = silent) -> Flows:
    """Compute the flow and simulate networks at the width of the size, two weight draws for each of its seeds."""
    n_tokens, n_layers, draws = token_number(size), min(N_LAYERS, size.n_layers), 2 * size.seeds
    flows = []
    for k, (name, sigma_w) in enumerate(NETWORKS.items()):
        spec = network(n_layers=n_layers, d_model=size.d_model, sigma_w=sigma_w)
        pairs = []
        for i, (q, cosine) in enumerate(STARTS):
            pairs.append(_simulated(spec, n_tokens, q, cosine, draws=draws, seed=1000 * i))
            progress(f"{name} network, starting points", k * len(STARTS) + i + 1, len(NETWORKS) * len(STARTS))
        simulated = np.array(pairs)
        mean, error = simulated.mean(axis=-1), simulated.std(axis=-1, ddof=1) / np.sqrt(draws)
        start_q, start_cosine = np.array(STARTS).T
        theory_q, theory_cosine = _run(spec, n_tokens, start_q, start_cosine)
        points = min(_FIELD, size.grid)
        field_q, field_cosine = np.linspace(*_Q_RANGE, points), np.linspace(0.0, 1.0, points)
        after_q, after_cosine = _run(spec.with_depth(1), n_tokens, field_q[None, :], field_cosine[:, None])
        flows.append(
            Flow(
                name=name,
                sigma_w=sigma_w,
                field_q=field_q,
                field_cosine=field_cosine,
                step_q=after_q[1] - after_q[0],
                step_cosine=after_cosine[1] - after_cosine[0],
                theory_q=theory_q.T,
                theory_cosine=theory_cosine.T,
                simulated_q=mean[:, 0],
                simulated_cosine=mean[:, 1],
                error_q=error[:, 0],
                error_cosine=error[:, 1],
                rest_states=_rest_states(spec, n_tokens),
            )
        )
    return Flows(
        flows=tuple(flows),
        about=described(
            size,
            n_tokens=n_tokens,
            n_layers=n_layers,
            weight_draws=draws,
            starts=[list(start) for start in STARTS],
            closure=DEFAULT_CLOSURE.name,
        ),
    )


def _run(spec: Transformer, n_tokens: int, q: FloatArray, cosine: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return q and p/q at every block border."""
    run = propagate(spec, n_tokens=n_tokens, q=q, p=cosine * q, closure=DEFAULT_CLOSURE)
    q, p = run.q[run.borders], run.p[run.borders]
    return q, p / q


def _simulated(
    spec: Transformer, n_tokens: int, q: float, cosine: float, *, draws: int, seed: int
) -> list[list[FloatArray]]:
    """Return q and p/q of every network at every block border, shape ``(2, n_layers + 1, draws)``."""
    from fathometer.models import equiangular_tokens

    tokens = equiangular_tokens(n_tokens=n_tokens, d_model=spec.d_model, q=q, p=cosine * q, batch=draws, seed=seed)
    norms, cosines = [], []
    for gram in gram_matrices(spec, tokens, seed=seed):
        total = np.trace(gram, axis1=-2, axis2=-1)
        norms.append(total / n_tokens)
        cosines.append((gram.sum(axis=(-2, -1)) - total) / (n_tokens - 1) / total)
    return [norms, cosines]


def _rest_states(spec: Transformer, n_tokens: int) -> tuple[RestState, ...]:
    return tuple(
        RestState(
            q=point.q,
            cosine=point.cosine,
            rate=max(abs(rate) for rate in point.rates),
            is_stable=point.is_stable,
            kind=point.kind,
        )
        for point in fixed_points(spec, n_tokens=n_tokens)
    )
