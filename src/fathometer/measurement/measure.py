"""Measuring a real model: the theory's curves, seen, with standard errors over weight draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import BatchError, FathometerError, ModelError, NotCoveredError, SpecError
from fathometer.measurement.batches import Batch, as_batch
from fathometer.measurement.sounding import sound
from fathometer.measurement.statistics import average, gram_matrix
from fathometer.measurement.untouched import untouched
from fathometer.models.finding import Stack, find_stacks, named_stack
from fathometer.models.reading import ModelReading, check_weights, read_block, spec_of
from fathometer.models.redraw import redrawn
from fathometer.models.trace import Trace
from fathometer.models.weights import WeightSlice
from fathometer.results import Profile

FloatArray = NDArray[np.float64]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen, and what was read off the model on the way.

    Attributes:
        profile: Averages over weight draws, with standard errors.
        own: Curves of the model's own weights, before any redraw.
        draws: Curves of every weight draw, the first with the model's own weights.
        gram: Tokens' Gram matrix at the first block, shape ``(samples, n, n)``.
        stack: The measured blocks.
        reading: The spec and weight roles, or ``None`` where the theory has no map; then ``not_covered`` says why.
        not_covered: Reason, or ``None``.
        slices: Every weight that a redraw replaces.
        duplicates: Groups of layers whose weights are copies of each other.
        other_stacks: Labels of further runs of blocks in the model.
        notes: Remarks for the report.
    """

    profile: Profile
    own: Profile
    draws: tuple[dict[str, FloatArray], ...]
    gram: FloatArray
    stack: Stack
    reading: ModelReading | None
    not_covered: str | None
    slices: tuple[WeightSlice, ...]
    duplicates: tuple[tuple[int, ...], ...]
    other_stacks: tuple[str, ...]
    notes: tuple[str, ...]


def measure(
    model: nn.Module,
    batch: Any,
    *,
    draws: int = 1,
    seeds: int = 8,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    forward: bool = True,
    pooled: bool = True,
    progress: Report | None = None,
) -> Profile:
    """Measure activation and gradient statistics at every layer of a model.

    The first draw uses the model's own weights; the others redraw every block matrix as an independent Gaussian of
    the same mean square (embeddings stay), because theory predicts averages over weights and their scatter dominates
    the error. The model is left untouched: weights, gradients, hooks, modes and random states, also after an exception.

    Args:
        model: Any torch module with residual blocks.
        batch: A tensor, a tuple or dict of tensors, or a :class:`Batch`.
        draws: Random output gradients per weight draw; one is near-optimal.
        seeds: Weight draws. One gives no standard errors.
        seed: Seed of everything random here.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
        forward: Whether to measure the forward APJN (needs forward-mode differentiable operations).
        pooled: Whether to measure the gradient amplification of a mean-pooled loss.
        progress: Called with (label, done, total).
    Returns:
        Curves over layers with standard errors, ``source="measurement"``.
    Raises:
        ModelError, BatchError: in one sentence, before anything was changed.
    """
    found = observe(
        model,
        batch,
        draws=draws,
        seeds=seeds,
        seed=seed,
        blocks=blocks,
        forward=forward,
        pooled=pooled,
        progress=progress,
    )
    return found.profile


def observe(
    model: nn.Module,
    batch: Any,
    *,
    draws: int = 1,
    seeds: int = 8,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    forward: bool = True,
    pooled: bool = True,
    progress: Report | None = None,
) -> Measurement:
    """Do the work of :func:`measure` and return everything that was seen and read."""
    check_count("draws", draws)
    check_count("seeds", seeds)
    ready = as_batch(batch)
    check_weights(model)
    with untouched(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested_tensor.*")
        stacks = _stacks(model, ready, blocks)
        stack = stacks[0]
        readings: dict[int, Any] = {}
        shapes: dict[str, int] = {}

        def inspect(layer: int, before: Tensor, after: Tensor, trace: Trace) -> None:
            shapes["d_model"] = before.shape[-1]
            try:
                readings[layer] = read_block(stack.names[layer], before, after, trace)
            except NotCoveredError as error:
                readings[layer] = error
            except SpecError as error:
                readings[layer] = NotCoveredError(str(error))

        def report(draw: int) -> Callable[[int], None] | None:
            if progress is None:
                return None
            label, total = f"weight draw {draw + 1}/{seeds}", 2 * len(stack)
            return lambda done: progress(label, done, total)

        options: dict[str, Any] = {"draws": draws, "forward": forward, "pooled": pooled}
        first = sound(model, stack, ready, seed=seed, progress=report(0), check_state=True, inspect=inspect, **options)
        reading, reason = _reading(readings, shapes["d_model"])
        scales = None if reading is None else [[part.added_scale for part in layer] for layer in reading.layers]
        if scales is not None:
            first.curves.update(_rescaled_added(first.curves, scales, reading))
        soundings = [first]
        slices = _redrawable(model, stack, reading)
        duplicates = _duplicates(stack)
        for draw in range(1, seeds):
            with redrawn(model, slices, seed + draw, tied=bool(duplicates)):
                soundings.append(
                    sound(model, stack, ready, seed=seed + draw, progress=report(draw), added_scales=scales, **options)
                )
    curves, errors = average([s.curves for s in soundings])
    about = {
        "n_tokens": int(first.first_stream.shape[-2]),
        "samples": int(first.first_stream.shape[0]),
        "d_model": shapes["d_model"],
        "weight_draws": seeds,
        "cotangents": draws,
        "seed": seed,
        "batch": ready.label,
        "blocks": stack.label,
    }
    return Measurement(
        profile=Profile(source="measurement", curves=curves, errors=errors, about=about),
        own=Profile(source="measurement", curves=first.curves, about=about),
        draws=tuple(s.curves for s in soundings),
        gram=gram_matrix(first.first_stream),
        stack=stack,
        reading=reading,
        not_covered=reason,
        slices=tuple(slices),
        duplicates=duplicates,
        other_stacks=tuple(s.label for s in stacks[1:]),
        notes=tuple(dict.fromkeys([*(note for s in soundings for note in s.notes), *_own_notes(soundings)])),
    )


def check_count(name: str, value: Any) -> None:
    """Refuse what is no number of draws."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{name} must be a positive integer; got {value!r}")


def _stacks(model: nn.Module, batch: Batch, blocks: str | Sequence[nn.Module] | None) -> list[Stack]:
    try:
        if blocks is not None:
            with torch.no_grad():
                batch.call(model)
            return [named_stack(model, blocks)]
        return find_stacks(model, lambda: batch.call(model))
    except FathometerError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise BatchError(f"the model does not run on {batch.label}: {type(error).__name__}: {first_line}") from error


def _reading(readings: dict[int, Any], d_model: int) -> tuple[ModelReading | None, str | None]:
    for layer in sorted(readings):
        if isinstance(readings[layer], NotCoveredError):
            return None, f"block {layer}: {readings[layer].reason}"
    layers = tuple(readings[layer] for layer in sorted(readings))
    return ModelReading(spec=spec_of(layers, d_model), layers=layers), None


def _rescaled_added(curves: dict[str, FloatArray], scales: list[list[float]], reading: Any) -> dict[str, FloatArray]:
    """Apply residual factors, known only after reading, to the branch curves of the first draw."""
    out = {}
    for name, wanted in (("attention_added_q", True), ("mlp_added_q", False)):
        if name in curves:
            factors = [
                [scale for scale, part in zip(row, layer, strict=True) if part.sublayer.is_attention == wanted]
                for row, layer in zip(scales, reading.layers, strict=True)
            ]
            if all(len(row) == 1 for row in factors):
                out[name] = curves[name] * np.array([row[0] ** 2 for row in factors])
    return out


def _own_notes(soundings: list[Any]) -> list[str]:
    """Say so where the model's own weights do not behave like random ones of the same size."""
    if len(soundings) < 2:
        return []
    own, redraws = soundings[0].curves, [s.curves for s in soundings[1:]]
    for name in ("apjn_log", "q"):
        logs = [c[name] if name.endswith("_log") else np.log(c[name]) for c in (own, *redraws)]
        scatter = max(float(np.max(np.std(logs[1:], axis=0))) if len(logs) > 2 else 0.0, 0.1)
        if float(np.max(np.abs(logs[0] - np.mean(logs[1:], axis=0)))) > 7 * scatter:
            return [
                "the model's own weights do not behave like independent random weights of the same size (trained, or "
                "drawn in a special way): the verdict is theirs, averaged curves and theory describe random ones"
            ]
    return []


def _redrawable(model: nn.Module, stack: Stack, reading: ModelReading | None) -> list[WeightSlice]:
    """Return every weight slice of the blocks: by role where roles are known, else whole matrices."""
    known = [] if reading is None else [s for layer in reading.layers for part in layer for s in part.roles.values()]
    taken = {s.parameter for s in known}
    slices = list(known)
    for name, block in zip(stack.names, stack.blocks, strict=True):
        for suffix, parameter in block.named_parameters():
            full = f"{name}.{suffix}"
            if parameter.ndim >= 2 and full not in taken:
                slices.append(WeightSlice(parameter=full, axis=0, start=0, stop=len(parameter), size=len(parameter)))
    return slices


def _duplicates(stack: Stack) -> tuple[tuple[int, ...], ...]:
    """Return groups of layers whose weight matrices are equal, entry by entry.

    Layers are first told apart by the shapes and first entries of their matrices; only those that agree are compared
    in full.
    """
    alike: dict[tuple[Any, ...], list[list[int]]] = {}
    matrices = [[p.detach() for p in block.parameters() if p.ndim >= 2] for block in stack.blocks]
    for layer, weights in enumerate(matrices):
        key = tuple((tuple(w.shape), float(w.flatten()[0])) for w in weights)
        groups = alike.setdefault(key, [])
        for group in groups:
            if all(torch.equal(a, b) for a, b in zip(weights, matrices[group[0]], strict=True)):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return tuple(tuple(group) for groups in alike.values() for group in groups if len(group) > 1)
