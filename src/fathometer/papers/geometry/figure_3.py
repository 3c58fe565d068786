r"""Recovery of permutation symmetry: tokens in two groups forget over depth which group they belong to.

The first block gets tokens of unit norm in two equal groups, with overlap 0.75 inside a group and 0.5 across. The
ratio of the mean overlaps tends to one. Theory is the recursion on the full Gram matrix; near the stable state, with
q_A and c_A between the branches, it decays as

.. math:: \frac{\langle p_1 \rangle}{\langle p_2 \rangle} - 1 \sim e^{\lambda l}, \qquad
          e^{\lambda} = (1 - \alpha_A^2)\Bigl(1 - \alpha_M^2 + \frac{\alpha_M^2\, C'(c_A)}{q_A}\Bigr)

with C the average of the MLP over two tokens. Networks are compared by the ratio of mean overlaps, for the mean of
ratios is biased by their fluctuations.

Source: the question, the two overlaps and the map, Cowsik et al., arXiv:2403.02579; the layout in two groups is ours,
and the exponent is derived in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fathometer.attention import DEFAULT_CLOSURE, Annealed
from fathometer.observables import stable_state
from fathometer.papers.geometry.architecture import NETWORKS, described, gram_matrices, network, token_number
from fathometer.papers.item import Cell, FloatArray, Progress, Size, Table, plain, silent
from fathometer.propagation import propagate, propagate_gram
from fathometer.spec import Transformer

N_LAYERS = 24
INSIDE, ACROSS = 0.75, 0.5
#: From this layer on the means of networks are no longer dominated by the fluctuations of the two group means.
SETTLED = 8


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Ratios of mean overlaps over depth.

    Attributes:
        names, sigma_w: The networks, first axis of every array.
        theory: Ratio with true softmax averages, at twice the depth, shape ``(n_networks, 2 * n_layers + 1)``.
        annealed: The same with annealed averages, as published, shape ``(n_networks, n_layers + 1)``.
        simulated, errors: Ratio of means over weight draws, with its jackknife error, same shape.
        exponents: Predicted decay exponent of ``ratio - 1``, nats per block, shape ``(n_networks,)``.
        about: Sizes.
    """

    names: tuple[str, ...]
    sigma_w: tuple[float, ...]
    theory: FloatArray
    annealed: FloatArray
    simulated: FloatArray
    errors: FloatArray
    exponents: FloatArray
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def largest_difference(self) -> FloatArray:
        """Return the largest distance of simulation from theory from layer 8 on, for every network."""
        layers = self.simulated.shape[1]
        difference = np.abs(self.simulated - self.theory[:, :layers])
        return np.asarray(difference[:, min(SETTLED, layers - 1) :].max(axis=1))

    def last_slopes(self) -> FloatArray:
        """Return the slope of ``ln(ratio - 1)`` over the last block of the theory."""
        return np.asarray(np.log(self.theory[:, -1] - 1) - np.log(self.theory[:, -2] - 1))

    def table(self) -> Table:
        """Return ratios at some layers, how far simulation is from theory, and the decay."""
        last = self.simulated.shape[1] - 1
        rows: list[tuple[Cell, ...]] = []
        for i, name in enumerate(self.names):
            for layer in range(SETTLED, last + 1, SETTLED):
                seen = (float(self.simulated[i, layer]), float(self.errors[i, layer]))
                rows.append(
                    (f"{name}, layer {layer}", float(self.theory[i, layer]), float(self.annealed[i, layer]), seen)
                )
            rows.append((f"{name}, largest gap from layer {SETTLED} on", "", "", float(self.largest_difference()[i])))
            rows.append((f"{name}, decay exponent", float(self.exponents[i]), "", ""))
            rows.append((f"{name}, slope at layer {2 * last}", float(self.last_slopes()[i]), "", ""))
        return Table(
            title="Mean overlap inside over mean overlap across groups",
            headings=("network", "theory", "annealed", "simulated"),
            rows=tuple(rows),
        )


def figure_3(size: Size, progress: Progress = silent) -> Recovery:
    """Propagate the Gram matrix and simulate at the width of the size, four weight draws for each of its seeds."""
    from fathometer.models import tokens_with_gram

    n_tokens, n_layers, draws = token_number(size), min(N_LAYERS, size.n_layers), 4 * size.seeds
    n_tokens -= n_tokens % 2
    gram = grouped_gram(n_tokens)
    ratios: dict[str, list[FloatArray]] = {"theory": [], "annealed": [], "simulated": [], "errors": []}
    exponents = []
    for k, (name, sigma_w) in enumerate(NETWORKS.items()):
        spec = network(n_layers=n_layers, d_model=size.d_model, sigma_w=sigma_w)
        for label, depth, closure in (("theory", 2 * n_layers, DEFAULT_CLOSURE), ("annealed", n_layers, Annealed())):
            run = propagate_gram(spec.with_depth(depth), gram, closure=closure)
            inside, across = group_overlaps(run.grams[run.borders])
            ratios[label].append(inside / across)
        tokens = tokens_with_gram(gram, d_model=size.d_model, batch=draws, seed=0)
        overlaps = []
        for layer, seen in enumerate(gram_matrices(spec, tokens, seed=0)):
            overlaps.append(group_overlaps(seen))
            progress(f"{name} network, layers", k * n_layers + layer, len(NETWORKS) * n_layers)
        ratio, error = ratio_of_means(*np.moveaxis(np.array(overlaps), 1, 0))
        ratios["simulated"].append(ratio)
        ratios["errors"].append(error)
        exponents.append(decay_exponent(spec, n_tokens))
    return Recovery(
        names=tuple(NETWORKS),
        sigma_w=tuple(NETWORKS.values()),
        **{label: np.stack(rows) for label, rows in ratios.items()},
        exponents=np.array(exponents),
        about=described(
            size,
            n_tokens=n_tokens,
            n_layers=n_layers,
            weight_draws=draws,
            inside=INSIDE,
            across=ACROSS,
            closure=DEFAULT_CLOSURE.name,
        ),
    )


def grouped_gram(n_tokens: int) -> FloatArray:
    """Return the Gram matrix of unit tokens in two equal groups, one after the other."""
    half = n_tokens // 2
    gram = np.kron(np.array([[INSIDE, ACROSS], [ACROSS, INSIDE]]), np.ones((half, half)))
    np.fill_diagonal(gram, 1.0)
    return gram


def group_overlaps(gram: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the mean overlap of different tokens inside the groups and across them, for ``(..., n, n)`` matrices."""
    half = gram.shape[-1] // 2
    blocks = gram.reshape(*gram.shape[:-2], 2, half, 2, half).sum(axis=(-3, -1))
    inside = np.trace(blocks, axis1=-2, axis2=-1) - np.trace(gram, axis1=-2, axis2=-1)
    return inside / (2 * half * (half - 1)), (blocks[..., 0, 1] + blocks[..., 1, 0]) / (2 * half**2)


def ratio_of_means(above: FloatArray, below: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ratio of two means over the last axis and its jackknife standard error.

    >>> ratio_of_means(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    (np.float64(2.0), np.float64(1.0))
    """
    n = above.shape[-1]
    without = (above.sum(axis=-1, keepdims=True) - above) / (below.sum(axis=-1, keepdims=True) - below)
    return above.mean(axis=-1) / below.mean(axis=-1), np.sqrt(n - 1) * without.std(axis=-1)


def decay_exponent(spec: Transformer, n_tokens: int) -> float:
    """Return the exponent of what tells the groups apart, at the stable state of a block of attention and MLP.

    Attention averages over so many tokens that only the skip carries the difference past it; the MLP multiplies it by
    the derivative of its overlap, which is also how it carries back gradients shared by two tokens.
    """
    state = stable_state(spec, n_tokens=n_tokens)
    run = propagate(spec.with_depth(1), n_tokens=n_tokens, q=state.q, p=state.cosine * state.q, closure=DEFAULT_CLOSURE)
    skip = spec.blocks[-1].sublayers[0].skip_scale
    return float(np.log(skip**2 * run.transfer[1, 1, 1]))
