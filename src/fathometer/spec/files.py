"""Specs as TOML and JSON: strict in, plain data out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fathometer.errors import SpecError, nearest
from fathometer.spec.branches import MLP, CrossAttention, GatedMLP, SelfAttention
from fathometer.spec.encoder_decoder import EncoderDecoder
from fathometer.spec.network import Network
from fathometer.spec.norms import Derf, DyT, LayerNorm, PointwiseNorm, RMSNorm
from fathometer.spec.pointwise import Pointwise
from fathometer.spec.transformer import Block, Sublayer, Transformer

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

_NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm, "dyt": DyT, "derf": Derf}
_BRANCHES = {"self_attention": SelfAttention, "cross_attention": CrossAttention, "mlp": MLP, "gated_mlp": GatedMLP}
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
    if isinstance(data, dict) and {"encoder", "decoder"} & set(data):
        raise SpecError("this is an encoder-decoder; read it with load_encoder_decoder or encoder_decoder_from_dict")
    return _transformer(data, "spec")


def encoder_decoder_from_dict(data: Any) -> EncoderDecoder:
    """Build an encoder-decoder from plain data as written by :func:`to_dict`.

    Without an entry ``memory_norm`` there is no norm behind the encoder.

    Raises:
        SpecError: naming the place (``decoder.blocks[0].sublayers[1].branch``), the value and what would be accepted.
    """
    table = dict(_table(data, "spec", EncoderDecoder))
    for name in ("encoder", "decoder"):
        if name in table:
            table[name] = _transformer(table[name], name)
    table["memory_norm"] = _variant(table["memory_norm"], "memory_norm", _NORMS) if "memory_norm" in table else None
    return _build(EncoderDecoder, table, "spec")  # type: ignore[no-any-return]


def load(path: str | Path) -> Transformer:
    """Read a transformer from a ``.toml`` or ``.json`` file."""
    return from_dict(_read(path))


def load_encoder_decoder(path: str | Path) -> EncoderDecoder:
    """Read an encoder-decoder from a ``.toml`` or ``.json`` file."""
    return encoder_decoder_from_dict(_read(path))


def dumps_json(spec: Transformer | EncoderDecoder) -> str:
    """Return the spec as JSON text.

    Raises:
        SpecError: for anything else, such as a Network, which has no file form.
    """
    _check_writable(spec)
    return json.dumps(to_dict(spec), indent=2, allow_nan=False)


def dumps_toml(spec: Transformer | EncoderDecoder) -> str:
    """Return the spec as TOML text.

    Raises:
        SpecError: for anything else, such as a Network, which has no file form.
    """
    _check_writable(spec)
    data = to_dict(spec)
    if isinstance(spec, Transformer):
        return "\n".join(_toml_stack(data, "")) + "\n"
    lines = [f"{key} = {_toml_value(item)}" for key, item in data.items() if key not in ("encoder", "decoder")]
    for name in ("encoder", "decoder"):
        lines += ["", f"[{name}]", *_toml_stack(data[name], f"{name}.")]
    return "\n".join(lines) + "\n"


def _check_writable(spec: object) -> None:
    if not isinstance(spec, (Transformer, EncoderDecoder)):
        hint = "; write its trunk" if isinstance(spec, Network) else ""
        raise SpecError(f"a file holds a Transformer or an EncoderDecoder; got {type(spec).__name__}{hint}")


def _toml_stack(data: dict[str, Any], prefix: str) -> list[str]:
    lines = [f"schema = {data['schema']}", f"d_model = {data['d_model']}"]
    for block in data["blocks"]:
        lines += ["", f"[[{prefix}blocks]]", f"repeat = {block['repeat']}"]
        for sublayer in block["sublayers"]:
            lines += ["", f"  [[{prefix}blocks.sublayers]]"]
            lines += [f"  {key} = {_toml_value(item)}" for key, item in sublayer.items()]
    return lines


def _read(path: str | Path) -> Any:
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise SpecError(f"a spec file must end in .toml or .json; got {str(path)!r}")
    if not path.is_file():
        raise SpecError(f"no spec file at {str(path)!r}")
    if path.stat().st_size > _MAX_BYTES:
        raise SpecError(f"spec file {str(path)!r} is larger than {_MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None


def _transformer(data: Any, where: str) -> Transformer:
    """Build a stack; places inside it are named without ``where`` if that is the whole file."""
    table = _table(data, where, Transformer)
    prefix = "" if where == "spec" else f"{where}."
    blocks = []
    for i, raw_block in enumerate(_items(table, "blocks", where)):
        place = f"{prefix}blocks[{i}]"
        block = _table(raw_block, place, Block)
        sublayers = tuple(
            _sublayer(raw, f"{place}.sublayers[{j}]") for j, raw in enumerate(_items(block, "sublayers", place))
        )
        blocks.append(_build(Block, {**block, "sublayers": sublayers}, place))
    return _build(Transformer, {**table, "blocks": tuple(blocks)}, where)  # type: ignore[no-any-return]


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
