"""Deciding the role of each parameter from the reading of the blocks and one watched forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fathometer.errors import ModelError, NotCoveredError
from fathometer.models.branches import Branch, leaving, split_branches
from fathometer.models.finding import Stack
from fathometer.models.identify import identify_norm
from fathometer.models.parameter_role import MATRIX_ROLES, PARAMETER_ROLES, TABLE_ROLES, ModelRoles, ParameterRole
from fathometer.models.parameter_uses import ForwardRecord, Use, tensors_in
from fathometer.models.trace import AttentionCall, Trace, same_tensor
from fathometer.models.weights import WeightSlice, read_attention, read_mlp, whole_weight
from fathometer.spec import CrossAttention, SelfAttention


class RoleReader:
    """Everything known about one model while its parameters get their roles."""

    def __init__(
        self, model: nn.Module, stacks: list[Stack], record: ForwardRecord, batch: Any, settled: dict[str, str]
    ) -> None:
        self.parameters = dict(model.named_parameters())
        every = dict(model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        self.canonical = {name: first[id(parameter)] for name, parameter in every.items()}
        self.blocks = [name for stack in stacks for name in stack.names]
        self.firsts = [self.blocks.index(stack.names[0]) for stack in stacks]
        self.record, self.batch, self.settled = record, batch, settled
        if len(set(record.widths)) > 1:
            raise NotCoveredError(f"the width of the stream changes from {record.widths[0]} to {record.widths[-1]}")
        self.d_model = record.widths[0]
        self.uses: dict[str, list[Use]] = {}
        for use in record.uses:
            self.uses.setdefault(use.parameter, []).append(use)
        self.n_heads: int | None = None
        self.n_kv_heads: int | None = None
        self.exits: list[str] = []
        self.exits_known = True
        self.unread: dict[str, str] = {}
        self.inner: set[str] = set()  # modules between the maps of a branch
        self.rows: dict[str, list[ParameterRole]] = {}
        self.missing: list[str] = []

    def read(self) -> ModelRoles:
        """Return the roles, or refuse the model: blocks first, then weights, then biases, which follow weights."""
        for layer in range(len(self.blocks)):
            self._read_block(layer)
        self.norms = {
            call.name
            for call in self.record.trace.calls
            if any(True for _ in call.module.parameters(recurse=False))
            and identify_norm(call.module, call.before, call.after) is not None
        }
        self.lookups = self._stem_lookups()
        biases = {name for name, uses in self.uses.items() if any(use.partner is not None for use in uses)}
        for name in sorted(self.parameters, key=lambda name: name in biases):
            self._settle(name)
        self._check_complete()
        rows = tuple(row for name in self.parameters for row in self.rows[name])
        return ModelRoles(
            roles=rows,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            blocks=tuple(self.blocks),
            exits=tuple(self.exits) if self.exits_known else (),
        )

    def _read_block(self, layer: int) -> None:
        """Give the matrices of one block their roles; what cannot be read is remembered with the reason."""
        name, trace = self.blocks[layer], self.record.blocks[layer]
        try:
            branches = split_branches(trace)
        except NotCoveredError as error:
            self.unread[f"{name}."] = error.reason
            self.exits_known = False
            return
        for branch in branches:
            self.inner |= {f"{name}.{call.name}" for call in branch.inner}
            self._note_exit(name, branch, trace)
            try:
                if branch.attention is None:
                    parts = _mlp_parts(name, branch)
                else:
                    body, parts = read_attention(name, replace(branch, attention=_unmasked(branch.attention)))
                    self._note_heads(body)
            except NotCoveredError as error:
                for call in (*branch.entries, branch.exit):
                    self.unread[f"{name}.{call.name}."] = error.reason
                continue
            for role, part in parts.items():
                self._add_matrix(role, layer, part)

    def _note_exit(self, name: str, branch: Branch, trace: Trace) -> None:
        try:
            _, norm, _, last = leaving(branch, trace)
        except NotCoveredError:
            self.exits_known = False
        else:
            self.exits.append(f"{name}.{branch.exit.name if norm is None else last}")

    def _note_heads(self, body: SelfAttention | CrossAttention) -> None:
        heads = (body.n_heads, body.n_kv_heads or body.n_heads)
        if self.n_heads is not None and heads != (self.n_heads, self.n_kv_heads):
            # Only divisibility is asked of heads later: a number that divides all of them serves every layer.
            heads = (math.gcd(heads[0], self.n_heads), math.gcd(heads[1], self.n_kv_heads or heads[1]))
        self.n_heads, self.n_kv_heads = heads

    def _add_matrix(self, role: str, layer: int, part: WeightSlice) -> None:
        name = self.canonical[part.parameter]
        shape = self.parameters[name].shape
        whole = (part.start, part.stop) == (0, part.size)
        row = ParameterRole(
            parameter=name,
            role=role,
            layer=layer,
            part=None if whole else replace(part, parameter=name),
            fan_in=int(shape[1 - part.axis]),
            fan_out=part.stop - part.start,
        )
        rows = self.rows.setdefault(name, [])
        if not any(replace(other, layer=layer) == row for other in rows):  # a layer that shares its weights
            rows.append(row)

    def _settle(self, name: str) -> None:
        """Decide one parameter, or say what would decide it."""
        uses = self.uses.get(name, [])
        if name in self.settled:
            self.rows[name] = [self._whole(name, self.settled[name], uses)]
            return
        read = self.rows.get(name, [])
        found: dict[str, list[ParameterRole]] = {" and ".join(row.role for row in read): read} if read else {}
        for use in uses:
            rows = self._rows_of(use)
            if rows:
                found.setdefault(" and ".join(row.role for row in rows), rows)
        if set(found) == {"token_embedding", "head"}:
            self.rows[name] = [replace(found["token_embedding"][0], tied=True)]
            return
        if len(found) > 1:
            roles = " and ".join(map(repr, found))
            raise ModelError(
                f"parameter {name!r} has two roles, {roles}; settle it with overrides={{{name!r}: ROLE}}, "
                f"ROLE being one of {', '.join(PARAMETER_ROLES)}"
            )
        if not found:
            self.missing.append(name)
            return
        self.rows[name] = next(iter(found.values()))
        self._check_overlap(name)

    def _check_complete(self) -> None:
        """Refuse a model with parameters that have no role; the reason given is that of the first one."""
        if not self.missing:
            return
        name, *more = (name for name in self.parameters if name in self.missing)
        others = f" (nor have {', '.join(map(repr, more))})" if more else ""
        raise ModelError(
            f"parameter {name!r} of shape {tuple(self.parameters[name].shape)} has no role{others}: "
            f"{self._why(name, self.uses.get(name, []))}; give it one with overrides={{{name!r}: ROLE}}, where "
            f"patterns with * work too and ROLE is one of {', '.join(PARAMETER_ROLES)}"
        )

    def _check_overlap(self, name: str) -> None:
        """Refuse slices that overlap or leave out a part of a fused parameter."""
        parts = [row.part for row in self.rows[name] if row.part is not None]
        if not parts:
            if len(self.rows[name]) > 1:
                roles = " and ".join(repr(row.role) for row in self.rows[name])
                raise ModelError(
                    f"parameter {name!r} has two roles, {roles}; settle it with "
                    f"overrides={{{name!r}: {self.rows[name][0].role!r}}}"
                )
            return
        covered = 0
        for part in sorted(parts, key=lambda part: part.start):
            if part.start != covered:
                problem = "two roles" if part.start < covered else "no role"
                raise ModelError(
                    f"rows {min(part.start, covered)} to {max(part.start, covered)} of {name!r} have {problem}"
                )
            covered = part.stop

    def _why(self, name: str, uses: list[Use]) -> str:
        if not uses:
            return "the forward pass of this batch does not use it"
        reason = next((reason for prefix, reason in self.unread.items() if name.startswith(prefix)), None)
        if reason is not None:
            return f"its branch was not read ({reason})"
        where = "in front of the blocks" if uses[0].entered == 0 else "behind the blocks"
        return f"used by {uses[0].kind!r} " + (where if uses[0].block is None else f"inside block {uses[0].block}")

    def _rows_of(self, use: Use) -> list[ParameterRole]:
        """Return what one use says; nothing where it does not tell."""
        if use.partner is not None:
            return self._bias_rows(use)
        role = self._role_of(use)
        return [self._whole(use.parameter, role, [use])] if role else []

    def _bias_rows(self, use: Use) -> list[ParameterRole]:
        """Return the rows of a bias: those of its matrix, along the outputs."""
        size = self.parameters[use.parameter].numel()
        rows = []
        for row in self.rows.get(use.partner or "", []):
            role = "head" if row.tied else row.role
            if role not in MATRIX_ROLES:
                continue
            part = row.part and WeightSlice(
                parameter=use.parameter, axis=0, start=row.part.start, stop=row.part.stop, size=size
            )
            fan_out = size if row.tied else row.fan_out
            rows.append(
                replace(
                    row, parameter=use.parameter, role=f"{role}_bias", part=part, fan_in=1, fan_out=fan_out, tied=False
                )
            )
        return rows

    def _role_of(self, use: Use) -> str | None:
        parameter = self.parameters[use.parameter]
        owner = use.parameter.rpartition(".")[0]
        in_stem, behind = use.entered == 0, use.block is None and use.entered == len(self.blocks)
        is_norm = use.kind in ("gain", "offset") or owner in self.norms
        if is_norm and use.kind in ("gain", "offset", "multiply", "add"):
            if parameter.numel() == 1:
                return "norm_shape"
            suffix = "bias" if use.kind in ("offset", "add") else "gain"
            return f"qk_norm_{suffix}" if self._is_per_head(owner, parameter) else f"norm_{suffix}"
        if use.kind == "lookup":
            if use.block is None:
                return self.lookups.get(use.parameter)
            return "relative_position" if parameter.shape[-1] != self.d_model else None
        if use.kind == "linear" and use.block is None and use.fans is not None:
            if behind:
                return "head" if self._is_last(use) else "head_hidden"
            if in_stem:
                return "stem_hidden" if use.fans[0] == self.d_model else "patch_embedding"
        if use.kind == "multiply" and (use.block is not None or behind):
            return "layer_scale" if parameter.numel() in (1, self.d_model) else None
        if in_stem and use.kind == "join":
            return "class_token"
        if in_stem and use.kind == "add" and parameter.ndim >= 2:
            return "class_token" if parameter.numel() == self.d_model else "position_embedding"
        return None

    def _is_per_head(self, owner: str, parameter: Tensor) -> bool:
        return owner in self.inner and parameter.numel() < self.d_model

    def _is_last(self, use: Use) -> bool:
        """Return whether a map behind the blocks makes an output, or is the last one and leaves the stream's width."""
        if any(same_tensor(use.output, output) for output in tensors_in(self.record.output)):
            return True
        last = [u for u in self.record.uses if u.kind == "linear" and u.block is None and u.entered == use.entered][-1]
        return last is use and use.output.shape[-1] != self.d_model

    def _stem_lookups(self) -> dict[str, str]:
        """Tell tokens, positions and segments apart by the numbers that are looked up.

        Positions count up by one along each sample. Of the other tables, the one that is fed a tensor of the batch
        holds the tokens (the largest, where several are); the rest tell segments apart. A source and a target may have
        tables of their own: this is decided for each stack.
        """
        given = [t for t in tensors_in(getattr(self.batch, "inputs", self.batch)) if not t.is_floating_point()]
        tables: dict[str, list[Tensor]] = {}
        for use in self.record.uses:
            if use.kind == "lookup" and use.block is None and use.ids is not None:
                tables.setdefault(use.parameter, []).append(use.ids)
        fed = {name for name, ids in tables.items() if any(same_tensor(i, t) for i in ids for t in given)}
        out = {
            name: "position_embedding" for name, ids in tables.items() if all(map(_counts_up, ids)) and name not in fed
        }
        for name in fed - set(out):  # positions handed over with the batch
            if len(fed) > 1 and all(map(_counts_up, tables[name])):
                out[name] = "position_embedding"
        rest = [name for name in tables if name not in out]
        best = {
            max(group, key=lambda name: (name in fed, len(self.parameters[name]))) for group in self._by_stack(rest)
        }
        return out | {name: "token_embedding" if name in best else "segment_embedding" for name in rest}

    def _by_stack(self, tables: list[str]) -> list[list[str]]:
        """Group tables by the stack whose first stream their rows are a part of, told by the correlation with it."""
        streams = [self.record.blocks[first].calls[0].input for first in self.firsts]
        groups: dict[int, list[str]] = {}
        for name in tables:
            for use in self.uses[name]:
                fits = [_cosine(use.output, stream) for stream in streams]
                group = groups.setdefault(fits.index(max(fits)), [])
                group += [] if name in group else [name]
        return list(groups.values())

    def _whole(self, name: str, role: str, uses: Sequence[Use]) -> ParameterRole:
        """Return the row of a parameter that has one role throughout."""
        shape = self.parameters[name].shape
        fans = next((use.fans for use in uses if use.fans is not None), None)
        if role in MATRIX_ROLES and fans is None:
            fans = (math.prod(shape[1:]), shape[0])
        if role not in MATRIX_ROLES or fans is None:
            fans = (1, shape[-1] if role in TABLE_ROLES else math.prod(shape))
        layer = next((i for i, block in enumerate(self.blocks) if name.startswith(f"{block}.")), None)
        return ParameterRole(parameter=name, role=role, layer=layer, part=None, fan_in=fans[0], fan_out=fans[1])


def _unmasked(call: AttentionCall) -> AttentionCall:
    """Return an attention operation without masks and additive biases, which change no role."""
    if call.logits is not None:
        return replace(call, logits=call.scores().nan_to_num(neginf=0.0))
    return replace(call, mask=None, causal=False)


def _mlp_parts(name: str, branch: Branch) -> dict[str, WeightSlice]:
    """Return the maps of an MLP; an activation the theory does not know leaves the roles of two maps clear."""
    try:
        return read_mlp(name, branch)[1]
    except NotCoveredError:
        (first, *more), last = branch.entries, branch.exit
        if more or first.output.shape[-1] != last.input.shape[-1]:
            raise
        return {"mlp_in": whole_weight(name, first), "mlp_out": whole_weight(name, last)}


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the size of the correlation of two tensors' entries, -1 where their numbers differ."""
    if a.numel() != b.numel():
        return -1.0
    x, y = (t.detach().double().flatten() for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y).abs() / (x.norm() * y.norm()).clamp_min(1e-300))


def _counts_up(ids: Tensor) -> bool:
    return ids.ndim > 0 and ids.shape[-1] > 1 and bool((ids.diff(dim=-1) == 1).all())
