r"""Which learning rate explains what the neural-tangent rules gain on images? That of the position embedding, it says.

Relative to the matrices of the blocks, the rules speed up tables, biases and norms by the width n (AdamW). One width,
and recipes that differ in relative rates only:

* **uniform**: one rate for all;
* **neural-tangent**: the absolute factors of arXiv:2304.02034v1, Eqs. 1.108-1.116, over that of a block matrix;
* **neural-tangent, positions slow**: the same, with the position embedding at the rate of the matrices;
* **uniform, positions fast**: one rate for all but the position embedding, which has the factor of the rules.

The paper's finding is on ImageNet at n = 768; here are 8 x 8 digits in 16 patches. Patches have 4 pixels, not 768, so
that the rules also speed up the patch embedding by n / 4: **uniform, patches fast** is the control. Every recipe has a
learning rate of its own, the best of a grid for the training loss; accuracy is that of the test part at this rate.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Sec. 2.1. The recipes and the task are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from fathometer._version import __version__
from fathometer.papers.effective.models import POSITION, vision_model
from fathometer.papers.item import SMALL, Cell, FloatArray, Progress, Size, Table, plain
from fathometer.prescription.width_scaling import SCALINGS

UNIFORM = "uniform"
RULES = "neural-tangent"
SLOW = "neural-tangent, positions slow"
FAST = "uniform, positions fast"
CONTROL = "uniform, patches fast"
VARIANTS = (UNIFORM, FAST, CONTROL, SLOW, RULES)
BATCH = 16
LOG2_RATES = range(-13, -5)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Losses and accuracies of all recipes.

    Attributes:
        rates: Learning rate of the block matrices, shape ``(n_rates,)``.
        losses: By recipe, training loss over the last fifth of the steps, shape ``(n_rates, n_seeds)``; infinite for
            runs that diverged.
        accuracies: By recipe, share of the test part classified rightly, same shape; NaN for runs that diverged.
        factors: By recipe, relative rate of every role.
        about: Protocol and versions.
    """

    rates: FloatArray
    losses: dict[str, FloatArray]
    accuracies: dict[str, FloatArray]
    factors: dict[str, dict[str, float]]
    about: dict[str, Any]

    def best(self, name: str) -> int:
        """Return the number of the rate with the least mean loss."""
        return int(np.argmin(self.losses[name].mean(axis=-1)))

    def gain(self, name: str, over: str = UNIFORM) -> tuple[float, float]:
        """Return how much less the loss is at the best rates, and its standard error over paired seeds; NaN without."""
        before, after = self.losses[over][self.best(over)], self.losses[name][self.best(name)]
        return _mean(before - np.where(np.isfinite(before), after, np.nan))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        best = {name: self.best(name) for name in self.losses}
        return {"schema": 1, **plain(self), "best": best}

    def table(self) -> Table:
        """Return loss and accuracy of every recipe at its best rate."""
        rows: list[tuple[Cell, ...]] = []
        for name in self.losses:
            at = self.best(name)
            rows.append(
                (
                    name,
                    f"2^{math.log2(self.rates[at]):.0f}",
                    _mean(self.losses[name][at]),
                    self.gain(name),
                    _mean(self.accuracies[name][at]),
                )
            )
        return Table(
            title=f"Digits, width {self.about['width']}, {self.about['steps']} steps, at each recipe's best rate",
            headings=("recipe", "block rate", "training loss", "less than uniform", "test accuracy"),
            rows=tuple(rows),
        )


def ablation(size: Size, progress: Progress) -> Ablation:
    """Train all recipes at all rates.

    Args:
        size: At the small size width 64, else 256; half its ``seeds``, at least three; steps from its ``grid``.
        progress: Told after every run.
    """
    from fathometer.training import load_digits
    from fathometer.training.families import Family, Recipe, digits_task, seeded, train_steps
    from fathometer.training.runs import final_loss

    width = 64 if size.d_model <= SMALL.d_model else 256
    steps = min(max(5, size.grid), 400)
    seeds = max(3, size.seeds // 2)
    data = load_digits()
    task = digits_task(data, batch_size=BATCH)
    family = Family(partial(vision_model, position=POSITION), task, base_width=width)
    factors = _factors(family, width)
    rates = [2.0**power for power in LOG2_RATES]
    losses = {name: np.full((len(rates), seeds), np.inf) for name in VARIANTS}
    accuracies = {name: np.full((len(rates), seeds), np.nan) for name in VARIANTS}
    runs = list(product(range(seeds), VARIANTS, range(len(rates))))
    for done, (k, name, j) in enumerate(runs, start=1):
        chosen = Recipe(name=name, scheme=SCALINGS[RULES], uniform=True, rates=factors[name])
        with seeded(k):
            model, updater = family.start(chosen, width=width, seed=k, rate=rates[j])
            loss = final_loss(list(train_steps(model, updater, task.batches(k), steps=steps)), steps)
        if math.isfinite(loss):
            losses[name][j, k] = loss
            accuracies[name][j, k] = _accuracy(model, data)
        progress(name, done, len(runs))
    about = {
        "paper": "arXiv:2304.02034",
        "width": width,
        "steps": steps,
        "seeds": seeds,
        "position_std": POSITION,
        "batches": task.name,
        "version": __version__,
    }
    return Ablation(rates=np.array(rates), losses=losses, accuracies=accuracies, factors=factors, about=about)


def _factors(family: Any, width: int) -> dict[str, dict[str, float]]:
    """Return every recipe's relative rates by role, one for a block matrix."""
    from fathometer.application import scaling_table

    rows = scaling_table(family.roles(width), RULES, base_width=None).rows
    bulk = next(row.factors.rate for row in rows if row.role == "query")
    rules = {row.role: row.factors.rate / bulk for row in rows}
    even = dict.fromkeys(rules, 1.0)
    position, patch = "position_embedding", "patch_embedding"
    return {
        UNIFORM: even,
        FAST: even | {position: rules[position]},
        CONTROL: even | {patch: rules[patch]},
        SLOW: rules | {position: 1.0},
        RULES: rules,
    }


def _accuracy(model: Any, data: Any) -> float:
    import torch

    with torch.no_grad():
        return float((model(data.test).argmax(dim=-1) == data.test_labels).float().mean())


def _mean(values: FloatArray) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
