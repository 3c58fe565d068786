"""Figures and tables of arXiv:2604.11890v3.

Source: S. Alekseev, "Subcritical Signal Propagation at Initialization in Normalization-Free Transformers".

Conventions: pre-norm blocks with unit skips, ReLU MLPs of ratio 4, no biases, no mask, every norm (also LayerNorm's
gain) at its initial value; the depth is counted in blocks. Tokens start equiangular. Where the paper leaves out terms
that simulation resolves (finite token number, the alignment K, gradients through the scores), the lines are the full
recursion derived in the documentation, and ``apjn/approximations`` shows what each of them is worth.
"""

from __future__ import annotations

from fathometer.papers.apjn.approximations import approximations
from fathometer.papers.apjn.backward import backward, pooled
from fathometer.papers.apjn.depth_alpha import depth_alpha
from fathometer.papers.apjn.forward import forward
from fathometer.papers.apjn.growth import growth
from fathometer.papers.apjn.photographs import photographs
from fathometer.papers.apjn.sensitivity import sensitivity
from fathometer.papers.apjn.vit_large import vit_large
from fathometer.papers.item import Item
from fathometer.plotting import apjn as pictures

ITEMS: tuple[Item, ...] = (
    Item(
        name="apjn/forward",
        run=forward,
        draw=pictures.draw_forward,
        about="q, p and p/q over depth for nine alphas of Derf and for LayerNorm",
    ),
    Item(
        name="apjn/backward",
        run=backward,
        draw=pictures.draw_backward,
        about="averaged partial Jacobian norm from every block to the output, same networks",
    ),
    Item(
        name="apjn/pooled",
        run=pooled,
        draw=pictures.draw_pooled,
        about="gradient amplification of a mean-pooled loss, and how far it exceeds the APJN",
    ),
    Item(
        name="apjn/growth",
        run=growth,
        draw=pictures.draw_growth,
        about="power law against stretched exponential: closed-form and fitted constants of long runs",
    ),
    Item(
        name="apjn/photographs",
        run=photographs,
        draw=pictures.draw_photographs,
        about="fold errors by thirds of the depth: a real ViT on photographs, equal tokens against their Gram matrix",
    ),
    Item(
        name="apjn/approximations",
        run=approximations,
        draw=pictures.draw_approximations,
        about="what each published approximation of J gets wrong against simulation",
    ),
    Item(
        name="apjn/depth-alpha",
        run=depth_alpha,
        draw=pictures.draw_depth_alpha,
        about="APJN over depth and alpha, with the alpha that matches pre-LayerNorm at each depth",
    ),
    Item(
        name="apjn/sensitivity",
        run=sensitivity,
        draw=pictures.draw_sensitivity,
        about="largest stable learning rate of small ViTs against predicted amplification, with the rank correlation",
    ),
    Item(
        name="apjn/vit-large",
        run=vit_large,
        draw=pictures.draw_vit_large,
        about="Derf 0.5 and LayerNorm at the width and depth of the paper (full size), networks on top of theory",
    ),
)
