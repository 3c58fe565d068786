"""Figures of arXiv:2505.24333.

Source: A. Giorlandino and S. Goldt, "Two failure modes of deep transformers and how to avoid them: a unified theory of
signal propagation at initialisation".

Conventions: one head; skips are scaled, branches are not; scores scale as ``beta sqrt(ln n)``. The published theory is
the limit of infinitely many tokens (closure ``random_energy``); true averages over finite rows (``exact``) stand beside
it, and annealed ones. Where a number of the paper could not be confirmed, the item says what was chosen instead.
"""

from __future__ import annotations

from fathometer.papers.failure_modes.diagram import diagram
from fathometer.papers.failure_modes.figure_1 import figure_1
from fathometer.papers.failure_modes.figure_3 import figure_3
from fathometer.papers.failure_modes.figure_4 import figure_4
from fathometer.papers.failure_modes.figure_12 import figure_12
from fathometer.papers.failure_modes.training import training_check
from fathometer.papers.item import Item
from fathometer.plotting import failure_modes as pictures

ITEMS: tuple[Item, ...] = (
    Item(
        name="failure-modes/figure-1",
        run=figure_1,
        draw=pictures.draw_figure_1,
        about="cosine of tokens over 50 blocks, spread and condensed attention: four theories against networks",
    ),
    Item(
        name="failure-modes/figure-3",
        run=figure_3,
        draw=pictures.draw_figure_3,
        about="gradient of the query matrix over the inverse temperature, without a fitted constant",
    ),
    Item(
        name="failure-modes/figure-4",
        run=figure_4,
        draw=pictures.draw_figure_4,
        about="softmax averages over the score variance, and where annealed and asymptotic ones suffice",
    ),
    Item(
        name="failure-modes/figure-12",
        run=figure_12,
        draw=pictures.draw_figure_12,
        about="post-LN, pre-LN, no LN and gain control: cosine and condensation over 100 blocks",
    ),
    Item(
        name="failure-modes/diagram",
        run=diagram,
        draw=pictures.draw_diagram,
        about="trainable, rank collapse or entropy collapse over temperature and skip, asymptotic and exact",
    ),
    Item(
        name="failure-modes/training",
        run=training_check,
        draw=pictures.draw_training_check,
        about="which of a grid of small BERT-like models learns a masked-token task, against the predicted diagram",
    ),
)
