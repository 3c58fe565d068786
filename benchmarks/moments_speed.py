"""Time of the moments of every component over 1000 layers, tables of the softmax apart.

python benchmarks/moments_speed.py
"""

from __future__ import annotations

import time

from fathometer.observables import predict
from fathometer.observables.model_moments import moments
from fathometer.prescription import apply_scheme
from fathometer.spec import Transformer, preset

GIVEN = {"n_tokens": 196, "q": 0.27, "p": 0.11}


def timed(function, spec: Transformer, repeats: int = 9) -> tuple[float, float]:
    """Return the first and the best wall time, milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(spec, **GIVEN)
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], min(times[1:])


def main() -> None:
    """Print the figures."""
    deep = preset("vit", n_layers=1000)
    specs = {
        "pre-norm, equal layers": deep,
        "post-norm, equal layers": preset("bert", n_layers=1000),
        "gated, equal layers": preset("llama", n_layers=1000).bidirectional(),
        "DeepScaleLM, 1000 different layers": apply_scheme(deep, "deepscalelm", r0=0.3, n_tokens=100).spec,
        "DS-Init, different query and key scales": apply_scheme(preset("bert", n_layers=1000), "ds-init").spec,
    }
    print(f"  {'1000 layers, ms':42s}{'first call':>12s}{'best':>9s}")
    for label, spec in specs.items():
        first, best = timed(moments, spec)
        print(f"  {label:42s}{first:12.1f}{best:9.2f}")
    first, best = timed(predict, deep)
    print(f"  {'for comparison, predict (curves only)':42s}{first:12.1f}{best:9.2f}")


if __name__ == "__main__":
    main()
