"""Full-depth APJN: one reverse pass for all layers against one reverse pass per layer and draw.

Both sides use the same network, the same random output gradients and the same number of draws; the naive side keeps one
graph and differentiates the output once per (layer, draw), which is what a direct reading of the definition does.

    python benchmarks/apjn_speed.py
"""

from __future__ import annotations

import resource
import time

import numpy as np
import torch

from fathometer.measurement.batches import as_batch
from fathometer.measurement.sounding import sound
from fathometer.models import Stack, equiangular_tokens, reference_network
from fathometer.spec import preset

DEPTH, WIDTH, TOKENS, DRAWS = 48, 384, 64, 8


def naive(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Return ``J^{L,l}`` by one reverse pass per layer and draw."""
    streams = [tokens.clone().requires_grad_()]
    for block in model.blocks:
        streams.append(block(streams[-1]))
    out = np.zeros(DEPTH + 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        cotangent = torch.randn(streams[-1].shape, generator=generator)
        for layer, stream in enumerate(streams):
            (gradient,) = torch.autograd.grad(streams[-1], stream, cotangent, retain_graph=True)
            out[layer] += float(gradient.square().mean() / cotangent.square().mean()) / DRAWS
    return out


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Run a plain forward and backward, gradients of all weights included."""
    model(tokens).square().mean().backward()
    model.zero_grad(set_to_none=True)


def timed(function: object, *args: object, **kwargs: object) -> float:
    """Return the best of three wall times, seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*args, **kwargs)  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the figures."""
    spec = preset("vit", n_layers=DEPTH, d_model=WIDTH)
    model = reference_network(spec, seed=0).eval()
    tokens = equiangular_tokens(n_tokens=TOKENS, d_model=WIDTH, q=1.0, p=0.4, batch=1, seed=0)
    stack = Stack(tuple(f"blocks.{i}" for i in range(DEPTH)), tuple(model.blocks))
    batch = as_batch(tokens)
    lean = {"forward": False, "pooled": False}
    ours = timed(sound, model, stack, batch, seed=0, draws=DRAWS, watch=False, **lean)
    start = time.perf_counter()
    reference = naive(model, tokens)
    theirs = time.perf_counter() - start
    curve = np.exp(sound(model, stack, batch, seed=0, draws=DRAWS, **lean).curves["apjn_log"])
    print(f"APJN of {DEPTH} layers, d = {WIDTH}, {TOKENS} tokens, {DRAWS} draws")
    print(f"  one reverse pass per layer and draw  {theirs:8.2f} s")
    print(f"  one reverse pass                     {ours:8.2f} s   {theirs / ours:.1f} times faster")
    print(f"  J to the first layer                 {reference[0]:.4f} against {curve[0]:.4f}")
    plain = timed(step, model, tokens)
    whole = timed(sound, model, stack, batch, seed=0, draws=1, **lean)
    print(f"  forward + backward                   {plain:8.2f} s")
    print(f"  q, p, branches, entropy and J        {whole:8.2f} s   {whole / plain:.2f} times a forward + backward")
    print(
        f"  peak memory                          {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GB"
    )


if __name__ == "__main__":
    main()
