"""Training many small transformers together, each with its own weights, learning rate and fate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.errors import DomainError
from fathometer.models import stacked_network
from fathometer.models.seeding import named_generator
from fathometer.models.stacked import standardised
from fathometer.spec import Transformer
from fathometer.training.digits import CLASSES, PATCH_PIXELS, PATCHES, Digits
from fathometer.training.runs import DIVERGED, OK, Progress, batches, diverged
from fathometer.training.vision import PatchClassifier

#: The last norm's, as in ``nn.LayerNorm``.
_EPSILON = 1e-5


class StackedClassifier(nn.Module):
    """Independent :class:`PatchClassifier` networks, one per grid point and copy, as one module.

    Every parameter has a leading axis over networks. Patch embedding and positions are drawn like the weights of
    :class:`fathometer.models.StackedTransformer`, with the names ``"embed"`` and ``"positions"``; heads start at zero.

    Args:
        spec: The blocks; fields may be arrays, see :func:`fathometer.models.stacked_network`.
        n_copies: Independent weight draws of each grid point.
        seed: Seed of all weights.
        token_scale: Root mean square of a token at the first block, one for all or an array of one per network.
    Raises:
        SpecError, NotCoveredError, DomainError: as :func:`fathometer.models.stacked_network`; DomainError also for
            token scales that are not positive, or not one per network.
    """

    def __init__(self, spec: Transformer, *, n_copies: int = 1, seed: int = 0, token_scale: Any = 1.0) -> None:
        super().__init__()
        self.stack = stacked_network(spec, n_copies=n_copies, seed=seed)
        n, d_model = self.n_networks, spec.d_model
        half = _per_network("token_scale", token_scale, n).float().view(n, 1, 1) / 2**0.5
        noise = {
            name: torch.empty(n, d_model, size).normal_(generator=named_generator(seed, name))
            for name, size in (("embed", PATCH_PIXELS), ("positions", PATCHES))
        }
        self.embed = nn.Parameter(noise["embed"] * half / PATCH_PIXELS**0.5)
        self.positions = nn.Parameter(noise["positions"] * half)
        self.norm_weight = nn.Parameter(torch.ones(n, d_model, 1))
        self.norm_bias = nn.Parameter(torch.zeros(n, d_model, 1))
        self.head = nn.Parameter(torch.zeros(n, CLASSES, d_model))
        self.head_bias = nn.Parameter(torch.zeros(n, CLASSES, 1))

    @property
    def n_networks(self) -> int:
        """Number of networks."""
        return self.stack.n_networks

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches ``(batch, 16, 4)``, shown to every network, to logits ``(n_networks, batch, 10)``."""
        n, d_model, _ = self.embed.shape
        embedded = self.embed.view(-1, PATCH_PIXELS) @ patches.reshape(-1, PATCH_PIXELS).T
        tokens = embedded.view(n, d_model, -1, PATCHES) + self.positions.unsqueeze(2)
        stream = self.stack.advance(tokens.flatten(2), PATCHES)
        normed = standardised(stream, self.norm_weight, centred=True, epsilon=_EPSILON)
        pooled = normed.view(n, d_model, -1, PATCHES).mean(dim=-1) + self.norm_bias
        return torch.baddbmm(self.head_bias, self.head, pooled).mT

    def single(self, index: int) -> PatchClassifier:
        """Return a copy of one network as a plain module.

        Raises:
            DomainError: if there is no such network.
        """
        stack = self.stack.single(index)
        network = PatchClassifier(stack.spec, seed=0)
        network.stack = stack
        with torch.no_grad():
            network.embed.copy_(self.embed[index].T)
            network.positions.copy_(self.positions[index].T)
            network.norm.weight.copy_(self.norm_weight[index, :, 0])
            network.norm.bias.copy_(self.norm_bias[index, :, 0])
            network.head.weight.copy_(self.head[index])
            network.head.bias.copy_(self.head_bias[index, :, 0])
        return network


@dataclass(frozen=True, kw_only=True)
class StackedRun:
    """Finished training runs of a stack of networks.

    Attributes:
        losses: Training loss of every network at every step, shape ``(steps, n_networks)``; NaN after a network was
            frozen.
        test_loss: Mean cross-entropy on the test part, shape ``(n_networks,)``; infinite for a network that diverged.
        accuracy: Share of the test part classified rightly, shape ``(n_networks,)``; NaN for a network that diverged.
        status: ``"ok"`` or ``"diverged"``, shape ``(n_networks,)``, by the criterion of :class:`Run`; a network whose
            parameters left the finite numbers in its last step has diverged too.
        frozen_at: The step at which a network's loss or parameters left the finite numbers, -1 where they never did,
            shape ``(n_networks,)``. It takes no further steps.
    """

    losses: NDArray[np.float64]
    test_loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    status: NDArray[np.str_]
    frozen_at: NDArray[np.int64]


class Momentum:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``, at one rate per network."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.9) -> None:
        self.parameters = parameters
        self.momentum = momentum
        self.state = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Update the parameters in place.

        Args:
            gradients: One for each parameter.
            rates: Shape ``(n_networks,)``.
        """
        for p, g, velocity in zip(self.parameters, gradients, self.state, strict=True):
            velocity.mul_(self.momentum).add_(g)
            p.addcmul_(velocity, _beside(rates, p), value=-1)


class Adam:
    """AdamW without weight decay, as ``torch.optim.AdamW``, at one rate per network."""

    def __init__(self, parameters: list[Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.parameters = parameters
        self.betas = betas
        self.eps = eps
        self.taken = 0
        self.state = [torch.zeros_like(p) for p in parameters for _ in range(2)]

    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Update the parameters in place.

        Args:
            gradients: One for each parameter; overwritten.
            rates: Shape ``(n_networks,)``.
        """
        self.taken += 1
        first, second = (1 - beta**self.taken for beta in self.betas)
        rates = rates * (second**0.5 / first)
        eps = self.eps * second**0.5
        for p, g, mean, square in zip(self.parameters, gradients, self.state[::2], self.state[1::2], strict=True):
            mean.lerp_(g, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
            torch.sqrt(square, out=g).add_(eps)
            torch.div(mean, g, out=g)
            p.addcmul_(g, _beside(rates, p), value=-1)


UPDATES: dict[str, type[Momentum] | type[Adam]] = {"sgd": Momentum, "adamw": Adam}


def train_together(
    model: StackedClassifier,
    data: Digits,
    *,
    rate: Any,
    steps: int,
    warmup: int = 0,
    batch_size: int = 32,
    optimizer: str = "sgd",
    seed: int = 0,
    clip: float | None = None,
    progress: Progress | None = None,
) -> StackedRun:
    """Train all networks of a stack on the same batches in the same order.

    The loss is the sum over networks of each network's mean cross-entropy, so that every network receives its own
    gradient; a network behaves as it would alone in :func:`train`. A network whose numbers are no longer finite is
    frozen and changes nothing for the others, bit for bit.

    Cost: the floating-point operations of the same runs one after another; what is saved is the overhead of small
    calls. A hundred networks of 24 layers and width 16 take about a quarter of the time on one core, and use a second
    core where one network could not; for widths in the hundreds there is little left to save. Memory: a layer keeps
    about ``17 d_model + n_heads n_tokens`` numbers for every token of a batch in every network.

    Args:
        model: The networks, trained in place.
        data: The task.
        rate: Learning rate after warm-up: one for all, or an array of one per network.
        steps: Steps taken.
        warmup: Steps over which the rate rises linearly.
        batch_size: Samples a step, drawn without replacement within an epoch.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"`` (no weight decay).
        seed: Order of the samples.
        clip: Largest norm of a network's gradient, over all its parameters; ``None`` for no bound.
        progress: Called after every step with a label, the steps taken and their number.
    Raises:
        DomainError: for an unknown optimizer, rates or a bound that are not positive, rates that are not one per
            network, fewer than two steps, or batches larger than the task.
    """
    order = batches(len(data.train), batch_size, seed)

    def loss_of_step() -> Tensor:
        chosen = next(order)
        return _cross_entropy(model(data.train[chosen]), data.train_labels[chosen])

    losses, frozen_at = descend(
        list(model.parameters()),
        loss_of_step,
        n_networks=model.n_networks,
        rate=rate,
        steps=steps,
        warmup=warmup,
        optimizer=optimizer,
        clip=clip,
        progress=progress,
    )
    failed = diverged(losses) | (frozen_at >= 0)
    test_loss, accuracy = _evaluate(model, data, batch_size)
    return StackedRun(
        losses=losses,
        test_loss=np.where(failed, np.inf, test_loss),
        accuracy=np.where(failed, np.nan, accuracy),
        status=np.where(failed, DIVERGED, OK),
        frozen_at=frozen_at,
    )


def descend(
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[], Tensor],
    *,
    n_networks: int,
    rate: Any,
    steps: int,
    warmup: int = 0,
    optimizer: str = "sgd",
    clip: float | None = None,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Take the same number of steps in every network of a stack.

    Args:
        parameters: Of all networks, leading axis over networks; changed in place.
        loss_of_step: Returns every network's loss on the next batch, shape ``(n_networks,)``.
        n_networks: Number of networks.
        rate, steps, warmup, optimizer, clip, progress: As in :func:`train_together`.
    Returns:
        ``losses`` and ``frozen_at`` of :class:`StackedRun`.
    Raises:
        DomainError: as :func:`train_together`.
    """
    if optimizer not in UPDATES:
        raise DomainError(f"optimizer {optimizer!r} is unknown; accepted: {', '.join(UPDATES)}", value=optimizer)
    if steps < 2 or warmup < 0:
        raise DomainError(f"steps must be >= 2 and warmup >= 0; got {steps} and {warmup}")
    if clip is not None and not clip > 0:
        raise DomainError(f"clip must be positive; got {clip}", value=clip)
    rates = _per_network("rate", rate, n_networks)
    updater = UPDATES[optimizer]([p.detach() for p in parameters])
    losses = np.full((steps, n_networks), np.nan)
    frozen_at = np.full(n_networks, -1)
    for step in range(steps):
        loss = loss_of_step()
        now = loss.detach().double().numpy()
        losses[step] = np.where(frozen_at < 0, now, np.nan)
        frozen_at[(frozen_at < 0) & ~np.isfinite(now)] = step
        gradients = list(torch.autograd.grad(loss.sum(), parameters))
        frozen = torch.from_numpy(frozen_at >= 0)
        if frozen.any():
            for tensor in (*gradients, *updater.state):
                tensor[frozen] = 0
        if clip is not None:
            _clip(gradients, clip)
        updater.step(gradients, (rates * min(1.0, (step + 1) / (warmup + 1))).float())
        frozen_at[(frozen_at < 0) & ~_finite(parameters)] = step
        if progress is not None:
            progress("training together", step + 1, steps)
    return losses, frozen_at


def _evaluate(
    model: StackedClassifier, data: Digits, batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cross-entropy and accuracy on the test part, each of shape ``(n_networks,)``."""
    loss, right = torch.zeros(2, model.n_networks, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(data.test), batch_size):
            labels = data.test_labels[start : start + batch_size]
            logits = model(data.test[start : start + batch_size])
            loss += _cross_entropy(logits, labels).double() * len(labels)
            right += (logits.argmax(dim=-1) == labels).sum(dim=1)
    return (loss / len(data.test)).numpy(), (right / len(data.test)).numpy()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of every network, shape ``(n_networks,)``."""
    n = len(logits)
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(n), reduction="none").view(n, -1).mean(dim=1)


def _clip(gradients: list[Tensor], bound: float) -> None:
    """Scale each network's gradient in place so that its norm over all parameters is at most ``bound``."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    factors = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(_beside(factors, g))


def _finite(parameters: list[nn.Parameter]) -> NDArray[np.bool_]:
    """Return which networks have finite parameters, of finite sum, shape ``(n_networks,)``."""
    with torch.no_grad():
        total = sum(p.flatten(1).sum(dim=1) for p in parameters)
        assert isinstance(total, Tensor)
        return total.isfinite().numpy()


def _beside(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Return one number per network, shaped to broadcast with a stacked parameter."""
    return numbers.view(-1, *[1] * (parameter.ndim - 1))


def _per_network(name: str, value: Any, n_networks: int) -> Tensor:
    """Return a positive number per network, float64."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (n_networks,)):
        raise DomainError(f"{name} must be one number or have shape ({n_networks},); got shape {array.shape}")
    if not (np.isfinite(array) & (array > 0)).all():
        raise DomainError(f"{name} must be positive and finite; got {value}", value=value)
    return torch.from_numpy(np.broadcast_to(array, n_networks).copy())
