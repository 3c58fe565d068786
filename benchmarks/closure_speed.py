"""Time of the exact closure: building a table, a million points, one scalar.

python benchmarks/closure_speed.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fathometer.attention.exact import Exact


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the figures."""
    closure, generator = Exact(), np.random.default_rng(0)
    print(f"  {'tokens':>8s}{'table, s':>12s}{'1e6 points, s':>16s}{'scalar, us':>14s}")
    for n in (64, 1024, 10**6):
        build = seconds(lambda n=n: closure.statistics(n, 1.0, 0.5))
        variance, correlation = 8 * math.log(n) * generator.random(10**6), generator.random(10**6)
        points = seconds(lambda n=n, v=variance, c=correlation: closure.statistics(n, v, c))
        scalar = min(seconds(lambda n=n: closure.statistics(n, 1.3, 0.4)) for _ in range(1000))
        print(f"  {n:8d}{build:12.2f}{points:16.2f}{1e6 * scalar:14.0f}")
    counts = np.arange(1.0, 4097.0)
    build = seconds(lambda: closure.statistics(counts, np.ones(4096), 0.0))
    points = seconds(lambda: closure.statistics(counts, generator.random((240, 4096)), 0.0))
    print(f"  {'1..4096':>8s}{build:12.2f}{points:16.2f}")


if __name__ == "__main__":
    main()
