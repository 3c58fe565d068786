r"""A byte-level language model around the reference network, and one training run of it.

The network is that of a :class:`fathometer.spec.Network`: rows of a token and a position table are added, the blocks
are the reference network of the trunk, and a head reads every token,

.. math:: z = m\, W\, N(x) + b, \qquad W = E \text{ (tied)} \quad\text{or a matrix of its own.}

The bias b starts at the logarithms of the symbols' frequencies, so that a network need not learn these first: a loss
below their entropy is learned from context.

With unit-size tokens, DeepScaleLM (A. Kedia et al., arXiv:2403.09635) gives each of ``n_e`` tables the variance
:math:`s_e = (1-p)/n_e` and the tied head the multiplier :math:`m = 1/\sqrt{d\,s_e}`, so that logits have variance one.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fathometer.errors import BatchError, DomainError, SpecError
from fathometer.models import reference_network
from fathometer.models.reference import norm_module
from fathometer.models.seeding import named_generator
from fathometer.results.plain import plain
from fathometer.spec import Head, LayerNorm, Network, TokenStem, Transformer
from fathometer.training.runs import DIVERGED, OK, Progress, final_loss
from fathometer.training.text import Batch, ByteText, held_out_batches, training_batches

#: Status of a run that was stopped from outside.
INTERRUPTED = "interrupted"


def language_network(
    trunk: Transformer,
    *,
    tied: bool = False,
    dropout: float = 0.0,
    logit_std: float = 1.0,
    head_multiplier: float = 1.0,
) -> Network:
    """Return a trunk between unit-size embeddings and a head whose logits start with a wanted deviation.

    Token and position tables have entries of variance ``(1 - dropout) / 2`` each.

    Args:
        trunk: The blocks.
        tied: Whether the head is the token table; its multiplier is then ``logit_std / (sqrt(d_model) std)``.
        dropout: Rate of the dropout on embeddings.
        logit_std: Deviation of a logit around its bias.
        head_multiplier: Factor in front of an untied head, whose weights are as much smaller. It leaves the start as it
            is and lets the head learn faster: a step of AdamW at a rate moves a logit by up to rate times
            ``head_multiplier d_model``, which is little at small widths and the small rates that deep stacks bear.
    Raises:
        SpecError: for a tied head with a ``head_multiplier``.
        DomainError: for a dropout outside ``[0, 1)``, or a deviation or multiplier that is not positive and finite.

    >>> from fathometer.spec import preset
    >>> network = language_network(preset("gpt2"), tied=True)
    >>> round(network.head.multiplier * 768**0.5 * network.stem.token, 12)
    1.0
    """
    if not 0 <= dropout < 1:
        raise DomainError(f"dropout must lie in [0, 1); got {dropout!r}", value=dropout)
    for name, value in (("logit_std", logit_std), ("head_multiplier", head_multiplier)):
        if not (math.isfinite(value) and value > 0):
            raise DomainError(f"{name} must be positive and finite; got {value!r}", value=value)
    std = math.sqrt((1 - dropout) / 2)
    stem = TokenStem(token=std, position=std, dropout=dropout)
    if not tied:
        head = Head(scale=logit_std / head_multiplier, multiplier=head_multiplier, norm=LayerNorm())
    elif head_multiplier == 1.0:
        head = Head(tied=True, multiplier=logit_std / (math.sqrt(trunk.d_model) * std), norm=LayerNorm())
    else:
        raise SpecError("a tied head has the multiplier that gives its logits logit_std; head_multiplier must be 1")
    return Network(stem=stem, trunk=trunk, head=head)


class LanguageModel(nn.Module):
    """Bytes to logits.

    Args:
        network: Stem, blocks and head. Segments have no place here, and neither has pooling.
        log_frequencies: Where the bias of the head starts, shape ``(n_symbols,)``; inputs may also hold the number
            ``n_symbols``, the mask.
        n_tokens: Longest sequence.
        seed: Seed of all weights, see :func:`fathometer.models.draw_weights`.
        recompute: Whether to keep, of every block, its input only, and to compute the rest again on the way back: a
            third more time, and memory for the activations of one block instead of all.
    Raises:
        SpecError: for a stem or head that is not of a language model, or arrays in the trunk.
    """

    def __init__(
        self, network: Network, *, log_frequencies: Tensor, n_tokens: int, seed: int, recompute: bool = False
    ) -> None:
        super().__init__()
        stem, head, d_model = check_language_network(network), network.head, network.trunk.d_model
        self.network = network
        self.recompute = recompute
        self.random = network.trunk.has_dropout
        self.multiplier = float(head.multiplier)

        def table(name: str, rows: int, std: float) -> nn.Parameter:
            noise = torch.empty(rows, d_model).normal_(generator=named_generator(seed, name))
            return nn.Parameter(noise * std)

        self.token_embedding = table("token_embedding", len(log_frequencies) + 1, float(stem.token))
        self.position_embedding = table("position_embedding", n_tokens, float(stem.position))
        self.dropout = nn.Dropout(float(stem.dropout))
        self.trunk = reference_network(network.trunk, seed=seed)
        self.norm = norm_module(head.norm, d_model)
        for parameter in self.norm.parameters():
            nn.init.constant_(parameter, getattr(head.norm, "gain", 1.0))
        if not head.tied:
            self.head = table("head", len(log_frequencies), float(head.scale) / math.sqrt(d_model))
        self.head_bias = nn.Parameter(log_frequencies.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map symbols of shape ``(batch, n_tokens)`` to logits of shape ``(batch, n_tokens, n_symbols)``."""
        n_tokens = inputs.shape[-1]
        if n_tokens > len(self.position_embedding):
            raise BatchError(f"sequences have at most {len(self.position_embedding)} tokens; got {n_tokens}")
        x = self.dropout(F.embedding(inputs, self.token_embedding) + self.position_embedding[:n_tokens])
        for block in self.trunk.blocks:
            if self.recompute and self.training:  # re-entrant: half the overhead, and x always needs a gradient here
                x = checkpoint(block, x, use_reentrant=True, preserve_rng_state=self.random)
            else:
                x = block(x)
        head = self.token_embedding[: len(self.head_bias)] if self.network.head.tied else self.head
        return F.linear(self.norm(x) * self.multiplier, head, self.head_bias)


@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A training run.

    Attributes:
        losses: Training loss at every step taken, nats per scored byte.
        held_out: Loss on the held-out windows after the last step, nats; NaN unless ``status`` is ``"ok"``.
        unigram_loss: The loss there of the symbols' frequencies: the mark of a network that knows nothing of context.
        status: ``"ok"``, ``"diverged"`` as in :class:`fathometer.training.Run`, or ``"interrupted"``.
        seconds_per_step: Median time of a step, NaN without one; for networks trained together, their time over their
            number.
    """

    losses: tuple[float, ...]
    held_out: float
    unigram_loss: float
    status: str
    seconds_per_step: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become ``None``."""
        return {"schema": 1, **plain(self)}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LanguageRun:
        """Return the run that :meth:`to_dict` described.

        Raises:
            SpecError: for data of another schema.
        """
        if data.get("schema") != 1:
            raise SpecError(f"a run of schema {data.get('schema')!r} is not known to this version; accepted: 1")

        def number(value: Any) -> float:
            return math.nan if value is None else float(value)

        return cls(
            losses=tuple(number(loss) for loss in data["losses"]),
            held_out=number(data["held_out"]),
            unigram_loss=float(data["unigram_loss"]),
            status=str(data["status"]),
            seconds_per_step=number(data["seconds_per_step"]),
        )


def train_language_model(
    network: Network,
    text: ByteText,
    *,
    objective: str,
    rate: float,
    steps: int,
    n_tokens: int,
    batch_size: int,
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    recompute: bool = False,
    device: torch.device | str = "cpu",
    held_out_windows: int = 256,
    progress: Progress | None = None,
) -> LanguageRun:
    """Train a language model for some steps of AdamW at a constant rate after warm-up.

    An interruption (``KeyboardInterrupt``) ends the run and is not raised again: its losses come back with the status
    ``"interrupted"``. The random state of torch is left as found.

    Args:
        network: What is trained, see :func:`language_network`. Attention must be causal for ``"causal"``, and must
            not be for ``"masked"``.
        text: What it reads.
        objective: ``"causal"``: the next byte; ``"masked"``: the 15 % of bytes hidden behind a mask.
        rate: Learning rate after warm-up.
        steps: Steps taken at most; a run whose loss is no longer finite stops.
        n_tokens: Length of a window.
        batch_size: Windows a step.
        warmup: Steps over which the rate rises linearly.
        weight_decay: Decoupled decay of AdamW, on everything.
        clip: Largest norm of the gradient; ``None`` for no bound.
        seed: Of weights, windows, masks and dropout.
        recompute: See :class:`LanguageModel`.
        device: Where it is trained; the draws do not depend on it.
        held_out_windows: Windows of the held-out part to judge by: the same for every run.
        progress: Called after every step with a label, the steps taken and their number.
    Raises:
        DomainError: for an unknown objective, or a number outside its range.
        BatchError: for windows longer than the text.
        SpecError: for a network that does not fit the objective.
    """
    check_run(network, objective, rate=rate, steps=steps, warmup=warmup)
    if clip is not None and not clip > 0:
        raise DomainError(f"clip must be positive; got {clip}", value=clip)
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise DomainError(f"weight_decay must be finite and >= 0; got {weight_decay!r}", value=weight_decay)
    source = training_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, seed=seed)
    judged = judging_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, windows=held_out_windows)
    model = LanguageModel(
        network, log_frequencies=text.log_frequencies, n_tokens=n_tokens, seed=seed, recompute=recompute
    )
    model = model.to(device).train()
    updater = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    losses: list[float] = []
    times: list[float] = []
    held_out, status = math.nan, DIVERGED
    devices = [] if torch.device(device).type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            for step in range(steps):
                started = time.perf_counter()
                for group in updater.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / (warmup + 1))
                loss = batch_loss(model, next(source), device)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    break
                updater.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                updater.step()
                times.append(time.perf_counter() - started)
                if progress is not None:
                    progress("training", step + 1, steps)
            if run_status(losses, steps) == OK:
                model.eval()
                with torch.no_grad():
                    judgement = float(np.mean([float(batch_loss(model, batch, device)) for batch in judged]))
                held_out = judgement if math.isfinite(judgement) else math.nan
            status = DIVERGED if math.isnan(held_out) else OK
        except KeyboardInterrupt:
            status = INTERRUPTED
    return LanguageRun(
        losses=tuple(losses),
        held_out=held_out,
        unigram_loss=frequency_loss(text, judged),
        status=status,
        seconds_per_step=float(np.median(times)) if times else math.nan,
    )


def batch_loss(model: nn.Module, batch: Batch, device: torch.device | str = "cpu") -> Tensor:
    """Return the mean cross-entropy over the scored bytes of a batch, nats."""
    inputs, targets, scored = (part.to(device) for part in batch)
    loss: Tensor = F.cross_entropy(model(inputs)[scored], targets[scored])
    return loss


def judging_batches(text: ByteText, objective: str, *, n_tokens: int, batch_size: int, windows: int) -> list[Batch]:
    """Return the held-out windows, about as many as asked for, that every run of an objective is judged by."""
    n_batches = max(1, round(windows / batch_size))
    return held_out_batches(text, objective, n_tokens=n_tokens, batch_size=batch_size, n_batches=n_batches)


def frequency_loss(text: ByteText, batches: list[Batch]) -> float:
    """Return the loss of the frequencies of the training part on the scored bytes of batches, nats."""
    each = [-text.log_frequencies[batch.targets[batch.scored]].mean() for batch in batches]
    return float(torch.stack(each).double().mean())


def run_status(losses: list[float], steps: int) -> str:
    """Return ``"ok"`` or ``"diverged"`` of the losses of a run that should have taken ``steps`` steps."""
    return OK if math.isfinite(final_loss(losses, steps)) else DIVERGED


def check_run(network: Network, objective: str, *, rate: float, steps: int, warmup: int) -> None:
    """Refuse numbers outside their range, and attention that does not fit the objective.

    Raises:
        DomainError, SpecError: as :func:`train_language_model`.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise DomainError(f"rate must be positive and finite; got {rate!r}", value=rate)
    if steps < 2 or warmup < 0:
        raise DomainError(f"steps must be >= 2 and warmup >= 0; got {steps} and {warmup}")
    causal = network.trunk.is_causal
    if causal != (objective == "causal") and objective in ("causal", "masked"):
        raise SpecError(
            f"the objective {objective!r} needs attention {'with' if objective == 'causal' else 'without'} a causal "
            f"mask; the network's attention has {'one' if causal else 'none'}"
        )


def check_language_network(network: Network) -> TokenStem:
    """Return the stem of a network that a language model can have.

    Raises:
        SpecError: for patches, segments, or a head that pools.
    """
    if not isinstance(network.stem, TokenStem) or np.any(np.asarray(network.stem.segment) != 0):
        raise SpecError("a language model needs a TokenStem without segments")
    if network.head.pooling != "none":
        raise SpecError(f"a language model reads every token; Head.pooling is {network.head.pooling!r}")
    return network.stem
