"""Tangent kernel by group: reverse passes with reductions on the way, against whole gradients and a whole Jacobian.

A vision transformer of 12 layers and width 256, one image of 64 x 64 pixels in patches of 16, 8 outputs; the full 8 x 8
kernel of every group of parameters. Memory is the peak of resident memory of a process that does nothing else; one that
only builds the model and runs it forward tells what they have in common.

    python benchmarks/tangent_speed.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import ViTConfig, ViTForImageClassification

from fathometer.measurement.tangent import measure_tangent_kernel
from fathometer.models.roles import parameter_roles

Table = dict[str, str]

DEPTH, WIDTH, OUTPUTS, ROUNDS = 12, 256, 8, 15


def network() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=DEPTH,
        hidden_size=WIDTH,
        num_attention_heads=8,
        intermediate_size=4 * WIDTH,
        image_size=64,
        patch_size=16,
        num_labels=OUTPUTS,
    )
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(1, 3, 64, 64)}


def forward(model: nn.Module, batch: dict[str, Tensor], table: Table) -> None:
    """What every contender needs: the model, its groups and one forward pass with its graph."""
    model(**batch).logits.sum()


def passes(model: nn.Module, batch: dict[str, Tensor], table: Table) -> None:
    """One forward and 8 reverse passes to all parameters; the gradients are dropped."""
    outputs = model(**batch).logits[0]
    for output in outputs:
        torch.autograd.grad(output, list(model.parameters()), retain_graph=True)


def ours(model: nn.Module, batch: dict[str, Tensor], table: Table) -> dict[str, np.ndarray]:
    """The measured kernel."""
    found = measure_tangent_kernel(model, batch, groups=table)
    return {group: matrix[0, :, 0] for group, matrix in found.matrices.items()}


def jacobian(model: nn.Module, batch: dict[str, Tensor], table: Table) -> dict[str, np.ndarray]:
    """The kernel from ``torch.func.jacrev`` over all parameters."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        rows = jacrev(lambda theta: functional_call(model, theta, (), batch).logits[0])(weights)
    kernels: dict[str, np.ndarray] = {}
    for name, group in table.items():
        part = rows[name].flatten(1)
        kernels[group] = kernels.get(group, 0) + (part @ part.T).double().numpy()
    return kernels


CONTENDERS: dict[str, Callable[..., Any]] = {"forward": forward, "passes": passes, "ours": ours, "jacrev": jacobian}


def groups() -> Table:
    model, batch = network()
    rows = parameter_roles(model, batch)
    assert not any(row.part for row in rows)
    return {row.parameter: row.role for row in rows}


def times(table: Table) -> dict[str, float]:
    """Return the best time of every contender, seconds; they take turns, so a busy machine is busy for all."""
    model, batch = network()
    best = dict.fromkeys(CONTENDERS, np.inf)
    for name in [*CONTENDERS] * ROUNDS:
        start = time.perf_counter()
        CONTENDERS[name](model, batch, table)
        best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak(name: str, table: Table) -> float:
    """Run one contender once and return the process's peak memory in MiB."""
    model, batch = network()
    CONTENDERS[name](model, batch, table)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def child(command: str, table: Table | None = None) -> Any:
    """Run a part of this file in a new process; it counts our memory at its birth as its own peak, so stay small."""
    words = [sys.executable, __file__, command]
    done = subprocess.run(words, input=json.dumps(table), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the figures."""
    table = child("groups")
    seconds = child("times", table=table)
    peaks = {name: child(name, table=table) for name in CONTENDERS}
    model, batch = network()
    found, naive = ours(model, batch, table), jacobian(model, batch, table)
    gap = max(
        float(np.abs(found[group] - naive[group]).max() / np.abs(naive[group]).max())
        for group in naive
        if group != "key_bias"  # zero
    )
    gradient = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    print(
        f"Tangent kernel by group: {DEPTH} layers, d = {WIDTH}, {OUTPUTS} outputs; one gradient is {gradient:.0f} MiB"
    )
    labels = {"passes": "8 reverse passes", "ours": "kernel, reduced on the way", "jacrev": "kernel from jacrev"}
    for name, label in labels.items():
        more = peaks[name] - peaks["forward"]
        print(
            f"  {label:28s} {seconds[name]:7.3f} s  {seconds[name] / seconds['passes']:5.2f} times the passes;"
            f"  peak {peaks[name]:5.0f} MiB, {more:4.0f} over a forward pass, {more / gradient:5.2f} gradients"
        )
    ratio = (peaks["jacrev"] - peaks["forward"]) / (peaks["ours"] - peaks["forward"])
    print(f"  memory of jacrev over ours {ratio:.1f}; largest relative difference of any group {gap:.1e}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "groups":
        print(json.dumps(groups()))
    elif sys.argv[1] == "times":
        print(json.dumps(times(json.load(sys.stdin))))
    else:
        print(json.dumps(peak(sys.argv[1], json.load(sys.stdin))))
