"""What the blocks of a real model compute, found by running each of them once: one stack, or an encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fathometer.application.multipliers import multipliers_in
from fathometer.errors import BatchError, FathometerError, ModelError, NotCoveredError, SpecError
from fathometer.measurement.batches import Batch, as_batch
from fathometer.measurement.sounding import BlockCall, first_layout, record_calls
from fathometer.measurement.statistics import gram_matrix
from fathometer.measurement.untouched import untouched
from fathometer.models import Stack, SublayerReading, check_weights, find_stacks, named_stack, read_block
from fathometer.models.branches import leaving, producer_of, split_branches
from fathometer.models.joined_stacks import find_joined_stacks
from fathometer.models.reading import spec_of
from fathometer.models.trace import Trace, tracing
from fathometer.models.weights import check_order
from fathometer.spec import EncoderDecoder, Norm, Transformer

_EPSILONS = ("eps", "variance_epsilon", "epsilon")


class FirstTokens(NamedTuple):
    """The tokens in front of a stack: how many, their mean square per coordinate and their mean overlap."""

    n_tokens: int
    q: float
    p: float

    @property
    def cosine(self) -> float:
        """The overlap over the mean square."""
        return self.p / self.q


@dataclass(frozen=True, kw_only=True)
class ReadBlock:
    """One block of the model: what its sublayers are, and which module puts out each branch."""

    parts: tuple[SublayerReading, ...]
    exits: tuple[str, ...]
    epsilons: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ReadStack:
    """The blocks of one stack.

    Attributes:
        stack: The modules.
        blocks: What each computes.
        stream: The tokens in front of the first block, shape ``(batch, n_tokens, d_model)``.
        label: What a block of it is called in messages.
    """

    stack: Stack
    blocks: tuple[ReadBlock, ...]
    stream: Tensor
    label: str = "block"

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.stream.shape[-1])

    @property
    def spec(self) -> Transformer:
        """The transformer the blocks make, with the scales of their weights."""
        return spec_of([block.parts for block in self.blocks], self.d_model)

    @property
    def tolerance(self) -> float:
        """Relative error of residual factors read off tensors."""
        return max(1e-5, *(4 * torch.finfo(parameter.dtype).eps for parameter in self.stack.blocks[0].parameters()))

    @property
    def tokens(self) -> FirstTokens:
        """The moments of the tokens in front of the first block."""
        grams = gram_matrix(self.stream)
        n = grams.shape[-1]
        own = np.trace(grams, axis1=-2, axis2=-1)
        shared = (grams.sum(axis=(-2, -1)) - own) / max(n - 1, 1)
        return FirstTokens(n, float(own.mean()) / n, float(shared.mean()) / n)

    def own_factors(self) -> tuple[str, ...]:
        """Describe the residual factors other than one that the code of the blocks applies."""
        return tuple(
            f"{float(s.skip_scale):g} on the skip and {float(s.branch_scale):g} on the branch of {exit_name!r}"
            for block in self.blocks
            for s, exit_name in zip((part.sublayer for part in block.parts), block.exits, strict=True)
            if any(abs(float(factor) - 1) > self.tolerance for factor in (s.skip_scale, s.branch_scale))
        )


@dataclass(frozen=True, kw_only=True)
class ReadPair:
    """An encoder, the norm behind it, and the decoder that reads it."""

    encoder: ReadStack
    decoder: ReadStack
    memory_norm: Norm | None

    @property
    def spec(self) -> EncoderDecoder:
        """The two transformers, with the scales of their weights."""
        return EncoderDecoder(encoder=self.encoder.spec, decoder=self.decoder.spec, memory_norm=self.memory_norm)


@dataclass(frozen=True, kw_only=True)
class ModelInside:
    """What the blocks of a model compute.

    Attributes:
        names: Full names of the blocks.
        spec: The transformer they make, with the scales of their weights.
        tokens: What enters the first one.
        own_factors: Residual factors other than one that the model's code applies, in words.
    """

    names: tuple[str, ...]
    spec: Transformer
    tokens: FirstTokens
    own_factors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderInside:
    """What the blocks of an encoder-decoder compute.

    Attributes:
        encoder, decoder: Full names of the blocks.
        spec: The two transformers they make, with the scales of their weights.
        tokens, memory_tokens: What enters the first block of the decoder, and of the encoder.
        own_factors: Residual factors other than one that the model's code applies, in words.
    """

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    spec: EncoderDecoder
    tokens: FirstTokens
    memory_tokens: FirstTokens
    own_factors: tuple[str, ...]


def read_model(
    model: nn.Module, batch: Any, blocks: str | Sequence[nn.Module] | None = None
) -> ModelInside | EncoderDecoderInside:
    """Read the blocks of a model, one traced call each; the model is left as found.

    Args:
        model: A torch module with residual blocks.
        batch: What it can be called with.
        blocks: Path of the block container, or the blocks, where they are not found on their own; one stack is read
            then, as of a model that has only one.
    Raises:
        NotCoveredError: naming the block and what the theory has no map for.
        ModelError, BatchError: as :func:`fathometer.application.write_spec`.
    """
    return inside_of(read_blocks(model, as_batch(batch), blocks))


def read_blocks(
    model: nn.Module, batch: Batch, blocks: str | Sequence[nn.Module] | None = None
) -> ReadStack | ReadPair:
    """Return what the blocks of a model compute and where that is in it; arguments and errors as :func:`read_model`."""
    check_weights(model)
    with without_multipliers(model):
        pair = read_pair(model, batch) if blocks is None else None
        return read_stack(model, batch, blocks) if pair is None else pair


def inside_of(read: ReadStack | ReadPair) -> ModelInside | EncoderDecoderInside:
    """Return what was read as data."""
    if isinstance(read, ReadPair):
        return _inside(read)
    return ModelInside(names=read.stack.names, spec=read.spec, tokens=read.tokens, own_factors=read.own_factors())


def read_encoder_decoder(model: nn.Module, batch: Any) -> EncoderDecoderInside:
    """Read the encoder and the decoder of a model, one traced call of each block; the model is left as found.

    Args:
        model: A torch module with two stacks of residual blocks, one of which attends to the other's output, through
            one norm or none.
        batch: What it can be called with, so that both stacks run.
    Raises:
        NotCoveredError: for a model without such stacks, or naming the block and what the theory has no map for.
        ModelError, BatchError: as :func:`fathometer.application.write_spec`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Transformer(32, 2, 2, 3, 64, batch_first=True)
    >>> found = read_encoder_decoder(model, (torch.randn(1, 5, 32), torch.randn(1, 4, 32)))
    >>> found.spec.decoder.n_layers, found.decoder[0], [s.branch.kind for s in found.spec.decoder.blocks[0].sublayers]
    (3, 'decoder.layers.0', ['self_attention', 'cross_attention', 'mlp'])
    """
    check_weights(model)
    with without_multipliers(model):
        return _inside(expect_pair(read_pair(model, as_batch(batch))))


def expect_pair(pair: ReadPair | None) -> ReadPair:
    """Return the pair, or refuse a model without one."""
    if pair is None:
        raise NotCoveredError(
            "no stack of blocks attends to the output of another one in this forward pass; the batch must run the "
            "encoder too (no encoder_outputs), and both stacks need at least two blocks"
        )
    return pair


@contextmanager
def without_multipliers(model: nn.Module) -> Iterator[None]:
    """Let a model run without its residual multipliers for a while; the hooks stay where they are."""
    hooks = [hook for _, hook in multipliers_in(model) if not hook.muted]
    for hook in hooks:
        hook.muted = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.muted = False


def read_stack(model: nn.Module, batch: Batch, blocks: str | Sequence[nn.Module] | None) -> ReadStack:
    """Return what every block of a model's best, or named, stack computes.

    Every block is run on the stream in front of the first one: what a deep stack has made of it (overflow, branches
    lost in rounding) would only hide what the code does.
    """
    with untouched(model):
        with _running(batch):
            if blocks is not None:
                stack = named_stack(model, blocks)
            else:
                stack = find_stacks(model, lambda: batch.call(model))[0]
            calls, _ = record_calls(model, stack, batch, False, 0)
        return _read_blocks(stack, calls, "block", None)


def read_pair(model: nn.Module, batch: Batch) -> ReadPair | None:
    """Return what every block of an encoder and its decoder computes, or ``None`` for a model that has no such pair.

    The decoder's blocks attend to the memory of this batch.
    """
    with untouched(model):
        with _running(batch):
            joined = find_joined_stacks(model, lambda: batch.call(model))
            if joined is None:
                return None
            calls, _ = record_calls(model, joined.both, batch, False, 0)
        n = len(joined.encoder)
        if not _attends_to_memory(joined.decoder.blocks[0], calls[n]):
            return None
        where = joined.argument
        memory = calls[n].args[where] if isinstance(where, int) else calls[n].kwargs[where]
        encoder = _read_blocks(joined.encoder, calls[:n], "encoder block", None)
        decoder = _read_blocks(joined.decoder, calls[n:], "decoder block", memory)
    return ReadPair(encoder=encoder, decoder=decoder, memory_norm=joined.memory_norm())


def _attends_to_memory(block: nn.Module, call: BlockCall) -> bool:
    with torch.no_grad(), tracing(block) as trace:
        call.run(block, call.stream.clone())
    try:
        branches = split_branches(trace)
    except NotCoveredError as error:
        raise NotCoveredError(f"decoder block 0: {error}") from error
    return any(b.memory is not None or (b.attention is not None and b.attention.crossed) for b in branches)


def _inside(pair: ReadPair) -> EncoderDecoderInside:
    return EncoderDecoderInside(
        encoder=pair.encoder.stack.names,
        decoder=pair.decoder.stack.names,
        spec=pair.spec,
        tokens=pair.decoder.tokens,
        memory_tokens=pair.encoder.tokens,
        own_factors=(*pair.encoder.own_factors(), *pair.decoder.own_factors()),
    )


@contextmanager
def _running(batch: Batch) -> Iterator[None]:
    """Turn whatever goes wrong in the model's own code into an error about the batch."""
    try:
        yield
    except FathometerError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise BatchError(f"the model does not run on {batch.label}: {type(error).__name__}: {first_line}") from error


def _read_blocks(stack: Stack, calls: Sequence[BlockCall], label: str, memory: Tensor | None) -> ReadStack:
    stream = calls[0].stream
    if not bool(torch.isfinite(stream).all()):
        raise ModelError(f"the stream in front of {stack.names[0]!r} is NaN or infinite; check the embedding")
    tokens = stream.reshape(-1, stream.shape[-1])
    if float((tokens - tokens[0]).abs().max()) <= 1e-6 * float(tokens.abs().max()):
        raise BatchError(
            f"the tokens in front of {stack.names[0]!r} are all alike, so that nothing tells what the blocks do to "
            "different ones; give a batch with at least two different tokens"
        )
    read = []
    for layer, (name, block, call) in enumerate(zip(stack.names, stack.blocks, calls, strict=True)):
        entered = stream.clone()
        with torch.no_grad(), tracing(block) as trace:
            out = call.run(block, entered)
        try:
            parts = read_block(name, entered, out.detach(), trace, memory=memory)
            read.append(_located(name, parts, trace))
        except (NotCoveredError, SpecError) as error:
            raise NotCoveredError(f"{label} {layer}: {error}") from error
    arranged = first_layout(stack.blocks[0], calls[0]).arranged(stream)
    return ReadStack(stack=stack, blocks=tuple(read), stream=arranged, label=label)


def _located(name: str, parts: tuple[SublayerReading, ...], trace: Trace) -> ReadBlock:
    """Return a block's reading together with the module that puts out each branch."""
    exits, epsilons = [], []
    for branch, part in zip(split_branches(trace), parts, strict=True):
        check_order(branch, part.roles)
        # Behind a norm on the branch, else right at its last matrix: dropout and layer scale commute with a factor.
        exit_name = branch.exit.name if part.sublayer.output_norm is None else leaving(branch, trace)[3]
        module = next(call.module for call in trace.calls if call.name == exit_name)
        if sum(call.module is module for call in trace.calls) != 1:
            raise NotCoveredError(f"{exit_name!r} runs more than once in a block; no factor can be put behind it")
        exits.append(f"{name}.{exit_name}")
        norm = producer_of(branch.source, trace)
        eps = 0.0 if norm is None else next((getattr(norm.module, n) for n in _EPSILONS if hasattr(norm.module, n)), 0)
        power = 1.0 if norm is None else float(norm.before.square().mean())
        epsilons.append(float(eps or 0.0) / power if power else 0.0)
    return ReadBlock(parts=parts, exits=tuple(exits), epsilons=tuple(epsilons))
