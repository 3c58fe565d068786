r"""Kernels and tangent kernels of finite networks beside their limit of infinite width, group by group.

The network is the language model of :mod:`fathometer.papers.effective.models` with a few tokens, one of them twice, and
8 outputs. Under the rules every group's share of the tangent kernel is of order one, under one rate for all those of
matrices grow with the width and those of tables and norms do not.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.35-1.84 (kernels), 1.96-1.190 (tangent kernels) and
1.99-1.107 (rates). The norms' gains are derived in docs/derivations.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fathometer._version import __version__
from fathometer.observables.tangent import TangentKernel, tangent_kernel
from fathometer.papers.effective.models import D_HEAD, language_spec
from fathometer.papers.item import SMALL, Cell, FloatArray, Progress, Size, Table, plain
from fathometer.prescription.width_scaling import width_rule

if TYPE_CHECKING:
    from torch import nn

    from fathometer.measurement.tangent_slopes import TangentSlopes

TOKENS = (0, 1, 2, 1)
OUTPUTS = 8
POSITION = 0.5  # large enough to tell the two equal tokens apart


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Theory and measurement against width.

    Attributes:
        widths: Shape ``(n_widths,)``.
        tokens: Numbers of the tokens.
        output: Theory's second moments of the outputs, shape ``(n_tokens, n_tokens)``.
        measured_output, output_error: Mean and standard error over draws, shape ``(n_widths, n_tokens, n_tokens)``.
        theory, theory_error: Tangent kernel by role under the rules, mean over tokens, and its sampling error.
        measured, error: The same measured, shape ``(n_widths,)``.
        about: Protocol and versions.
    """

    widths: FloatArray
    tokens: tuple[int, ...]
    output: FloatArray
    measured_output: FloatArray
    output_error: FloatArray
    theory: dict[str, float]
    theory_error: dict[str, float]
    measured: dict[str, FloatArray]
    error: dict[str, FloatArray]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return every group at all widths, and how far the widest is from theory."""
        rows: list[tuple[Cell, ...]] = []
        for role, values in self.measured.items():
            cells = [(float(value), float(error)) for value, error in zip(values, self.error[role], strict=True)]
            rows.append((role, self.theory[role], *cells, f"{100 * (values[-1] / self.theory[role] - 1):+.1f} %"))
        return Table(
            title="Tangent kernel by group under the rules (mean diagonal)",
            headings=("group", "theory", *(f"width {w:.0f}" for w in self.widths), "widest over theory"),
            rows=tuple(rows),
        )


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """Slopes of ln(tangent kernel) against ln(width), by role.

    Attributes:
        widths: Shape ``(n_widths,)``.
        rules, uniform: Slope and standard error over draws under the rules and under one rate for all.
        expected: Slopes that theory gives under one rate for all; under the rules all are zero.
        about: Protocol and versions.
    """

    widths: FloatArray
    rules: dict[str, tuple[float, float]]
    uniform: dict[str, tuple[float, float]]
    expected: dict[str, float]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return the slopes."""
        rows: list[tuple[Cell, ...]] = [
            (role, self.rules[role], 0.0, self.uniform[role], self.expected[role]) for role in self.rules
        ]
        return Table(
            title=f"Slope of the tangent kernel against width, {self.widths[0]:.0f} to {self.widths[-1]:.0f}",
            headings=("group", "rules", "theory", "one rate for all", "theory"),
            rows=tuple(rows),
        )


def kernels(size: Size, progress: Progress) -> Kernels:
    """Predict and measure kernels and tangent kernels at several widths.

    Args:
        size: Six times its ``seeds`` draws, at least twelve; widths 32 to 256 at the small size, else 64 to 1024.
        progress: Told after every width.
    """
    found, widths, draws = _measured(size, progress)
    theory = _theory(widths[-1])
    rules = {role: found.kernels[role] for role in found.kernels if role not in found.vanishing}
    output, output_error = _outputs(widths, draws)
    return Kernels(
        widths=found.widths.astype(float),
        tokens=TOKENS,
        output=theory.output,
        measured_output=output,
        output_error=output_error,
        theory={role: float(np.diag(theory.roles[role]).mean()) for role in rules},
        theory_error={role: float(np.diag(theory.role_se[role]).mean()) for role in rules},
        measured=rules,
        error={role: values * found.relative_errors[role] for role, values in rules.items()},
        about=_about(draws),
    )


def tangent_kernel_slopes(size: Size, progress: Progress) -> Slopes:
    """Measure how every group's tangent kernel grows with width; sizes as for :func:`kernels`."""
    found, widths, draws = _measured(size, progress)
    first, last = factors(widths[0]), factors(widths[-1])
    span = np.log(widths[-1] / widths[0])
    return Slopes(
        widths=found.widths.astype(float),
        rules=found.slopes,
        uniform=found.uniform_slopes,
        expected={role: float(-np.log(last[role] / first[role]) / span) + 0.0 for role in found.slopes},
        about=_about(draws),
    )


def factors(width: int) -> dict[str, float]:
    """Return the learning-rate factor of every role of the model at a width, for gradient descent at s = 0."""
    fans = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "output": (width, width),
        "mlp_in": (width, 4 * width),
        "mlp_out": (4 * width, width),
        "head": (width, OUTPUTS),
        "head_bias": (1, OUTPUTS),
        "token_embedding": (1, width),
        "position_embedding": (1, width),
        "norm_gain": (1, width),
    }
    return {
        role: width_rule(role, fan_in=a, fan_out=b, d_model=width, s=0, optimizer="sgd").rate
        for role, (a, b) in fans.items()
    }


def model(width: int, seed: int) -> nn.Module:
    """Return the network of a width and a seed."""
    import torch

    from fathometer.training.language import LanguageModel

    spec = language_spec(width, position=POSITION, d_head=2 * D_HEAD)
    return LanguageModel(spec, log_frequencies=torch.zeros(OUTPUTS), n_tokens=len(TOKENS), seed=seed)


def _theory(width: int) -> TangentKernel:
    return tangent_kernel(language_spec(width, position=POSITION, d_head=2 * D_HEAD), tokens=np.array([TOKENS]))


def _measured(size: Size, progress: Progress) -> tuple[TangentSlopes, list[int], int]:
    import torch

    from fathometer.measurement.tangent_slopes import tangent_slopes

    widths = [32, 64, 128, 256] if size.d_model <= SMALL.d_model else [64, 128, 256, 512, 1024]
    draws = max(12, 6 * size.seeds)
    found = tangent_slopes(
        model,
        widths,
        torch.tensor([TOKENS]),
        lr_factors=factors,
        components=4,
        seeds=draws,
        progress=progress,
    )
    return found, widths, draws


def _outputs(widths: list[int], draws: int) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard error over draws of the outputs' second moments, averaged over the head."""
    import torch

    means, errors = [], []
    for width in widths:
        grams = []
        for seed in range(draws):
            network: Any = model(width, seed)
            behind: list[Any] = []
            handle = network.norm.register_forward_hook(lambda module, args, out, seen=behind: seen.append(out))
            with torch.no_grad():
                network(torch.tensor([TOKENS]))
            handle.remove()
            tokens = behind[0][0].double().numpy()
            grams.append(tokens @ tokens.T / width)
        means.append(np.mean(grams, axis=0))
        errors.append(np.std(grams, axis=0, ddof=1) / np.sqrt(draws))
    return np.array(means), np.array(errors)


def _about(draws: int) -> dict[str, Any]:
    return {
        "paper": "arXiv:2304.02034",
        "tokens": TOKENS,
        "outputs": OUTPUTS,
        "draws": draws,
        "d_head": 2 * D_HEAD,
        "version": __version__,
    }
