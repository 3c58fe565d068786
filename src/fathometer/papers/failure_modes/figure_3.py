r"""The gradient of the query matrix against the inverse temperature, in one layer, theory without a fitted constant.

Tokens are Gaussian (q = 1, p = 0), gradients at the output of attention independent of mean square
``s`` per coordinate. With entries of W_Q and W_K of variance ``\beta \sqrt{\ln n}/d``,

.. math:: \frac{|\partial L/\partial W_Q|^2}{n d^2 s\,\sigma_v^2 \sqrt{\ln n}} = \beta\, q (q-p)^2\, \hat G, \qquad
          \hat G = \Bigl(1 + \frac1d\Bigr) E[Y_2 - 2 Y_3 + Y_2^2] + \frac1d E(1 - Y_2)^2 .

The second term of :math:`\hat G` is the random overlap of tokens; in the uniform phase it is a floor. The published
limit keeps :math:`(\beta_c/3)(1 - \beta_c/\beta)` above :math:`\beta_c = \sqrt2` and nothing below; its bracket is used
here in the form ``E[Y_2 - 2 Y_3 + Y_2^2]``.

Source: the limit, Giorlandino and Goldt, arXiv:2505.24333; the form at finite width is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import CLOSURES, Closure, row_averages
from fathometer.papers.failure_modes.architecture import described
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent

LARGEST_BETA = 3.0
_POINTS = 13
_LIMITS = ("annealed", "random_energy")


@dataclass(frozen=True, kw_only=True)
class QueryGradients:
    """Squared gradient norms in the units above; the first two axes of arrays are token numbers and widths.

    Attributes:
        n_tokens, d_model: What was simulated.
        betas: Grid of the theories.
        theory: By name (``"exact"`` at finite width, ``"annealed"``, ``"random_energy"``), shape ``(n_token_numbers,
            n_widths, n_betas)``.
        at: Inverse temperatures of the networks.
        simulated, errors: Mean and standard error over draws, shape ``(n_token_numbers, n_widths, len(at))``.
        expected: The exact theory at the same points.
        about: Sizes.
    """

    n_tokens: tuple[int, ...]
    d_model: tuple[int, ...]
    betas: FloatArray
    theory: dict[str, FloatArray]
    at: FloatArray
    simulated: FloatArray
    errors: FloatArray
    expected: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return theory and simulation at some temperatures."""
        rows: list[tuple[Cell, ...]] = []
        for i, n in enumerate(self.n_tokens):
            for j, d in enumerate(self.d_model):
                for k in range(1, len(self.at), 2):
                    beta, value = float(self.at[k]), float(self.expected[i, j, k])
                    limit_there = float(np.interp(beta, self.betas, self.theory["random_energy"][i, j]))
                    seen = (float(self.simulated[i, j, k]), float(self.errors[i, j, k]))
                    rows.append((f"{n}", f"{d}", f"{beta:.2f}", seen, value, f"{value / seen[0]:.3f}", limit_there))
        return Table(
            title="Squared gradient of W_Q over n d^2 s sigma_v^2 sqrt(ln n)",
            headings=("tokens", "width", "beta", "simulated", "exact", "ratio", "asymptotic"),
            rows=tuple(rows),
        )


def figure_3(size: Size, progress: Progress = silent) -> QueryGradients:
    """Predict and measure for a quarter and half of the size's width, with 8 and 16 tokens for each quarter of it."""
    widths, numbers = (size.d_model // 4, size.d_model // 2), (2 * size.d_model, 4 * size.d_model)
    betas = np.linspace(0.0, LARGEST_BETA, max(size.grid, 2))
    at = np.linspace(LARGEST_BETA / _POINTS, LARGEST_BETA, _POINTS)
    draws = 4 * size.seeds
    shape = (len(numbers), len(widths))
    theory = {name: np.empty((*shape, len(betas))) for name in ("exact", *_LIMITS)}
    expected, simulated, errors = (np.empty((*shape, len(at))) for _ in range(3))
    for i, n in enumerate(numbers):
        for j, d in enumerate(widths):
            theory["exact"][i, j], expected[i, j] = predicted(n, d, betas), predicted(n, d, at)
            for name in _LIMITS:
                theory[name][i, j] = limit(n, betas, CLOSURES[name])
            for k, beta in enumerate(at.tolist()):
                seen = measured(n, d, beta, draws=draws, seed=draws * k)
                simulated[i, j, k], errors[i, j, k] = seen.mean(), seen.std(ddof=1) / np.sqrt(draws)
                done = (i * len(widths) + j) * len(at) + k + 1
                progress(f"{n} tokens, width {d}", done, len(numbers) * len(widths) * len(at))
    return QueryGradients(
        n_tokens=numbers,
        d_model=widths,
        betas=betas,
        theory=theory,
        at=at,
        simulated=simulated,
        errors=errors,
        expected=expected,
        about=described(size, weight_draws=draws, q=1.0, p=0.0),
    )


def predicted(n_tokens: int, d_model: int, betas: FloatArray) -> FloatArray:
    """Return the theory at finite width."""
    row = row_averages(n_tokens, _variance(n_tokens, betas))
    apart = 1 - 2 * row.y2 + row.y2_squared
    return np.asarray(betas * ((1 + 1 / d_model) * row.score + apart / d_model))


def limit(n_tokens: int, betas: FloatArray, closure: Closure) -> FloatArray:
    """Return the theory of wide layers with a closure."""
    return np.asarray(betas * closure.statistics(n_tokens, _variance(n_tokens, betas), 0.0 * betas).score)


def _variance(n_tokens: int, betas: FloatArray) -> FloatArray:
    return np.asarray(betas**2 * np.log(n_tokens))


def measured(n_tokens: int, d_model: int, beta: float, *, draws: int, seed: int) -> FloatArray:
    """Return the squared norm of every draw, in the units of the theory.

    Args:
        n_tokens, d_model, beta: The layer.
        draws: Of weights, tokens and output gradients.
        seed: Of the first draw; later ones use the numbers that follow.
    """
    import torch

    strength = beta * math.sqrt(math.log(n_tokens))  # d times the variance of the entries of W_Q and W_K
    out = []
    for number in range(seed, seed + draws):
        generator = torch.Generator().manual_seed(number)
        tokens, gradient = torch.randn(2, n_tokens, d_model, generator=generator)
        query, key, value = torch.randn(3, d_model, d_model, generator=generator) / d_model**0.5
        query, key = query * strength**0.5, key * strength**0.5
        query.requires_grad_()
        scores = (tokens @ query.T) @ (tokens @ key.T).T / d_model**0.5
        mixed = scores.softmax(-1) @ (tokens @ value.T)
        (found,) = torch.autograd.grad(mixed, query, gradient)
        out.append(float(found.double().square().sum()))
    return np.array(out) / (n_tokens * d_model**2 * math.sqrt(math.log(n_tokens)))
