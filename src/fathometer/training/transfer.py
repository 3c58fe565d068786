r"""Does a learning rate tuned on a narrow model serve a wide one? Loss after training against rate, width by width.

The optimum is where the loss, averaged over seeds, is least on the grid of rates; a parabola in :math:`\log_2` of the
rate through that point and its two neighbours refines it,

.. math:: x^* = x_0 + \frac{h}{2}\,\frac{f_- - f_+}{f_- - 2 f_0 + f_+},

and resampling seeds gives its error. How far the optimum moves between the narrowest and the widest model, in factors
of two, is the verdict: it should not under a scheme that transfers.

Source: the experiments of Dinan, Yaida and Zhang, arXiv:2304.02034v1, Sec. 2; the parabola and the resampling are ours.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.errors import DomainError, SpecError
from fathometer.prescription.width_scaling import FixedHeads, Optimizer, ScalingScheme
from fathometer.results.files import write_atomically
from fathometer.results.plain import plain
from fathometer.training.families import (
    UNIFORM,
    Build,
    Family,
    Recipe,
    Task,
    check_runs,
    recipe,
    seeded,
    train_steps,
)
from fathometer.training.runs import DIVERGED, OK, Progress, final_loss

FloatArray = NDArray[np.float64]

EDGE, CLIFF = "edge", "cliff"
SCHEMES = (UNIFORM, "neural-tangent", "hybrid", "maximal-update")
_RESAMPLES = 1000
_JOURNAL = 2  # schema
_WORSE = (OK, CLIFF, EDGE, DIVERGED)


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate at one width.

    Attributes:
        grid_rate: Where the mean loss is least on the grid; NaN where every rate has a run that diverged.
        rate: The vertex of the parabola; ``grid_rate`` where a neighbour is missing or diverged.
        error: Standard error of the base-two logarithm of ``rate``, over resampled seeds; NaN unless ``status`` is
            ``"ok"``.
        loss: Least mean loss on the grid.
        status: ``"ok"``; ``"edge"`` if the least loss is at an end of the grid, ``"cliff"`` if beside a rate that
            diverged; ``"diverged"`` if there is no rate without. Only an ``"ok"`` optimum lies between its neighbours.
    """

    grid_rate: float
    rate: float
    error: float
    loss: float
    status: str


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far the optimum moves from the narrowest to the widest model, in factors of two.

    Attributes:
        grid: On the grid of rates.
        fitted: Of the parabolas.
        error: Standard error of ``fitted`` over seeds, resampled for both widths alike; NaN unless ``status`` is
            ``"ok"``.
        status: The worse of those of the two optima, see :class:`Optimum`. Behind an edge of the grid either optimum
            may lie anywhere, so that nothing is known of the shift.
    """

    grid: float
    fitted: float
    error: float
    status: str

    def __str__(self) -> str:
        """Return the shift on the grid, with that of the parabolas where there is one, else with the status."""
        if self.status == OK:
            return f"{self.grid:+.0f} ({self.fitted:+.2f} +- {self.error:.2f})"
        return self.status if math.isnan(self.grid) else f"{self.grid:+.0f} ({self.status})"


@dataclass(frozen=True, kw_only=True)
class TransferCheck:
    """Losses after training.

    Attributes:
        schemes: Names of the recipes.
        widths: Shape ``(n_widths,)``, ascending.
        rates: Learning rates at the base width, shape ``(n_rates,)``, ascending.
        losses: By recipe, mean training loss over the last fifth of the steps, nats, shape
            ``(n_widths, n_rates, n_seeds)``; infinite for runs that diverged.
        status: By recipe, ``"ok"`` or ``"diverged"``, same shape.
        protocol: Everything that was held fixed.
    """

    schemes: tuple[str, ...]
    widths: NDArray[np.int64]
    rates: FloatArray
    losses: Mapping[str, FloatArray]
    status: Mapping[str, NDArray[np.str_]]
    protocol: Mapping[str, Any]

    def optima(self, scheme: str) -> tuple[Optimum, ...]:
        """Return the best rate at every width."""
        x = np.log2(self.rates)
        out = []
        for losses in self.losses[scheme]:
            (at,), (vertex,), (status,) = _least(x, losses.mean(axis=-1)[None])
            error = _spread(_vertices(x, losses), losses.shape[-1]) if status == OK else math.nan
            known = status != DIVERGED
            out.append(
                Optimum(
                    grid_rate=float(self.rates[at]) if known else math.nan,
                    rate=float(2**vertex),
                    error=error,
                    loss=float(losses[at].mean()) if known else math.inf,
                    status=str(status),
                )
            )
        return tuple(out)

    def shift(self, scheme: str) -> Shift:
        """Return how far the optimum moves over all widths."""
        found, x = self.optima(scheme), np.log2(self.rates)
        first, last = found[0], found[-1]
        status = max(first.status, last.status, key=_WORSE.index)
        moved = _vertices(x, self.losses[scheme][-1]) - _vertices(x, self.losses[scheme][0])
        return Shift(
            grid=float(np.log2(last.grid_rate / first.grid_rate)),
            fitted=float(np.log2(last.rate / first.rate)),
            error=_spread(moved, self.losses[scheme].shape[-1]) if status == OK else math.nan,
            status=status,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the optima and shifts; numbers that are not finite become ``None``."""
        return {
            "schema": 1,
            "schemes": list(self.schemes),
            "widths": plain(self.widths),
            "rates": plain(self.rates),
            "losses": plain(self.losses),
            "status": plain(self.status),
            "optima": {name: plain(self.optima(name)) for name in self.schemes},
            "shifts": {name: plain(self.shift(name)) for name in self.schemes},
            "protocol": plain(self.protocol),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def transfer_check(
    build: Build,
    widths: Sequence[int],
    *,
    task: Task,
    rates: Sequence[float],
    base_width: int,
    schemes: Sequence[str | float | ScalingScheme | Recipe] = SCHEMES,
    steps: int = 150,
    warmup: int = 0,
    seeds: int = 3,
    optimizer: Optimizer = "adamw",
    fixed: FixedHeads = "d_head",
    overrides: Mapping[str, str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TransferCheck:
    """Train a family of models at several widths and learning rates, under several recipes.

    Every recipe, width and rate sees the same data, seed by seed. At the base width the recipes coincide, and runs are
    made once. An interruption is raised; with a journal no finished run is lost, and the same call goes on.

    Args:
        build: Returns the model of a width and a seed, see :class:`fathometer.training.families.Family`.
        widths: At least two.
        task: What is trained on.
        rates: Learning rates at the base width, best a grid of factors of two wide enough to hold every optimum.
        base_width: The width that rates are named for.
        schemes: Recipes, see :func:`fathometer.training.families.recipe`.
        steps, warmup: Of every run.
        seeds: Runs that are averaged, at least two, each with weights and data of its own.
        optimizer, fixed, overrides: See :class:`fathometer.training.families.Family`.
        journal: File of finished runs, rewritten in one step after each. Runs found in it are not made again. It
            belongs to one task, protocol, version and family of models; families that differ in nothing that
            :meth:`fathometer.training.families.Family.fingerprint` sees need journals of their own.
        progress: Called with (label, done, total) after every run.
    Returns:
        The losses. Cost: the number of runs times ``steps`` times a forward and reverse pass; wide models dominate.
    Raises:
        DomainError, SpecError, ModelError: for numbers out of range, unknown schemes, models without roles, and a
            journal that is unreadable or of another protocol.
    """
    chosen = [recipe(scheme) for scheme in schemes]
    names = [one.name for one in chosen]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"schemes must be different and at least one; got {names}")
    check_runs(widths, base_width, [steps], seeds, rates)
    if steps < 5 or warmup < 0:
        raise DomainError(f"steps must be at least 5 and warmup not negative; got {steps} and {warmup}")
    if len(rates) < 3 or len(set(rates)) < len(rates):
        raise DomainError(f"an optimum needs at least three different rates; got {list(rates)}", value=rates)
    widths, rates = sorted(widths), sorted(float(rate) for rate in rates)
    family = Family(build, task, base_width=base_width, optimizer=optimizer, fixed=fixed, overrides=overrides)
    protocol = {
        "model": family.fingerprint(),
        "overrides": dict(overrides or {}),
        "task": task.name,
        "steps": steps,
        "warmup": warmup,
        "optimizer": optimizer,
        "base_width": base_width,
        "fixed": fixed,
        "version": __version__,
        "recipes": {one.name: {"s": one.scheme.s, "uniform": one.uniform, "rates": dict(one.rates)} for one in chosen},
    }
    kept = _Journal(journal, {key: value for key, value in protocol.items() if key != "recipes"})
    shape = (len(widths), len(rates), seeds)
    losses = {name: np.full(shape, np.inf) for name in names}
    status = {name: np.full(shape, DIVERGED, dtype="<U8") for name in names}
    places = list(product(range(len(widths)), range(seeds), chosen, range(len(rates))))
    for done, (i, k, one, j) in enumerate(places, start=1):
        label = "base" if widths[i] == base_width and not one.rates else _label(one)
        key = f"{label} | width {widths[i]} | rate {rates[j]!r} | seed {k}"
        if key not in kept.runs:
            with seeded(k):
                model, updater = family.start(one, width=widths[i], seed=k, rate=rates[j])
                curve = list(train_steps(model, updater, task.batches(k), steps=steps, warmup=warmup))
            loss = final_loss(curve, steps)
            kept.add(key, loss if math.isfinite(loss) else None)
        found = kept.runs[key]
        if found is not None:
            losses[one.name][i, j, k], status[one.name][i, j, k] = found, OK
        if progress is not None:
            progress(f"{one.name}, width {widths[i]}", done, len(places))
    return TransferCheck(
        schemes=tuple(names),
        widths=np.array(widths, dtype=np.int64),
        rates=np.array(rates),
        losses=losses,
        status=status,
        protocol=protocol,
    )


def _label(one: Recipe) -> str:
    rates = "".join(f", {role} {rate!r}" for role, rate in sorted(one.rates.items()))
    return f"{'uniform' if one.uniform else 'scaled'} s {one.scheme.s!r} {one.scheme.name}{rates}"


def _least(x: FloatArray, means: FloatArray) -> tuple[NDArray[np.int64], FloatArray, NDArray[np.str_]]:
    """Return where curves of shape ``(n, n_rates)`` are least, the vertices of parabolas there, and statuses."""
    rows, at = np.arange(len(means)), np.argmin(means, axis=-1)
    inside = np.clip(at, 1, len(x) - 2)
    here, left, right = x[inside], x[inside - 1] - x[inside], x[inside + 1] - x[inside]
    low, down, up = means[rows, inside], means[rows, inside - 1], means[rows, inside + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = (right**2 * (low - down) - left**2 * (low - up)) / (-left * (low - up) + right * (low - down)) / 2
    known = np.isfinite(means[rows, at])
    status = np.full(len(means), OK, dtype="<U8")
    status[~(np.isfinite(down) & np.isfinite(up))] = CLIFF
    status[at != inside] = EDGE
    status[~known] = DIVERGED
    fitted = (status == OK) & np.isfinite(moved)
    return at, np.where(known, np.where(fitted, here + np.where(fitted, moved, 0.0), x[at]), np.nan), status


def _vertices(x: FloatArray, losses: FloatArray) -> FloatArray:
    """Return the optimum of each of many resamples of the seeds, the same resamples for every curve."""
    n_seeds = losses.shape[-1]
    picked = np.random.default_rng(0).integers(0, n_seeds, size=(_RESAMPLES, n_seeds))
    return _least(x, losses[:, picked].mean(axis=-1).T)[1]


def _spread(values: FloatArray, n_seeds: int) -> float:
    """Return the standard error that resamples of ``n_seeds`` values show, corrected for their number."""
    seen = values[np.isfinite(values)]
    return float(seen.std() * math.sqrt(n_seeds / (n_seeds - 1))) if len(seen) > 1 else math.nan


class _Journal:
    """Finished runs by name, in a file that is replaced whole after each; ``None`` for a run that diverged."""

    def __init__(self, path: str | os.PathLike[str] | None, protocol: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.protocol = protocol
        self.runs: dict[str, float | None] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            schema, known = found["schema"], dict(found["protocol"])
            self.runs = {key: None if loss is None else float(loss) for key, loss in found["runs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"{os.fspath(self.path)!r} is no journal of a transfer check: {error}") from error
        if schema != _JOURNAL:
            raise SpecError(
                f"the journal {os.fspath(self.path)!r} has schema {schema!r}; accepted: {_JOURNAL}; name another file"
            )
        for name, value in protocol.items():
            if known.get(name) != value:
                raise SpecError(
                    f"the journal {os.fspath(self.path)!r} holds runs of another protocol: {name} is "
                    f"{known.get(name)!r} there and {value!r} here; name another file"
                )

    def add(self, key: str, loss: float | None) -> None:
        """Keep a finished run."""
        self.runs[key] = loss
        if self.path is None:
            return
        content = {"schema": _JOURNAL, "protocol": self.protocol, "runs": self.runs}
        try:
            write_atomically(self.path, json.dumps(content, indent=1, allow_nan=False).encode())
        except OSError as error:
            raise SpecError(f"cannot write the journal {os.fspath(self.path)!r}: {error.strerror or error}") from error
