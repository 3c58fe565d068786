"""A gradient exponent over initialisations, theory beside thousands of networks.

The paper's own definition of its gradient exponent could not be confirmed, and the candidates differ. This library
tells three apart (:mod:`fathometer.observables.exponents`): the token exponent, of gradients that differ between tokens
of an infinite stack, which at collapse is the angle exponent itself; the coherent exponent, of gradients that all
tokens share, which is never negative there; and the exponent ``ln(J_0 / J_L) / L`` of a stack of finite depth L and n
tokens, in which the second overtakes the first. What is shown is the last one, with isotropic noise at the output and
tokens of cosine 0.99 at the norm that blocks preserve: sixteen layers and 64 tokens, whatever the size. Of the three
only it has what the paper says of its figure: a zero line at smaller sigma_w than the angle exponent's and, as long as
both strengths are small, at a similar ratio of alpha_A to alpha_M.

The line moves with depth and number of tokens; that of a deeper stack, 64 layers and 256 tokens, is drawn beside it.
Measured values are means of logarithms over networks. They lie below theory, a logarithm of the mean, by half the
variance between networks over the depth, and the variance falls with width.

Source: the figure, Cowsik et al., arXiv:2403.02579; the exponent is derived in the documentation.
"""

from __future__ import annotations

from typing import Any

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.papers.geometry.architecture import described, network
from fathometer.papers.geometry.maps import (
    Line,
    Maps,
    Networks,
    angle_line,
    coarse_points,
    compute_maps,
    network_width,
    zero_line,
)
from fathometer.papers.item import Progress, Size, silent

N_LAYERS, N_TOKENS = 16, 64
COSINE = 0.99
DEEP_LAYERS, DEEP_TOKENS = 64, 256
_DRAWS_TIMES_WIDTH = 768  # the variance between networks falls with width: the error stays


def figure_5(size: Size, progress: Progress = silent) -> Maps:
    """Predict on the grid of the size, and measure on 12 x 12 points of width 128, or 24 x 24 of 256 at large sizes."""
    width = network_width(size)
    networks = Networks(
        spec=network(n_layers=min(N_LAYERS, size.n_layers), d_model=width),
        n_tokens=min(N_TOKENS, size.n_tokens),
        cosine=COSINE,
        draws=max(_DRAWS_TIMES_WIDTH // width, 2),
        points=coarse_points(size),
    )
    spec = networks.spec

    def lines(x: str, y: str) -> tuple[Line, ...]:
        what: dict[str, Any] = {"observable": "gradient_exponent", "cosine": COSINE, "readout": "isotropic"}
        deep = f"same at L = {DEEP_LAYERS}, n = {DEEP_TOKENS}"
        return (
            zero_line(spec, x, y, n_tokens=networks.n_tokens, label="gradient exponent = 0", **what),
            angle_line(spec, x, y, networks.n_tokens),
            zero_line(spec.with_depth(DEEP_LAYERS), x, y, n_tokens=DEEP_TOKENS, label=deep, **what),
        )

    maps = compute_maps(networks, "gradient_exponent", lines, fine=size.grid, progress=progress)
    return Maps(
        observable="gradient_exponent",
        title=f"Gradient exponent at L = {spec.n_layers}, n = {networks.n_tokens} (isotropic, cosine {COSINE})",
        maps=maps,
        about=described(
            size,
            d_model=width,
            n_layers=spec.n_layers,
            n_tokens=networks.n_tokens,
            cosine=COSINE,
            readout="isotropic",
            closure=DEFAULT_CLOSURE.name,
            weight_draws=networks.draws,
        ),
    )
