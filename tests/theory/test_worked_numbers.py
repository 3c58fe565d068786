"""Worked numbers, computed once by independent code and quoted to all printed digits.

n = 10, q = 1, p = 1/2, two pre-norm blocks, ReLU, without the gradient through the scores.
Recursions: Alekseev, arXiv:2604.11890v3; the finite-n rows are derived in the documentation.
"""

from __future__ import annotations

import numpy as np
import pytest

from fathometer.attention import Annealed, Closure, Uniform, UniformLargeN
from fathometer.kernels import activation_kernel, norm_kernel
from fathometer.observables import backward, forward
from fathometer.propagation import propagate
from fathometer.spec import Derf, DyT, LayerNorm, Norm, Scales, Transformer

SCALES = Scales(query=0.9, key=0.9, value=0.8, output=0.6, mlp_in=0.7, mlp_out=1.1)
COLUMNS = ("q1", "p1", "q2", "p2", "J0", "K0", "J1", "K1")
PRINTED = 5.1e-9  # half a unit of the eighth decimal

LN, DERF, DYT = LayerNorm(), Derf(alpha=0.8), DyT(alpha=0.8)
LARGE, UNIFORM, SOFTMAX = UniformLargeN(), Uniform(), Annealed(score_path=False)
ROWS: list[tuple[Norm, Closure, str]] = [
    (LN, LARGE, "1.41165000 0.80609224 1.83966494 1.14010754 1.57425438 0.06363958 1.21155561 0.01945664 0.06000667"),
    (LN, UNIFORM, "1.42317000 0.81854567 1.86192448 1.16459877 1.56651024 0.06262774 1.20862243 0.01925492 0.05910099"),
    (LN, SOFTMAX, "1.42704501 0.82030008 1.86847885 1.16768022 1.58366311 0.06037583 1.21315157 0.01859170 0.06827809"),
    (
        DERF,
        LARGE,
        "1.15652867 0.61134101 1.32656591 0.73486551 1.28632494 0.02131524 1.13013832 0.00893054 0.02375953",
    ),
    (
        DERF,
        UNIFORM,
        "1.16134504 0.61621018 1.33677028 0.74523433 1.28556224 0.02120417 1.12975460 0.00891090 0.02364393",
    ),
    (
        DERF,
        SOFTMAX,
        "1.16156334 0.61631371 1.33724560 0.74546756 1.28671656 0.02109394 1.13026226 0.00886048 0.02419090",
    ),
    (
        DYT,
        UNIFORM,
        "1.13405313 0.59675508 1.27892030 0.70329484 1.22990183 0.01708901 1.10634484 0.00741590 0.01864335",
    ),
]

# Averages at q = 1, p = 1/2: E NN', E NN at equal tokens first, then the slopes.
STATISTICS = [
    (norm_kernel(DERF), "0.3794768378 0.1811343562 0.4318819898 0.3723717646"),
    (norm_kernel(DYT), "0.3149849207 0.1517886740 0.3495781686 0.3103239309"),
    (norm_kernel(Derf(alpha=0.8, shift=0.25)), "0.3977005597 0.2068702685 0.4169807341 0.3567675693"),
    (activation_kernel("relu"), "0.5 0.3044988905 0.5 0.3333333333"),
    (activation_kernel("gelu"), "0.4252214826 0.2272949150 0.4558508656 0.3422672425"),
    (activation_kernel("silu"), "0.3557755198 0.1831696631 0.3794823516 0.3122796153"),
    (activation_kernel("tanh"), "0.3942944904 0.1863244132 0.4644029025 0.3847470284"),
    (activation_kernel("erf"), "0.4645590544 0.2163468959 0.5694100347 0.4501581581"),
]


@pytest.mark.parametrize(("norm", "closure", "printed"), ROWS, ids=lambda x: getattr(x, "kind", getattr(x, "name", "")))
def test_two_blocks(norm: Norm, closure: Closure, printed: str) -> None:
    spec = Transformer.uniform(n_layers=2, d_model=64, n_heads=4, norm=norm, scales=SCALES, activation="relu")
    trajectory = propagate(spec, n_tokens=10, q=1.0, p=0.5, closure=closure)
    q, p = trajectory.q[trajectory.borders], trajectory.p[trajectory.borders]
    gradients = backward(trajectory.transfer)
    jacobian = np.exp(gradients.log_norm)[trajectory.borders]
    alignment = jacobian * gradients.alignment[trajectory.borders]
    found = [q[1], p[1], q[2], p[2], jacobian[0], alignment[0], jacobian[1], alignment[1]]
    wanted = np.array(printed.split()[:-1], dtype=float)
    wrong = {
        name: (got, want) for name, got, want in zip(COLUMNS, found, wanted, strict=True) if abs(got - want) > PRINTED
    }
    assert wrong == {}


@pytest.mark.parametrize(("norm", "closure", "printed"), ROWS)
def test_alignment_of_a_perturbation(norm: Norm, closure: Closure, printed: str) -> None:
    spec = Transformer.uniform(n_layers=2, d_model=64, n_heads=4, norm=norm, scales=SCALES, activation="relu")
    trajectory = propagate(spec, n_tokens=10, q=1.0, p=0.5, closure=closure)
    ahead = forward(trajectory.transfer, trajectory.n_others)
    found = np.exp(ahead.log_norm[-1]) * ahead.alignment[-1]
    assert found == pytest.approx(float(printed.rsplit(maxsplit=1)[-1]), abs=PRINTED)


@pytest.mark.parametrize(("kernel", "printed"), STATISTICS)
def test_averages(kernel: object, printed: str) -> None:
    found = [
        average(1.0, 1.0, p)
        for average in (kernel.overlap, kernel.slope_overlap)  # type: ignore[attr-defined]
        for p in (1.0, 0.5)
    ]
    np.testing.assert_allclose(found, np.array(printed.split(), dtype=float), rtol=0, atol=6e-11)
