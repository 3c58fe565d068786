"""One training run, and the largest learning rate that survives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import DomainError
from fathometer.training.digits import Digits

#: Called with a label, how much is done, and of how much.
Progress: TypeAlias = Callable[[str, int, int], None]

#: Statuses of a run.
OK, DIVERGED = "ok", "diverged"

#: How far above the first loss, relatively, a run may end without counting as diverged: batch noise is smaller.
DIVERGENCE = 0.05

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run.

    Attributes:
        losses: Training loss at every step taken.
        accuracy: Share of the test part classified rightly; NaN for a run that diverged.
        status: ``"ok"``, or ``"diverged"``: a loss left the finite numbers, or their mean over the last fifth of steps
            ended more than a twentieth above the first loss. A rate too small to learn within the steps is stable.
    """

    losses: tuple[float, ...]
    accuracy: float
    status: str


def train(
    model: nn.Module,
    data: Digits,
    *,
    rate: float,
    steps: int,
    warmup: int = 0,
    batch_size: int = 64,
    optimizer: str = "sgd",
    seed: int = 0,
) -> Run:
    """Train a classifier for a few steps.

    Args:
        model: Maps patches to logits; trained in place.
        data: The task.
        rate: Learning rate after warm-up.
        steps: Steps taken at most; a run whose loss is no longer finite stops.
        warmup: Steps over which the rate rises linearly.
        batch_size: Samples a step, drawn without replacement within an epoch.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"`` (no weight decay).
        seed: Order of the samples.
    """
    if optimizer not in OPTIMIZERS:
        raise DomainError(f"optimizer {optimizer!r} is unknown; accepted: {', '.join(OPTIMIZERS)}", value=optimizer)
    if not rate > 0 or steps < 2 or warmup < 0:
        raise DomainError(f"rate must be positive, steps >= 2, warmup >= 0; got {rate}, {steps}, {warmup}")
    updater = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    order = batches(len(data.train), batch_size, seed)
    losses: list[float] = []
    for step in range(steps):
        for group in updater.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (warmup + 1))
        chosen = next(order)
        loss = nn.functional.cross_entropy(model(data.train[chosen]), data.train_labels[chosen])
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        updater.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        updater.step()
    survived = math.isfinite(final_loss(losses, steps))
    with torch.no_grad():
        right = model(data.test).argmax(dim=-1) == data.test_labels
    return Run(
        losses=tuple(losses),
        accuracy=float(right.float().mean()) if survived else math.nan,
        status=OK if survived else DIVERGED,
    )


def largest_stable_rate(run: Callable[[float], Run], *, low: float, high: float) -> tuple[float, list[Run]]:
    """Return the largest rate on the factor-two grid from ``low`` to ``high`` below the first divergence.

    Args:
        run: Trains a fresh model at a rate.
        low, high: Ends of the grid.
    Returns:
        The rate, 0 if even ``low`` diverges, and the runs tried, in order.
    """
    best, tried, rate = 0.0, [], low
    while rate <= high * 1.0001:
        tried.append(run(rate))
        if tried[-1].status != OK:
            break
        best, rate = rate, 2 * rate
    return best, tried


def diverged(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which runs ended above their start, or not on finite numbers.

    Args:
        losses: One loss a step along the first axis, runs along the others; NaN after a run has stopped.
    Returns:
        The shape of ``losses`` without its first axis.
    """
    return np.asarray(~(last_fifth(losses) < (1 + DIVERGENCE) * losses[0]))


def last_fifth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the last fifth of the steps, the first axis of ``losses``; of one step at least."""
    return np.asarray(losses[-max(len(losses) // 5, 1) :].mean(axis=0))


def final_loss(losses: Sequence[float], steps: int) -> float:
    """Return the mean loss over the last fifth of a run.

    Args:
        losses: One a step.
        steps: How many there should be.
    Returns:
        NaN if the run stopped early, left the finite numbers or diverged.
    """
    curve = np.array(losses, dtype=np.float64)
    if len(curve) != steps or not np.isfinite(curve).all() or bool(diverged(curve)):
        return math.nan
    return float(last_fifth(curve))


def batches(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, each epoch in a new order; an incomplete batch is dropped."""
    if not 1 <= batch_size <= size:
        raise DomainError(f"batch_size must lie in [1, {size}]; got {batch_size}", value=batch_size)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order: Tensor = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
