r"""Exponents of a real network, from estimators with little noise.

All of them start from equal tokens, x_a = u, so that nothing of the tokens' scatter enters.

* **Token exponent**: the output gradient sums to zero over the late half of the tokens and is zero on the others; on
  the way back only the part that does so is kept. For tokens that see one another alike this part is carried by the
  network exactly; under causal masks it leaks at order ``1/n_tokens``. By duality its growth is also that of the angle
  between nearly equal tokens, with far less scatter than a pair of perturbed tokens shows.
* **Coherent exponent**: the output gradient is one vector for all tokens; on the way back its mean over tokens is kept,
  which attention preserves whatever its mask, because its rows sum to one.
* **Angle exponent**: tokens leave ``u`` by a part 1e-6 of their square, and the growth of 1 - cosine is read off
  centred unit vectors. Needs float64.
* **Gradient exponent**: isotropic output gradient at the batch's own tokens, ``ln(J_0/J_L)/L``.

Source: the quantities, Cowsik et al., arXiv:2403.02579; the projections are derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathometer.errors import DomainError, ModelError
from fathometer.measurement.batches import as_batch
from fathometer.measurement.layout import Layout
from fathometer.measurement.measure import Report, check_count, observe
from fathometer.measurement.sounding import BlockCall, first_layout, pull_back, record_calls
from fathometer.measurement.untouched import untouched
from fathometer.models.redraw import redrawn
from fathometer.models.seeding import named_generator

FloatArray = NDArray[np.float64]
Step: TypeAlias = Callable[[Tensor], Tensor]
Project: TypeAlias = Callable[[Tensor], Tensor]

_GAP = 1e-6  # 1 - cosine of the tokens of the angle estimator


@dataclass(frozen=True, kw_only=True)
class MeasuredExponents:
    """Exponents per block, nats, as (mean, standard error over weight draws); errors are NaN for one draw.

    Attributes:
        token, coherent, gradient: Of squared gradients.
        angle: Of 1 - cosine; ``None`` unless the model is in float64.
        curves: ``"token"``, ``"coherent"`` and, where measured, ``"angle"``: the logarithms at every block border,
            from the output for gradients and from the input for angles; shape ``(n_draws, n_layers + 1)``.
        q: Second moment of the equal tokens at the first block.
        n_tokens: Number of tokens.
    """

    token: tuple[float, float]
    coherent: tuple[float, float]
    gradient: tuple[float, float]
    angle: tuple[float, float] | None
    curves: dict[str, FloatArray]
    q: float
    n_tokens: int


def measure_exponents(
    model: nn.Module,
    batch: Any,
    *,
    seeds: int = 8,
    seed: int = 0,
    q: float | None = None,
    blocks: str | Sequence[nn.Module] | None = None,
    progress: Report | None = None,
) -> MeasuredExponents:
    """Measure the angle and gradient exponents of a model.

    The first draw uses the model's own weights, the others redraw every block matrix. The model is left untouched.

    Args:
        model: Any torch module with residual blocks.
        batch: What to call it with; it fixes the number of tokens, masks, and the tokens of the gradient exponent.
        seeds: Weight draws.
        seed: Seed of everything random here.
        q: Second moment of the equal tokens at the first block; by default that of the batch there. Exponents per
            block are constant over depth only at the norm the blocks preserve, see
            :func:`fathometer.observables.exponents`.
        blocks: As in :func:`fathometer.measure`.
        progress: Called with (label, done, total).
    Returns:
        The exponents. Cost: one sounding of the model per draw, plus two forwards and two backwards of the blocks.
    Raises:
        ModelError, BatchError: as :func:`fathometer.measure`.
        DomainError: for fewer than four tokens, or q that is not positive.
    """
    if q is not None and not (np.isfinite(q) and q > 0):
        raise DomainError(f"q must be positive and finite; got {q}", value=q)
    check_count("seeds", seeds)
    ready = as_batch(batch)
    found = observe(model, ready, seeds=1, seed=seed, blocks=blocks, forward=False, pooled=False)
    n_tokens = found.gram.shape[-1]
    if n_tokens < 4:
        raise DomainError(f"exponents need at least 4 tokens; the batch has {n_tokens}", value=n_tokens)
    level = float(found.own.q[0]) if q is None else q
    rows: dict[str, list[FloatArray]] = {}
    gradients: list[float] = []
    with untouched(model):
        for draw in range(seeds):
            with redrawn(model, [] if draw == 0 else found.slices, seed + draw, tied=bool(found.duplicates)):
                calls, _ = record_calls(model, found.stack, ready, False, seed + draw)
                layout = first_layout(found.stack.blocks[0], calls[0])
                modes = _Modes(found.stack.blocks, calls, layout, level, seed + draw)
                for name, row in modes.curves().items():
                    rows.setdefault(name, []).append(row)
                gradients.append(modes.isotropic())
            if progress is not None:
                progress("weight draws", draw + 1, seeds)
    depth = len(found.stack)
    curves = {name: np.stack(row) for name, row in rows.items()}
    ends = {name: curve[:, -1 if name == "angle" else 0] / depth for name, curve in curves.items()}
    return MeasuredExponents(
        token=_mean(ends["token"]),
        coherent=_mean(ends["coherent"]),
        gradient=_mean(np.array(gradients) / depth),
        angle=_mean(ends["angle"]) if "angle" in ends else None,
        curves=curves,
        q=level,
        n_tokens=n_tokens,
    )


def carried_forward(steps: Sequence[Step], stream: Tensor) -> list[Tensor]:
    """Return the stream at every border of a stack; a step may overwrite its input."""
    streams = [stream]
    with torch.no_grad():
        for step in steps:
            streams.append(step(streams[-1].clone()))
    return streams


def carried_back(
    steps: Sequence[Step], stream: Tensor, cotangent: Tensor, project: Project, *, networks: int = 0
) -> FloatArray:
    """Carry an output gradient to every border of a stack, keeping one part of it.

    Args:
        steps: The blocks, as functions of the stream alone.
        stream: The stream at the first block.
        cotangent: The gradient at the output, of the stream's shape.
        project: Picks the part that is kept at every border; the cotangent must be such a part.
        networks: Number of leading axes that count independent networks.
    Returns:
        Log of the squared size relative to the output, shape ``(n_steps + 1, *networks)``; infinite or NaN from where a
        gradient vanishes or overflows. Rescaled at every border: nothing overflows on the way.
    """
    streams = carried_forward(steps[:-1], stream)
    axes = tuple(range(networks, stream.ndim))
    unit = cotangent.square().sum(dim=axes, keepdim=True)
    logs = [torch.zeros_like(unit)]
    for step, before in zip(reversed(steps), reversed(streams), strict=True):
        leaf = before.detach().requires_grad_()
        with torch.enable_grad():
            out = step(leaf.clone())
        gradient = project(pull_back("of the stack", out, leaf, [cotangent])[0])
        size = gradient.square().sum(dim=axes, keepdim=True)
        logs.append(logs[-1] + (size / unit).log())
        cotangent = gradient * (unit / size).sqrt()
    values = torch.stack(logs[::-1]).double().cpu().numpy()
    return np.asarray(values.reshape(values.shape[: 1 + networks]))


class _Modes:
    """The estimators on one draw of a network."""

    def __init__(
        self, blocks: Sequence[nn.Module], calls: Sequence[BlockCall], layout: Layout, q: float, seed: int
    ) -> None:
        self._calls, self._layout, self._seed = calls, layout, seed
        self._steps = [partial(call.run, block) for call, block in zip(calls, blocks, strict=True)]
        self._like = calls[0].stream
        direction = self._noise("direction", shared=True)
        self._equal = direction * (q / direction.square().mean()).sqrt()

    def curves(self) -> dict[str, FloatArray]:
        """Return the logarithms at every border."""
        out = {
            "token": self._backward(self._equal, self._centred(self._noise("token")), self._centred),
            "coherent": self._backward(self._equal, self._noise("coherent", shared=True), self._averaged),
        }
        if self._like.dtype == torch.float64:
            out["angle"] = self._angles()
        return out

    def isotropic(self) -> float:
        """Return ln(J_0/J_L) at the batch's own tokens."""
        noise = self._noise("isotropic")
        return float(self._backward(self._calls[0].stream, noise, lambda gradient: gradient)[0])

    def _backward(self, stream: Tensor, cotangent: Tensor, project: Project) -> FloatArray:
        logs = carried_back(self._steps, stream, cotangent, project)
        bad = np.flatnonzero(~np.isfinite(logs))
        if bad.size:
            raise ModelError(
                f"the gradient at block {bad[-1]} vanishes or overflows; it cannot be carried further back"
            )
        return logs

    def _angles(self) -> FloatArray:
        apart = self._noise("apart")
        apart = apart - self._mean(apart)
        # Every token is tilted away from u by the same angle, in directions of its own.
        along = (apart * self._equal).mean(dim=-1, keepdim=True) / self._equal.square().mean(dim=-1, keepdim=True)
        apart = apart - along * self._equal
        apart = (
            apart * self._equal.square().mean(-1, keepdim=True).sqrt() / apart.square().mean(-1, keepdim=True).sqrt()
        )
        start = (1 - _GAP) ** 0.5 * self._equal + _GAP**0.5 * apart
        with torch.no_grad():
            streams = carried_forward(self._steps, start)
        gaps = []
        for stream in streams:
            arranged = self._layout.arranged(stream)
            units = arranged / arranged.square().mean(dim=-1, keepdim=True).sqrt()
            centred = units - units.mean(dim=-2, keepdim=True)
            n = centred.shape[-2]
            gaps.append(float(centred.square().mean()) * n / (n - 1))
        return np.log(np.array(gaps) / gaps[0])

    def _noise(self, name: str, *, shared: bool = False) -> Tensor:
        shape = self._layout.shared_shape(self._like) if shared else tuple(self._like.shape)
        noise = torch.randn(shape, generator=named_generator(self._seed, name)).to(self._like)
        return noise.expand_as(self._like).contiguous()

    def _mean(self, x: Tensor) -> Tensor:
        arranged = self._layout.arranged(x)
        return self._restored(arranged.mean(dim=-2, keepdim=True).expand_as(arranged))

    def _averaged(self, gradient: Tensor) -> Tensor:
        return self._mean(gradient).contiguous()

    def _centred(self, gradient: Tensor) -> Tensor:
        arranged = self._layout.arranged(gradient)
        late = arranged.shape[-2] // 2
        kept = torch.zeros_like(arranged)
        kept[:, late:] = arranged[:, late:] - arranged[:, late:].mean(dim=-2, keepdim=True)
        return self._restored(kept).contiguous()

    def _restored(self, arranged: Tensor) -> Tensor:
        """Return a tensor of shape ``(batch, n_tokens, d_model)`` in the layout of the stream."""
        return arranged.transpose(0, 1) if self._layout.sequence_first else arranged.reshape(self._like.shape)


def _mean(values: FloatArray) -> tuple[float, float]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error
