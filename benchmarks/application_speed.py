"""Time of a training step with and without residual multipliers, and of a scheme on a large model.

A small GPT-2 is trained; its vocabulary is small, so that blocks, where the multipliers are, make nearly all of the
step. The large one, by default of a billion parameters (4 GB), is initialised by DeepScaleLM, beside one pass of normal
random numbers over all of its parameters.

    python benchmarks/application_speed.py [LAYERS_OF_THE_LARGE_MODEL]
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from transformers import GPT2Config, GPT2Model

from fathometer.application import initialize, remove_multipliers, write_spec
from fathometer.spec import preset, with_field

LAYERS, WIDTH, TOKENS, BATCH, ROUNDS = 6, 384, 128, 4, 40


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Return the wall time of one training step, seconds."""
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    model(ids).last_hidden_state.square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def large(n_layers: int) -> None:
    """Initialise a wide GPT-2, and draw its parameters once for comparison."""
    config = GPT2Config(
        vocab_size=256, n_layer=n_layers, n_embd=1792, n_head=28, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    model = GPT2Model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    initialize(model, "deepscalelm", ids, dropout=0.0)
    taken = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    once = time.perf_counter() - start
    print(f"{count / 1e9:.2f} billion parameters: initialize {taken:.1f} s, one pass of normal numbers {once:.1f} s")


def main() -> None:
    """Print the figures."""
    large(int(sys.argv[1]) if len(sys.argv) > 1 else 26)
    sizes = {"vocab_size": 256, "n_layer": LAYERS, "n_embd": WIDTH, "n_head": WIDTH // 64}
    config = GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)
    model = GPT2Model(config).eval()
    ids = torch.randint(0, 256, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    target = with_field(preset("gpt2", n_layers=LAYERS, d_model=WIDTH), "residual_strength", 0.3)
    start = time.perf_counter()
    applied = write_spec(model, ids, target)
    print(f"write_spec: {time.perf_counter() - start:.2f} s, {len(applied.residual)} multipliers")
    plain = copy.deepcopy(model)
    remove_multipliers(plain)
    networks = [(m.train(), torch.optim.AdamW(m.parameters(), lr=1e-4)) for m in (model, plain)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):  # alternating, so that drifts of the machine cancel
        for kept, (network, optimizer) in zip(times, networks, strict=True):
            kept.append(step(network, optimizer, ids))
    ratio = statistics.median(a / b for a, b in zip(times[0][3:], times[1][3:], strict=True))
    print(f"training step without multipliers: {1e3 * statistics.median(times[1][3:]):.0f} ms; with them x {ratio:.3f}")
    print(f"fastest of each: x {min(times[0]) / min(times[1]):.3f}")


if __name__ == "__main__":
    main()
