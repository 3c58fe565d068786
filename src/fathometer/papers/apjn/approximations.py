r"""What the published approximations of J get wrong, each against simulation.

* ``many tokens``: forward moments and the backward recursion without terms in ``1/n`` (the paper's code);
* ``single factor``: :math:`J = \prod_l \chi_l` with :math:`\chi = (1 + \sigma_{OV}^2 \hat q P)(1 + \sigma_{21}^2 \hat
  q/2)`, which drops the alignment K of gradients between tokens (the paper's text);
* ``no score path``: attention weights that carry no gradient.

The full recursion keeps all three; its softmax is averaged in closed form (``annealed``, the library's default) and
over sampled scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fathometer.attention import Annealed, Closure, UniformLargeN
from fathometer.observables import backward
from fathometer.papers.apjn.architecture import P0, Q0, VIT_BASE, VIT_LARGE, described, network
from fathometer.papers.apjn.overlay import simulate
from fathometer.papers.apjn.sampled import Sampled
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import Trajectory, propagate
from fathometer.spec import Derf, LayerNorm, Norm, Scales

METHODS = ("full, sampled", "full, annealed", "many tokens", "single factor", "no score path")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network in which some approximation is put to the test."""

    name: str
    norm: Norm
    scales: Scales
    n_layers: int
    n_tokens: int


def strong_scores(coupling: float) -> Scales:
    """Return ViT-large scales with attention matrices such that ``sigma_Q^2 sigma_K^2`` is ``coupling``, all alike."""
    scale = coupling**0.25
    return replace(VIT_LARGE, query=scale, key=scale, value=scale, output=scale)


DOUBLED = replace(VIT_BASE, value=2 * VIT_BASE.value, output=2 * VIT_BASE.output)
SETTINGS: tuple[Setting, ...] = (
    Setting(name="ViT-L, LN, n = 64", norm=LayerNorm(), scales=VIT_LARGE, n_layers=24, n_tokens=64),
    Setting(name="ViT-L, Derf 1, n = 64", norm=Derf(alpha=1.0), scales=VIT_LARGE, n_layers=24, n_tokens=64),
    Setting(name="few tokens, LN, n = 8", norm=LayerNorm(), scales=VIT_LARGE, n_layers=24, n_tokens=8),
    Setting(name="few tokens, Derf 1, n = 8", norm=Derf(alpha=1.0), scales=VIT_LARGE, n_layers=24, n_tokens=8),
    Setting(name="σ²_QK = 1, LN", norm=LayerNorm(), scales=strong_scores(1.0), n_layers=12, n_tokens=32),
    Setting(name="σ²_QK = 2.86, LN", norm=LayerNorm(), scales=strong_scores(2.86), n_layers=12, n_tokens=32),
    Setting(name="σ²_QK = 2.86, Derf 1", norm=Derf(alpha=1.0), scales=strong_scores(2.86), n_layers=12, n_tokens=32),
    Setting(name="doubled O, V, LN", norm=LayerNorm(), scales=DOUBLED, n_layers=32, n_tokens=64),
    Setting(name="doubled O, V, Derf 1", norm=Derf(alpha=1.0), scales=DOUBLED, n_layers=32, n_tokens=64),
)


@dataclass(frozen=True, kw_only=True)
class Approximations:
    """J from the input to the output in every setting.

    Attributes:
        settings: Names, first axis of every array.
        simulated, errors: Mean and standard error over weight draws.
        predicted: By method.
        folds: ``max(x, 1/x)`` of prediction over simulation, by method.
        level: Mean square of a token at the output over simulation, by ``"full, sampled"`` and ``"many tokens"``.
        about: Sizes.
    """

    settings: tuple[str, ...]
    simulated: FloatArray
    errors: FloatArray
    predicted: dict[str, FloatArray]
    folds: dict[str, FloatArray]
    level: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return J by simulation and by every method, with the fold error of each."""
        rows: list[tuple[Cell, ...]] = []
        for i, name in enumerate(self.settings):
            cells = [f"{self.predicted[m][i]:.4g} ({self.folds[m][i]:.3f})" for m in METHODS]
            levels = [f"{level[i]:.3f}" for level in self.level.values()]
            rows.append((name, (float(self.simulated[i]), float(self.errors[i])), *cells, *levels))
        return Table(
            title="J from input to output: prediction (fold error); q at the output over simulation",
            headings=("setting", "simulated", *METHODS, *(f"q, {method}" for method in self.level)),
            rows=tuple(rows),
        )


def approximations(
    size: Size, progress: Progress = silent, *, settings: Sequence[Setting] = SETTINGS
) -> Approximations:
    """Simulate every setting at the width of the size, with four weight draws for each of its seeds."""
    simulated, errors, levels = [], [], []
    predicted: dict[str, list[float]] = {method: [] for method in METHODS}
    level: dict[str, list[float]] = {"full, sampled": [], "many tokens": []}
    for i, setting in enumerate(settings):

        def report(text: str, done: int, total: int, at: int = i, name: str = setting.name) -> None:
            progress(f"{name}, {text}", at * total + done, len(settings) * total)

        spec = network(replace(size, n_layers=setting.n_layers), setting.norm, setting.scales)
        inputs: dict[str, Any] = {"n_tokens": setting.n_tokens, "q": Q0, "p": P0}
        seen = simulate(spec, **inputs, seeds=4 * size.seeds, progress=report)
        simulated.append(float(seen.apjn[0]))
        errors.append(float(seen.errors["apjn_log"][0]) * simulated[-1])
        levels.append(float(seen.q[-1]))

        def run(closure: Closure, described: Any = spec, start: dict[str, Any] = inputs) -> Trajectory:
            return propagate(described, **start, closure=closure)

        runs = {
            "full, sampled": run(Sampled()),
            "full, annealed": run(Annealed()),
            "many tokens": run(UniformLargeN()),
            "single factor": run(Annealed(score_path=False)),
            "no score path": run(Annealed(score_path=False)),
        }
        for method, trajectory in runs.items():
            if method == "single factor":
                predicted[method].append(float(np.prod(trajectory.transfer[:, 0, 0])))
            else:
                predicted[method].append(float(np.exp(backward(trajectory.transfer).log_norm[0])))
        for method, values in level.items():
            values.append(float(runs[method].q[-1]) / levels[-1])
    found = np.array(simulated)
    arrays = {method: np.array(values) for method, values in predicted.items()}
    return Approximations(
        settings=tuple(setting.name for setting in settings),
        simulated=found,
        errors=np.array(errors),
        predicted=arrays,
        folds={method: np.exp(np.abs(np.log(values / found))) for method, values in arrays.items()},
        level={method: np.array(values) for method, values in level.items()},
        about=described(size, q=Q0, p=P0),
    )
