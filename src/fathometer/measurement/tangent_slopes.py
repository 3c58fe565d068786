r"""How the tangent kernel of every group of parameters grows with width.

The slope of :math:`\ln \Theta_G` against :math:`\ln n`: zero, up to 1/n, where the learning-rate factors make every
group's share of the kernel independent of the width; one for most matrices under one rate for all.

Source: the criterion, Dinan, Yaida and Zhang, arXiv:2304.02034v1, Sec. 1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fathometer.errors import DomainError
from fathometer.measurement.measure import Report, check_count
from fathometer.measurement.tangent import Groups, Read, measure_tangent_kernel
from fathometer.models.roles import ParameterRole

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TangentSlopes:
    """Tangent kernels against width, by group.

    Attributes:
        widths: The widths, shape ``(n_widths,)``.
        uniform: Mean diagonal of the kernel where every factor is one, shape ``(n_widths,)``.
        relative_errors: Its relative standard errors over weight draws; the factors do not change them.
        factors: The learning-rate factors, shape ``(n_widths,)``.
        vanishing: Groups whose kernel is zero at some width, to rounding (1e-10 of the largest): they have no slope.
    """

    widths: NDArray[np.int64]
    uniform: Mapping[str, FloatArray]
    relative_errors: Mapping[str, FloatArray]
    factors: Mapping[str, FloatArray]
    vanishing: tuple[str, ...]

    @property
    def kernels(self) -> dict[str, FloatArray]:
        """Mean diagonal of the kernel under the factors."""
        return {group: self.factors[group] * values for group, values in self.uniform.items()}

    @property
    def slopes(self) -> dict[str, tuple[float, float]]:
        """Slope under the factors and its standard error."""
        return self._slopes(self.kernels)

    @property
    def uniform_slopes(self) -> dict[str, tuple[float, float]]:
        """Slope under one learning rate for all groups and its standard error."""
        return self._slopes(self.uniform)

    def _slopes(self, kernels: Mapping[str, FloatArray]) -> dict[str, tuple[float, float]]:
        return {
            group: log_slope(self.widths, values, self.relative_errors[group])
            for group, values in kernels.items()
            if group not in self.vanishing
        }


def tangent_slopes(
    build: Callable[[int, int], nn.Module],
    widths: Sequence[int],
    batch: Any,
    *,
    groups: Groups | Sequence[ParameterRole] | None = None,
    lr_factors: Callable[[int], Mapping[str, float]] | None = None,
    read: Read | None = None,
    components: int | Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    sketches: int = 0,
    seeds: int = 16,
    seed: int = 0,
    progress: Report | None = None,
) -> TangentSlopes:
    """Measure the tangent kernel of a model at several widths.

    Args:
        build: Returns the model of a width and a seed.
        widths: At least two different ones.
        batch: What to call every model with.
        groups: As in :func:`fathometer.measurement.measure_tangent_kernel`, for every width.
        lr_factors: Returns the factor of every group at a width; by default one everywhere.
        read, components, tokens, sketches: As in :func:`fathometer.measurement.measure_tangent_kernel`.
        seeds: Weight draws at each width, at least two.
        seed: Seed of everything random here.
        progress: Called with (label, done, total).
    Returns:
        Kernels and slopes. Cost: that of one measured kernel for each width, dominated by the largest.
    Raises:
        DomainError: for fewer than two different widths, or one seed.
        ModelError, BatchError: as :func:`fathometer.measurement.measure_tangent_kernel`.
    """
    if len(widths) < 2 or len(set(widths)) < len(widths) or min(widths) < 1:
        raise DomainError(f"a slope needs at least two different positive widths; got {list(widths)}", value=widths)
    check_count("seeds", seeds)
    if seeds < 2:
        raise DomainError("a slope with an error bar needs at least 2 seeds; got 1", value=seeds)
    uniform: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    factors: dict[str, list[float]] = {}
    for i, width in enumerate(widths):
        found = measure_tangent_kernel(
            partial(build, width),
            batch,
            groups=groups,
            lr_factors=None if lr_factors is None else lr_factors(width),
            read=read,
            components=components,
            tokens=tokens,
            sketches=sketches,
            seeds=seeds,
            seed=seed,
        )
        for group, (mean, error) in found.sizes.items():
            factor = found.lr_factors[group]
            uniform.setdefault(group, []).append(mean / factor)
            errors.setdefault(group, []).append(error / mean if mean > 0 else np.nan)
            factors.setdefault(group, []).append(factor)
        if progress is not None:
            progress("widths", i + 1, len(widths))
    largest = np.max(list(uniform.values()), axis=0)
    return TangentSlopes(
        widths=np.array(widths, dtype=np.int64),
        uniform={group: np.array(values) for group, values in uniform.items()},
        relative_errors={group: np.array(values) for group, values in errors.items()},
        factors={group: np.array(values) for group, values in factors.items()},
        vanishing=tuple(group for group, values in uniform.items() if np.any(np.array(values) <= 1e-10 * largest)),
    )


def log_slope(widths: NDArray[Any], values: FloatArray, relative_errors: FloatArray) -> tuple[float, float]:
    """Return the least-squares slope of ln(values) against ln(widths) and its standard error.

    All widths weigh the same: weights by error would be infinite for groups without scatter, such as the head bias.

    >>> import numpy as np
    >>> slope, error = log_slope(np.array([2, 4, 8]), np.array([4.0, 8.0, 16.0]), np.array([0.1, 0.1, 0.1]))
    >>> round(slope, 6), round(error, 4)
    (1.0, 0.102)
    """
    x = np.log(widths) - np.log(widths).mean()
    weights = x / (x @ x)
    return float(weights @ np.log(values)), float(np.sqrt(weights**2 @ relative_errors**2))
