"""Masked-token modelling of handwritten digits by stacks of small BERT-like transformers.

Every image is a sequence of 16 tokens: its 2 x 2 patches, each named by the darkness of its two halves in four levels.
A quarter of the tokens is hidden behind a mask token and to be guessed from what is left and from where they stand. A
network that cannot tell tokens apart can do no better than the frequencies of tokens: the *unigram entropy* is the
mark to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.models import stacked_network
from fathometer.models.seeding import named_generator
from fathometer.models.stacked import standardised
from fathometer.spec import Transformer
from fathometer.training.digits import load_digits
from fathometer.training.runs import DIVERGED, OK, Progress, batches, diverged
from fathometer.training.stacked import descend

_EPSILON = 1e-5
HIDDEN = 0.25  # share of tokens to guess
_LEVELS = 4  # of darkness of half a patch


@dataclass(frozen=True)
class PatchTokens:
    """Images as token numbers.

    Attributes:
        train, test: Shape ``(n_images, 16)``, below ``n_symbols``.
        n_symbols: Number of different tokens; the mask token is the next number.
        unigram_entropy: Entropy of the frequencies of tokens in the training part, nats.
    """

    train: Tensor
    test: Tensor
    n_symbols: int
    unigram_entropy: float


@dataclass(frozen=True, kw_only=True)
class MaskedRun:
    """How a stack of networks learned to guess hidden tokens.

    Attributes:
        losses: Training loss, shape ``(steps, n_networks)``.
        test_loss: Mean cross-entropy on hidden tokens of the test part, nats; infinite for a network that diverged.
            Shape ``(n_networks,)``.
        status: ``"ok"`` or ``"diverged"``.
        unigram_entropy: The mark to beat.
    """

    losses: NDArray[np.float64]
    test_loss: NDArray[np.float64]
    status: NDArray[np.str_]
    unigram_entropy: float


def load_patch_tokens() -> PatchTokens:
    """Return the digits of scikit-learn as sequences of patch tokens.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    digits = load_digits()
    halves = torch.cat([digits.train, digits.test]).view(-1, digits.train.shape[1], 2, 2).mean(dim=-2)  # two columns
    borders = torch.quantile(halves.flatten(), torch.arange(1, _LEVELS) / _LEVELS)
    levels = torch.bucketize(halves.contiguous(), borders)
    ids = _LEVELS * levels[..., 0] + levels[..., 1]
    train, test = ids[: len(digits.train)], ids[len(digits.train) :]
    shares = torch.bincount(train.flatten(), minlength=_LEVELS**2).double() / train.numel()
    entropy = float(-torch.special.xlogy(shares, shares).sum())
    return PatchTokens(train, test, _LEVELS**2, entropy)


class StackedMaskedModel(nn.Module):
    """Embedding, positions, the spec's blocks and a read-out of every token, for every network of a grid.

    Args:
        spec: The blocks; fields may be arrays.
        n_symbols: Number of different tokens.
        n_tokens: Length of a sequence.
        seed: Seed of all weights.
    """

    def __init__(self, spec: Transformer, *, n_symbols: int, n_tokens: int, seed: int) -> None:
        super().__init__()
        self.stack = stacked_network(spec, seed=seed)
        n, d_model = self.stack.n_networks, spec.d_model

        def noise(name: str, columns: int) -> nn.Parameter:
            draw = torch.empty(n, d_model, columns).normal_(generator=named_generator(seed, name))
            return nn.Parameter(draw * 0.5**0.5)

        self.embed, self.positions = noise("embed", n_symbols + 1), noise("positions", n_tokens)
        self.norm_weight = nn.Parameter(torch.ones(n, d_model, 1))
        self.norm_bias = nn.Parameter(torch.zeros(n, d_model, 1))
        self.head = nn.Parameter(torch.zeros(n, n_symbols, d_model))
        self.head_bias = nn.Parameter(torch.zeros(n, n_symbols, 1))

    @property
    def n_networks(self) -> int:
        """Number of networks."""
        return self.stack.n_networks

    def forward(self, ids: Tensor) -> Tensor:
        """Map token numbers ``(batch, n)``, the same for all, to logits ``(n_networks, n_symbols, batch * n)``."""
        batch, n_tokens = ids.shape
        stream = self.embed[:, :, ids.flatten()] + self.positions.repeat(1, 1, batch)
        stream = self.stack.advance(stream, n_tokens)
        normed = standardised(stream, self.norm_weight, centred=True, epsilon=_EPSILON) + self.norm_bias
        return torch.baddbmm(self.head_bias, self.head, normed)


def train_masked(
    spec: Transformer,
    *,
    steps: int,
    rate: Any,
    warmup: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    clip: float | None = 1.0,
    progress: Progress | None = None,
) -> MaskedRun:
    """Train every network of a grid of specs to guess hidden tokens, all on the same batches, by AdamW.

    Args:
        spec: The blocks; fields may be arrays.
        steps, rate, warmup, clip, progress: As in :func:`fathometer.training.train_together`.
        batch_size: Images a step.
        seed: Of weights, batches and masks.
    """
    data = load_patch_tokens()
    generator = named_generator(seed, "masks")
    order = batches(len(data.train), batch_size, seed)
    model = StackedMaskedModel(spec, n_symbols=data.n_symbols, n_tokens=data.train.shape[1], seed=seed)

    def loss_on(true: Tensor, source: torch.Generator) -> Tensor:
        hidden = torch.rand(true.shape, generator=source) < HIDDEN
        hidden[:, 0] |= ~hidden.any(dim=1)
        guesses = model(torch.where(hidden, data.n_symbols, true))[:, :, hidden.flatten()]
        targets = true[hidden].expand(model.n_networks, -1)
        return F.cross_entropy(guesses, targets, reduction="none").mean(dim=1)

    losses, frozen_at = descend(
        list(model.parameters()),
        lambda: loss_on(data.train[next(order)], generator),
        n_networks=model.n_networks,
        rate=rate,
        steps=steps,
        warmup=warmup,
        optimizer="adamw",
        clip=clip,
        progress=progress,
    )
    failed = diverged(losses) | (frozen_at >= 0)
    with torch.no_grad():
        source = named_generator(seed, "test")
        whole = len(data.test) - len(data.test) % batch_size or len(data.test)
        parts = [loss_on(part, source) for part in torch.split(data.test[:whole], batch_size)]
    test = torch.stack(parts).mean(dim=0).double().numpy()
    return MaskedRun(
        losses=losses,
        test_loss=np.where(failed, np.inf, test),
        status=np.where(failed, DIVERGED, OK),
        unigram_entropy=data.unigram_entropy,
    )
