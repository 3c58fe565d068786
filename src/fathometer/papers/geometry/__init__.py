"""Figures of arXiv:2403.02579.

Source: A. Cowsik, T. Nebabu, X.-L. Qi, S. Ganguli, "Geometric Dynamics of Signal Propagation Predict Trainability of
Transformers".

Conventions: exponents are those of squared quantities; q and p are per coordinate; a layer is attention followed by an
MLP. Where a number of the paper could not be confirmed, the item says what was chosen instead.
"""

from __future__ import annotations

from fathometer.papers.geometry.figure_2 import figure_2
from fathometer.papers.geometry.figure_3 import figure_3
from fathometer.papers.geometry.figure_4 import figure_4
from fathometer.papers.geometry.figure_5 import figure_5
from fathometer.papers.geometry.trainability import trainability
from fathometer.papers.item import Item
from fathometer.plotting import geometry as pictures

ITEMS: tuple[Item, ...] = (
    Item(
        name="geometry/figure-2",
        run=figure_2,
        draw=pictures.draw_flows,
        about="flow of token norm and cosine over depth: ordered and chaotic networks against the map of one block",
    ),
    Item(
        name="geometry/figure-3",
        run=figure_3,
        draw=pictures.draw_recovery,
        about="tokens in two groups become exchangeable: ratio of mean overlaps over depth, with its decay exponent",
    ),
    Item(
        name="geometry/figure-4",
        run=figure_4,
        draw=pictures.draw_maps,
        about="angle exponent over initialisations: theory, measured maps and the edge of chaos",
    ),
    Item(
        name="geometry/figure-5",
        run=figure_5,
        draw=pictures.draw_maps,
        about="gradient exponent of a finite stack over initialisations: theory, measured maps and zero lines",
    ),
    Item(
        name="geometry/trainability",
        run=trainability,
        draw=pictures.draw_trainability,
        about="loss of small deep transformers, trained together, against their exponents at initialisation",
    ),
)
