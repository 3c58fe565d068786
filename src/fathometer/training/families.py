r"""One family of models at many widths: what it is trained on, and how variances and rates follow the width.

A recipe says at which standard deviations the model of a width starts and at which rates its groups of parameters
learn, both as ratios to a base width (arXiv:2304.02034v1, Eqs. 1.25-1.34 and 1.99-1.116). At the base width all recipes
are one and the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.application import initialize_widths, parameter_groups, role_stds
from fathometer.errors import BatchError, DomainError, ModelError, SpecError, nearest
from fathometer.models.roles import ModelRoles, read_roles
from fathometer.models.trace import first_tensor
from fathometer.prescription.width_scaling import SCALINGS, FixedHeads, Optimizer, ScalingScheme, scaling_scheme
from fathometer.training.digits import Digits
from fathometer.training.runs import batches
from fathometer.training.text import ByteText, training_batches

Build: TypeAlias = Callable[[int, int], nn.Module]

UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What models are trained on: inputs, and the class each output should have.

    Attributes:
        name: What it is called in results and journals; two tasks that differ need two names.
        batches: Returns an endless iterator of (inputs, targets) for a seed. Inputs are what the model is called with;
            targets have the shape of its output without the last axis. The loss is the mean cross-entropy.
    """

    name: str
    batches: Callable[[int], Iterator[tuple[Any, Tensor]]]


def language_task(text: ByteText, *, n_tokens: int, batch_size: int) -> Task:
    """Return the task of guessing the next byte of a text.

    Args:
        text: What is read.
        n_tokens: Length of a window.
        batch_size: Windows a step.
    """

    def of_seed(seed: int) -> Iterator[tuple[Any, Tensor]]:
        for batch in training_batches(text, "causal", n_tokens=n_tokens, batch_size=batch_size, seed=seed):
            yield batch.inputs, batch.targets

    read = f"{text.name} {text.digest[:12]}, {len(text.train)} bytes and {len(text.held_out)} held out"
    return Task(name=f"{read}, {batch_size} x {n_tokens} a step", batches=of_seed)


def digits_task(data: Digits, *, batch_size: int) -> Task:
    """Return the task of naming handwritten digits.

    Args:
        data: The digits; only their training part is used.
        batch_size: Digits a step.
    """

    def of_seed(seed: int) -> Iterator[tuple[Any, Tensor]]:
        for chosen in batches(len(data.train), batch_size, seed):
            yield data.train[chosen], data.train_labels[chosen]

    return Task(name=f"{len(data.train)} digits, {batch_size} a step", batches=of_seed)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How initial variances and learning rates follow the width.

    Attributes:
        name: What it is called.
        scheme: Whose variances, and whose rates where nothing else is said.
        uniform: Whether all groups have one rate instead.
        rates: Factors by role that replace those of the scheme.
    """

    name: str
    scheme: ScalingScheme
    uniform: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)

    def factor(self, role: str, scaled: float) -> float:
        """Return the factor on the rate of a group, ``scaled`` being the scheme's."""
        return self.rates.get(role, 1.0 if self.uniform else scaled)


def recipe(name: str | float | ScalingScheme | Recipe) -> Recipe:
    """Return a recipe by name: ``"uniform"``, a scaling scheme, or its s.

    ``"uniform"`` starts as the neural-tangent scheme does, with variances ``C / fan_in``, and has one learning rate for
    all parameters.

    >>> recipe("maximal-update").scheme.s
    1.0
    """
    if isinstance(name, Recipe):
        return name
    if name == UNIFORM:
        return Recipe(name=UNIFORM, scheme=SCALINGS["neural-tangent"], uniform=True)
    if isinstance(name, str) and name not in SCALINGS:
        raise SpecError(f"there is no recipe {name!r}{nearest(name, [UNIFORM, *SCALINGS])}")
    scheme = scaling_scheme(name)
    return Recipe(name=scheme.name, scheme=scheme)


class Family:
    """Models of several widths with their task, ready to be started by a recipe.

    Args:
        build: Returns the model of a width and a seed. Depth, vocabulary and ratios must not depend on the width.
            What matters of its weights are the standard deviations at the base width; biases start as they are built.
        task: What is trained on.
        base_width: The width that learning rates are named for.
        optimizer: ``"adamw"`` (no weight decay) or ``"sgd"`` (no momentum).
        fixed: What stays while the width changes, the width of a head or the number of heads.
        overrides: Roles of parameters that cannot be told.
    """

    def __init__(
        self,
        build: Build,
        task: Task,
        *,
        base_width: int,
        optimizer: Optimizer = "adamw",
        fixed: FixedHeads = "d_head",
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        if optimizer not in ("sgd", "adamw"):
            raise SpecError(f"optimizer must be 'sgd' or 'adamw'; got {optimizer!r}")
        self.build, self.task, self.base_width = build, task, base_width
        self.optimizer: Optimizer = optimizer
        self.fixed: FixedHeads = fixed
        self.overrides = overrides
        self._inputs = next(task.batches(0))[0]
        self._roles: dict[int, ModelRoles] = {}
        self._base: tuple[dict[str, float], str] | None = None

    def roles(self, width: int) -> ModelRoles:
        """Return the roles of the parameters at a width, read once."""
        if width not in self._roles:
            with seeded(0):
                found = read_roles(self.build(width, 0), self._inputs, overrides=self.overrides)
            if found.d_model != width:
                raise ModelError(f"build({width}, seed) returned a model whose stream is {found.d_model} wide")
            self._roles[width] = found
        return self._roles[width]

    def fingerprint(self) -> str:
        """Return what tells this family from another: class, size and a digest of the model of the base width.

        The digest is over names, shapes and roles of parameters, kinds of modules, numbers of heads and standard
        deviations. Of numbers and functions in a model's code it knows nothing.
        """
        return self._at_base_width()[1]

    def _at_base_width(self) -> tuple[dict[str, float], str]:
        """Return the standard deviations of every role at the base width, and the fingerprint."""
        if self._base is None:
            roles = self.roles(self.base_width)
            with seeded(0):
                model = self.build(self.base_width, 0)
            stds = role_stds(model, roles)
            described = {
                "parameters": [(name, list(parameter.shape)) for name, parameter in model.named_parameters()],
                "roles": [(row.parameter, row.role) for row in roles.roles],
                "modules": [(name, type(module).__qualname__) for name, module in model.named_modules()],
                "heads": [roles.n_heads, roles.n_kv_heads],
                "stds": {role: f"{std:.6g}" for role, std in stds.items()},
            }
            digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
            count = sum(parameter.numel() for parameter in model.parameters())
            self._base = stds, f"{type(model).__qualname__}, {count} parameters at width {self.base_width}, {digest}"
        return self._base

    def start(self, chosen: Recipe, *, width: int, seed: int, rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model of a width and a seed as the recipe starts it, and its optimizer.

        Args:
            chosen: The recipe.
            width, seed: Which model.
            rate: Learning rate at the base width.
        """
        stds, _ = self._at_base_width()
        roles, model = self.roles(width), self.build(width, seed)
        biases = {
            row.parameter: dict(model.named_parameters())[row.parameter].detach().clone()
            for row in roles.roles
            if row.role.endswith("_bias")
        }
        initialize_widths(
            model,
            chosen.scheme,
            base_width=self.base_width,
            base_stds=stds,
            roles=roles,
            seed=seed,
            fixed=self.fixed,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in biases:
                    parameter.copy_(biases[name])
        groups = parameter_groups(
            model,
            chosen.scheme,
            lr=rate,
            base_width=self.base_width,
            roles=roles,
            optimizer=self.optimizer,
            fixed=self.fixed,
            scale_eps=not chosen.uniform,
        )
        for group in groups:
            group["lr"] = rate * chosen.factor(group["role"], group["lr"] / rate)
        if self.optimizer == "sgd":
            return model, torch.optim.SGD(groups, lr=rate)
        return model, torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what draws from torch's own generator, such as dropout, and leave its state as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train_steps(
    model: nn.Module,
    updater: torch.optim.Optimizer,
    source: Iterator[tuple[Any, Tensor]],
    *,
    steps: int,
    warmup: int = 0,
) -> Iterator[float]:
    """Take steps one at a time, yielding the loss before each; stop behind a loss that is not finite.

    Args:
        model, updater: Changed in place.
        source: Batches.
        steps: Steps at most.
        warmup: Steps over which all rates rise linearly.
    """
    rates = [group["lr"] for group in updater.param_groups]
    for step in range(steps):
        for group, rate in zip(updater.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / (warmup + 1))
        loss = task_loss(model, *next(source))
        value = float(loss.detach())
        if math.isfinite(value):
            updater.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            updater.step()
        yield value
        if not math.isfinite(value):
            return


def task_loss(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of a model's first output."""
    output = model_output(model, inputs)
    if output.shape[:-1] != targets.shape:
        raise BatchError(
            f"targets of shape {tuple(targets.shape)} do not go with outputs of shape {tuple(output.shape)}: they "
            "need one class for every output vector"
        )
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def model_output(model: nn.Module, inputs: Any) -> Tensor:
    """Return the first floating-point tensor of what a model returns."""
    if isinstance(inputs, dict):
        returned = model(**inputs)
    else:
        returned = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    values = tuple(returned.values()) if isinstance(returned, dict) else (returned,)
    output = first_tensor(values, {})
    if output is None:
        raise ModelError(f"{type(model).__name__} returned no floating-point tensor")
    return output


def check_runs(
    widths: Sequence[int], base_width: int, steps: Sequence[int], seeds: int, rates: Sequence[float]
) -> None:
    """Refuse widths, steps, seeds and rates that no check can be made of.

    Raises:
        DomainError: naming the value.
    """
    whole = {"widths": widths, "base_width": [base_width], "steps": steps, "seeds": [seeds]}
    for name, values in whole.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DomainError(f"{name} must be positive whole numbers; got {value!r}", value=value)
    if len(widths) < 2 or len(set(widths)) < len(widths):
        raise DomainError(f"at least two different widths are needed; got {list(widths)}", value=widths)
    if seeds < 2:
        raise DomainError("an error bar needs at least 2 seeds; got 1", value=seeds)
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise DomainError(f"learning rates must be positive and finite; got {list(rates)}", value=rates)
