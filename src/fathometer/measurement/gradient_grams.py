r"""Inner products of the gradients of many outputs, by group of parameters, without a Jacobian.

Every output is differentiated by one reverse pass. A weight that the model used once, in a linear map of S positions
(all samples and tokens), need not have its gradient formed: with inputs :math:`x_s` and the output's gradients
:math:`g_s` at that map,

.. math:: \frac{\partial f_a}{\partial W} = \sum_s g_{a,s}\, x_s^\top, \qquad
          \Bigl\langle \frac{\partial f_a}{\partial W}, \frac{\partial f_b}{\partial W} \Bigr\rangle
          = \sum_{s,s'} (x_s \cdot x_{s'})\,(g_{a,s} \cdot g_{b,s'}),

so only the ``(S, S)`` inner products of the inputs and the ``(S, fan_out)`` gradients at the output are kept. This is
exact, and cheaper than the gradient wherever S is at most the fan-in; elsewhere, and for every parameter used in any
other way or more than once (tied ones), the gradient itself is kept.

Inner products add up over the entries of a gradient, so a large model is worked off in segments of columns, each with
its own reverse passes: memory is bounded whatever the number of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError
from fathometer.measurement.grouping import GroupEntry
from fathometer.measurement.linear_uses import LinearUse, ParameterWatch, wide
from fathometer.measurement.untouched import trainable

_RUN = 4096  # columns summed in the gradient's own precision; runs are added in float64


def gradient_grams(
    model: nn.Module,
    run: Callable[[], Tensor],
    directions: Callable[[int], Tensor],
    entries: Sequence[GroupEntry],
    *,
    memory: float,
) -> dict[str, Tensor]:
    """Return the inner products of output gradients for every group of parameters.

    Args:
        model: The model; the caller keeps its modes and random states.
        run: Runs the model once and returns its outputs as rows, shape ``(n_rows, n_out)``.
        directions: Given ``n_out``, returns combinations of the components to differentiate, shape
            ``(n_sets, n_directions, n_out)``; inner products are taken within each set.
        entries: Which parameters belong to which group.
        memory: What may be kept at a time, in units of one gradient of all parameters.
    Returns:
        By group, float64, shape ``(n_sets, P, P)`` with P = n_rows * n_directions, rows first. Cost of a set: for each
        segment P reverse passes, which form no gradient of the weights used once; one segment does where
        ``P * sum(S * fan_out)`` fits ``memory`` gradients. And ``P S (P + S) fan_out`` products per weight. Memory of
        the model's graph, of ``memory`` gradients, and of at most one more while it is reduced.
    Raises:
        ModelError: if no gradient flows from the outputs to any parameter.
    """
    parameters = dict(model.named_parameters())
    uses = ParameterWatch({id(parameter): name for name, parameter in parameters.items()})
    with trainable(parameters.values()), torch.enable_grad():
        with uses:
            outputs = run()
        if not outputs.requires_grad:
            raise ModelError("no gradient flows from the output to the parameters; does the model detach it?")
        sets = directions(outputs.shape[1]).to(outputs)
        n_passes = len(outputs) * sets.shape[1]
        grams = {entry.group: torch.zeros(len(sets), n_passes, n_passes, dtype=torch.float64) for entry in entries}
        order = {name: i for i, name in enumerate(uses.counts)}
        sources = [
            _Source(entry, parameters[entry.parameter], uses.single(entry.parameter))
            for entry in sorted(entries, key=lambda e: order.get(e.parameter, len(order)))  # neighbours in one segment
        ]
        allowance = memory * sum(parameter.numel() for parameter in parameters.values()) / n_passes
        segments = _segments(sources, allowance)
        for i, combinations in enumerate(sets):
            for segment in segments:
                for source, gram in _segment_grams(segment, outputs, combinations):
                    grams[source.entry.group][i] += gram
    return grams


class _Source:
    """What is kept of one output's gradient for one entry of the table of groups: columns of a fixed height."""

    def __init__(self, entry: GroupEntry, parameter: Tensor, use: LinearUse | None) -> None:
        fits = use is not None and (entry.part is None or entry.part.axis == use.axis)
        self.entry = entry
        self._use = use if fits else None
        self.target: Any = parameter if self._use is None else self._use.edge
        self.dtype, self.device = wide(parameter.dtype), parameter.device
        if self._use is None:
            self.height = 1
            self.columns = (parameter if entry.part is None else entry.part.of(parameter)).numel()
        else:
            self.height = len(self._use.gram)
            size = parameter.shape[self._use.axis]
            self.columns = size if entry.part is None else entry.part.stop - entry.part.start

    def kept(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        """Return columns of a gradient at the target, shape ``(height, stop - start)``."""
        part = self.entry.part
        if self._use is None:
            return (gradient if part is None else part.of(gradient)).reshape(1, -1)[:, start:stop]
        first = start if part is None else start + part.start
        return self._use.arranged(gradient)[:, first : first + stop - start]

    def gram(self, rows: Tensor) -> Tensor:
        """Return the inner products of kept columns, shape ``(n_passes, height, n_columns)``; float64 on the CPU."""
        mixed = rows if self._use is None else self._use.gram @ rows
        pairs = zip(torch.split(rows.flatten(1), _RUN, 1), torch.split(mixed.flatten(1), _RUN, 1), strict=True)
        return torch.stack([one @ other.mT for one, other in pairs]).cpu().double().sum(dim=0)


@dataclass(frozen=True)
class _Piece:
    """A range of the columns of a source."""

    source: _Source
    start: int
    stop: int


def _segments(sources: Sequence[_Source], allowance: float) -> list[list[_Piece]]:
    """Cut the columns of all sources, in order, into runs that hold at most ``allowance`` numbers for each output."""
    segments: list[list[_Piece]] = [[]]
    room = allowance
    for source in sources:
        start = 0
        while start < source.columns:
            fit = min(source.columns - start, int(room // source.height))
            if fit < 1 and segments[-1]:
                segments.append([])
                room = allowance
                continue
            fit = max(fit, 1)
            segments[-1].append(_Piece(source, start, start + fit))
            room -= fit * source.height
            start += fit
    return [segment for segment in segments if segment]


def _segment_grams(segment: Sequence[_Piece], outputs: Tensor, directions: Tensor) -> Iterator[tuple[_Source, Tensor]]:
    """Run one reverse pass per row and direction, keep the columns of the segment, and yield their inner products."""
    n_passes = len(outputs) * len(directions)
    kept = [
        torch.zeros(
            n_passes,
            piece.source.height,
            piece.stop - piece.start,
            dtype=piece.source.dtype,
            device=piece.source.device,
        )
        for piece in segment
    ]
    targets = [piece.source.target for piece in segment]
    for index in range(n_passes):
        row, direction = divmod(index, len(directions))
        cotangent = torch.zeros_like(outputs)
        cotangent[row] = directions[direction]
        gradients = torch.autograd.grad(outputs, targets, cotangent, retain_graph=True, allow_unused=True)
        for piece, gradient, store in zip(segment, gradients, kept, strict=True):
            if gradient is not None:
                store[index] = piece.source.kept(gradient, piece.start, piece.stop)
    for piece, store in zip(segment, kept, strict=True):
        yield piece.source, piece.source.gram(store)
