"""Time of a prediction, and of importing the package.

python benchmarks/prediction_speed.py
"""

from __future__ import annotations

import subprocess
import sys
import time

from fathometer.observables import predict
from fathometer.prescription import compare_schemes
from fathometer.spec import DyT, Scales, Transformer, preset


def best(spec: Transformer, repeats: int = 7) -> float:
    """Return the best wall time of a prediction, milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        predict(spec, n_tokens=196, q=0.27, p=0.11)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print the figures."""
    scales = Scales(query=0.55, key=0.55, value=0.55, output=0.55, mlp_in=0.55, mlp_out=1.1)
    dyt = Transformer.uniform(
        n_layers=128, d_model=768, n_heads=12, norm=DyT(alpha=0.8), activation="gelu", scales=scales
    )
    for label, spec in (
        ("128 layers, LayerNorm and GELU", preset("vit", n_layers=128)),
        ("128 layers, DyT and GELU", dyt),
        ("1000 layers, LayerNorm and GELU", preset("vit", n_layers=1000)),
    ):
        print(f"  {label:36s}{best(spec):8.2f} ms")
    deep = preset("vit", n_layers=1000)
    compare_schemes(deep, n_tokens=196, p=0.4)  # builds the tables of softmax averages
    start = time.perf_counter()
    compared = len(compare_schemes(deep, n_tokens=196, p=0.4).rows)
    label = f"1000 layers, each of {compared} schemes"
    print(f"  {label:36s}{1e3 * (time.perf_counter() - start) / compared:8.2f} ms")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import fathometer"], check=True)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - start
    print(f"  {'import fathometer, over bare Python':36s}{1e3 * (min(times) - bare):8.2f} ms")


if __name__ == "__main__":
    main()
