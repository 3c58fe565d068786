"""Does the diagram foretell which networks learn? A grid of small BERT-like models on a masked-token task.

Post-norm transformers of 24 blocks at every point of (inverse temperature, skip strength) are trained together on
masked patch tokens of handwritten digits, same batches, same rates. A network has *learned* if its test loss lies
clearly below the entropy of the tokens' frequencies, which is all that a network can reach whose tokens have become
one.

The prediction is made before training, for the actual number of tokens, by
:func:`fathometer.observables.failure_modes`. Reported is the confusion matrix as found, over all seeds and both rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer import __version__
from fathometer.observables import MODES, Criteria, failure_modes
from fathometer.papers.failure_modes.architecture import network
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain

N_LAYERS, D_MODEL, N_TOKENS = 24, 16, 16
COSINE = 0.1  # of embedded tokens: half of the embedding is the position's, and every mask looks alike
BETAS = (0.3, 1.0, 1.7, 2.4, 3.2, 4.5)
SKIPS = (0.1, 0.25, 0.5, 1.0, 2.0)
RATES = (1e-3, 4e-3)
MARGIN = 0.2  # nats below the unigram entropy


@dataclass(frozen=True, kw_only=True)
class TrainingCheck:
    """Predicted failure modes and losses after training.

    Attributes:
        betas, skips: The grid.
        predicted: Labels, shape ``(n_skips, n_betas)``.
        cosine, condensation: The numbers behind them, same shape.
        losses: Final test losses, shape ``(n_seeds, n_rates, n_skips, n_betas)``; infinite for diverged runs.
        unigram_entropy: The loss of a network that cannot tell tokens apart, nats.
        confusion: Counts of runs, one row for each of the predicted modes: (learned, did not).
        about: Protocol and version.
    """

    betas: FloatArray
    skips: FloatArray
    predicted: NDArray[np.str_]
    cosine: FloatArray
    condensation: FloatArray
    losses: FloatArray
    unigram_entropy: float
    confusion: dict[str, tuple[int, int]]
    about: dict[str, Any]

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Which runs beat the mark, shape of ``losses``."""
        return np.asarray(self.losses < self.unigram_entropy - MARGIN)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return the confusion matrix."""
        rows: list[tuple[Cell, ...]] = []
        for mode, (learned, failed) in self.confusion.items():
            runs = learned + failed
            rows.append((mode, f"{learned}", f"{failed}", learned / runs if runs else "-"))
        trains = self.confusion[MODES[0]]
        others = [self.confusion[mode] for mode in MODES[1:]]
        right = trains[0] + sum(failed for _, failed in others)
        total = sum(trains) + sum(sum(pair) for pair in others)
        rows.append(("foretold rightly", f"{right} of {total}", "", right / total))
        return Table(
            title=f"Predicted before training, and what became of it (mark: {self.unigram_entropy - MARGIN:.2f} nats)",
            headings=("predicted", "learned", "did not", "share"),
            rows=tuple(rows),
        )


def training_check(size: Size, progress: Progress) -> TrainingCheck:
    """Train the grid and compare.

    Args:
        size: Its ``seeds``, at most 4, and the number of steps, twice its ``grid`` within 40 and 600.
        progress: Told about every step.
    """
    from fathometer.training.masked import train_masked

    n_seeds, steps = min(size.seeds, 4), int(np.clip(2 * size.grid, 40, 600))
    betas, skips = np.array(BETAS), np.array(SKIPS)
    spec = network(
        d_model=D_MODEL, n_layers=N_LAYERS, n_tokens=N_TOKENS, beta=betas[None, :], skip_scale=skips[:, None]
    )
    found = failure_modes(spec, n_tokens=N_TOKENS, cosine=COSINE, criteria=Criteria())
    losses = np.empty((n_seeds, len(RATES), len(skips), len(betas)))
    entropy = np.nan
    for seed in range(n_seeds):
        for i, rate in enumerate(RATES):

            def report(label: str, done: int, total: int, at: int = seed * len(RATES) + i) -> None:
                progress(f"{losses[0, 0].size} networks", at * total + done, n_seeds * len(RATES) * total)

            run = train_masked(
                spec, steps=steps, rate=rate, warmup=steps // 10, batch_size=16, seed=seed, progress=report
            )
            losses[seed, i] = run.test_loss.reshape(len(skips), len(betas))
            entropy = run.unigram_entropy
    learned = losses < entropy - MARGIN
    confusion = {}
    for mode in MODES:
        runs = learned[:, :, found.mode == mode]
        confusion[mode] = (int(np.count_nonzero(runs)), int(np.count_nonzero(~runs)))
    return TrainingCheck(
        betas=betas,
        skips=skips,
        predicted=found.mode,
        cosine=found.cosine,
        condensation=found.condensation,
        losses=losses,
        unigram_entropy=float(entropy),
        confusion=confusion,
        about={
            "paper": "arXiv:2505.24333",
            "task": "masked patch tokens of the handwritten digits of scikit-learn",
            "n_layers": N_LAYERS,
            "d_model": D_MODEL,
            "n_tokens": N_TOKENS,
            "steps": steps,
            "rates": list(RATES),
            "optimizer": "adamw",
            "seeds": n_seeds,
            "version": __version__,
        },
    )
