"""Many byte-level language models trained together: each exactly what it would be alone, in a fraction of the time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.errors import SpecError
from fathometer.models.seeding import named_generator
from fathometer.models.stacked import Grid, StackedBranch, StackedNorm, StackedTransformer
from fathometer.spec import Network, Transformer, batch_shape
from fathometer.training.language import (
    LanguageRun,
    check_language_network,
    check_run,
    frequency_loss,
    judging_batches,
)
from fathometer.training.runs import DIVERGED, OK, Progress, diverged
from fathometer.training.stacked import descend
from fathometer.training.text import Batch, ByteText, training_batches


class StackedLanguageModel(nn.Module):
    """Independent :class:`fathometer.training.language.LanguageModel` networks of one architecture as one module.

    Network ``i`` has the weights of ``LanguageModel(networks[i], seed=seeds[i])``.

    Args:
        networks: One for each network; they may differ in the numbers of their trunks only.
        seeds: One for each network.
        log_frequencies, n_tokens: As there.
    Raises:
        SpecError: for networks that differ in more than numbers, or have stems or heads no language model has.
    """

    def __init__(
        self, networks: Sequence[Network], *, seeds: Sequence[int], log_frequencies: Tensor, n_tokens: int
    ) -> None:
        super().__init__()
        first = networks[0]
        stem, head, d_model = check_language_network(first), first.head, first.trunk.d_model
        if float(stem.dropout):
            raise SpecError("networks trained together have no dropout; train them one after another")
        if any((other.stem, other.head) != (stem, head) for other in networks):
            raise SpecError("networks trained together share their stem and head")
        self.n_networks, n_symbols = len(networks), len(log_frequencies)
        self.multiplier = float(head.multiplier)
        self.seeds = tuple(seeds)
        trunk = stacked_trunk([network.trunk for network in networks])
        copies = self.n_networks // math.prod(batch_shape(trunk))  # more than one where all trunks are alike
        self.stack = StackedTransformer(trunk, copies, torch.float32, "cpu")
        with torch.no_grad():
            for prefix, module in self.stack.named_modules():
                if isinstance(module, StackedBranch):
                    for name, part, std in module.random_parts():
                        self._fill(part, f"{prefix}.{name}", std.float())

        def table(name: str, rows: int, std: float) -> nn.Parameter:
            part = torch.empty(self.n_networks, rows, d_model)
            self._fill(part, name, torch.full((self.n_networks, 1, 1), std))
            return nn.Parameter(part)

        self.token_embedding = table("token_embedding", n_symbols + 1, float(stem.token))
        self.position_embedding = table("position_embedding", n_tokens, float(stem.position))
        grid = Grid((self.n_networks,), 1)
        norm = head.norm
        self.norm = nn.Identity() if norm is None else StackedNorm(norm, d_model, grid, self.token_embedding.detach())
        self.head = None if head.tied else table("head", n_symbols, float(head.scale) / math.sqrt(d_model))
        self.head_bias = nn.Parameter(log_frequencies.view(1, -1, 1).repeat(self.n_networks, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map symbols ``(n_networks, batch, n_tokens)`` to logits ``(n_networks, n_symbols, batch * n_tokens)``."""
        n, batch, n_tokens = inputs.shape
        rows = self.token_embedding.shape[1]
        numbered = inputs.flatten(1) + rows * torch.arange(n).unsqueeze(1)
        tokens = F.embedding(numbered, self.token_embedding.flatten(0, 1))
        stream = (tokens + self.position_embedding[:, :n_tokens].repeat(1, batch, 1)).mT.contiguous()
        stream = self.stack.advance(stream, n_tokens)
        head = self.token_embedding[:, : self.head_bias.shape[1]] if self.head is None else self.head
        return torch.baddbmm(self.head_bias, head, self.norm(stream) * self.multiplier)

    def _fill(self, part: Tensor, name: str, std: Tensor) -> None:
        """Draw a part of every network by its own seed."""
        for seed in set(self.seeds):
            mine = [i for i, other in enumerate(self.seeds) if other == seed]
            noise = torch.empty(part.shape[1:]).normal_(generator=named_generator(seed, name))
            part[mine] = noise * std[mine]


def stacked_trunk(trunks: Sequence[Transformer]) -> Transformer:
    """Return transformers of one architecture as one whose differing numbers are arrays, one entry for each.

    Raises:
        SpecError: where they differ in more than numbers.
    """
    unrolled = [
        dataclasses.replace(t, blocks=tuple(dataclasses.replace(block, repeat=1) for block in t.layers()))
        for t in trunks
    ]
    merged: Transformer = _merged(unrolled, "trunk")
    return merged


def train_together(
    networks: Sequence[Network],
    text: ByteText,
    *,
    objective: str,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    n_tokens: int,
    batch_size: int,
    warmup: int = 0,
    clip: float | None = None,
    held_out_windows: int = 256,
    progress: Progress | None = None,
) -> list[LanguageRun]:
    """Train language models together, each on its own windows, as :func:`train_language_model` would one by one.

    Weight decay is zero. Cost: that of the same runs alone, less the overhead of small calls; at width 16 and 128
    tokens a step, eighteen networks take about a fifth of the time. Memory: all networks with all their activations.

    Args:
        networks, rates, seeds: One for each network.
        text, objective, steps, n_tokens, batch_size, warmup, clip, held_out_windows, progress: As there.
    Returns:
        One run for each network.
    Raises:
        DomainError, BatchError, SpecError: as there, and for networks that cannot be stacked.
    """
    if not len(networks) == len(rates) == len(seeds) > 0:
        raise SpecError(
            f"networks, rates and seeds must be as many, and not none; got {len(networks)}, {len(rates)}, {len(seeds)}"
        )
    for network, rate in zip(networks, rates, strict=True):
        check_run(network, objective, rate=rate, steps=steps, warmup=warmup)
    sources = {
        seed: training_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, seed=seed) for seed in seeds
    }
    judged = judging_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, windows=held_out_windows)
    model = StackedLanguageModel(networks, seeds=seeds, log_frequencies=text.log_frequencies, n_tokens=n_tokens)
    times = [time.perf_counter()]

    def told(label: str, done: int, total: int) -> None:
        times.append(time.perf_counter())
        if progress is not None:
            progress(label, done, total)

    losses, frozen_at = descend(
        list(model.parameters()),
        lambda: _losses(model, _next(sources, seeds)),
        n_networks=len(networks),
        rate=rates,
        steps=steps,
        warmup=warmup,
        optimizer="adamw",
        clip=clip,
        progress=told,
    )
    with torch.no_grad():
        seen = [_losses(model, Batch(*(part.expand(len(seeds), -1, -1) for part in batch))) for batch in judged]
    held_out = torch.stack(seen).double().mean(dim=0).numpy()
    mark = frequency_loss(text, judged)
    failed = diverged(losses) | (frozen_at >= 0) | ~np.isfinite(held_out)
    return [
        LanguageRun(
            losses=tuple(losses[: frozen_at[i] + 1 if frozen_at[i] >= 0 else steps, i].tolist()),
            held_out=math.nan if failed[i] else float(held_out[i]),
            unigram_loss=mark,
            status=DIVERGED if failed[i] else OK,
            seconds_per_step=float(np.median(np.diff(times))) / len(networks),
        )
        for i in range(len(networks))
    ]


def _next(sources: dict[int, Iterator[Batch]], seeds: Sequence[int]) -> Batch:
    drawn = {seed: next(source) for seed, source in sources.items()}
    return Batch(*(torch.stack([drawn[seed][part] for seed in seeds]) for part in range(3)))


def _losses(model: StackedLanguageModel, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over each network's scored bytes, shape ``(n_networks,)``."""
    each = F.cross_entropy(model(batch.inputs), batch.targets.flatten(1), reduction="none")
    scored = batch.scored.flatten(1).float()
    return (each * scored).sum(dim=1) / scored.sum(dim=1)


def _merged(values: Sequence[Any], where: str) -> Any:
    first = values[0]
    if all(value is first for value in values):
        return first
    if all(type(value) is type(first) for value in values):
        if dataclasses.is_dataclass(first) and not isinstance(first, type):
            fields = {
                field.name: _merged([getattr(value, field.name) for value in values], f"{where}.{field.name}")
                for field in dataclasses.fields(first)
            }
            return dataclasses.replace(first, **fields)
        if isinstance(first, tuple) and all(len(value) == len(first) for value in values):
            return tuple(_merged(entries, f"{where}[{i}]") for i, entries in enumerate(zip(*values, strict=True)))
    if all(isinstance(value, (int, float)) for value in values) and not isinstance(first, bool):
        return first if all(value == first for value in values) else np.array(values, dtype=float)
    if any(value != first for value in values):
        raise SpecError(f"networks trained together have one architecture; they differ in {where}")
    return first
