"""Are DyT and Derf sensitive in training, and does the gradient amplification at initialisation foretell it?

Small vision transformers on scikit-learn's digits: pre-LayerNorm, DyT and Derf, several alphas, depths and warm-ups.
The largest stable learning rate on a factor-two grid is set against the predicted amplification of a mean-pooled
loss, and their rank correlation is reported with its interval, whatever it is.

Protocol (ours): SGD with momentum 0.9, no weight decay, no clipping; a rate is stable if no loss leaves the finite
numbers and the mean loss of the last fifth of the steps is at most a twentieth above the first loss. Tokens at the
first block have unit mean square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from fathometer.observables import predict
from fathometer.papers.apjn.architecture import name_of
from fathometer.papers.item import FloatArray, Progress, Size, Table, plain, silent
from fathometer.spec import Derf, DyT, LayerNorm, Norm, Scales, Transformer
from fathometer.training import PatchClassifier, largest_stable_rate, load_digits, train
from fathometer.training.digits import PATCHES

SCALES = Scales(query=0.55, key=0.55, value=0.55, output=0.55, mlp_in=0.55, mlp_out=1.1)
LOWEST, HIGHEST = 2.0**-7, 8.0
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is trained.

    Args:
        norms: Norms compared.
        depths: Numbers of blocks.
        warmups: Warm-up steps.
        d_model, steps, seeds: Width, steps and weight draws.
    """

    norms: tuple[Norm, ...]
    depths: tuple[int, ...]
    warmups: tuple[int, ...]
    d_model: int
    steps: int
    seeds: int


NORMS: tuple[Norm, ...] = (
    LayerNorm(),
    *(Derf(alpha=a) for a in (0.5, 1.0, 2.0)),
    *(DyT(alpha=a) for a in (0.5, 1.0, 2.0)),
)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Largest stable rates and predictions.

    Attributes:
        norms, depths, warmups: Axes.
        rates: Largest stable learning rate, shape ``(n_norms, n_depths, n_warmups, n_seeds)``; 0 where none was.
        accuracy: Test accuracy at that rate, same shape; NaN where none was.
        amplification: Predicted natural log of the pooled gradient amplification, shape ``(n_norms, n_depths)``.
        correlation: Spearman's rho of mean log rate and amplification per warm-up, with the ends of its 95 %
            interval by resampling settings; shape ``(n_warmups, 3)``.
        about: Protocol.
    """

    norms: tuple[str, ...]
    depths: tuple[int, ...]
    warmups: tuple[int, ...]
    rates: FloatArray
    accuracy: FloatArray
    amplification: FloatArray
    correlation: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def log_rates(self) -> FloatArray:
        """Return log2 of the largest stable rate; a setting without one counts as half the lowest rate tried."""
        return np.log2(np.maximum(self.rates, LOWEST / 2))

    def table(self) -> Table:
        """Return one row per setting and warm-up."""
        logs = self.log_rates()
        rows = []
        for i, norm in enumerate(self.norms):
            for j, depth in enumerate(self.depths):
                for k, warmup in enumerate(self.warmups):
                    seen = logs[i, j, k]
                    error = float(seen.std(ddof=1) / np.sqrt(seen.size)) if seen.size > 1 else None
                    good = self.accuracy[i, j, k][np.isfinite(self.accuracy[i, j, k])]
                    rows.append(
                        (
                            norm,
                            f"{depth}",
                            f"{warmup}",
                            float(self.amplification[i, j]),
                            (float(seen.mean()), error),
                            float(good.mean()) if good.size else float("nan"),
                        )
                    )
        says = "; ".join(
            f"warm-up {warmup}: rho = {rho:.2f} [{low:.2f}, {high:.2f}]"
            for warmup, (rho, low, high) in zip(self.warmups, self.correlation, strict=True)
        )
        return Table(
            title=f"Largest stable learning rate against predicted amplification. Rank correlation, {says}",
            headings=("norm", "blocks", "warm-up", "ln amplification", "log2 largest rate", "accuracy there"),
            rows=tuple(rows),
        )


def sensitivity(size: Size, progress: Progress = silent) -> Sensitivity:
    """Train the grid that belongs to a size: minutes on two cores for widths up to 256, longer beyond."""
    small = size.d_model <= 256
    protocol = Protocol(
        norms=NORMS,
        depths=(4, 8, 16) if small else (12, 24, 48),
        warmups=(0, 10) if small else (0, 50),
        d_model=32 if small else 192,
        steps=30 if small else 200,
        seeds=min(size.seeds, 3) if small else 5,
    )
    return run(protocol, progress)


def run(protocol: Protocol, progress: Progress = silent) -> Sensitivity:
    """Train every setting of a protocol and correlate."""
    data = load_digits()
    shape = (len(protocol.norms), len(protocol.depths), len(protocol.warmups), protocol.seeds)
    rates, accuracy = np.zeros(shape), np.full(shape, np.nan)
    amplification = np.zeros(shape[:2])
    for i, norm in enumerate(protocol.norms):
        for j, depth in enumerate(protocol.depths):
            spec = Transformer.uniform(
                n_layers=depth, d_model=protocol.d_model, n_heads=4, norm=norm, activation="gelu", scales=SCALES
            )
            amplification[i, j] = predict(spec, n_tokens=PATCHES, q=1.0, p=0.0).gradient_log[0]
            for k, warmup in enumerate(protocol.warmups):
                for seed in range(protocol.seeds):

                    def attempt(rate: float, spec: Transformer = spec, warmup: int = warmup, seed: int = seed) -> Any:
                        model = PatchClassifier(spec, seed=seed)
                        return train(
                            model, data, rate=rate, steps=protocol.steps, warmup=warmup, batch_size=BATCH, seed=seed
                        )

                    best, tried = largest_stable_rate(attempt, low=LOWEST, high=HIGHEST)
                    rates[i, j, k, seed] = best
                    stable = [attempt.accuracy for attempt in tried if attempt.status == "ok"]
                    accuracy[i, j, k, seed] = stable[-1] if stable else np.nan
            progress("trained settings", i * shape[1] + j + 1, shape[0] * shape[1])
    logs = np.log2(np.maximum(rates, LOWEST / 2)).mean(axis=-1)
    correlation = np.array([rank_correlation(amplification.ravel(), logs[:, :, k].ravel()) for k in range(shape[2])])
    return Sensitivity(
        norms=tuple(name_of(norm) for norm in protocol.norms),
        depths=protocol.depths,
        warmups=protocol.warmups,
        rates=rates,
        accuracy=accuracy,
        amplification=amplification,
        correlation=correlation,
        about={
            "task": "scikit-learn digits, 16 patches of 2 x 2",
            "optimizer": "sgd, momentum 0.9",
            "d_model": protocol.d_model,
            "steps": protocol.steps,
            "batch_size": BATCH,
            "seeds": protocol.seeds,
        },
    )


def rank_correlation(x: FloatArray, y: FloatArray, *, draws: int = 2000) -> tuple[float, float, float]:
    """Return Spearman's rho and its 95 % interval by resampling pairs (seeded; degenerate resamples are left out)."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(x), size=(draws, len(x)))
    good = (np.ptp(x[chosen], axis=1) > 0) & (np.ptp(y[chosen], axis=1) > 0)
    resampled = [spearmanr(x[rows], y[rows]).statistic for rows in chosen[good]]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)
