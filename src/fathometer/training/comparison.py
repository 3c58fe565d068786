"""Initialisation schemes against each other: largest learning rate that trains, loss with seeds, time of a step."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.errors import DomainError, SpecError
from fathometer.prescription import apply_scheme, scheme_options
from fathometer.results.plain import plain
from fathometer.spec import Network, Transformer, to_dict
from fathometer.training.language import (
    INTERRUPTED,
    LanguageRun,
    frequency_loss,
    language_network,
    train_language_model,
)
from fathometer.training.language_stack import train_together
from fathometer.training.runs import OK, Progress, last_fifth
from fathometer.training.text import ByteText, training_batches

FloatArray = NDArray[np.float64]

#: How far below the loss of the symbols' frequencies, in nats, a run must end to have learned from context.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingComparison:
    """Runs over schemes, depths, learning rates and seeds.

    Arrays have the shape ``(n_schemes, n_depths, n_rates, n_seeds)``.

    Attributes:
        schemes, depths, rates, seeds: The axes.
        held_out: Loss on the held-out windows, nats; NaN for a run that diverged.
        status: ``"ok"`` or ``"diverged"``.
        seconds_per_step: Time of a step of one network.
        losses: Training losses, one more axis over steps; NaN after a run has stopped.
        unigram_loss: The loss of the symbols' frequencies on the held-out windows.
        frequency_losses: Their loss on the windows of every training step, shape ``(n_seeds, steps)``.
        about: Protocol and version.
    """

    schemes: tuple[str, ...]
    depths: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    held_out: FloatArray
    status: NDArray[np.str_]
    seconds_per_step: FloatArray
    losses: FloatArray
    unigram_loss: float
    frequency_losses: FloatArray
    about: dict[str, Any]

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Which runs ended clearly below the loss of the symbols' frequencies."""
        return np.asarray((self.status == OK) & (self.held_out < self.unigram_loss - MARGIN))

    def largest_stable_rate(self) -> FloatArray:
        """Return the largest rate that no seed diverges at, nor at a lower one; 0 without one. ``(scheme, depth)``."""
        return self._largest((self.status == OK).all(axis=-1))

    def largest_learning_rate(self) -> FloatArray:
        """Return the largest rate that every seed learned at; 0 without one. Shape ``(n_schemes, n_depths)``."""
        learned = self.learned.all(axis=-1)
        return np.asarray(np.max(np.where(learned, self.rates, 0.0), axis=-1))

    def best_rate(self) -> NDArray[np.intp]:
        """Return the place of the rate of lowest final training loss, mean over seeds; ``(n_schemes, n_depths)``.

        The final loss is the mean over the last fifth of the steps. A rate at which a seed diverged counts as worst.
        """
        final = last_fifth(np.moveaxis(self.losses, -1, 0))
        final = np.where(self.status == OK, final, np.inf).mean(axis=-1)
        return np.asarray(np.argmin(final, axis=-1))

    def at_best_rate(self) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard error over seeds of the held-out loss less that of the frequencies, at best rates.

        Both have the shape ``(n_schemes, n_depths)``. The error is NaN with one seed, both are where a seed diverged.
        """
        chosen = np.take_along_axis(self.held_out, self.best_rate()[..., None, None], axis=2)[:, :, 0]
        n_seeds = chosen.shape[-1]
        error = chosen.std(axis=-1, ddof=1) / np.sqrt(n_seeds) if n_seeds > 1 else np.full(chosen.shape[:-1], np.nan)
        return chosen.mean(axis=-1) - self.unigram_loss, np.asarray(error)

    def curves(self, scheme: int, depth: int) -> FloatArray:
        """Return training losses less those of the frequencies on the same windows, at the best rate.

        The difference is what context teaches, without most of the noise of small batches. Shape ``(n_seeds, steps)``.
        """
        return np.asarray(self.losses[scheme, depth, self.best_rate()[scheme, depth]] - self.frequency_losses)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become ``None``."""
        return {"schema": 1, **plain(self)}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def _largest(self, good: NDArray[np.bool_]) -> FloatArray:
        reached = np.minimum.accumulate(good, axis=-1)
        return np.asarray(np.max(np.where(reached, self.rates, 0.0), axis=-1))


@dataclass(frozen=True, kw_only=True)
class RepeatedRuns:
    """Runs of one network that differ in their seeds.

    Attributes:
        runs: The runs.
        about: What was trained, on what and how.
    """

    runs: tuple[LanguageRun, ...]
    about: Mapping[str, Any]

    def gap(self) -> tuple[float, float]:
        """Return mean and standard error of the held-out loss less that of the frequencies, nats.

        Over runs that are ``"ok"``. The error is NaN with one such run, both are without.
        """
        gaps = np.array([run.held_out - run.unigram_loss for run in self.runs if run.status == OK])
        mean = float(gaps.mean()) if len(gaps) else np.nan
        return mean, float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else np.nan

    @property
    def learned(self) -> int:
        """How many runs ended by more than :data:`MARGIN` below the loss of the symbols' frequencies."""
        return sum(run.status == OK and run.held_out < run.unigram_loss - MARGIN for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become ``None``."""
        mean, error = self.gap()
        return {
            "schema": 1,
            "about": plain(self.about),
            "gap": plain(mean),
            "gap_error": plain(error),
            "learned": self.learned,
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)


def compare_training(
    trunk: Transformer,
    text: ByteText,
    *,
    objective: str,
    schemes: Mapping[str, Mapping[str, Any]],
    depths: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    n_tokens: int,
    batch_size: int,
    warmup: int = 0,
    clip: float | None = None,
    around: Callable[[Transformer], Network] = language_network,
    together: bool = False,
    recompute: bool = False,
    device: torch.device | str = "cpu",
    runs: MutableMapping[str, LanguageRun] | None = None,
    progress: Progress | None = None,
) -> TrainingComparison:
    """Train one architecture at several depths, initialised by several schemes, at several rates and seeds.

    Everything but the scheme is alike: embeddings, head, text, windows, optimizer. Embeddings and head are not those a
    scheme may prescribe. A scheme whose options name them is given ``n_tokens`` and ``r0``, the cosine that the token
    table's repeated rows give to two embedded tokens.

    Args:
        trunk: The architecture; its depth and numbers are replaced.
        text, objective, steps, n_tokens, batch_size, warmup, clip, recompute, device: As in
            :func:`fathometer.training.language.train_language_model`.
        schemes: Names to further options.
        depths: Numbers of blocks.
        rates: Learning rates, ascending.
        seeds: Of weights and windows.
        around: Puts stem and head around a trunk.
        together: Whether to train all runs of a depth as one stack, on the CPU: the same numbers in a fraction of the
            time for small widths, and in the memory of all of them.
        runs: Finished runs by key; those found here are not trained again, and finished ones are put here.
        progress: Called with a label, the steps taken and their number.
    Raises:
        DomainError, SpecError, BatchError: for settings no run could have.
        KeyboardInterrupt: when interrupted; what was finished is in ``runs``.
    """
    _check_axes(schemes, depths, rates, seeds)
    if together and (recompute or torch.device(device).type != "cpu"):
        raise SpecError("networks are trained together on the CPU and without recomputing; set together=False")
    done: MutableMapping[str, LanguageRun] = {} if runs is None else runs
    protocol = {
        "text": text.digest,
        "train_bytes": len(text.train),
        "objective": objective,
        "steps": steps,
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "warmup": warmup,
        "clip": clip,
        "together": together,
        "recompute": recompute,
        "device": torch.device(device).type,
        "version": __version__,
    }
    common: dict[str, Any] = {
        "objective": objective,
        "steps": steps,
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "warmup": warmup,
        "clip": clip,
    }
    planned: list[list[tuple[str, Network, float, int]]] = []
    for depth in depths:
        wanted = []
        for name, options in schemes.items():
            network = around(
                scheme_on_text(trunk.with_depth(depth), name, text, objective=objective, n_tokens=n_tokens, **options)
            )
            described = to_dict(network)
            for rate in rates:
                for seed in seeds:
                    digest = _digest({**protocol, "network": described, "rate": rate, "seed": seed})
                    key = f"{objective}-{name}-{depth}x{trunk.d_model}-rate{rate:g}-seed{seed}-{digest}"
                    wanted.append((key, network, rate, seed))
        planned.append(wanted)
    missing = [[job for job in wanted if job[0] not in done] for wanted in planned]
    total = steps * sum(bool(jobs) if together else len(jobs) for jobs in missing)
    before = 0

    def report(label: str, step: int, _: int) -> None:
        if progress is not None:
            progress(label, before + step, total)

    for depth, jobs in zip(depths, missing, strict=True):

        def told(label: str, step: int, of: int, depth: int = depth) -> None:
            report(f"{objective}, {depth} blocks", step, of)

        if together and jobs:
            keys, networks, picked, draws = zip(*jobs, strict=True)
            found = train_together(networks, text, rates=picked, seeds=draws, progress=told, **common)
            done.update(zip(keys, found, strict=True))
            before += steps
            continue
        for key, network, rate, seed in jobs:
            run = train_language_model(
                network, text, rate=rate, seed=seed, recompute=recompute, device=device, progress=told, **common
            )
            if run.status == INTERRUPTED:
                raise KeyboardInterrupt
            done[key] = run
            before += steps
    shape = (len(depths), len(schemes), len(rates), len(seeds))
    ordered = [done[key] for wanted in planned for key, *_ in wanted]

    def gathered(values: Sequence[Any]) -> NDArray[Any]:
        return np.moveaxis(np.array(values).reshape(*shape, *np.shape(values[0])), 0, 1)

    def frequencies(seed: int) -> list[float]:
        source = training_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, seed=seed)
        return [frequency_loss(text, [batch]) for batch in itertools.islice(source, steps)]

    padded = [np.concatenate([run.losses, np.full(steps - len(run.losses), np.nan)]) for run in ordered]
    return TrainingComparison(
        schemes=tuple(schemes),
        depths=tuple(depths),
        rates=tuple(rates),
        seeds=tuple(seeds),
        held_out=gathered([run.held_out for run in ordered]),
        status=gathered([run.status for run in ordered]),
        seconds_per_step=gathered([run.seconds_per_step for run in ordered]),
        losses=gathered(padded),
        unigram_loss=ordered[0].unigram_loss,
        frequency_losses=np.array([frequencies(seed) for seed in seeds]),
        about={
            **protocol,
            "text": text.name,
            "optimizer": "adamw",
            "d_model": trunk.d_model,
            "schemes": {name: dict(options) for name, options in schemes.items()},
        },
    )


def scheme_on_text(
    trunk: Transformer, scheme: str, text: ByteText, *, objective: str, n_tokens: int, **options: Any
) -> Transformer:
    """Return blocks with a scheme's numbers; one whose options name them is told of the text.

    Args:
        trunk: The blocks.
        scheme: Name of the scheme.
        text, objective: Give ``r0``, the cosine that the token table's repeated rows lend to two embedded tokens.
        n_tokens: Length of a window.
        options: Of the scheme; they come before what the text says.
    """
    given = {"r0": embedded_cosine(text, objective), "n_tokens": n_tokens}
    known = scheme_options(scheme)
    return apply_scheme(trunk, scheme, **{key: value for key, value in given.items() if key in known} | options).spec


def embedded_cosine(text: ByteText, objective: str) -> float:
    """Return the mean cosine of two embedded tokens where tokens and positions have equal shares of the variance."""
    return text.input_collision(objective) / 2


def _check_axes(
    schemes: Mapping[str, Any], depths: Sequence[int], rates: Sequence[float], seeds: Sequence[int]
) -> None:
    for name, axis in (("schemes", schemes), ("depths", depths), ("rates", rates), ("seeds", seeds)):
        if not len(axis):
            raise SpecError(f"{name} must not be empty")
    if list(rates) != sorted(set(rates)):
        raise DomainError(f"rates must ascend; got {list(rates)}", value=list(rates))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
