"""The same maps on real networks: thousands of small ones, stacked into batched matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fathometer._version import __version__
from fathometer.diagrams.grid import Axis, Diagram
from fathometer.diagrams.observables import Tokens
from fathometer.diagrams.predicted import on_grid
from fathometer.errors import DomainError, SpecError, nearest
from fathometer.spec import MLP, GatedMLP, Transformer, to_dict, with_field

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float64]

MEASURED = ("angle_exponent", "gradient_exponent", "q", "cosine")

_WEIGHTS = 1 << 27  # numbers held at a time: half a gigabyte


def measured_diagram(
    spec: Transformer,
    *,
    x: tuple[str, Any],
    y: tuple[str, Any],
    observable: str = "angle_exponent",
    n_tokens: int = 32,
    cosine: float = 0.5,
    q: float | None = None,
    seeds: int = 8,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagram:
    """Measure an observable on networks at every point of two fields. Causal masks are dropped, as in the theory.

    Args:
        spec: The transformer; its depth and width are those of the networks.
        x, y: ``(field, values)``.
        observable: ``"angle_exponent"`` (from gradients that differ between equal tokens, which have the same
            expectation and far less noise), or ``"gradient_exponent"``, ``"q"``, ``"cosine"`` of the stack.
        n_tokens: Number of tokens, at most ``d_model``.
        cosine: p/q of the tokens at the first block; their Gram matrix is exact.
        q: Their second moment; by default the one that theory says the last block preserves, at every point.
        seeds: Independent networks at every point.
        seed: Seed of weights, tokens and gradients.
        device: Where the networks run.
        progress: Called with (label, points done, points in all).
    Returns:
        Means and standard errors over networks, ``source="measurement"``. Cost: forward and backward of ``points *
        seeds`` networks and the draw of their weights, as many stacked at a time as hold 2^27 weights.
    Raises:
        SpecError, DomainError: as :func:`fathometer.diagram`.
    """
    if observable not in MEASURED:
        raise SpecError(f"a measured diagram has no observable {observable!r}{nearest(observable, MEASURED)}")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise DomainError(f"seeds must be a positive integer; got {seeds!r}", value=seeds)
    if n_tokens < 2:
        raise DomainError(f"n_tokens must be >= 2; got {n_tokens}", value=n_tokens)
    if q is not None and not (np.isfinite(q) and q > 0):
        raise DomainError(f"q must be positive and finite; got {q}", value=q)
    tokens = Tokens(n_tokens=n_tokens, cosine=cosine, q=q)
    axes = Axis.of(x), Axis.of(y)
    grid = on_grid(spec.bidirectional(), *axes)
    shape = (axes[1].values.size, axes[0].values.size)
    levels = np.broadcast_to(tokens.start(grid), shape).ravel()
    samples = np.empty((levels.size, seeds))
    for part, points in _parts(grid, axes, seeds):
        samples[part] = _measured(
            points, observable, n_tokens, cosine, levels[part], seeds=seeds, seed=seed + part.start, device=device
        )
        if progress is not None:
            progress(observable, part.stop, levels.size)
    mean = samples.mean(axis=1).reshape(shape)
    errors = {}
    if seeds > 1:
        errors[observable] = (samples.std(axis=1, ddof=1) / np.sqrt(seeds)).reshape(shape)
    return Diagram(
        x=axes[0],
        y=axes[1],
        values={observable: mean},
        errors=errors,
        status={observable: np.where(np.isfinite(mean), "ok", "overflow")},
        source="measurement",
        about={
            "spec": to_dict(spec),
            "n_tokens": n_tokens,
            "cosine": cosine,
            "q": q,
            "weight_draws": seeds,
            "seed": seed,
            "version": __version__,
        },
    )


def _parts(grid: Transformer, axes: tuple[Axis, Axis], seeds: int) -> Iterator[tuple[slice, Transformer]]:
    """Yield runs of grid points, as a spec with one-dimensional fields, that fit into memory together."""
    d = grid.d_model
    weights = sum(
        block.repeat * d * d * sum(_size(sublayer.branch) for sublayer in block.sublayers) for block in grid.blocks
    )
    size = max(1, int(_WEIGHTS / (weights * seeds)))
    x, y = axes
    y_points, x_points = (values.ravel() for values in np.meshgrid(y.values, x.values, indexing="ij"))
    for first in range(0, len(x_points), size):
        part = slice(first, min(first + size, len(x_points)))
        yield part, with_field(with_field(grid, y.name, y_points[part]), x.name, x_points[part])


def _size(branch: Any) -> float:
    """Return the number of weights of a branch over the squared width."""
    if isinstance(branch, MLP):
        return 2 * branch.ratio
    return 3 * branch.ratio if isinstance(branch, GatedMLP) else 4.0


def _measured(
    points: Transformer,
    observable: str,
    n_tokens: int,
    cosine: float,
    levels: FloatArray,
    *,
    seeds: int,
    seed: int,
    device: str,
) -> FloatArray:
    """Return samples of shape ``(points, seeds)``."""
    import torch

    from fathometer.measurement.exponents import carried_back, carried_forward
    from fathometer.models import equiangular_tokens, stacked_network
    from fathometer.models.seeding import named_generator

    network = stacked_network(points, n_copies=seeds, seed=seed, device=device).requires_grad_(False)
    n, d = network.n_networks, points.d_model
    steps = [partial(block, n_tokens=n_tokens) for block in network.blocks]
    scale = torch.from_numpy(np.sqrt(levels).repeat(seeds)).float().view(-1, 1, 1).to(device)

    def noise(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=named_generator(seed, name)).to(device)

    if observable == "angle_exponent":
        direction = noise("direction", n, d, 1)
        direction = direction / direction.square().mean(dim=1, keepdim=True).sqrt()
        stream = (scale * direction).expand(n, d, n_tokens).contiguous()
        logs = carried_back(steps, stream, _centred(noise("token", n, d, n_tokens)), _centred, networks=1)
        return np.asarray(logs[0].reshape(-1, seeds) / len(steps))
    tokens = equiangular_tokens(n_tokens=n_tokens, d_model=d, q=1.0, p=cosine, batch=n, seed=seed)
    stream = scale * tokens.mT.contiguous().to(device)
    if observable == "gradient_exponent":
        logs = carried_back(steps, stream, noise("isotropic", n, d, n_tokens), lambda gradient: gradient, networks=1)
        return np.asarray(logs[0].reshape(-1, seeds) / len(steps))
    out = carried_forward(steps, stream)[-1].double()
    square = out.square().sum(dim=(1, 2)) / d
    total = out.sum(dim=2).square().sum(dim=1) / d
    q, p = square / n_tokens, (total - square) / (n_tokens * (n_tokens - 1))
    return np.asarray((q if observable == "q" else p / q).cpu().numpy().reshape(-1, seeds))


def _centred(x: Tensor) -> Tensor:
    """Return what differs between tokens, the last axis."""
    return x - x.mean(dim=-1, keepdim=True)
