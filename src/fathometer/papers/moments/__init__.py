"""Figures and tables of arXiv:2403.09635.

Source: A. Kedia, M. A. Zaidi, S. Khyalia, J. Jung, H. Goka, H. Lee, "Transformers Get Stable: An End-to-End Signal
Propagation Theory for Language Models".

Conventions: moments are per entry and not centred; a layer is attention followed by an MLP; gradients are those of the
sum of a loss over tokens. Where a number of the paper could not be confirmed, the item says what was chosen instead.
"""

from __future__ import annotations

from fathometer.papers.item import Item
from fathometer.papers.moments.component_accuracy import component_accuracy
from fathometer.papers.moments.deep_vs_shallow import deep_vs_shallow
from fathometer.papers.moments.profiles import (
    deepscalelm_flat,
    post_norm_backward,
    pre_norm_backward,
    pre_norm_forward,
)
from fathometer.plotting.moments.component_accuracy import draw_component_accuracy
from fathometer.plotting.moments.deep_vs_shallow import draw_deep_vs_shallow
from fathometer.plotting.moments.profiles import draw_profiles

ITEMS: tuple[Item, ...] = (
    Item(
        name="moments/component-accuracy",
        run=component_accuracy,
        draw=draw_component_accuracy,
        about="moments of every component, forward and backward, refined and published, against simulation",
    ),
    Item(
        name="moments/figure-1",
        run=pre_norm_forward,
        draw=draw_profiles,
        about="pre-norm: the stream's second moment grows linearly with depth",
    ),
    Item(
        name="moments/figure-2",
        run=pre_norm_backward,
        draw=draw_profiles,
        about="pre-norm: gradients fall hyperbolically from the input to the output",
    ),
    Item(
        name="moments/figure-3",
        run=post_norm_backward,
        draw=draw_profiles,
        about="post-norm: gradients vanish exponentially towards the input",
    ),
    Item(
        name="moments/figure-4",
        run=deepscalelm_flat,
        draw=draw_profiles,
        about="DeepScaleLM: stream and gradients keep their size at every depth",
    ),
    Item(
        name="moments/deep-vs-shallow",
        run=deep_vs_shallow,
        draw=draw_deep_vs_shallow,
        about="byte-level language models of up to hundreds of blocks: DeepScaleLM against standard initialisations",
    ),
)
