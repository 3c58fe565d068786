"""How each component moves the mean, second moment and cross moment of tokens and of gradients."""

from fathometer.observables.components.attention import Attention
from fathometer.observables.components.blocks import (
    FeedForward,
    Pooling,
    attention_block,
    feed_forward_block,
    head_map,
)
from fathometer.observables.components.composition import Chain, Residual
from fathometer.observables.components.cross_attention import CrossAttentionMoments
from fathometer.observables.components.elementwise import ActivationMap, Dropout, GatedUnit, Linear, relu_of_mean
from fathometer.observables.components.finite_width import HeadWidth
from fathometer.observables.components.norms import NormMap, sample_correlation
from fathometer.observables.components.softmax import Softmax
from fathometer.observables.components.state import Component, Form, GradientState, TokenState

__all__ = [
    "ActivationMap",
    "Attention",
    "Chain",
    "Component",
    "CrossAttentionMoments",
    "Dropout",
    "FeedForward",
    "Form",
    "GatedUnit",
    "GradientState",
    "HeadWidth",
    "Linear",
    "NormMap",
    "Pooling",
    "Residual",
    "Softmax",
    "TokenState",
    "attention_block",
    "feed_forward_block",
    "head_map",
    "relu_of_mean",
    "sample_correlation",
]
