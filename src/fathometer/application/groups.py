r"""Learning rates per parameter for torch optimizers, so that a rate tuned on a narrow model serves a wide one.

Each parameter of a model gets its role, each role its factors from :mod:`fathometer.prescription.width_scaling`, and
parameters with equal settings one group. The update that AdamW makes of such a group is

.. math:: \theta \leftarrow (1 - \eta\,w)\,\theta - \lambda\,\eta\,\hat v / (\sqrt{\hat u} + \epsilon)

of arXiv:2304.02034v1, Eqs. 1.91-1.94: torch decays by ``lr * weight_decay`` of the group, so the group's decay is the
base's over the factor on the rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import DomainError, ModelError, NotCoveredError, SpecError
from fathometer.models.roles import ModelRoles, ParameterRole, read_roles
from fathometer.prescription.width_scaling import (
    Factors,
    FixedHeads,
    Optimizer,
    ScalingScheme,
    Sizes,
    width_factors,
)
from fathometer.prescription.width_table import WidthTable, width_table

Groups = torch.optim.Optimizer | Iterable[Mapping[str, Any]]


def parameter_groups(
    model: nn.Module,
    scheme: str | float | ScalingScheme,
    *,
    lr: float,
    base_width: int | None,
    batch: Any = None,
    roles: ModelRoles | None = None,
    weight_decay: float = 0.0,
    optimizer: Optimizer = "adamw",
    eps: float = 1e-8,
    scale_eps: bool = True,
    fixed: FixedHeads = "d_head",
    base_layers: int | None = None,
    blocks: str | Sequence[nn.Module] | None = None,
    overrides: Mapping[str, str] | None = None,
    groups: Groups | None = None,
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer that carry a tuned learning rate from a base width to this model.

    The base model need not exist: its sizes are this model's times ``base_width / d_model``, with the same patches,
    vocabulary, outputs and MLP ratio. At the base width all groups have the rate ``lr``, the decay ``weight_decay``
    (none for biases, norms and elementwise factors) and ``eps``. Frozen parameters are left out. A scheduler has to
    multiply all groups by one factor, as torch's do.

    Args:
        model: Any model whose parameters have roles, see :func:`fathometer.models.parameter_roles`.
        scheme: ``"neural-tangent"``, ``"hybrid"``, ``"maximal-update"``, ``"complete-p"``, s itself, or a scheme.
        lr: Learning rate at the base width.
        base_width: Width of the stream of the model that ``lr`` was tuned on. ``None`` gives the paper's absolute
            factors, for which ``lr`` is of another size, about ``n^(3/2)`` times larger.
        batch: Something the model can be called with.
        roles: What :func:`fathometer.models.read_roles` said, in place of a batch.
        weight_decay: At the base width.
        optimizer: ``"sgd"`` or ``"adamw"``, which the groups are for.
        eps: AdamW's epsilon at the base width.
        scale_eps: Whether epsilon follows the size of gradients, or is the same for all.
        fixed: What the base has in common with this model, the width of a head or the number of heads.
        base_layers: Number of blocks of the base, where it is another.
        blocks, overrides: As in :func:`fathometer.models.parameter_roles`.
        groups: Groups of your own, or an optimizer that has some. Each is split by role and keeps its options; its
            ``lr`` (or the argument) is multiplied, its ``weight_decay`` divided by the same factor, its ``eps``
            multiplied. A decay that a group states acts on its biases and norms too. An optimizer is not changed.
    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay``, ``eps`` (AdamW), ``name`` and ``role``.
    Raises:
        ModelError: for parameters without a role, in none or in two of the given groups, or not of this model.
        NotCoveredError: for one parameter that holds roles with different factors.
        DomainError, SpecError: for numbers out of range, an unknown scheme, and widths that heads do not fit.
    """
    for name, value, least in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0), ("eps", eps, 0.0)):
        if not (math.isfinite(value) and value >= least):
            raise DomainError(f"{name} must be finite and not negative; got {value!r}", value=value)
    known = roles if roles is not None else _read(model, batch, blocks, overrides)
    by_parameter = rows_by_parameter(known, model)
    table = scaling_table(
        known, scheme, base_width=base_width, optimizer=optimizer, fixed=fixed, base_layers=base_layers
    )
    settings: dict[int, tuple[str, Factors]] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        rows = by_parameter[name]
        settings[id(parameter)] = (_called(rows), _agreed([_factors(row, table, known, fixed) for row in rows], rows))
        names[id(parameter)] = name
    given = _given(groups, model, names) if groups is not None else [{"params": list(model.parameters())}]
    out: list[dict[str, Any]] = []
    for i, group in enumerate(given):
        split: dict[tuple[str, Factors], dict[str, Any]] = {}
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            label, factors = settings[id(parameter)]
            made = split.get((label, factors))
            if made is None:
                own = str(group.get("name", f"group {i}")) if groups is not None else ""
                made = split[(label, factors)] = _group(
                    group, factors, lr, weight_decay, eps, scale_eps, optimizer == "adamw"
                )
                made |= {"name": f"{own}: {label}" if own else label, "role": label.partition(" ")[0]}
            made["params"].append(parameter)
        out += split.values()
    return out


def scaling_table(
    roles: ModelRoles,
    scheme: str | float | ScalingScheme,
    *,
    base_width: int | None,
    optimizer: Optimizer = "adamw",
    fixed: FixedHeads = "d_head",
    base_layers: int | None = None,
) -> WidthTable:
    """Return what a scheme changes in a model from a base width on, one row per role; print it to read it.

    Args:
        roles: What :func:`fathometer.models.read_roles` said of the model.
        scheme, base_width, optimizer, fixed, base_layers: As in :func:`parameter_groups`.
    """
    heads = [] if roles.n_heads is None else [roles.n_heads, roles.n_kv_heads or roles.n_heads]
    queries = roles.of("query")
    return width_table(
        [sizes_of(row) for row in roles.roles],
        scheme,
        d_model=roles.d_model,
        base_width=base_width,
        optimizer=optimizer,
        fixed=fixed,
        n_heads=heads,
        d_head=queries[0].fan_out // heads[0] if queries and heads else None,
        n_layers=len(roles.blocks),
        base_layers=base_layers,
        tied=any(row.tied for row in roles.roles),
    )


def sizes_of(row: ParameterRole) -> Sizes:
    """Return a parameter as the scaling rule sees it."""
    return Sizes(row.role, row.fan_in, row.fan_out, row.layer is not None)


def _read(
    model: nn.Module, batch: Any, blocks: str | Sequence[nn.Module] | None, overrides: Mapping[str, str] | None
) -> ModelRoles:
    if batch is None:
        raise SpecError("roles are read off a forward pass: give a batch the model can be called with, or roles")
    return read_roles(model, batch, blocks=blocks, overrides=overrides)


def rows_by_parameter(roles: ModelRoles, model: nn.Module) -> dict[str, list[ParameterRole]]:
    """Return the rows of every parameter of a model.

    Raises:
        ModelError: for roles that are those of another model, naming the first parameter only one of them has.
    """
    out: dict[str, list[ParameterRole]] = {}
    for row in roles.roles:
        out.setdefault(row.parameter, []).append(row)
    names = [name for name, _ in model.named_parameters()]
    unknown = next((name for name in names if name not in out), None)
    if unknown is not None:
        raise ModelError(f"the given roles know no parameter {unknown!r}; they are those of another model")
    absent = next((name for name in out if name not in set(names)), None)
    if absent is not None:
        raise ModelError(f"the model has no parameter {absent!r} of the given roles; they are those of another model")
    return out


def _factors(row: ParameterRole, table: WidthTable, roles: ModelRoles, fixed: FixedHeads) -> Factors:
    return width_factors(
        sizes_of(row),
        table.scheme,
        d_model=roles.d_model,
        base_width=table.base_width,
        optimizer=table.optimizer,
        fixed=fixed,
        n_layers=table.n_layers,
        base_layers=table.base_layers,
    )


def _agreed(factors: Sequence[Factors], rows: Sequence[ParameterRole]) -> Factors:
    """Return the factors of all parts of a fused parameter: an optimizer has one rate per tensor."""
    for row, other in zip(rows[1:], factors[1:], strict=True):
        if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(factors[0], other, strict=True)):
            raise NotCoveredError(
                f"parameter {row.parameter!r} is fused: {rows[0].role!r} needs a rate times {factors[0].rate:.6g} and "
                f"{row.role!r} times {other.rate:.6g}, but a tensor has one; split it, or give it one role with "
                f"overrides={{{row.parameter!r}: {rows[0].role!r}}}"
            )
    return factors[0]


def _called(rows: Sequence[ParameterRole]) -> str:
    where = "" if rows[0].layer is None else " (blocks)"
    return "+".join(dict.fromkeys(row.role for row in rows)) + where


def _group(
    group: Mapping[str, Any],
    factors: Factors,
    lr: float,
    weight_decay: float,
    eps: float,
    scale_eps: bool,
    adaptive: bool,
) -> dict[str, Any]:
    """Return an empty group with the options of ``group`` and scaled rates."""
    made = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    made |= {"params": [], "lr": group.get("lr", lr) * factors.rate}
    if "initial_lr" in group:
        made["initial_lr"] = group["initial_lr"] * factors.rate
    decay = group["weight_decay"] / factors.rate if "weight_decay" in group else weight_decay * factors.decay
    made["weight_decay"] = decay
    if adaptive:
        made["eps"] = group.get("eps", eps) * (factors.epsilon if scale_eps else 1.0)
    return made


def _given(groups: Groups, model: nn.Module, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a user's groups with lists of parameters, each parameter of the model in exactly one."""
    source: Iterable[Mapping[str, Any]] = groups.param_groups if isinstance(groups, torch.optim.Optimizer) else groups
    out: list[dict[str, Any]] = []
    home: dict[int, int] = {}
    for i, group in enumerate(source):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ModelError(f"group {i} is no dictionary with 'params'; got {type(group).__name__}")
        if "role" in group:
            raise ModelError(f"group {i} has a role already: its rate has been scaled before; give the original groups")
        params = group["params"]
        members = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
        for member in members:
            if id(member) not in names:
                raise ModelError(
                    f"group {i} holds a parameter of shape {tuple(member.shape)} that is not of this model"
                )
            if id(member) in home:
                raise ModelError(f"parameter {names[id(member)]!r} is in two groups, {home[id(member)]} and {i}")
            home[id(member)] = i
        out.append({**group, "params": members})
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in home:
            raise ModelError(
                f"parameter {names[id(parameter)]!r} is in none of the {len(out)} given groups; add it, or freeze it"
            )
    return out
