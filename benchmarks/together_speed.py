"""Time of training many small transformers: stacked and together, against one after another.

Both sides take the same steps of the same optimizer on the same batches. The second runs a few of the networks and is
scaled to all. What counts is the time of further steps: two runs of different length are subtracted, and of the task's
test part one sample is left. The two sides alternate, and the best of several repeats counts on each. Run it on an idle
machine: the stacked side lives on memory bandwidth and, with two threads, on both cores being free.

    python benchmarks/together_speed.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

NETWORKS, ALONE = 120, 3
DEPTH, WIDTH, BATCH = 24, 16, 16
SHORT, LONG, REPEATS = 2, 10, 3


def per_step(runs: Sequence[Callable[..., object]]) -> NDArray[np.float64]:
    """Return the wall time of one further step of each run, seconds."""
    times = np.zeros((2, REPEATS, len(runs)))
    for repeat in range(-1, REPEATS):  # one round more than counts: the first touches memory for the first time
        for i, steps in enumerate((SHORT, LONG)):
            for j, run in enumerate(runs):
                start = time.perf_counter()
                run(steps=steps)
                times[i, repeat, j] = time.perf_counter() - start
    short, long = times.min(axis=1)
    return (long - short) / (LONG - SHORT)


def compare(threads: int) -> None:
    """Print the figures at one number of threads."""
    import torch

    from fathometer.spec import LayerNorm, Scales, Transformer
    from fathometer.training import PatchClassifier, StackedClassifier, load_digits, train, train_together

    torch.set_num_threads(threads)
    digits = load_digits()
    data = replace(digits, test=digits.test[:1], test_labels=digits.test_labels[:1])
    scales = {"query": 0.55, "key": 0.55, "value": 0.55, "output": 0.55, "mlp_out": 1.1}
    for n_heads in (1, 2):
        grid, spec = (
            Transformer.uniform(
                n_layers=DEPTH, d_model=WIDTH, n_heads=n_heads, norm=LayerNorm(), scales=Scales(**scales, mlp_in=mlp_in)
            )
            for mlp_in in (np.linspace(0.5, 2.0, NETWORKS), 0.55)
        )
        for optimizer in ("sgd", "adamw"):
            options = {"data": data, "rate": 1e-3, "batch_size": BATCH, "optimizer": optimizer}
            stack = StackedClassifier(grid)
            networks = [PatchClassifier(spec, seed=seed) for seed in range(ALONE)]
            together = partial(train_together, stack, **options)
            alone = [partial(train, network, **options) for network in networks]
            times = 1e3 * per_step([together, *alone])
            many, one = times[0] / NETWORKS, times[1:].mean()
            print(
                f"  {threads} thread{'s' * (threads > 1):1s}  {n_heads} head{'s' * (n_heads > 1):1s}  {optimizer:6s}"
                f"one after another {one:6.2f} ms  together {many:6.2f} ms  ratio {one / many:5.1f}",
                flush=True,
            )


def main() -> None:
    """Print the figures for one thread and for two."""
    if len(sys.argv) > 1:
        compare(int(sys.argv[1]))
        return
    print(f"{NETWORKS} transformers of {DEPTH} layers, width {WIDTH}, batch {BATCH}: a step of one network")
    for threads in (1, 2):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, __file__, str(threads)], check=True, env=environment)


if __name__ == "__main__":
    main()
