"""Drawing a model's weights at the scale a width-scaling scheme asks for, from scales known at a base width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fathometer.application.drawing import Draw, draw
from fathometer.application.groups import rows_by_parameter, scaling_table, sizes_of
from fathometer.application.multipliers import ResidualMultiplier, modules_sharing, remove_multipliers
from fathometer.errors import DomainError, NotCoveredError, SpecError, nearest
from fathometer.models import check_weights
from fathometer.models.identify import rms
from fathometer.models.roles import ModelRoles, ParameterRole, read_roles
from fathometer.prescription.width_scaling import FixedHeads, ScalingScheme, is_weight, width_factors
from fathometer.prescription.width_table import WidthTable


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """One matrix, table or bias that was drawn: which, and the standard deviation, zero for biases."""

    parameter: ParameterRole
    std: float


@dataclass(frozen=True, kw_only=True)
class WidthsApplied:
    """What :func:`initialize_widths` did.

    Attributes:
        scaling: The scheme's factors.
        rows: Everything drawn.
        multipliers: Module names and the factor put on their outputs.
        seed: Seed of the draw.
        notes: What was left alone, and what to know.
    """

    scaling: WidthTable
    rows: tuple[DrawnRow, ...]
    multipliers: tuple[tuple[str, float], ...]
    seed: int
    notes: tuple[str, ...]
    _hooks: tuple[ResidualMultiplier, ...] = field(repr=False, compare=False)

    def table(self) -> str:
        """Return the scheme's table, one line per drawn weight, the multipliers and the notes."""
        width = max((len(row.parameter.key) for row in self.rows), default=0)
        lines = [self.scaling.table(), "", f"{'role':<20}  {'parameter':<{width}}  std"]
        lines += [f"{r.parameter.role:<20}  {r.parameter.key:<{width}}  {r.std:.6g}" for r in self.rows]
        lines += [f"output of {name} times {factor:.6g}" for name, factor in self.multipliers]
        return "\n".join([*lines, *self.notes])

    def remove(self) -> None:
        """Take the multipliers out of the model again; the weights stay as drawn."""
        for hook in self._hooks:
            hook.remove()


def initialize_widths(
    model: nn.Module,
    scheme: str | float | ScalingScheme,
    *,
    base_width: int,
    base_stds: Literal["read"] | Mapping[str, float],
    batch: Any = None,
    roles: ModelRoles | None = None,
    seed: int = 0,
    fixed: FixedHeads = "d_head",
    base_layers: int | None = None,
    blocks: str | Sequence[nn.Module] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> WidthsApplied:
    """Draw every matrix and table of a model with the standard deviation a scheme gives it at this width, in place.

    That is ``std(base) * sqrt(variance(width) / variance(base))``, Gaussian. Biases become zero; norms and elementwise
    factors stay, and so do frozen parameters. The draw depends on the seed and the parameter's name only. A tied
    head's logits, and every branch where the scheme scales branches with depth, get a multiplier (a forward hook, kept
    out of ``state_dict``); multipliers that are in the model already are taken out first. Learning rates are the other
    half: :func:`fathometer.application.parameter_groups`.

    Args:
        model: Any model whose parameters have roles.
        scheme: Name, s, or scheme.
        base_width: Width of the stream of the base.
        base_stds: Role to standard deviation at the base width, as from :func:`role_stds` of a base model; or
            ``"read"``, for recipes with one number at every width (such as 0.02): what the weights of this model have
            now is what those of the base have. Reading what an earlier call has drawn scales it once more.
        batch, roles: A batch the model can be called with, or what :func:`fathometer.models.read_roles` said.
        seed: Which draw.
        fixed, base_layers: As in :func:`fathometer.application.parameter_groups`.
        blocks, overrides: As in :func:`fathometer.models.parameter_roles`.
    Raises:
        SpecError: for roles without a base std, an unknown scheme, or widths that heads do not fit.
        DomainError: for a std that is negative or not finite.
        NotCoveredError: for a multiplier that no module can carry.
        ModelError, BatchError: as :func:`fathometer.models.parameter_roles`.
    """
    if roles is None and batch is None:
        raise SpecError("roles are read off a forward pass: give a batch the model can be called with, or roles")
    known = roles if roles is not None else read_roles(model, batch, blocks=blocks, overrides=overrides)
    rows_by_parameter(known, model)
    check_weights(model)
    table = scaling_table(known, scheme, base_width=base_width, fixed=fixed, base_layers=base_layers)
    parameters = dict(model.named_parameters())
    rows = [
        DrawnRow(parameter=row, std=_std(row, parameters[row.parameter], base_stds, table, known, fixed))
        for row in known.roles
        if parameters[row.parameter].requires_grad and (is_weight(row.role) or row.role.endswith("_bias"))
        if row.role not in ("norm_bias", "qk_norm_bias")
    ]
    places = _places(model, known, table)
    remove_multipliers(model)
    draw(
        model,
        [Draw(row.parameter.parameter, row.parameter.key, row.parameter.of, row.std) for row in rows],
        seed=seed,
        label="scaled",
    )
    hooks = tuple(ResidualMultiplier(model.get_submodule(name), factor) for name, factor in places)
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    notes = ["biases were set to zero; norms and elementwise factors are left as they are"]
    if table.output_multiplier != 1.0 and known.of("head_bias"):
        notes.append("the multiplier of the tied head acts on its bias too, whose effective rate it lowers")
    zero = sorted({row.parameter.role for row in rows if row.std == 0 and is_weight(row.parameter.role)})
    notes += [f"zero stays zero: {', '.join(zero)}"] if zero else []
    notes += [f"frozen parameters are left as they are: {', '.join(frozen)}"] if frozen else []
    return WidthsApplied(
        scaling=table, rows=tuple(rows), multipliers=tuple(places), seed=seed, notes=tuple(notes), _hooks=hooks
    )


def role_stds(model: nn.Module, roles: ModelRoles) -> dict[str, float]:
    """Return the root mean square of the entries of every role that is drawn, over all layers.

    Args:
        model: A freshly initialised model of the base width.
        roles: Its roles.
    """
    parameters = dict(model.named_parameters())
    squares: dict[str, tuple[float, int]] = {}
    for row in roles.roles:
        if is_weight(row.role):
            view = row.of(parameters[row.parameter]).detach()
            total, count = squares.get(row.role, (0.0, 0))
            squares[row.role] = (total + float(view.double().square().sum()), count + view.numel())
    return {role: math.sqrt(total / count) for role, (total, count) in squares.items()}


def _std(
    row: ParameterRole,
    parameter: nn.Parameter,
    base_stds: Literal["read"] | Mapping[str, float],
    table: WidthTable,
    roles: ModelRoles,
    fixed: FixedHeads,
) -> float:
    if not is_weight(row.role):
        return 0.0
    if isinstance(base_stds, str):
        if base_stds != "read":
            raise SpecError(f"base_stds must be 'read' or a mapping of roles to numbers; got {base_stds!r}")
        base = rms(row.of(parameter))
    elif row.role not in base_stds:
        raise SpecError(f"base_stds has no number for the role {row.role!r}{nearest(row.role, base_stds)}")
    else:
        base = float(base_stds[row.role])
        if not (math.isfinite(base) and base >= 0):
            raise DomainError(f"base_stds[{row.role!r}] must be finite and not negative; got {base!r}", value=base)
    factors = width_factors(
        sizes_of(row), table.scheme, d_model=roles.d_model, base_width=table.base_width, fixed=fixed
    )
    return base * factors.std


def _places(model: nn.Module, roles: ModelRoles, table: WidthTable) -> list[tuple[str, float]]:
    """Return which module outputs to multiply by what."""
    places: list[tuple[str, float]] = []
    if table.output_multiplier != 1.0:
        heads = modules_sharing(model, {row.parameter for row in roles.roles if row.tied})
        if not heads:
            raise NotCoveredError(
                f"the head multiplies by the token embedding outside any module of its own; multiply its logits by "
                f"{table.output_multiplier:.6g} in the model's code"
            )
        places += [(name, table.output_multiplier) for name in heads]
    if table.residual_multiplier != 1.0:
        if not roles.exits:
            raise NotCoveredError(
                f"a block could not be read; multiply branches by {table.residual_multiplier:.6g} in the model's code"
            )
        places += [(name, table.residual_multiplier) for name in roles.exits]
    return places
