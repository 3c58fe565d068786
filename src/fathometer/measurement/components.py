r"""Simulation of single components: fresh weights and inputs for every seed, moments with standard errors over seeds.

Inputs follow the standard model of arXiv:2403.09635 (Kedia et al.), with c shared by the tokens of a sequence,

.. math:: x_{ai} = \mu + \sqrt{p - \mu^2}\; c_i + \sqrt{q - p}\; e_{ai},

and the gradient at the output is drawn likewise from (J, K), independent of everything. Entries that share c or a
weight matrix depend on each other, so errors are those of the mean over seeds, never over entries.

A component is a function that takes a generator and returns the map with the weights and masks drawn from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fathometer.errors import DomainError, NotCoveredError
from fathometer.measurement.statistics import token_moments
from fathometer.measurement.tangent import mean_and_error
from fathometer.models.reference import activation_module, norm_module
from fathometer.models.seeding import named_generator
from fathometer.spec import (
    MLP,
    Activation,
    CrossAttention,
    GatedMLP,
    Head,
    LayerNorm,
    Norm,
    PatchStem,
    RMSNorm,
    SelfAttention,
    TokenStem,
    hidden_width,
)
from fathometer.spec.arrays import FloatArray, Scale

Map: TypeAlias = Callable[..., Tensor]
Draw: TypeAlias = Callable[[Generator], Map]
Estimates: TypeAlias = "dict[str, tuple[float, float]]"


class Input(NamedTuple):
    """One input of a component: ``n_tokens`` tokens of ``width`` entries with these moments."""

    n_tokens: int
    width: int
    q: float
    p: float
    mean: float = 0.0


def simulate(
    draw: Draw,
    inputs: Sequence[Input],
    *,
    J: float,
    K: float,
    seeds: int,
    sequences: int = 2,
    stream: str = "component",
) -> Estimates:
    """Measure the moments behind a component and of the gradients in front of it.

    Args:
        draw: The component.
        inputs: Its inputs; the first is called ``x``, a second ``memory``.
        J, K: Moments of the gradient at the output.
        seeds: Draws of weights, inputs, masks and gradients, at least 2.
        sequences: Sequences a draw, which share its weights.
        stream: Name of the random numbers; simulations with different names are independent.
    Returns:
        By name the mean and its standard error: ``mean, q, p`` of the output, ``J, K`` at the first input and
        ``J_memory, K_memory`` at the second. Cost: one forward and backward pass a seed.
    Raises:
        DomainError: for fewer than two seeds.
    """
    _check_seeds(seeds)
    return estimates([_once(draw, inputs, J, K, named_generator(seed, stream), sequences) for seed in range(seeds)])


def simulate_tokens(draw: Callable[[Generator], Tensor], *, seeds: int, stream: str = "stem") -> Estimates:
    """Measure the moments of tokens that are made from nothing but a generator: those of a stem.

    Raises:
        DomainError: for fewer than two seeds.
    """
    _check_seeds(seeds)
    found = []
    for seed in range(seeds):
        q, p = token_moments(draw(named_generator(seed, stream)))
        found.append({"q": q, "p": p})
    return estimates(found)


def _check_seeds(seeds: int) -> None:
    if seeds < 2:
        raise DomainError(f"a standard error needs at least 2 seeds; got {seeds}", value=seeds)


def estimates(draws: Sequence[dict[str, float]]) -> Estimates:
    """Return mean and standard error by name."""
    out = {}
    for name in draws[0]:
        values = np.array([found[name] for found in draws])
        mean, error = mean_and_error(values)
        out[name] = float(mean), float(error)
    return out


def _once(
    draw: Draw, inputs: Sequence[Input], J: float, K: float, generator: Generator, sequences: int
) -> dict[str, float]:
    tokens = [
        correlated(sequences, one.n_tokens, one.width, one.q, one.p, generator, mean=one.mean).requires_grad_()
        for one in inputs
    ]
    out = draw(generator)(*tokens)
    gradient = correlated(sequences, out.shape[-2], out.shape[-1], J, K, generator)
    found = dict(zip(("q", "p"), token_moments(out), strict=True))
    found["mean"] = float(out.detach().double().mean())
    for suffix, part in zip(("", "_memory"), torch.autograd.grad(out, tokens, gradient), strict=False):
        found["J" + suffix], found["K" + suffix] = token_moments(part)
    return found


def correlated(
    sequences: int, n_tokens: int, width: int, q: float, p: float, generator: Generator, *, mean: float = 0.0
) -> Tensor:
    """Return tokens of the standard model, shape ``(sequences, n_tokens, width)``.

    Raises:
        DomainError: unless ``mean^2 <= p <= q``.
    """
    if not mean * mean <= p + 1e-12 <= q + 2e-12:
        raise DomainError(f"the standard model needs mean^2 <= p <= q; got mean={mean:g}, p={p:g}, q={q:g}", value=p)
    shared = torch.randn(sequences, 1, width, generator=generator) * max(p - mean * mean, 0.0) ** 0.5
    own = torch.randn(sequences, n_tokens, width, generator=generator) * max(q - p, 0.0) ** 0.5
    tokens: Tensor = mean + shared + own
    return tokens


def linear(scale: float, *, bias: float = 0.0, fan_out: int, fan_in: int) -> Draw:
    """Return a linear map with weights of deviation ``scale / sqrt(fan_in)``."""

    def draw(generator: Generator) -> Map:
        weight = _matrix(fan_out, fan_in, scale, generator)
        offset = torch.randn(fan_out, generator=generator) * bias
        return lambda x: F.linear(x, weight, offset)

    return draw


def dropout(rate: float) -> Draw:
    """Return inverted dropout."""
    return lambda generator: lambda x: _dropped(x, rate, generator)


def activation(name: Activation) -> Draw:
    """Return an activation."""
    return lambda generator: activation_module(name)


def norm(what: Norm, width: int) -> Draw:
    """Return a norm with its gain.

    Raises:
        DomainError: for any but :class:`~fathometer.spec.LayerNorm` and :class:`~fathometer.spec.RMSNorm`.
    """
    if not isinstance(what, LayerNorm | RMSNorm):
        raise DomainError(f"simulated norms are LayerNorm and RMSNorm; got {type(what).__name__}", value=what)

    def draw(generator: Generator) -> Map:
        module = norm_module(what, width)
        gain = float(what.gain)
        return lambda x: gain * module(x)

    return draw


def softmax() -> Draw:
    """Return the softmax over the token axis, so that the entries of a row take the place of tokens."""
    return lambda generator: lambda x: x.softmax(-2)


def gated_unit(gate: float, mlp_in: float, name: Activation, *, width: int, hidden: int) -> Draw:
    """Return ``f(W_g x) * (W_1 x)``."""

    def draw(generator: Generator) -> Map:
        f, weights = activation_module(name), [_matrix(hidden, width, s, generator) for s in (gate, mlp_in)]
        return lambda x: f(F.linear(x, weights[0])) * F.linear(x, weights[1])

    return draw


def attention(
    branch: SelfAttention | CrossAttention, *, width: int, d_head: int | None = None, projected: bool = True
) -> Draw:
    """Return attention, of cross attention as a map of the tokens that ask and of the memory, both of one width.

    Raises:
        NotCoveredError: for biases, normalised queries and keys, centring, shared keys and values, or a memory of
            another width.
    """
    _refuse_uncovered(branch, width)
    causal = isinstance(branch, SelfAttention) and branch.causal
    size = width // branch.n_heads if d_head is None else d_head
    inner = size * branch.n_heads

    def draw(generator: Generator) -> Map:
        query, key, value = (_matrix(inner, width, s, generator) for s in (branch.query, branch.key, branch.value))
        output = _matrix(width, inner, branch.output, generator) if projected else torch.eye(inner)

        def heads(x: Tensor, weight: Tensor) -> Tensor:
            return F.linear(x, weight).view(*x.shape[:-1], branch.n_heads, size).transpose(-3, -2)

        def attend(x: Tensor, memory: Tensor | None = None) -> Tensor:
            seen = x if memory is None else memory
            scores = heads(x, query) @ heads(seen, key).transpose(-1, -2)
            scores = scores * (float(branch.score_multiplier) / size**0.5)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
            weights = _dropped(scores.softmax(-1), float(branch.attention_dropout), generator)
            return F.linear((weights @ heads(seen, value)).transpose(-3, -2).flatten(-2), output)

        return attend

    return draw


def _refuse_uncovered(branch: SelfAttention | CrossAttention, width: int) -> None:
    plain = {
        "value_bias": (0.0,),
        "output_bias": (0.0,),
        "qk_norm": (False,),
        "centred": (False,),
        "n_kv_heads": (None, branch.n_heads),
        "d_memory": (None, width),
    }
    for name, accepted in plain.items():
        if getattr(branch, name, accepted[0]) not in accepted:
            raise NotCoveredError(f"simulated attention with {name}={getattr(branch, name)!r}")


def perceptron(branch: MLP | GatedMLP, *, width: int) -> Draw:
    """Return an MLP or gated MLP."""
    hidden = hidden_width(branch, width)
    out = linear(float(branch.mlp_out), fan_out=width, fan_in=hidden)
    if isinstance(branch, GatedMLP):
        unit = gated_unit(float(branch.gate), float(branch.mlp_in), branch.activation, width=width, hidden=hidden)
        return chain(unit, out)
    first = linear(float(branch.mlp_in), bias=float(branch.in_bias), fan_out=hidden, fan_in=width)
    last = linear(float(branch.mlp_out), bias=float(branch.out_bias), fan_out=width, fan_in=hidden)
    return chain(first, activation(branch.activation), last)


def chain(*parts: Draw) -> Draw:
    """Return components one after another."""

    def draw(generator: Generator) -> Map:
        maps = [part(generator) for part in parts]

        def run(x: Tensor) -> Tensor:
            for part in maps:
                x = part(x)
            return x

        return run

    return draw


def residual(branch: Draw, *, skip_scale: float = 1.0, branch_scale: float = 1.0) -> Draw:
    """Return ``skip_scale * x + branch_scale * f(x)``."""

    def draw(generator: Generator) -> Map:
        f = branch(generator)
        return lambda x: skip_scale * x + branch_scale * f(x)

    return draw


def head(what: Head, *, width: int, n_outputs: int, token_std: float = 0.0) -> Draw:
    """Return a head; a tied one has a token table of deviation ``token_std``, independent of its input."""
    scale = token_std * width**0.5 if what.tied else float(what.scale)
    parts: list[Draw] = [] if what.norm is None else [norm(what.norm, width)]
    if what.pooling == "mean":
        parts.append(lambda generator: lambda x: x.mean(-2, keepdim=True))
    if what.pooling == "first":
        parts.append(lambda generator: lambda x: x[..., :1, :])
    parts.append(linear(scale * float(what.multiplier), fan_out=n_outputs, fan_in=width))
    return chain(*parts)


def token_stem(
    stem: TokenStem, frequencies: FloatArray, *, sequences: int, n_tokens: int, width: int
) -> Callable[[Generator], Tensor]:
    """Return a stem fed with words drawn from ``frequencies`` and two segments with a uniformly placed border."""
    chances = torch.as_tensor(frequencies)

    def draw(generator: Generator) -> Tensor:
        words = torch.multinomial(chances, sequences * n_tokens, replacement=True, generator=generator)
        x = _table(len(chances), width, stem.token, generator)[words].view(sequences, n_tokens, width)
        x = x + _table(n_tokens, width, stem.position, generator)
        border = torch.randint(0, n_tokens + 1, (sequences, 1), generator=generator)
        segments = (torch.arange(n_tokens) >= border).long()
        x = x + _table(2, width, stem.segment, generator)[segments]
        return _dropped(x, float(stem.dropout), generator)

    return draw


def patch_stem(stem: PatchStem, patches: Input, *, sequences: int, width: int) -> Callable[[Generator], Tensor]:
    """Return a stem fed with patches of the standard model, the class token in front."""

    def draw(generator: Generator) -> Tensor:
        n, fan_in, q, p, mean = patches
        pixels = correlated(sequences, n, fan_in, q, p, generator, mean=mean)
        x = F.linear(pixels, _matrix(width, fan_in, stem.patch, generator))
        if stem.class_token is not None:
            token = _table(1, width, stem.class_token, generator)
            x = torch.cat([token.expand(sequences, 1, width), x], dim=1)
        x = x + _table(x.shape[-2], width, stem.position, generator)
        return _dropped(x, float(stem.dropout), generator)

    return draw


def _matrix(fan_out: int, fan_in: int, scale: Scale, generator: Generator) -> Tensor:
    entries: Tensor = torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5
    return entries * float(scale)


def _table(rows: int, width: int, std: Scale, generator: Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator) * float(std)


def _dropped(x: Tensor, rate: float, generator: Generator) -> Tensor:
    if rate == 0.0:
        return x
    kept: Tensor = x * (torch.rand(x.shape, generator=generator) >= rate)
    return kept / (1 - rate)
