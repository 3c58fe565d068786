"""Figures of arXiv:2304.02034.

Source: E. Dinan, S. Yaida, S. Zhang, "Effective Theory of Transformers at Initialization".

Conventions: tangent kernels are those of plain gradient descent, summed over layers, mean over tokens; rates are
those of the narrowest model, at which all recipes are alike. Tasks and sizes are ours.
"""

from __future__ import annotations

from fathometer.papers.effective.ablation import ablation
from fathometer.papers.effective.kernels import kernels, tangent_kernel_slopes
from fathometer.papers.effective.transfer import transfer_language, transfer_vision
from fathometer.papers.item import Item
from fathometer.plotting import effective as pictures

ITEMS: tuple[Item, ...] = (
    Item(
        name="effective/kernels",
        run=kernels,
        draw=pictures.draw_kernels,
        about="kernels and tangent kernels by group against width: networks beside the limit of infinite width",
    ),
    Item(
        name="effective/tangent-slopes",
        run=tangent_kernel_slopes,
        draw=pictures.draw_slopes,
        about="how each group's tangent kernel grows with width, under the rules and under one rate for all",
    ),
    Item(
        name="effective/transfer-language",
        run=transfer_language,
        draw=pictures.draw_transfer,
        about="best learning rate of language models against width: one rate for all and three scaling schemes",
    ),
    Item(
        name="effective/transfer-vision",
        run=transfer_vision,
        draw=pictures.draw_transfer,
        about="best learning rate of small vision transformers against width, the same four recipes",
    ),
    Item(
        name="effective/position-ablation",
        run=ablation,
        draw=pictures.draw_ablation,
        about="which group's rate explains the gain on images: recipes with fast and slow position embeddings",
    ),
)
