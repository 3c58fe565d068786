"""Which parameters of a model belong to which group: every trainable one to exactly one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fathometer.errors import ModelError, nearest
from fathometer.models.weights import WeightSlice


@dataclass(frozen=True, kw_only=True)
class GroupEntry:
    """A parameter, or rows or columns of one, and the group it belongs to.

    Attributes:
        group: The group's name.
        parameter: The parameter's first name in the model.
        part: Rows or columns, or ``None`` for the whole parameter.
    """

    group: str
    parameter: str
    part: WeightSlice | None = None


def group_entries(model: nn.Module, groups: Mapping[str | WeightSlice, str]) -> list[GroupEntry]:
    """Return the entries of a table of groups, checked against the model.

    Args:
        model: The model.
        groups: Group of every parameter name, or of every :class:`WeightSlice` where a parameter is fused of several. A
            tied parameter may go by any of its names. Frozen parameters may be left out.
    Raises:
        ModelError: for a parameter, or part of one, in no group or in two, and for unknown names.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    table: dict[str, list[GroupEntry]] = {}
    for key, group in groups.items():
        name = key if isinstance(key, str) else key.parameter
        if name not in every:
            raise ModelError(f"the model has no parameter {name!r}{nearest(name, every)}")
        entry = GroupEntry(group=group, parameter=first[id(every[name])], part=None if isinstance(key, str) else key)
        known = table.setdefault(entry.parameter, [])
        if entry not in known:
            known.append(entry)
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in table]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(f"in no group: {shown}; give each a group, as in groups={{{missing[0]!r}: 'mlp_in'}}")
    for name, entries in table.items():
        _check_parts(name, tuple(every[name].shape), entries)
    return [entry for entries in table.values() for entry in entries]


def _check_parts(name: str, shape: tuple[int, ...], entries: Sequence[GroupEntry]) -> None:
    """Refuse parts that overlap, leave something out, or run along different axes."""
    parts = [entry.part for entry in entries if entry.part is not None]
    if not parts:
        if len(entries) > 1:
            raise ModelError(f"{name!r} is in two groups: {entries[0].group!r} and {entries[1].group!r}")
        return
    axis = parts[0].axis
    if len(parts) < len(entries) or any(part.axis != axis for part in parts):
        raise ModelError(f"{name!r} is in two groups: {', '.join(sorted({repr(entry.group) for entry in entries}))}")
    if not 0 <= axis < len(shape):
        raise ModelError(f"{name!r} of shape {shape} has no axis {axis}")
    end, owner = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.part.start if entry.part is not None else 0):
        part = entry.part
        assert part is not None
        if part.start < end:
            raise ModelError(f"{name!r}[{part.start}:{end}] is in two groups: {owner!r} and {entry.group!r}")
        if part.start > end:
            raise ModelError(f"{name!r}[{end}:{part.start}] is in no group")
        end, owner = part.stop, entry.group
    if end != shape[axis]:
        raise ModelError(
            f"{name!r}[{end}:{shape[axis]}] is in no group"
            if end < shape[axis]
            else f"{name!r} ends at {shape[axis]}; the group {owner!r} reaches to {end}"
        )
