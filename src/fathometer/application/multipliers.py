r"""Residual factors put into a network from outside, without touching its code.

A pre-norm block of sublayers

.. math:: x_j = \mu_j\, x_{j-1} + \tau_j\, f_j(N(x_{j-1}))

is computed by one without factors, :math:`y_j = y_{j-1} + c_j f_j(N(y_{j-1}))`, when

.. math:: y_j = x_j / g_j, \qquad g_j = \mu_1 \cdots \mu_j, \qquad c_j = \tau_j / g_j,

and the block's output is multiplied by :math:`g_m`: LayerNorm and RMSNorm do not see the size of what they are given,
up to their epsilon. A norm of that kind on the stream (post-norm) resets :math:`g` to one. Factors that the network's
own code already applies are divided out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fathometer.errors import ModelError, NotCoveredError, nearest
from fathometer.spec import LayerNorm, Norm, RMSNorm, Sublayer


class ResidualMultiplier:
    """A forward hook that multiplies the first floating-point tensor a module returns.

    It survives ``copy.deepcopy`` and ``pickle`` together with its module, and adds nothing to ``state_dict``.

    Attributes:
        muted: Whether the output is passed on as it is.
    """

    def __init__(self, module: nn.Module, factor: float) -> None:
        self._factor = factor
        self.muted = False
        self._handle: RemovableHandle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the module's output, multiplied; nothing while muted, which leaves it the very same tensor."""
        return None if self.muted else _scaled_first(output, self._factor)[0]

    @property
    def residual_factor(self) -> float:
        """What outputs are multiplied by at the moment: one while muted."""
        return 1.0 if self.muted else self._factor

    def remove(self) -> None:
        """Detach from the module; a second call does nothing."""
        self._handle.remove()


def multipliers_in(model: nn.Module) -> list[tuple[nn.Module, ResidualMultiplier]]:
    """Return every residual multiplier in a model with the module it belongs to."""
    return [
        (module, hook)
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, ResidualMultiplier)
    ]


def multiplier_table(model: nn.Module) -> dict[str, float]:
    """Return the factor on every module's output, by full module name: what a ``state_dict`` does not hold."""
    names = {id(module): name for name, module in model.named_modules()}
    table: dict[str, float] = {}
    for module, hook in multipliers_in(model):
        name = names[id(module)]
        table[name] = table.get(name, 1.0) * hook.residual_factor
    return table


def insert_multipliers(model: nn.Module, table: Mapping[str, float]) -> None:
    """Put the multipliers of :func:`multiplier_table` into a model of the same modules, in place of any it has.

    Raises:
        ModelError: naming the module the model does not have.
    """
    modules = dict(model.named_modules())
    for name in table:
        if name not in modules:
            raise ModelError(f"the model has no module {name!r} to multiply the output of{nearest(name, modules)}")
    remove_multipliers(model)
    for name, factor in table.items():
        ResidualMultiplier(modules[name], float(factor))


def remove_multipliers(model: nn.Module) -> None:
    """Take every residual multiplier out of a model, a copied or unpickled one included; weights stay."""
    for _, hook in multipliers_in(model):
        hook.remove()


def modules_sharing(model: nn.Module, parameters: Collection[str]) -> list[str]:
    """Return the full names of modules, other than embeddings, that hold any of the named parameters themselves."""
    shared = {id(parameter) for name, parameter in model.named_parameters() if name in parameters}
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and any(id(p) in shared for p in module.parameters(recurse=False))
    ]


def insertable_factors(
    own: Sequence[Sublayer], target: Sequence[Sublayer], *, tolerance: float
) -> tuple[list[float], list[float]]:
    """Return the multipliers that turn a block's own residual factors into others.

    Args:
        own: The block's sublayers as its code computes them.
        target: The same sublayers with the wanted factors.
        tolerance: Relative error of the own factors, where they were read off tensors.
    Returns:
        The factor on every branch's output; and the size of the wanted stream over the computed one before every
        sublayer and at the end, whose last entry is the factor on the block's output.
    Raises:
        NotCoveredError: where no multiplier outside the code has the same effect, saying what to edit.
    """
    branches: list[float] = []
    sizes = [1.0]
    for j, (mine, wanted) in enumerate(zip(own, target, strict=True)):
        skip, scale = float(wanted.skip_scale), float(wanted.branch_scale)
        edit = (
            f"edit the block's forward by hand: sublayer {j} must compute "
            f"{skip:g} * x + {scale:g} * {'attention' if mine.is_attention else 'mlp'}(...)"
        )
        if sizes[-1] != 1.0 and not _ignores_size(mine.input_norm):
            raise NotCoveredError(
                f"the skip factor in front of sublayer {j} cannot be inserted: {_called(mine.input_norm)} before its "
                f"branch sees the size of the stream; edit the block's forward by hand, from "
                f"{float(target[j - 1].skip_scale):g} * x in sublayer {j - 1} on"
            )
        own_skip, own_scale = float(mine.skip_scale), float(mine.branch_scale)
        if math.isclose(skip, own_skip, rel_tol=tolerance):
            ratio = 1.0
        elif skip == 0 or own_skip == 0:
            raise NotCoveredError(
                f"a skip factor of {skip:g} where the code has {own_skip:g} cannot be inserted; {edit}"
            )
        else:
            ratio = skip / own_skip
        size = sizes[-1] * ratio
        if math.isclose(scale, own_scale, rel_tol=tolerance):
            branches.append(1 / size)
        elif scale == 0 or own_scale == 0:
            raise NotCoveredError(
                f"a branch factor of {scale:g} where the code has {own_scale:g} cannot be inserted: a fixed multiplier "
                f"of zero would never learn; {edit}, with a trainable factor"
            )
        else:
            branches.append(scale / (own_scale * size))
        if mine.stream_norm is not None:
            if not _ignores_size(mine.stream_norm) and size != 1.0:
                raise NotCoveredError(
                    f"the skip factor of sublayer {j} cannot be inserted: {_called(mine.stream_norm)} on the stream "
                    f"sees its size; {edit}"
                )
            size = 1.0
        sizes.append(size)
    return branches, sizes


def _ignores_size(norm: Norm | None) -> bool:
    return isinstance(norm, (LayerNorm, RMSNorm))


def _called(norm: Norm | None) -> str:
    return "the absence of a norm" if norm is None else type(norm).__name__


def _scaled_first(value: Any, factor: float) -> tuple[Any, bool]:
    """Return ``value`` with its first floating-point tensor multiplied, and whether there was one."""
    if isinstance(value, Tensor):
        return (value * factor, True) if value.is_floating_point() else (value, False)
    if isinstance(value, (tuple, list)):
        items = list(value)
        for i, item in enumerate(items):
            items[i], done = _scaled_first(item, factor)
            if done:
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items), True
    return value, False
