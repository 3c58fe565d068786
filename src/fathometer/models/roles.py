"""The role of every parameter of a whole model: stem, blocks, norms and head.

Block matrices get theirs from the reading of the block; everything else from what one forward pass does with it (see
:mod:`fathometer.models.parameter_uses`): a table that is looked up, a vector that is added, a gain of a norm, a map in
front of the blocks or behind them. Names decide nothing but the order of separate query, key and value maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fathometer.errors import BatchError, FathometerError, ModelError, nearest
from fathometer.models.finding import Stack, find_stacks, named_stack
from fathometer.models.parameter_role import PARAMETER_ROLES, ModelRoles, ParameterRole
from fathometer.models.parameter_uses import evaluating, watch_parameters
from fathometer.models.reading import check_weights
from fathometer.models.role_reader import RoleReader
from fathometer.models.trace import hooked, watch_attention

__all__ = ["PARAMETER_ROLES", "ModelRoles", "ParameterRole", "parameter_roles", "read_roles"]


def parameter_roles(
    model: nn.Module,
    batch: Any,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> tuple[ParameterRole, ...]:
    """Return the role of every parameter of a model.

    Costs two forward passes, three where a model has several stacks, and the memory of all activations of one.

    Args:
        model: A torch module with residual blocks. It is run in evaluation mode and left as found.
        batch: A tensor, a tuple or a dict of tensors the model can be called with, at least two tokens long.
        blocks: Path of the block container, or the blocks, where they are not found on their own.
        overrides: Parameter name or glob pattern to role, for what cannot be told or is told wrongly.
    Returns:
        One row for each parameter, one for each slice of a fused one, in the order of ``model.named_parameters()``.
    Raises:
        ModelError: for a parameter without a role, or with two; the message says which override settles it. Also for
            meta, sharded or quantised parameters, and overrides that match nothing.
        BatchError: if the model does not run on the batch.
    """
    return read_roles(model, batch, blocks=blocks, overrides=overrides).roles


def read_roles(
    model: nn.Module,
    batch: Any,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> ModelRoles:
    """Return what :func:`parameter_roles` does, with the model's sizes."""
    _check_parameters(model)
    settled = _overridden(model, overrides or {})
    with evaluating(model):
        try:
            if blocks is not None:
                stacks = [named_stack(model, blocks)]
            else:
                stacks = _apart(model, find_stacks(model, lambda: _call(model, batch)), lambda: _call(model, batch))
            names = _storages(model)
            record = watch_parameters(model, stacks, lambda: _call(model, batch), names)
        except FathometerError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise BatchError(f"the model does not run on the batch: {type(error).__name__}: {line}") from error
        return RoleReader(model, stacks, record, batch, settled).read()


def _call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a tensor, a tuple, a dict, or anything that knows how to call it."""
    call: Callable[[nn.Module], Any] | None = getattr(batch, "call", None)
    if call is not None:
        return call(model)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _apart(model: nn.Module, stacks: list[Stack], forward: Callable[[], Any]) -> list[Stack]:
    """Return the best stack and every other attending one that lies apart from it, as a decoder does, in order."""
    kept = stacks[:1]
    for stack in stacks[1:]:
        names = {name for other in kept for name in other.names}
        nested = any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a in stack.names for b in names)
        kept += [] if nested else [stack]
    if len(kept) > 1:
        attending: set[str] = set()
        firsts = {stack.names[0]: stack.blocks[0] for stack in kept}
        inside: list[str] = []
        with (
            torch.no_grad(),
            hooked(firsts, before=lambda name, *_: inside.append(name), after=lambda name, *_: inside.remove(name)),
            watch_attention(lambda _: attending.update(inside)),
        ):
            forward()
        kept = [stack for stack in kept if stack is kept[0] or stack.names[0] in attending]
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(kept, key=lambda stack: position[stack.names[0]])


def _storages(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by the address of its storage.

    Raises:
        ModelError: for parameters that are slices of one storage.
    """
    out: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        address = parameter.untyped_storage().data_ptr()
        if address in out:
            raise ModelError(f"parameters {out[address]!r} and {name!r} are slices of one storage; give each its own")
        out[address] = name
    return out


def _check_parameters(model: nn.Module) -> None:
    """Refuse parameters whose entries are not here, or not plain floating-point numbers."""
    for name, parameter in model.named_parameters():
        sharded = (
            hasattr(parameter, "placements") or hasattr(parameter, "local_shards") or hasattr(parameter, "_local_shard")
        )
        if sharded or (parameter.numel() == 0 and not parameter.is_meta):
            raise ModelError(
                f"parameter {name!r} is sharded or empty on this process; read roles before distributing the model"
            )
    check_weights(model)


def _overridden(model: nn.Module, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return the role that overrides give to parameters, by canonical name."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    every = {name: canonical[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    out: dict[str, tuple[str, str]] = {}
    for pattern, role in overrides.items():
        if role not in PARAMETER_ROLES:
            raise ModelError(f"the override of {pattern!r} names no role {role!r}{nearest(str(role), PARAMETER_ROLES)}")
        matched = {every[name] for name in every if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise ModelError(f"the override {pattern!r} matches no parameter{nearest(pattern, every)}")
        for name in matched:
            earlier = out.setdefault(name, (pattern, role))
            if earlier[1] != role:
                raise ModelError(
                    f"parameter {name!r} is given two roles by overrides: {earlier[1]!r} by {earlier[0]!r} and "
                    f"{role!r} by {pattern!r}"
                )
    return {name: role for name, (_, role) in out.items()}
