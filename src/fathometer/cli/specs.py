"""A spec named on the command line: ``preset:NAME``, or a .toml or .json file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathometer.spec import Transformer


def named_spec(name: str, layers: int | None = None) -> Transformer:
    """Load a spec, at a depth of its own or the one given; the scales of a preset may depend on it."""
    from fathometer import spec as specs

    if name.startswith("preset:"):
        return specs.preset(name.removeprefix("preset:"), n_layers=layers)
    described = specs.load(name)
    return described if layers is None else described.with_depth(layers)


def is_encoder_decoder(name: str) -> bool:
    """Return whether a file describes an encoder and its decoder."""
    from pathlib import Path

    path = Path(name)
    if path.suffix not in (".toml", ".json") or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return "[encoder]" in text if path.suffix == ".toml" else '"encoder"' in text
