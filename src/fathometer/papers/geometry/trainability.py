"""Do the exponents at initialisation foretell the loss after training? Many small deep transformers, trained together.

The claim, of Cowsik et al., arXiv:2403.02579, is that the test loss is well predicted by the angle and the gradient
exponent, and least where both vanish. Task and protocol there are not known to us; these are ours. Classify handwritten
digits, cut into 16 patches, with transformers of 24 blocks; same batches, same rate, a few hundred steps of AdamW
with the gradient clipped. Two sets of settings:

* **fixed strength**: alpha_A^2 + alpha_M^2 is the same everywhere; the width of the MLP's weights and the ratio of the
  two strengths vary. Residual strength alone predicts nothing here by construction.
* **random**: both strengths and the width are drawn at random. The control is residual strength alone, since weak
  branches train well whatever their exponents.

The score of a setting is ``sqrt(angle^2 + gradient^2)``, the distance from the point where both exponents vanish; the
gradient exponent is that of the stack at its depth and number of tokens. Reported are Spearman correlations of scores
with the final test loss, averaged over seeds, and partial ones given the residual strength, with Student's intervals
over seeds and bootstrap intervals over settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, t

from fathometer._version import __version__
from fathometer.observables import exponents, gradient_exponent
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain
from fathometer.spec import LayerNorm, Scales, Transformer, with_field

STRENGTH = 0.5  # sqrt(alpha_A^2 + alpha_M^2) of the settings at fixed strength
WIDTHS = (0.5, 12.0)  # range of the MLP's weight scale
N_LAYERS, D_MODEL, N_TOKENS, COSINE = 24, 16, 16, 0.5
RATE, BATCH, CLIP = 1e-3, 16, 1.0
SCORES = ("distance", "angle", "gradient", "strength")


@dataclass(frozen=True, kw_only=True)
class Correlations:
    """Rank correlations of one set of settings with the final loss.

    Attributes:
        scores: Names of what is correlated.
        spearman: Per score (mean over seeds, lower and upper end of the 95 % interval over seeds).
        partial: The same given the residual strength; empty where that does not vary.
        bootstrap: 95 % interval over settings of the correlation with the loss averaged over seeds, per score.
    """

    scores: tuple[str, ...]
    spearman: dict[str, tuple[float, float, float]]
    partial: dict[str, tuple[float, float, float]]
    bootstrap: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Trainability:
    """Settings, their exponents and how they trained.

    Attributes:
        settings: ``"fixed"`` and ``"random"`` to arrays ``attention``, ``mlp`` (strengths) and ``width``.
        exponents: The same keys to ``angle`` and ``gradient``.
        losses: The same keys to final test losses, shape ``(n_seeds, n_settings)``; infinite for diverged runs.
        correlations: The same keys to what came out.
        about: Protocol and versions.
    """

    settings: dict[str, dict[str, FloatArray]]
    exponents: dict[str, dict[str, FloatArray]]
    losses: dict[str, FloatArray]
    correlations: dict[str, Correlations]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return the correlations."""
        rows: list[tuple[Cell, ...]] = []
        for name, found in self.correlations.items():
            for score in found.scores:
                given = _interval(found.partial[score]) if score in found.partial else "-"
                low, high = found.bootstrap[score]
                rows.append((name, score, _interval(found.spearman[score]), f"[{low:.2f}, {high:.2f}]", given))
        return Table(
            title="Rank correlation with the final test loss [95 % over seeds]",
            headings=("settings", "score", "Spearman", "over settings", "partial, given strength"),
            rows=tuple(rows),
        )


def trainability(size: Size, progress: Progress) -> Trainability:
    """Train all settings together, one stack per seed, and correlate.

    Args:
        size: Half its ``seeds``, within 3 and 6, and the number of settings and steps from its ``grid``.
        progress: Told about every step.
    """
    n_seeds = int(np.clip(size.seeds // 2, 3, 6))
    n_settings = int(np.clip(3 * size.grid // 8, 12, 120))
    steps = int(np.clip(size.grid, 20, 400))
    rng = np.random.default_rng(2403)
    angle = rng.uniform(0.05, np.pi / 2 - 0.05, n_settings)
    settings = {
        "fixed": {
            "attention": STRENGTH * np.cos(angle),
            "mlp": STRENGTH * np.sin(angle),
            "width": _spread(rng, *WIDTHS, n_settings),
        },
        "random": {
            "attention": _spread(rng, 0.05, 0.8, n_settings),
            "mlp": _spread(rng, 0.05, 0.8, n_settings),
            "width": _spread(rng, *WIDTHS, n_settings),
        },
    }
    together = {name: np.concatenate([part[name] for part in settings.values()]) for name in settings["fixed"]}
    spec = network(together["attention"], together["mlp"], together["width"])
    angles = exponents(spec, n_tokens=N_TOKENS).angle
    gradients = gradient_exponent(spec, n_tokens=N_TOKENS, cosine=COSINE)
    runs = np.stack([_train(spec, seed, steps, n_seeds, progress) for seed in range(n_seeds)])
    found, seen, losses = {}, {}, {}
    for i, name in enumerate(settings):
        part = slice(i * n_settings, (i + 1) * n_settings)
        seen[name] = {"angle": angles[part], "gradient": gradients[part]}
        losses[name] = runs[:, part]
        found[name] = _correlate(settings[name], seen[name], losses[name])
    return Trainability(
        settings=settings,
        exponents=seen,
        losses=losses,
        correlations=found,
        about={
            "paper": "arXiv:2403.02579",
            "task": "handwritten digits of scikit-learn, 16 patches of 2 x 2 pixels",
            "n_layers": N_LAYERS,
            "d_model": D_MODEL,
            "steps": steps,
            "rate": RATE,
            "batch_size": BATCH,
            "clip": CLIP,
            "optimizer": "adamw",
            "seeds": n_seeds,
            "chance": float(np.log(10)),
            "version": __version__,
        },
    )


def network(attention: Any, mlp: Any, width: Any) -> Transformer:
    """Return the transformers of the given residual strengths and MLP widths."""
    scales = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=width, mlp_out=1.0)
    spec = Transformer.uniform(
        n_layers=N_LAYERS, d_model=D_MODEL, n_heads=1, norm=LayerNorm(), activation="tanh", scales=scales
    )
    return with_field(with_field(spec, "attention.residual_strength", attention), "mlp.residual_strength", mlp)


def _spread(rng: np.random.Generator, low: float, high: float, count: int) -> FloatArray:
    """Return numbers uniform in their logarithm."""
    return np.asarray(np.exp(rng.uniform(np.log(low), np.log(high), count)))


def _train(spec: Transformer, seed: int, steps: int, n_seeds: int, progress: Progress) -> FloatArray:
    from fathometer.training import StackedClassifier, load_digits, train_together

    model = StackedClassifier(spec, seed=seed)

    def report(label: str, done: int, total: int) -> None:
        progress(f"{model.n_networks} networks, seed {seed}", seed * total + done, n_seeds * total)

    run = train_together(
        model,
        load_digits(),
        rate=RATE,
        steps=steps,
        warmup=steps // 10,
        batch_size=BATCH,
        optimizer="adamw",
        seed=seed,
        clip=CLIP,
        progress=report,
    )
    return np.asarray(run.test_loss)


def _correlate(setting: dict[str, FloatArray], seen: dict[str, FloatArray], losses: FloatArray) -> Correlations:
    strength = np.hypot(setting["attention"], setting["mlp"])
    values = {
        "distance": np.hypot(seen["angle"], seen["gradient"]),
        "angle": np.abs(seen["angle"]),
        "gradient": np.abs(seen["gradient"]),
        "strength": strength,
    }
    varies = float(np.ptp(strength)) > 1e-9
    names = SCORES if varies else SCORES[:-1]
    partial = {}
    if varies:
        partial = {
            name: _over_seeds([_partial(values[name], loss, strength) for loss in losses])
            for name in names
            if name != "strength"
        }
    return Correlations(
        scores=names,
        spearman={name: _over_seeds([_spearman(values[name], loss) for loss in losses]) for name in names},
        partial=partial,
        bootstrap={name: _over_settings(values[name], losses) for name in names},
    )


def _spearman(x: FloatArray, y: FloatArray) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _partial(x: FloatArray, y: FloatArray, given: FloatArray) -> float:
    """Return the rank correlation of x and y with the linear effect of the ranks of ``given`` removed from both."""
    xy, xz, yz = _spearman(x, y), _spearman(x, given), _spearman(y, given)
    return float((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def _over_seeds(values: list[float]) -> tuple[float, float, float]:
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def _over_settings(x: FloatArray, losses: FloatArray, draws: int = 2000) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    ranks = np.mean([rankdata(loss) for loss in losses], axis=0)
    picked = rng.integers(0, len(x), size=(draws, len(x)))
    values = [_spearman(x[which], ranks[which]) for which in picked]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
