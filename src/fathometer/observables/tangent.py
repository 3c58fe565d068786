r"""The neural tangent kernel of a whole network at initialisation, by parameter group.

One step of gradient descent at learning rates :math:`\eta \lambda_G` moves the outputs by
:math:`-\eta \sum_b \Theta_{ab}\, \partial\mathrm{loss}/\partial z_b`, with the tangent kernel the sum over groups G of
:math:`\Theta_G = \lambda_G \sum_\mu \partial_\mu z_a\, \partial_\mu z_b`. It is of order one at every width if
:math:`\lambda_G = \Lambda_G / \text{fan-in}`, which is where tables of learning rates come from. The head acts
without a skip,

.. math:: \Theta_{\rm out} = \sigma_h^2\, \hat F \circ \Theta, \qquad \Theta_{\rm head} = m^2 F, \qquad
          \Theta_{\rm head\ bias} = 1 .

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.80-1.84, 1.89-1.124 and 1.178-1.190.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, ExchangeableRows, JointRows, SampledRows, as_closure
from fathometer.errors import BatchError, NotCoveredError, SpecError, nearest
from fathometer.observables.tangent_head import check_epsilon, check_factors, read_out
from fathometer.propagation.stem import StemGram, stem_gram
from fathometer.propagation.tangent import Group, propagate_tangent
from fathometer.spec import Network, SelfAttention, refuse_arrays

FloatArray = NDArray[np.float64]

#: Roles of parameters that have a tangent kernel.
TANGENT_ROLES = (
    "token_embedding",
    "patch_embedding",
    "position_embedding",
    "segment_embedding",
    "class_token",
    "query",
    "key",
    "value",
    "output",
    "gate",
    "mlp_in",
    "mlp_out",
    "head",
    "patch_embedding_bias",
    "query_bias",
    "key_bias",
    "value_bias",
    "output_bias",
    "gate_bias",
    "mlp_in_bias",
    "mlp_out_bias",
    "head_bias",
    "norm_gain",
    "norm_bias",
)

_HEADS = 4096


@dataclass(frozen=True, kw_only=True)
class TangentKernel:
    r"""Kernels of one output coordinate over all read-out tokens, mean over weights.

    Rows and columns are the read-out tokens: sample by sample every token, or one for each sample where the head
    pools. Parameters the network need not have (biases, a norm's offset, a position table of zeros) have a kernel too:
    the one they have if they exist and start at their given value. Add up those that exist, see :meth:`total`.

    Attributes:
        output: Second moments of the outputs, shape ``(n, n)``.
        groups: Tangent kernel by parameter role and layer, learning-rate factors included; ``None`` is the layer of
            stem, head and final norm.
        output_se, group_se, role_se: Standard errors over replicates; zero unless attention was sampled.
        n_samples: Number of samples.
        n_tokens: Number of tokens of each; where two of them stand for many that are all alike, that number, and not
            the size of the matrices.
    """

    output: FloatArray
    groups: Mapping[Group, FloatArray]
    output_se: FloatArray
    group_se: Mapping[Group, FloatArray]
    role_se: Mapping[str, FloatArray]
    n_samples: int
    n_tokens: int

    @property
    def roles(self) -> dict[str, FloatArray]:
        """Tangent kernel by parameter role, summed over layers."""
        return _by_role(self.groups)

    def total(self, roles: Iterable[str]) -> FloatArray:
        """Return the sum over the roles a model has.

        Raises:
            SpecError: for a role this network has no kernel for.
        """
        found = self.roles
        wanted = list(roles)
        for role in wanted:
            if role not in found:
                raise SpecError(f"this network has no tangent kernel of {role!r}{nearest(role, found)}")
        return np.asarray(sum((found[role] for role in wanted), np.zeros(self.output.shape)))


def tangent_kernel(
    network: Network,
    *,
    tokens: Any | None = None,
    patches: Any | None = None,
    patch_gram: Any | None = None,
    positions: Any | None = None,
    segments: Any | None = None,
    rates: Mapping[str, float] | None = None,
    averaging: Closure | JointRows | str | None = None,
    norm_epsilon: float = 0.0,
    n_tokens: int | None = None,
) -> TangentKernel:
    r"""Predict the tangent kernel of plain gradient descent for every parameter group, in evaluation mode.

    Leading order in the width at fixed depth, tokens and samples, with many heads; measured means at width n exceed it
    by a few percent of ``100/n``, single networks scatter by ``sqrt(2 / n_heads)`` in queries and keys. A tied head is
    treated as independent of the stem, which is right for outputs that are not among the tokens.

    Args:
        network: Stem, blocks and head, scalar fields.
        tokens, patches, patch_gram, positions, segments: What the network sees, see :func:`stem_gram`.
        rates: Learning-rate factor :math:`\Lambda` by role, 1 where not given; the rate of a matrix is
            :math:`\eta\Lambda/\text{fan-in}`, that of a vector or a row of a table :math:`\eta\Lambda`.
        averaging: How the softmax is averaged. :class:`fathometer.attention.QuadratureRows` is exact for up to three
            tokens a sample; :class:`fathometer.attention.SampledRows` takes some dozens, with standard errors (the
            default, 4096 heads); a closure or its name takes any number, exact for tokens that are alike. Where tokens
            repeat, closures err by several percent, in queries and keys by more than half at dozens of tokens.
        norm_epsilon: What LayerNorm and RMSNorm add to the mean square under the root.
        n_tokens: Let two given tokens of one sample stand for so many that are all alike, with a closure (by default
            the exact one): rows and columns of the result are those of any two of them. For bidirectional attention
            and no class token. Milliseconds at any number of tokens.
    Returns:
        The kernels. Cost: as :func:`fathometer.propagation.propagate_tangent`, on one core for twelve layers: 64 tokens
        with a closure take seconds; 16 tokens with sampled heads as well, and 16 times as long for twice as many.
    Raises:
        SpecError: for fields that are arrays, or an unknown role in ``rates``.
        DomainError: for a rate or an epsilon that is negative or not finite.
        BatchError, NotCoveredError: see :func:`stem_gram` and the averages.

    >>> from fathometer.spec import Head, PatchStem, Scales, Transformer, LayerNorm
    >>> scales = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
    >>> trunk = Transformer.uniform(n_layers=1, d_model=64, n_heads=4, norm=LayerNorm(), scales=scales)
    >>> network = Network(stem=PatchStem(patch=1.0), trunk=trunk, head=Head())
    >>> kernel = tangent_kernel(network, patch_gram=[[1.0, 0.5], [0.5, 1.0]])
    >>> round(float(kernel.roles["head"][0, 0]), 6)
    1.0
    """
    checked_network(network, norm_epsilon)
    check_factors(rates or {}, TANGENT_ROLES)
    stem = stem_gram(
        network.stem, tokens=tokens, patches=patches, patch_gram=patch_gram, positions=positions, segments=segments
    )
    if averaging is None:
        averaging = SampledRows(n_heads=_HEADS) if n_tokens is None else DEFAULT_CLOSURE
    chosen = as_closure(averaging) if isinstance(averaging, str) else averaging
    if n_tokens is not None:
        chosen = _exchangeable(network, stem, chosen, n_tokens)
    parts: list[Closure | JointRows] = [*chosen.parts()] if isinstance(chosen, SampledRows) else [chosen]
    runs = [_network_kernels(network, stem, part, dict(rates or {}), norm_epsilon) for part in parts]
    outputs = np.stack([output for output, _ in runs])
    by_group = {group: np.stack([groups[group] for _, groups in runs]) for group in runs[0][1]}
    return TangentKernel(
        output=outputs.mean(axis=0),
        groups={group: values.mean(axis=0) for group, values in by_group.items()},
        output_se=_error(outputs),
        group_se={group: _error(values) for group, values in by_group.items()},
        role_se={role: _error(values) for role, values in _by_role(by_group).items()},
        n_samples=stem.n_samples,
        n_tokens=stem.n_tokens if n_tokens is None else n_tokens,
    )


def _exchangeable(network: Network, stem: StemGram, averaging: Closure | JointRows, n_tokens: int) -> ExchangeableRows:
    """Return the averages of tokens that are all alike, or refuse."""
    if isinstance(averaging, JointRows):
        raise NotCoveredError(f"n_tokens with {averaging.name} averages; give a closure for exchangeable tokens")
    if stem.gram.shape != (2, 2) or stem.n_samples != 1:
        raise BatchError(
            f"with n_tokens two tokens of one sample stand for all; got {stem.n_samples} samples of {stem.n_tokens}"
        )
    branches = [s.branch for block in network.trunk.blocks for s in block.sublayers]
    if "class_token" in stem.overlaps or any(
        isinstance(b, SelfAttention) and (b.causal or b.centred) for b in branches
    ):
        raise NotCoveredError(
            "exchangeable tokens with a class token, a causal mask or centred attention; give all tokens instead"
        )
    return ExchangeableRows(averaging, n_tokens)


def _network_kernels(
    network: Network, stem: StemGram, averaging: Closure | JointRows, rates: Mapping[str, float], epsilon: float
) -> tuple[FloatArray, dict[Group, FloatArray]]:
    """Return the output's second moments and the tangent kernels by group, read out."""
    head = network.head
    found = propagate_tangent(
        network.trunk,
        stem.gram,
        averaging=averaging,
        kernels=stem.overlaps,
        n_samples=stem.n_samples,
        norm_epsilon=epsilon,
    )
    output, groups = read_out(
        found.gram, found.kernels, head, network.stem, d_model=network.trunk.d_model, place=None, epsilon=epsilon
    )
    alike = averaging.n_tokens if isinstance(averaging, ExchangeableRows) else None
    return _pooled(output, stem, head.pooling, alike), {
        group: rates.get(group[0], 1.0) * _pooled(kernel, stem, head.pooling, alike) for group, kernel in groups.items()
    }


def _pooled(kernel: FloatArray, stem: StemGram, pooling: str, alike: int | None) -> FloatArray:
    """Read out every token, the mean or the first of every sample; two tokens may stand for many."""
    if pooling == "none":
        return kernel
    if pooling == "mean" and alike is not None:
        return np.asarray(kernel[:1, :1] + (alike - 1) * kernel[:1, 1:]) / alike
    blocks = kernel.reshape(stem.n_samples, stem.n_tokens, stem.n_samples, stem.n_tokens)
    return np.asarray(blocks.mean(axis=(1, 3)) if pooling == "mean" else blocks[:, 0, :, 0])


def _by_role(groups: Mapping[Group, FloatArray]) -> dict[str, FloatArray]:
    roles: dict[str, FloatArray] = {}
    for (role, _), kernel in groups.items():
        roles[role] = roles[role] + kernel if role in roles else kernel
    return roles


def _error(replicates: FloatArray) -> FloatArray:
    count = len(replicates)
    if count == 1:
        return np.zeros(replicates.shape[1:])
    return np.asarray(replicates.std(axis=0, ddof=1) / np.sqrt(count))


def checked_network(network: Network, epsilon: float) -> None:
    """Refuse networks whose fields are arrays, and an epsilon that is negative or not finite."""
    refuse_arrays(network, "a tangent kernel", "network")
    check_epsilon(epsilon)
