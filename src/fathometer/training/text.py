"""Text as bytes: a file of the user's, or prose that ships with Python; batches to continue or to fill in."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fathometer.errors import BatchError, DomainError, nearest
from fathometer.models.seeding import named_generator

OBJECTIVES = ("causal", "masked")
HIDDEN = 0.15  # share of bytes to guess under the masked objective
_SHORTEST = 64  # bytes that either part of a text must have


@dataclass(frozen=True, kw_only=True)
class ByteText:
    """A text as numbers of its own alphabet, in two parts.

    Attributes:
        name: Where it came from.
        digest: SHA-256 of the bytes.
        alphabet: The different bytes, ascending; symbol ``i`` is ``alphabet[i]``.
        train, held_out: Symbols, shape ``(n,)``; the held-out part is the end of the text.
        unigram_entropy: Entropy of the symbols' frequencies in the training part, nats.
        unigram_loss: Cross-entropy on the held-out part of those frequencies (each count raised by one), nats: the
            mark of a network that knows nothing of context.
        log_frequencies: Natural logarithms of those frequencies, shape ``(n_symbols,)``.
        collision: Probability that two symbols drawn from the training part are equal.
    """

    name: str
    digest: str
    alphabet: bytes
    train: Tensor
    held_out: Tensor
    unigram_entropy: float
    unigram_loss: float
    log_frequencies: Tensor
    collision: float

    @property
    def n_symbols(self) -> int:
        """Number of different bytes; the mask has the next number."""
        return len(self.alphabet)

    def input_collision(self, objective: str) -> float:
        """Return the probability that two inputs of a sequence are the same symbol, masks included.

        Positions are taken as independent draws.
        """
        check_objective(objective)
        hidden = HIDDEN if objective == "masked" else 0.0
        return (1 - hidden) ** 2 * self.collision + hidden**2


class Batch(NamedTuple):
    """What a network reads and what it should answer.

    Attributes:
        inputs: Symbols, shape ``(batch, n_tokens)``.
        targets: The right answers, same shape.
        scored: Which answers count, same shape.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor


def byte_text(path: str | os.PathLike[str] | None = None, *, held_out: float = 0.1) -> ByteText:
    """Return a text as bytes.

    Args:
        path: A file, read whole; by default the help topics of Python's own ``pydoc``, some 460 kB of English.
        held_out: Share of the text, at its end, that is not trained on.
    Raises:
        BatchError: for a file that cannot be read, is too short, or has one byte repeated.
        DomainError: if ``held_out`` is not inside ``(0, 1)``.
    """
    if not 0 < held_out < 1:
        raise DomainError(f"held_out must lie strictly between 0 and 1; got {held_out!r}", value=held_out)
    if path is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        content = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
        name = "pydoc topics"
    else:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BatchError(f"cannot read {os.fspath(path)!r}: {error.strerror or error}") from error
        name = Path(path).name
    return text_of_bytes(content, name=name, held_out=held_out)


def text_of_bytes(content: bytes, *, name: str, held_out: float = 0.1) -> ByteText:
    """Return bytes in memory as a text; see :func:`byte_text`."""
    split = len(content) - int(held_out * len(content))
    if min(split, len(content) - split) < _SHORTEST:
        raise BatchError(
            f"the text {name!r} has {len(content)} bytes, {split} to train on and {len(content) - split} held out; "
            f"each part needs at least {_SHORTEST}"
        )
    alphabet = bytes(sorted(set(content)))
    if len(alphabet) == 1:
        raise BatchError(f"the text {name!r} is the byte {alphabet!r} repeated: there is nothing to learn")
    number = torch.zeros(256, dtype=torch.long)
    number[list(alphabet)] = torch.arange(len(alphabet))
    symbols = number[torch.frombuffer(bytearray(content), dtype=torch.uint8).long()]
    train, rest = symbols[:split], symbols[split:]
    counts = torch.bincount(train, minlength=len(alphabet)).double()
    shares = counts / split
    smoothed = ((counts + 1) / (split + len(alphabet))).log()
    return ByteText(
        name=name,
        digest=hashlib.sha256(content).hexdigest(),
        alphabet=alphabet,
        train=train,
        held_out=rest,
        unigram_entropy=float(-torch.special.xlogy(shares, shares).sum()),
        unigram_loss=float(-smoothed[rest].mean()),
        log_frequencies=smoothed.float(),
        collision=float(shares.square().sum()),
    )


def training_batches(text: ByteText, objective: str, *, n_tokens: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of windows at random places of the training part, without end."""
    _check_windows(text.train, objective, n_tokens, batch_size)
    generator = named_generator(seed, "windows")
    while True:
        yield _windows(text, text.train, objective, n_tokens, batch_size, generator)


def held_out_batches(
    text: ByteText, objective: str, *, n_tokens: int, batch_size: int, n_batches: int, seed: int = 0
) -> list[Batch]:
    """Return batches of windows of the held-out part: the same for the same seed."""
    _check_windows(text.held_out, objective, n_tokens, batch_size)
    generator = named_generator(seed, "held-out windows")
    return [_windows(text, text.held_out, objective, n_tokens, batch_size, generator) for _ in range(n_batches)]


def check_objective(objective: str) -> None:
    """Refuse an objective that is not known, naming the closest one."""
    if objective not in OBJECTIVES:
        raise DomainError(f"objective {objective!r} is unknown{nearest(objective, OBJECTIVES)}", value=objective)


def _check_windows(part: Tensor, objective: str, n_tokens: int, batch_size: int) -> None:
    check_objective(objective)
    if batch_size < 1:
        raise DomainError(f"batch_size must be positive; got {batch_size}", value=batch_size)
    if not 2 <= n_tokens < len(part):
        raise BatchError(
            f"a window of n_tokens must have at least 2 bytes and fit into the {len(part)} bytes of its part of the "
            f"text; got {n_tokens}"
        )


def _windows(
    text: ByteText, part: Tensor, objective: str, n_tokens: int, batch_size: int, generator: torch.Generator
) -> Batch:
    starts = torch.randint(len(part) - n_tokens, (batch_size, 1), generator=generator)
    window = part[starts + torch.arange(n_tokens + 1)]
    if objective == "causal":
        targets = window[:, 1:]
        return Batch(window[:, :-1], targets, torch.ones_like(targets, dtype=torch.bool))
    targets = window[:, :-1]
    hidden = torch.rand(targets.shape, generator=generator) < HIDDEN
    hidden[:, 0] |= ~hidden.any(dim=1)
    return Batch(torch.where(hidden, text.n_symbols, targets), targets, hidden)
