r"""The tangent kernel of a real model, by group of parameters.

.. math:: H_{(a i)(b j)} = \sum_{\mu \in G} \lambda_G\,
          \frac{\partial f_{a,i}}{\partial \theta_\mu} \frac{\partial f_{b,j}}{\partial \theta_\mu},
          \qquad \Theta_{ab} = \frac{1}{n_\mathrm{out}} \sum_i H_{(a i)(b i)},

with a, b positions (sample and token), i, j output components, and :math:`\lambda_G` the factor on the group's learning
rate. Where there are many components, random combinations of them estimate the second without bias: for signs
:math:`r_i = \pm 1`, the gradients of :math:`\sum_i r_i f_{a,i}/\sqrt{n_\mathrm{out}}` have inner products of mean
:math:`\Theta_{ab}`, since :math:`E\, r_i r_j = \delta_{ij}`.

Source: the kernel by group, Dinan, Yaida and Zhang, arXiv:2304.02034v1, Eqs. 1.90 and 1.117; gradients of linear maps
as sums over positions, see :mod:`fathometer.measurement.gradient_grams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import BatchError, DomainError, ModelError, nearest
from fathometer.measurement.batches import Batch, as_batch
from fathometer.measurement.gradient_grams import gradient_grams
from fathometer.measurement.grouping import GroupEntry, group_entries
from fathometer.measurement.measure import Report, check_count
from fathometer.measurement.untouched import untouched
from fathometer.models.reading import check_weights
from fathometer.models.redraw import redrawn
from fathometer.models.roles import ParameterRole, parameter_roles
from fathometer.models.seeding import named_generator
from fathometer.models.trace import first_tensor
from fathometer.models.weights import WeightSlice

FloatArray = NDArray[np.float64]
Groups = Mapping[str | WeightSlice, str]
Build = Callable[[int], nn.Module]
Read = Callable[[Any], Tensor]

_MOST_PASSES = 20_000  # for one network; more is a vocabulary left in by accident


@dataclass(frozen=True, kw_only=True)
class MeasuredTangentKernel:
    """Tangent kernels by group of parameters, averaged over weight draws.

    Attributes:
        kernels: Mean over output components, shape ``(n_positions, n_positions)``.
        errors: Standard errors of ``kernels``; NaN where there is nothing to take them from.
        draws: The estimates behind both, shape ``(n_draws, n_positions, n_positions)``.
        drawn: What tells these apart: ``"weight draws"``, or ``"sketches"`` for several sketches of one network.
        matrices: Every pair of output components, shape ``(n_positions, n_components, n_positions, n_components)``,
            mean over weight draws; empty where components were sketched.
        positions: Sample and token of every position, shape ``(n_positions, 2)``.
        lr_factors: The factor of every group.
        notes: Remarks, such as parameters that are tied.
    """

    kernels: Mapping[str, FloatArray]
    errors: Mapping[str, FloatArray]
    draws: Mapping[str, FloatArray]
    drawn: str
    matrices: Mapping[str, FloatArray]
    positions: NDArray[np.int64]
    lr_factors: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, tuple[float, float]]:
        """Mean over positions of the diagonal, and its standard error, by group."""
        diagonals = {group: np.einsum("daa->d", draws) / draws.shape[-1] for group, draws in self.draws.items()}
        averages = {group: mean_and_error(values) for group, values in diagonals.items()}
        return {group: (float(mean), float(error)) for group, (mean, error) in averages.items()}


def measure_tangent_kernel(
    model: nn.Module | Build,
    batch: Any,
    *,
    groups: Groups | Sequence[ParameterRole] | None = None,
    lr_factors: Mapping[str, float] | None = None,
    read: Read | None = None,
    components: int | Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    sketches: int = 0,
    seeds: int = 1,
    seed: int = 0,
    memory: float = 2.0,
    progress: Report | None = None,
) -> MeasuredTangentKernel:
    """Measure the tangent kernel of a model by group of parameters.

    Of a model, the first weight draw uses its own weights; the others redraw every matrix with the mean square it has,
    embeddings included. Of a factory, every draw is a model of its own. The gradient of a tied parameter is the sum
    over all its uses, and belongs to one group. The model is left untouched.

    Args:
        model: Any torch module, or a function ``build(seed)`` that returns one.
        batch: What to call it with.
        groups: Group of every trainable parameter, by name, or by :class:`fathometer.models.WeightSlice` where several
            are fused into one; or what :func:`fathometer.models.roles.parameter_roles` returns, which is the default.
        lr_factors: Factor of every group; by default 1.
        read: Picks the outputs, shape ``(batch, n_out)`` or ``(batch, n_tokens, n_out)``, from what the model returns;
            by default its first floating-point tensor.
        components: How many output components, or which ones; by default all.
        tokens: Which tokens; by default all.
        sketches: Number of random combinations of components to use in place of each of them; 0 for none.
        seeds: Weight draws.
        seed: Seed of everything random here.
        memory: What may be kept of gradients at a time, in units of one gradient of all parameters.
        progress: Called with (label, done, total).
    Returns:
        The kernels. Cost: per weight draw one forward and one reverse pass per position and component (per position and
        sketch), more where ``memory`` is short, see :func:`fathometer.measurement.gradient_grams.gradient_grams`.
    Raises:
        ModelError: for a parameter in no group or in two, outputs of another shape or not finite.
        DomainError: for factors or numbers out of range.
        BatchError: if the model does not run on the batch.
    """
    check_count("seeds", seeds)
    if isinstance(sketches, bool) or not isinstance(sketches, int) or sketches < 0:
        raise DomainError(f"sketches must be an integer of at least 0; got {sketches!r}", value=sketches)
    if not (np.isfinite(memory) and memory > 0):
        raise DomainError(f"memory must be positive and finite; got {memory}", value=memory)
    outputs = _Outputs(as_batch(batch), read, components, tokens)
    factors: dict[str, float] = {}
    draws: dict[str, list[FloatArray]] = {}
    matrices: dict[str, list[FloatArray]] = {}
    notes: tuple[str, ...] = ()
    current = _built(model, seed)
    table = _table(current, outputs.batch, groups)
    for draw in range(seeds):
        if draw > 0:
            current = _built(model, seed + draw)
        entries = group_entries(current, table)
        factors = _factors({entry.group for entry in entries}, lr_factors)
        notes = _tied_notes(current)
        fresh = _matrices(current, entries) if draw > 0 and current is model else []
        with untouched(current), redrawn(current, fresh, seed + draw):
            grams = _grams(current, outputs, entries, sketches, seed + draw, memory)
        for group, factor in factors.items():
            gram = factor * grams[group].numpy()
            if sketches:
                draws.setdefault(group, []).extend(gram if seeds == 1 else [gram.mean(axis=0)])
                continue
            n = len(outputs.positions)
            matrix = gram.reshape(n, gram.shape[-1] // n, n, gram.shape[-1] // n)
            matrices.setdefault(group, []).append(matrix)
            draws.setdefault(group, []).append(np.einsum("aibi->ab", matrix) / matrix.shape[1])
        if progress is not None:
            progress("weight draws", draw + 1, seeds)
    stacked = {group: np.stack(kernels) for group, kernels in draws.items()}
    averages = {group: mean_and_error(kernels) for group, kernels in stacked.items()}
    return MeasuredTangentKernel(
        kernels={group: mean for group, (mean, _) in averages.items()},
        errors={group: error for group, (_, error) in averages.items()},
        draws=stacked,
        drawn="sketches" if sketches and seeds == 1 else "weight draws",
        matrices={group: np.mean(found, axis=0) for group, found in matrices.items()},
        positions=outputs.positions,
        lr_factors=factors,
        notes=notes,
    )


def mean_and_error(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the mean over the first axis and its standard error, NaN for a single entry."""
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, np.full(mean.shape, np.nan)
    return mean, values.std(axis=0, ddof=1) / np.sqrt(len(values))


class _Outputs:
    """Runs a model and arranges what it returns as rows, one a position.

    Attributes:
        batch: What the model is called with.
        positions: Sample and token of every row; known after the first run.
    """

    def __init__(
        self, batch: Batch, read: Read | None, components: int | Sequence[int] | None, tokens: Sequence[int] | None
    ) -> None:
        self.batch, self._read, self._components, self._tokens = batch, read, components, tokens
        self.positions = np.zeros((0, 2), dtype=np.int64)

    def rows(self, model: nn.Module) -> Tensor:
        """Return outputs of shape ``(n_positions, n_components)``."""
        try:
            raw = self.batch.call(model)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise BatchError(
                f"the model does not run on {self.batch.label}: {type(error).__name__}: {reason}"
            ) from error
        out = first_tensor(_values(raw), {}) if self._read is None else self._read(raw)
        if not isinstance(out, Tensor) or out.ndim not in (2, 3) or 0 in out.shape:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ModelError(
                f"outputs must have shape (batch, n_out) or (batch, n_tokens, n_out); got {shape}. Pass read="
            )
        if not bool(torch.isfinite(out).all()):
            raise ModelError("the outputs hold NaN or infinity")
        out = out if out.ndim == 3 else out[:, None]
        tokens = _chosen("tokens", self._tokens, out.shape[1])
        components = _chosen("components", self._components, out.shape[2])
        self.positions = np.array([(sample, token) for sample in range(len(out)) for token in tokens], dtype=np.int64)
        chosen: Tensor = out[:, tokens][:, :, components].flatten(0, 1)
        return chosen


def _values(raw: Any) -> tuple[Any, ...]:
    return tuple(raw.values()) if isinstance(raw, Mapping) else (raw,)


def _chosen(name: str, wanted: int | Sequence[int] | None, size: int) -> list[int]:
    """Return indices along an axis: all, the first few, or those given."""
    if isinstance(wanted, int):
        if not 1 <= wanted <= size:
            raise DomainError(f"{name} must lie in [1, {size}]; got {wanted}", value=wanted)
        return list(range(wanted))
    chosen = list(range(size)) if wanted is None else list(wanted)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= index < size for index in chosen):
        raise DomainError(f"{name} must be different indices in [0, {size - 1}]; got {chosen}", value=chosen)
    return chosen


def _built(model: nn.Module | Build, seed: int) -> nn.Module:
    built = model if isinstance(model, nn.Module) else model(seed)
    if not isinstance(built, nn.Module):
        raise ModelError(f"build(seed) must return a torch.nn.Module; got {type(built).__name__}")
    check_weights(built)
    return built


def _table(model: nn.Module, batch: Batch, groups: Groups | Sequence[ParameterRole] | None) -> Groups:
    if isinstance(groups, Mapping):
        return groups
    with untouched(model):
        rows = parameter_roles(model, batch) if groups is None else groups
    return {row.part or row.parameter: row.role for row in rows}


def _matrices(model: nn.Module, entries: Sequence[GroupEntry]) -> list[WeightSlice]:
    """Return every entry of the table of groups that is no vector."""
    sizes = {name: len(parameter) for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    return [
        entry.part
        or WeightSlice(
            parameter=entry.parameter, axis=0, start=0, stop=sizes[entry.parameter], size=sizes[entry.parameter]
        )
        for entry in entries
        if entry.parameter in sizes
    ]


def _grams(
    model: nn.Module, outputs: _Outputs, entries: Sequence[GroupEntry], sketches: int, seed: int, memory: float
) -> dict[str, Tensor]:
    """Return inner products by group, for every pair of position and component or for every sketch."""

    def directions(n_out: int) -> Tensor:
        n_positions = len(outputs.positions)
        if n_positions * (sketches or n_out) > _MOST_PASSES:
            raise ModelError(
                f"{n_positions} positions with {sketches or n_out} {'sketches' if sketches else 'components'} need "
                f"{n_positions * (sketches or n_out)} reverse passes; at most {_MOST_PASSES} are run. "
                "Pick some by tokens= and components=, or use sketches="
            )
        if not sketches:
            return torch.eye(n_out, dtype=torch.float64)[None]
        generator = named_generator(seed, "sketch")
        signs = 2 * torch.randint(2, (sketches, 1, n_out), generator=generator).double() - 1
        return torch.div(signs, n_out**0.5)

    return gradient_grams(model, lambda: outputs.rows(model), directions, entries, memory=memory)


def _factors(groups: set[str], lr_factors: Mapping[str, float] | None) -> dict[str, float]:
    if lr_factors is None:
        return dict.fromkeys(sorted(groups), 1.0)
    for group, factor in lr_factors.items():
        if group not in groups:
            raise ModelError(f"lr_factors names a group that is none: {group!r}{nearest(group, groups)}")
        if not (np.isfinite(factor) and factor > 0):
            raise DomainError(f"the factor of {group!r} must be positive and finite; got {factor}", value=factor)
    missing = sorted(groups - set(lr_factors))
    if missing:
        raise ModelError(f"lr_factors has no factor for: {', '.join(map(repr, missing))}")
    return {group: float(lr_factors[group]) for group in sorted(groups)}


def _tied_notes(model: nn.Module) -> tuple[str, ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(
        f"{' = '.join(alias)} is one parameter: its gradient is the sum over its uses"
        for alias in names.values()
        if len(alias) > 1
    )
