"""How fast a grid of specs goes through the theory, beside a hand-written loop of the same recursion.

    python benchmarks/diagram_speed.py

Ratios are of one run on one machine. The loop below is the recursion for pre-LayerNorm blocks with norm-preserving
residuals, annealed attention without score path, erf MLPs, vectorised over 200 x 200 points and written by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import fathometer as fm
from fathometer.attention import Annealed
from fathometer.diagrams import measured_diagram
from fathometer.observables import exponents, failure_modes, gradient_exponent, stable_state
from fathometer.papers.failure_modes.architecture import network
from fathometer.propagation import propagate_ends

N_TOKENS, N_LAYERS, COUPLING = 256, 100, 1.0
WIDTHS = np.linspace(0.5, 8.0, 200)[:, None]
STRENGTHS = np.linspace(0.05, 0.9, 200)[None, :]


def architecture(activation: str, n_layers: int, widths: Any, strengths: Any) -> fm.Transformer:
    scales = fm.Scales(query=COUPLING, key=1.0, value=1.0, output=1.0, mlp_in=widths, mlp_out=1.0)
    spec = fm.Transformer.uniform(
        n_layers=n_layers, d_model=256, n_heads=1, norm=fm.LayerNorm(), activation=activation, scales=scales
    )
    return fm.with_field(spec, "residual_strength", strengths)


def by_hand() -> tuple[Any, Any]:
    """Return q and ln J of the erf network, one numpy expression a line."""
    n = N_TOKENS
    a = np.broadcast_to(STRENGTHS**2, (200, 200)).copy()
    s = np.broadcast_to(WIDTHS**2, (200, 200)).copy()
    r = 1 - a
    kappa0 = 2 / np.pi * np.arcsin(2 * s / (1 + 2 * s))
    kappa1 = 4 / np.pi * s / np.sqrt(1 + 4 * s)
    q, p = np.full((200, 200), 0.8), np.full((200, 200), 0.4)
    token, shared = np.ones((200, 200)), np.zeros((200, 200))
    log_scale = np.zeros((200, 200))
    for layer in range(N_LAYERS):
        c = p / q
        v = COUPLING**2 * (1 - c)
        y2 = 1 / (1 + (n - 1) * np.exp(-v))
        y12 = 1 / (1 + (n - 1) * np.exp(-v * c))
        g = a / q
        token, shared = (
            token * (r + g * y2) + shared * g * (1 - y2) / (n - 1),
            token * g * (n - 1) * y12 + shared * (r + g * (1 - y12)),
        )
        q, p = r * q + a * (c + (1 - c) * y2), r * p + a * (c + (1 - c) * y12)
        c = p / q
        g = a / q
        x = 2 * s * c
        token = token * (r + g * kappa1)
        shared = shared * (r + g * 4 / np.pi * s / np.sqrt((1 + 2 * s) ** 2 - x**2))
        q, p = r * q + a * kappa0, r * p + a * 2 / np.pi * np.arcsin(x / (1 + 2 * s))
        if layer % 16 == 15:
            log_scale += np.log(token)
            shared, token = shared / token, np.ones((200, 200))
    return q, np.log(token) + log_scale


def timed(run: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    best, result = np.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def ours(activation: str) -> Any:
    spec = architecture(activation, N_LAYERS, WIDTHS, STRENGTHS)
    return propagate_ends(spec, n_tokens=N_TOKENS, q=0.8, p=0.4, closure=Annealed(score_path=False))


def main() -> None:
    reference, (q, log_j) = timed(by_hand)
    print(f"200 x 200 points, {N_LAYERS} layers, by hand (erf): {reference:.3f} s")
    for activation in ("erf", "relu", "gelu", "tanh", "silu", "gelu_tanh"):
        seconds, ends = timed(lambda activation=activation: ours(activation))
        print(f"  {activation:>9}: {seconds:.3f} s, {seconds / reference:.2f} times the loop")
        if activation == "erf":
            worst = max(np.max(np.abs(ends.q - q)), np.max(np.abs(ends.gradient_log() - log_j)))
            print(f"             largest difference from the loop {worst:.1e}")
    wide = architecture("tanh", 16, np.linspace(0.5, 8.0, 400)[:, None], np.linspace(0.05, 0.9, 400)[None, :])
    seconds, _ = timed(lambda: exponents(wide, n_tokens=N_TOKENS))
    print(f"400 x 400 angle, token and coherent exponents at collapse (tanh): {seconds:.3f} s")
    seconds, _ = timed(lambda: gradient_exponent(wide, n_tokens=N_TOKENS, cosine=0.5))
    print(f"400 x 400 gradient exponent of 16 layers (tanh): {seconds:.3f} s")
    seconds, _ = timed(lambda: stable_state(wide, n_tokens=N_TOKENS), repeats=1)
    print(f"400 x 400 stable states and phases (tanh): {seconds:.3f} s")
    spec = replace(architecture("tanh", 4, 2.0, 0.35), d_model=128)
    axes = {"x": ("mlp_in", np.linspace(0.5, 8.0, 24)), "y": ("residual_strength", np.linspace(0.05, 0.9, 24))}
    seconds, _ = timed(lambda: measured_diagram(spec, **axes, n_tokens=32, seeds=8), repeats=1)
    print(f"24 x 24 angle exponents measured on 4608 networks (d = 128, 32 tokens, 4 layers): {seconds:.0f} s")
    skips, betas = np.geomspace(0.1, 4.0, 256)[:, None], np.linspace(0.1, 4.0, 256)[None, :]
    deep = network(d_model=256, n_layers=60, n_tokens=512, beta=betas, skip_scale=skips)
    for closure in ("exact", "random_energy"):
        seconds, _ = timed(lambda closure=closure: failure_modes(deep, n_tokens=512, closure=closure), repeats=2)
        print(f"256 x 256 failure modes of 60 blocks, {closure} closure: {seconds:.1f} s")


if __name__ == "__main__":
    main()
