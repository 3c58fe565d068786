r"""How far features and outputs move in the first steps of training, against width.

Under a scaling with meta exponent s a step moves the output by an amount that no width changes, and hidden features by
:math:`n^{-(1-s)/2}`: frozen as the width grows at s = 0 (neural tangent), moving at one pace at s = 1 (maximal update).
With heads of fixed width attention logits follow the features; with a fixed number of heads a logit is a sum over
:math:`d_{head} \propto n` entries and moves :math:`n^{1/2}` times as far. One learning rate for all groups moves wide
models further and further: features by :math:`n` and the output by :math:`n^{3/2}` with AdamW, by :math:`n^{1/2}` and
:math:`n` with gradient descent.

The slope of the output is that of models wider than their number of outputs V: of a typical output, a step moves a part
:math:`V^{-1/2}` by design and :math:`n^{-1/2}` at random. Seen from 64 to 512 wide it is -0.05 with 16 outputs and -0.3
with 256; features do not mind.

Source: Dinan, Yaida and Zhang, arXiv:2304.02034v1, Secs. 1.2 and 1.3 and footnotes 21 and 26; the check itself,
G. Yang et al., arXiv:2203.03466, Appendix D.1. The exponents are derived in docs/derivations.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer._version import __version__
from fathometer.errors import ModelError
from fathometer.measurement.tangent import mean_and_error
from fathometer.measurement.tangent_slopes import log_slope
from fathometer.measurement.untouched import untouched
from fathometer.models.trace import AttentionCall, first_tensor, hooked, watch_attention
from fathometer.prescription.width_scaling import FixedHeads, Optimizer, ScalingScheme
from fathometer.results.plain import plain
from fathometer.training.families import (
    Build,
    Family,
    Recipe,
    Task,
    check_runs,
    model_output,
    recipe,
    seeded,
    train_steps,
)
from fathometer.training.runs import Progress

FloatArray = NDArray[np.float64]

STEM, LOGITS, OUTPUT = "stem", "attention logits", "output"


@dataclass(frozen=True, kw_only=True)
class CoordinateCheck:
    """Changes of features during the first steps of training.

    Attributes:
        scheme: Name of the recipe.
        s: Its meta exponent.
        uniform: Whether it has one rate for all groups.
        widths: Shape ``(n_widths,)``, ascending.
        steps: Numbers of steps taken.
        changes: Root mean square change since the start on the first batch, by place: ``"stem"`` (what enters the first
            block), ``"block i"`` (what leaves it), ``"attention logits"`` (the visible ones of all blocks) and
            ``"output"``; shape ``(n_widths, n_steps, n_seeds)``; NaN where a model left the finite numbers.
        protocol: Everything that was held fixed.
    """

    scheme: str
    s: float
    uniform: bool
    widths: NDArray[np.int64]
    steps: tuple[int, ...]
    changes: Mapping[str, FloatArray]
    protocol: Mapping[str, Any]

    def slopes(self, step: int) -> dict[str, tuple[float, float]]:
        """Return the slope of ln(change) against ln(width) after some steps and its standard error over seeds.

        Args:
            step: One of ``steps``.
        """
        at = self.steps.index(step)
        out = {}
        for place, values in self.changes.items():
            exact = np.zeros(len(self.widths))
            each = np.array([log_slope(self.widths, run, exact)[0] for run in values[:, at].T])
            mean, error = mean_and_error(each)
            out[place] = float(mean), float(error)
        return out

    @property
    def expected(self) -> dict[str, float]:
        """Slopes that theory gives for small steps of wide models, by place.

        Empty for a recipe with rates of its own. Without the blocks where the number of heads is fixed: there logits
        outrun features, and what leaves a block turns from the power of the one to that of the other.
        """
        if self.protocol["rates"]:
            return {}
        if self.uniform:
            stem, hidden, output = (0.0, 1.0, 1.5) if self.protocol["optimizer"] == "adamw" else (-0.5, 0.5, 1.0)
        else:
            stem, output = (self.s - 1) / 2, 0.0
            hidden = stem
        if self.protocol["fixed"] == "n_heads":
            return {STEM: stem, LOGITS: hidden + 0.5, OUTPUT: output}
        return {place: {STEM: stem, OUTPUT: output}.get(place, hidden) for place in self.changes}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with slopes and what theory expects; numbers that are not finite become ``None``."""
        return {
            "schema": 1,
            "scheme": self.scheme,
            "s": self.s,
            "uniform": self.uniform,
            "widths": plain(self.widths),
            "steps": list(self.steps),
            "changes": plain(self.changes),
            "slopes": {str(step): plain(self.slopes(step)) for step in self.steps},
            "expected": self.expected,
            "protocol": plain(self.protocol),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def coordinate_check(
    build: Build,
    widths: Sequence[int],
    *,
    task: Task,
    scheme: str | float | ScalingScheme | Recipe,
    lr: float,
    base_width: int,
    steps: Sequence[int] = (1, 3),
    seeds: int = 3,
    optimizer: Optimizer = "adamw",
    fixed: FixedHeads = "d_head",
    overrides: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> CoordinateCheck:
    """Take a few steps at several widths and measure how far features and outputs have moved.

    Args:
        build: Returns the model of a width and a seed, see :class:`fathometer.training.families.Family`.
        widths: At least two.
        task: What is trained on. Changes are seen on the batch of the first step: what a step does to inputs it was not
            made for has a random part of order ``n^(-1/2)`` beside the systematic one.
        scheme: A recipe, see :func:`fathometer.training.families.recipe`.
        lr: Learning rate at the base width; small enough that a step is close to linear.
        base_width: The width that the rate is named for.
        steps: Numbers of steps after which to look.
        seeds: Draws of weights and data at each width, at least two.
        optimizer, fixed, overrides: See :class:`fathometer.training.families.Family`.
        progress: Called with (label, done, total) after every model.
    Returns:
        Changes and slopes. Cost: per width and seed the largest number of steps and one forward pass for each look.
    Raises:
        DomainError, SpecError, ModelError: for numbers out of range, unknown schemes, or models without roles.
    """
    chosen = recipe(scheme)
    looks = tuple(sorted(set(steps)))
    check_runs(widths, base_width, list(looks) or [0], seeds, [lr])
    widths = sorted(widths)
    family = Family(build, task, base_width=base_width, optimizer=optimizer, fixed=fixed, overrides=overrides)
    changes: dict[str, FloatArray] = {}
    for done, (i, k) in enumerate(np.ndindex(len(widths), seeds), start=1):
        blocks = family.roles(widths[i]).blocks
        probe = next(task.batches(k))[0]
        with seeded(k):
            model, updater = family.start(chosen, width=widths[i], seed=k, rate=lr)
            before, after = _features(model, blocks, probe), {}
            for step, _ in enumerate(train_steps(model, updater, task.batches(k), steps=looks[-1]), start=1):
                if step in looks:
                    after[step] = _features(model, blocks, probe)
        for place, start in before.items():
            values = changes.setdefault(place, np.full((len(widths), len(looks), seeds), np.nan))
            for j, look in enumerate(looks):
                if look in after:
                    values[i, j, k] = _distance(start, after[look][place])
        if progress is not None:
            progress(f"{chosen.name}, width {widths[i]}", done, len(widths) * seeds)
    return CoordinateCheck(
        scheme=chosen.name,
        s=chosen.scheme.s,
        uniform=chosen.uniform,
        widths=np.array(widths, dtype=np.int64),
        steps=looks,
        changes=changes,
        protocol={
            "model": family.fingerprint(),
            "overrides": dict(overrides or {}),
            "task": task.name,
            "rates": dict(chosen.rates),
            "lr": lr,
            "base_width": base_width,
            "optimizer": optimizer,
            "fixed": fixed,
            "seeds": seeds,
            "version": __version__,
        },
    )


def _features(model: nn.Module, blocks: Sequence[str], inputs: Any) -> dict[str, list[Tensor]]:
    """Return what enters the blocks, leaves each, attention logits (minus infinity where masked), and the output."""
    seen: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = first_tensor(args, kwargs)
        if name == blocks[0] and source is not None:
            seen.setdefault(STEM, []).append(source.detach().clone())

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        result = first_tensor((out,), {})
        assert result is not None
        seen.setdefault(f"block {blocks.index(name) + 1}", []).append(result.detach().clone())

    def attend(call: AttentionCall) -> None:
        seen.setdefault(LOGITS, []).append(call.scores())

    with (
        untouched(model),
        torch.no_grad(),
        hooked({name: modules[name] for name in blocks}, after=leave, before=enter),
        watch_attention(attend),
    ):
        output = model_output(model, inputs)
    if STEM not in seen:
        raise ModelError(f"the block {blocks[0]!r} did not run")
    return {**seen, OUTPUT: [output]}


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the root mean square difference over what is not masked in both; NaN where it is not finite."""
    squares = torch.cat(
        [
            (b - a).double().square()[~(torch.isneginf(a) & torch.isneginf(b))]
            for a, b in zip(before, after, strict=True)
        ]
    )
    value = float(squares.mean().sqrt())
    return value if math.isfinite(value) else math.nan
