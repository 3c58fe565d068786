r"""How large the gradients of every weight matrix of a real model are, layer by layer.

Noise at the output is carried back block by block. Each block is run again from its kept input with gradients on, and
one reverse pass gives the gradient of its weights together with the one that goes on to the block before:

.. math:: \frac{n d}{\sum_a |g^L_a|^2}\, \Bigl| \frac{\partial}{\partial W} \sum_a g^L_a \cdot x^L_a \Bigr|_F^2 .

Source: the quantity, Giorlandino and Goldt, arXiv:2505.24333.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import ModelError, NotCoveredError, SpecError, nearest
from fathometer.measurement.batches import as_batch
from fathometer.measurement.layout import Layout
from fathometer.measurement.measure import Report, check_count, observe
from fathometer.measurement.sounding import BlockCall, first_layout, record_calls
from fathometer.measurement.untouched import trainable, untouched
from fathometer.models.finding import Stack
from fathometer.models.reading import SublayerReading
from fathometer.models.redraw import redrawn
from fathometer.models.seeding import named_generator

FloatArray = NDArray[np.float64]

READOUTS = ("isotropic", "pooled")


@dataclass(frozen=True, kw_only=True)
class MeasuredWeightGradients:
    """Squared Frobenius norms of weight gradients, as natural logarithms, per sample.

    They belong to output gradients of mean square one per coordinate, as in
    :class:`fathometer.observables.WeightGradients`.

    Attributes:
        logs: Logarithm of the mean over weight draws; by role, input first, each of shape ``(n_with_role,)``.
        errors: Its standard error over weight draws; NaN for one draw.
        draws: Logarithm of every draw, each of shape ``(n_draws, n_with_role)``.
        layers: Block of every entry.
        n_tokens: Number of tokens.
        readout: ``"isotropic"`` or ``"pooled"``.
    """

    logs: Mapping[str, FloatArray]
    errors: Mapping[str, FloatArray]
    draws: Mapping[str, FloatArray]
    layers: Mapping[str, NDArray[np.int64]]
    n_tokens: int
    readout: str


def measure_weight_gradients(
    model: nn.Module,
    batch: Any,
    *,
    seeds: int = 8,
    seed: int = 0,
    readout: str = "isotropic",
    blocks: str | Sequence[nn.Module] | None = None,
    progress: Report | None = None,
) -> MeasuredWeightGradients:
    """Measure the squared gradient norms of the weight matrices of every block.

    The first draw uses the model's own weights, the others redraw every block matrix. The model is left untouched, the
    ``grad`` of its parameters included.

    Args:
        model: Any torch module with residual blocks that can be read into a spec.
        batch: What to call it with.
        seeds: Weight draws.
        seed: Seed of everything random here.
        readout: ``"isotropic"`` noise at the output, or one random vector for all tokens of a sample, ``"pooled"``.
        blocks: As in :func:`fathometer.measure`.
        progress: Called with (label, done, total).
    Returns:
        The norms. Cost: per draw one forward of the model, and a forward and a full backward of every block; memory of
        block inputs plus the graph and weight gradients of one block.
    Raises:
        SpecError: for an unknown read-out.
        NotCoveredError: for a model whose weights have no known roles.
        ModelError, BatchError: as :func:`fathometer.measure`.
    """
    if readout not in READOUTS:
        raise SpecError(f"there is no read-out {readout!r}{nearest(readout, READOUTS)}")
    check_count("seeds", seeds)
    ready = as_batch(batch)
    found = observe(model, ready, seeds=1, seed=seed, blocks=blocks, forward=False, pooled=False)
    if found.reading is None:
        raise NotCoveredError(found.not_covered or "the roles of the weights are not known")
    rows: dict[str, list[list[float]]] = {}
    layers: dict[str, list[int]] = {}
    with untouched(model):
        for draw in range(seeds):
            with redrawn(model, [] if draw == 0 else found.slices, seed + draw, tied=bool(found.duplicates)):
                calls, _ = record_calls(model, found.stack, ready, False, seed + draw)
                layout = first_layout(found.stack.blocks[0], calls[0])
                output = calls[-1].output
                assert output is not None
                cotangent = _cotangent(output, layout, seed + draw, readout)
                parts = _norms(model, found.stack, calls, found.reading.layers, layout, cotangent)
            for role, (where, logs) in parts.items():
                layers[role] = where
                rows.setdefault(role, []).append(logs)
            if progress is not None:
                progress("weight draws", draw + 1, seeds)
    draws = {role: np.array(logs) for role, logs in rows.items()}
    averages = {role: _mean_log(logs) for role, logs in draws.items()}
    return MeasuredWeightGradients(
        logs={role: mean for role, (mean, _) in averages.items()},
        errors={role: error for role, (_, error) in averages.items()},
        draws=draws,
        layers={role: np.array(where) for role, where in layers.items()},
        n_tokens=found.gram.shape[-1],
        readout=readout,
    )


def _norms(
    model: nn.Module,
    stack: Stack,
    calls: Sequence[BlockCall],
    readings: Sequence[tuple[SublayerReading, ...]],
    layout: Layout,
    cotangent: Tensor,
) -> dict[str, tuple[list[int], list[float]]]:
    """Return blocks and logarithms by role, input first, for one draw of the weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unit = _square(cotangent)
    log_scale = float(np.log(layout.arranged(cotangent)[0].numel() / unit))
    found: dict[str, tuple[list[int], list[float]]] = {}
    for layer in range(len(stack) - 1, -1, -1):
        slices = [(role, part) for reading in readings[layer] for role, part in reading.roles.items()]
        weights = {part.parameter: parameters[part.parameter] for _, part in slices}
        leaf = calls[layer].stream.detach().requires_grad_()
        with trainable(weights.values()), torch.enable_grad():
            out = calls[layer].run(stack.blocks[layer], leaf.clone())
            onward, *gradients = _pull_back(stack.names[layer], out, [leaf, *weights.values()], cotangent)
        by_name = dict(zip(weights, gradients, strict=True))
        for role, part in reversed(slices):
            where, logs = found.setdefault(role, ([], []))
            with np.errstate(divide="ignore"):
                logs.append(float(np.log(_square(part.of(by_name[part.parameter]))) + log_scale))
            where.append(layer)
        size = _square(onward)
        if not (np.isfinite(size) and size > 0):
            raise ModelError(f"the gradient at {stack.names[layer]!r} vanishes or overflows; it cannot be carried on")
        log_scale += float(np.log(size / unit))
        cotangent = onward * (unit / size) ** 0.5
    return {role: (where[::-1], logs[::-1]) for role, (where, logs) in found.items()}


def _pull_back(name: str, out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(out, leaves, cotangent)
    except RuntimeError as error:
        raise ModelError(f"no gradient flows back through block {name!r}: {str(error).splitlines()[0]}") from error


def _cotangent(output: Tensor, layout: Layout, seed: int, readout: str) -> Tensor:
    shape = layout.shared_shape(output) if readout == "pooled" else tuple(output.shape)
    noise = torch.randn(shape, generator=named_generator(seed, "cotangent")).to(output)
    return noise.expand_as(output).contiguous()


def _square(x: Tensor) -> float:
    return float(x.detach().square().sum(dtype=torch.float64))


def _mean_log(logs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the logarithm of the mean over the first axis, and its standard error."""
    top = np.maximum(logs.max(axis=0), np.finfo(np.float64).min)  # finite also where every gradient vanishes
    plain = np.exp(logs - top)
    mean = plain.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(logs) == 1:
            return np.log(mean) + top, np.full(mean.shape, np.nan)
        return np.log(mean) + top, plain.std(axis=0, ddof=1) / np.sqrt(len(logs)) / mean
