"""The angle exponent over initialisations, theory beside thousands of networks, with its edge of chaos.

Two maps: over residual strength alpha_A = alpha_M and sigma_w, and over alpha_A and alpha_M at sigma_w = 2. Networks
are measured at equal tokens by gradients that differ between tokens, which shrink and grow by the same factor as angles
do, with far less noise. Four layers, 32 tokens and eight weight draws at every point, whatever the size.

Source: the exponent and its maps, Cowsik et al., arXiv:2403.02579; the closed form of the edge, and that gradients
    measure it, are derived in the documentation.
"""

from __future__ import annotations

from fathometer.papers.geometry.architecture import described, network
from fathometer.papers.geometry.maps import Maps, Networks, angle_line, coarse_points, compute_maps, network_width
from fathometer.papers.item import Progress, Size, silent

N_LAYERS, N_TOKENS, DRAWS = 4, 32, 8


def figure_4(size: Size, progress: Progress = silent) -> Maps:
    """Predict on the grid of the size, and measure on 12 x 12 points of width 128, or 24 x 24 of 256 at large sizes."""
    networks = Networks(
        spec=network(n_layers=min(N_LAYERS, size.n_layers), d_model=network_width(size)),
        n_tokens=min(N_TOKENS, size.n_tokens),
        cosine=1.0,
        draws=DRAWS,
        points=coarse_points(size),
    )
    maps = compute_maps(
        networks,
        "angle_exponent",
        lambda x, y: (angle_line(networks.spec, x, y, networks.n_tokens),),
        fine=size.grid,
        progress=progress,
    )
    return Maps(
        observable="angle_exponent",
        title="Angle exponent of equal tokens",
        maps=maps,
        about=described(
            size,
            d_model=networks.spec.d_model,
            n_layers=networks.spec.n_layers,
            n_tokens=networks.n_tokens,
            weight_draws=DRAWS,
        ),
    )
