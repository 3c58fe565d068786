"""Specs as TOML and JSON: strict in, plain data out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fathometer.errors import SpecError, nearest
from fathometer.spec.branches import MLP, GatedMLP, SelfAttention
from fathometer.spec.norms import Derf, DyT, LayerNorm, PointwiseNorm, RMSNorm
from fathometer.spec.pointwise import Pointwise
from fathometer.spec.transformer import Block, Sublayer, Transformer

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

_NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm, "dyt": DyT, "derf": Derf}
_BRANCHES = {"self_attention": SelfAttention, "mlp": MLP, "gated_mlp": GatedMLP}
_MAX_BYTES = 50_000_000


def to_dict(value: Any) -> Any:
    """Return a spec, or any part of one, as plain dicts, lists and numbers. ``None`` entries are left out.

    Raises:
        SpecError: if it holds a user's Python function, which has no file form.
    """
    if isinstance(value, (Pointwise, PointwiseNorm)):
        raise SpecError("a user's pointwise function cannot be written to a file; build this spec in Python")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_dict(item) for name, item in pairs if item is not None}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def from_dict(data: Any) -> Transformer:
    """Build a transformer from plain data as written by :func:`to_dict`.

    Raises:
        SpecError: naming the place (``blocks[0].sublayers[1].branch``), the value and what would be accepted.
    """
    table = _table(data, "spec", Transformer)
    blocks = []
    for i, raw_block in enumerate(_items(table, "blocks", "spec")):
        where = f"blocks[{i}]"
        block = _table(raw_block, where, Block)
        sublayers = tuple(
            _sublayer(raw, f"{where}.sublayers[{j}]") for j, raw in enumerate(_items(block, "sublayers", where))
        )
        blocks.append(_build(Block, {**block, "sublayers": sublayers}, where))
    return _build(Transformer, {**table, "blocks": tuple(blocks)}, "spec")  # type: ignore[no-any-return]


def load(path: str | Path) -> Transformer:
    """Read a transformer from a ``.toml`` or ``.json`` file."""
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise SpecError(f"a spec file must end in .toml or .json; got {str(path)!r}")
    if not path.is_file():
        raise SpecError(f"no spec file at {str(path)!r}")
    if path.stat().st_size > _MAX_BYTES:
        raise SpecError(f"spec file {str(path)!r} is larger than {_MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None
    return from_dict(data)


def dumps_json(spec: Transformer) -> str:
    """Return the spec as JSON text."""
    return json.dumps(to_dict(spec), indent=2, allow_nan=False)


def dumps_toml(spec: Transformer) -> str:
    """Return the spec as TOML text."""
    data = to_dict(spec)
    lines = [f"schema = {data['schema']}", f"d_model = {data['d_model']}"]
    for block in data["blocks"]:
        lines += ["", "[[blocks]]", f"repeat = {block['repeat']}"]
        for sublayer in block["sublayers"]:
            lines += ["", "  [[blocks.sublayers]]"]
            lines += [f"  {key} = {_toml_value(item)}" for key, item in sublayer.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _sublayer(raw: Any, where: str) -> Sublayer:
    table = dict(_table(raw, where, Sublayer))
    for slot in ("input_norm", "output_norm", "stream_norm"):
        if slot in table:
            table[slot] = _variant(table[slot], f"{where}.{slot}", _NORMS)
    if "branch" in table:
        table["branch"] = _variant(table["branch"], f"{where}.branch", _BRANCHES)
    return _build(Sublayer, table, where)  # type: ignore[no-any-return]


def _variant(raw: Any, where: str, kinds: dict[str, Any]) -> Any:
    if not isinstance(raw, dict) or "kind" not in raw:
        raise SpecError(f"{where} must be a table with a 'kind'; got {raw!r}. Accepted: {', '.join(sorted(kinds))}.")
    if raw["kind"] not in kinds:
        raise SpecError(f"{where}.kind {raw['kind']!r} is unknown{nearest(str(raw['kind']), kinds)}")
    cls = kinds[raw["kind"]]
    return _build(cls, _table(raw, where, cls), where)


def _table(raw: Any, where: str, cls: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise SpecError(f"{where} must be a table; got {type(raw).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in raw:
        if key not in known:
            raise SpecError(f"{where} has no field {key!r}{nearest(str(key), known)}")
    return raw


def _items(table: dict[str, Any], key: str, where: str) -> list[Any]:
    items = table.get(key)
    if not isinstance(items, list) or not items:
        raise SpecError(f"{where}.{key} must be a non-empty list; got {items!r}")
    return items


def _build(cls: Any, arguments: dict[str, Any], where: str) -> Any:
    try:
        return cls(**arguments)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except TypeError as error:
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        absent = [name for name in missing if name not in arguments]
        raise SpecError(f"{where} lacks {', '.join(absent)}" if absent else f"{where}: {error}") from None
