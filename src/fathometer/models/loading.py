"""Models by name, built from their configuration classes with random weights. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fathometer.errors import MissingExtraError, ModelError, nearest


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to feed it.

    Attributes:
        model: The module, freshly initialised.
        name: How it was asked for.
        kind: ``"text"``, ``"image"`` or ``"any"``: which batch it takes.
        image_size: Side of the square images of an image model.
        max_tokens: Positions a text model has.
        vocabulary: Tokens a text model knows.
        call: Extra keyword arguments for every call.
    """

    model: nn.Module
    name: str
    kind: str
    image_size: int = 224
    max_tokens: int = 1_000_000
    vocabulary: int = 256
    call: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Architecture:
    """One row of the table of Hugging Face names: classes and the configuration keys of its sizes."""

    config: str
    model: str
    kind: str
    layers: str
    width: str
    heads: str
    hidden: str
    ratio: float
    d_head: int
    extra: dict[str, Any]


_DECODER = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
_CACHELESS = {"use_cache": False}

HF_NAMES: dict[str, _Architecture] = {
    "gpt2": _Architecture(
        "GPT2Config", "GPT2Model", "text", "n_layer", "n_embd", "n_head", "n_inner", 4, 64, _CACHELESS
    ),
    "llama": _Architecture(
        "LlamaConfig",
        "LlamaModel",
        "text",
        **_DECODER,
        hidden="intermediate_size",
        ratio=2.6875,
        d_head=64,
        extra=_CACHELESS,
    ),
    "mistral": _Architecture(
        "MistralConfig",
        "MistralModel",
        "text",
        **_DECODER,
        hidden="intermediate_size",
        ratio=3.5,
        d_head=64,
        extra=_CACHELESS,
    ),
    "qwen2": _Architecture(
        "Qwen2Config",
        "Qwen2Model",
        "text",
        **_DECODER,
        hidden="intermediate_size",
        ratio=2.75,
        d_head=64,
        extra=_CACHELESS,
    ),
    "qwen3": _Architecture(
        "Qwen3Config",
        "Qwen3Model",
        "text",
        **_DECODER,
        hidden="intermediate_size",
        ratio=3.0,
        d_head=64,
        extra=_CACHELESS,
    ),
    "bert": _Architecture(
        "BertConfig", "BertModel", "text", **_DECODER, hidden="intermediate_size", ratio=4, d_head=64, extra={}
    ),
    "vit": _Architecture(
        "ViTConfig", "ViTModel", "image", **_DECODER, hidden="intermediate_size", ratio=4, d_head=64, extra={}
    ),
    "t5": _Architecture("T5Config", "T5EncoderModel", "text", "num_layers", "d_model", "num_heads", "d_ff", 4, 64, {}),
}


def load_model(
    name: str, *, layers: int | None = None, width: int | None = None, heads: int | None = None, seed: int = 0
) -> LoadedModel:
    """Build a model from a name.

    Args:
        name: ``hf:NAME`` (an architecture from its configuration class), ``timm:NAME``, or
            ``path/to/file.py:function`` where the function returns an ``nn.Module``.
        layers, width, heads: Sizes to override; ``None`` keeps the architecture's own (width 256 or more keeps 64 a
            head).
        seed: Seed of the random weights. The global random state is left as found.
    Raises:
        ModelError: for an unknown name (the nearest is suggested), a file without that function, or impossible sizes.
        MissingExtraError: naming the extra to install.
    """
    scheme, _, rest = name.partition(":")
    sizes = {"layers": layers, "width": width, "heads": heads}
    for key, value in sizes.items():
        if value is not None and not 1 <= value <= 1_000_000:
            raise ModelError(f"--{key} must lie in [1, 1000000]; got {value}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scheme == "hf":
            return _load_hf(name, rest, layers, width, heads)
        if scheme == "timm":
            return _load_timm(name, rest, layers, width, heads)
        if ".py:" in name:
            return _load_file(name, sizes)
    raise ModelError(
        f"cannot read the model {name!r}; accepted: hf:NAME ({', '.join(HF_NAMES)}), timm:NAME, "
        "or path/to/file.py:function"
    )


def _load_hf(name: str, architecture: str, layers: int | None, width: int | None, heads: int | None) -> LoadedModel:
    if architecture not in HF_NAMES:
        raise ModelError(f"there is no architecture {name!r}{nearest(architecture, HF_NAMES)}")
    row = HF_NAMES[architecture]
    transformers = _require("transformers", "hf")
    with _quiet():
        config_class = getattr(transformers, row.config)
        overrides: dict[str, Any] = {}
        if layers is not None:
            overrides[row.layers] = layers
        if width is not None or heads is not None:
            overrides |= _widths(row, width, heads, config_class())
        config = config_class(**overrides)
        model = getattr(transformers, row.model)(config)
    return LoadedModel(
        model=model,
        name=name,
        kind=row.kind,
        image_size=int(getattr(config, "image_size", 224)),
        max_tokens=int(getattr(config, "max_position_embeddings", getattr(config, "n_positions", 1_000_000))),
        vocabulary=int(getattr(config, "vocab_size", 256)),
        call=row.extra,
    )


def _widths(row: _Architecture, width: int | None, heads: int | None, usual: Any) -> dict[str, Any]:
    d_model = width if width is not None else int(getattr(usual, row.width))
    n_heads = heads if heads is not None else max(d_model // row.d_head, 1)
    if d_model % n_heads:
        raise ModelError(f"--width must be a multiple of --heads; got {d_model} and {n_heads}")
    out: dict[str, Any] = {row.width: d_model, row.heads: n_heads, row.hidden: round(row.ratio * d_model)}
    usual_kv = getattr(usual, "num_key_value_heads", None)
    if usual_kv is not None:
        shared = max(int(getattr(usual, row.heads)) // int(usual_kv), 1)
        out["num_key_value_heads"] = n_heads // shared if n_heads % shared == 0 else n_heads
    if hasattr(usual, "head_dim"):
        out["head_dim"] = d_model // n_heads
    if hasattr(usual, "d_kv"):
        out["d_kv"] = d_model // n_heads
    return out


def _load_timm(name: str, architecture: str, layers: int | None, width: int | None, heads: int | None) -> LoadedModel:
    timm = _require("timm", "timm")
    options = {"depth": layers, "embed_dim": width, "num_heads": heads}
    try:
        model = timm.create_model(
            architecture, pretrained=False, **{key: value for key, value in options.items() if value is not None}
        )
    except Exception as error:
        raise ModelError(f"timm cannot build {architecture!r}: {error}") from None
    size = model.default_cfg.get("input_size", (3, 224, 224))[-1]
    return LoadedModel(model=model, name=name, kind="image", image_size=int(size))


def _load_file(name: str, sizes: dict[str, int | None]) -> LoadedModel:
    path_text, _, function_name = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ModelError(f"there is no file {path_text!r}")
    spec = importlib.util.spec_from_file_location(f"_fathometer_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{path_text!r} cannot be imported: {type(error).__name__}: {error}") from error
    build = getattr(module, function_name, None)
    if not callable(build):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ModelError(f"{path_text!r} has no function {function_name!r}{nearest(function_name, functions)}")
    accepted = inspect.signature(build).parameters
    given = {key: value for key, value in sizes.items() if value is not None}
    for key in given:
        if key not in accepted:
            raise ModelError(f"{function_name}() takes no argument {key!r}, so --{key} cannot be set")
    model = build(**given)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{function_name}() must return a torch.nn.Module; got {type(model).__name__}")
    return LoadedModel(model=model, name=name, kind="any")


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, extra) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's import and construction chatter, then restore its level."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
