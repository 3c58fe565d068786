"""Gaussian expectations of pairs: how a norm or an activation acts on second moments and overlaps."""

from __future__ import annotations

from fathometer.kernels.activations import activation_kernel
from fathometer.kernels.norms import ProjectionKernel, norm_kernel
from fathometer.kernels.pair import check_pair
from fathometer.kernels.protocol import PairKernel
from fathometer.kernels.tabulated import FixedMomentKernel

__all__ = ["FixedMomentKernel", "PairKernel", "ProjectionKernel", "activation_kernel", "check_pair", "norm_kernel"]
