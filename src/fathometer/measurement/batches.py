"""Inputs to sound a model with: the user's own, or what installed packages ship. Nothing is downloaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fathometer.errors import BatchError, MissingExtraError
from fathometer.models.loading import LoadedModel

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
_ACCEPTED = "text, photographs, tokens:DxN, a .txt, .pt or .npy file, or images (.png, .jpg)"


@dataclass(frozen=True)
class Batch:
    """What a model is called with.

    Attributes:
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        label: What it is, for reports.
    """

    inputs: Any
    label: str

    def call(self, model: nn.Module) -> Any:
        """Run the model on this batch."""
        if isinstance(self.inputs, dict):
            return model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return model(*self.inputs)
        return model(self.inputs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        values = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        values = [values] if isinstance(values, Tensor) else list(values)
        return [value for value in values if isinstance(value, Tensor)]


def as_batch(inputs: Any) -> Batch:
    """Wrap a user's tensor, tuple or dict of tensors, refusing anything else or values that are not finite."""
    if isinstance(inputs, Batch):
        return inputs
    mapping = isinstance(inputs, dict) or hasattr(inputs, "keys")
    batch = Batch(dict(inputs) if mapping else tuple(inputs) if isinstance(inputs, list) else inputs, "the given batch")
    if not isinstance(batch.inputs, (Tensor, tuple, dict)):
        raise BatchError(f"a batch must be a tensor, a tuple or a dict of tensors; got {type(inputs).__name__}")
    if not batch.tensors:
        raise BatchError("a batch must hold at least one tensor; got none")
    for tensor in batch.tensors:
        additive_mask = bool(((tensor == 0) | torch.isneginf(tensor)).all())
        if tensor.is_floating_point() and not additive_mask and not bool(torch.isfinite(tensor).all()):
            raise BatchError("the batch holds NaN or infinity")
        if tensor.numel() == 0:
            raise BatchError(f"the batch holds an empty tensor of shape {tuple(tensor.shape)}")
    return batch


def default_batch(model: nn.Module, *, n_tokens: int = 64, batch_size: int = 2) -> Batch:
    """Return a batch for a model with a Hugging Face configuration: text as bytes, or Gaussian pixels.

    Raises:
        BatchError: for any other model.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if kind == "pixel_values" and hasattr(config, "image_size"):
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, int(getattr(config, "num_channels", 3)), *(int(config.image_size),) * 2)
        return Batch({"pixel_values": torch.randn(shape, generator=generator)}, f"{batch_size} Gaussian images")
    if kind != "input_ids" or not hasattr(config, "vocab_size"):
        raise BatchError(f"a batch is needed: {type(model).__name__} does not say what it takes")
    positions = int(getattr(config, "max_position_embeddings", getattr(config, "n_positions", n_tokens)) or n_tokens)
    loaded = LoadedModel(
        model=model,
        name=type(model).__name__,
        kind="text",
        max_tokens=positions,
        vocabulary=int(config.vocab_size),
    )
    batch = load_batch("text", loaded, n_tokens=min(n_tokens, positions), batch_size=batch_size)
    if getattr(config, "is_encoder_decoder", False):
        return Batch({**batch.inputs, "decoder_input_ids": batch.inputs["input_ids"]}, batch.label)
    return batch


def load_batch(source: str | None, loaded: LoadedModel, *, n_tokens: int = 64, batch_size: int = 2) -> Batch:
    """Load the batch a user names, or the default one for the kind of model.

    Args:
        source: ``None``, ``"text"``, ``"photographs"``, ``"tokens:WIDTHxCOUNT"`` (Gaussian tokens), or a file.
        loaded: The model it is for.
        n_tokens: Tokens per text sample.
        batch_size: Number of samples.
    Raises:
        BatchError: for a batch of the wrong kind, a missing or unreadable file, or a context longer than the model's.
    """
    if source is None:
        if loaded.kind == "any":
            raise BatchError(f"a batch is needed for {loaded.name!r}; pass --batch with one of: {_ACCEPTED}")
        source = "text" if loaded.kind == "text" else "photographs"
    if n_tokens < 2 or batch_size < 1:
        raise BatchError(f"a batch needs at least 2 tokens and 1 sample; got {n_tokens} and {batch_size}")
    path = Path(source)
    if source == "text" or path.suffix == ".txt":
        _expect(loaded, "text", source)
        return _text(source, path, loaded, n_tokens, batch_size)
    if source == "photographs" or path.suffix.lower() in _IMAGES:
        _expect(loaded, "image", source)
        return _images(source, path, loaded, batch_size)
    if source.startswith("tokens:"):
        return _gaussian(source, batch_size)
    if path.suffix in (".pt", ".npy"):
        return _tensors(source, path, loaded)
    raise BatchError(f"cannot read the batch {source!r}; accepted: {_ACCEPTED}")


def _expect(loaded: LoadedModel, kind: str, source: str) -> None:
    if loaded.kind not in (kind, "any"):
        takes = "images" if loaded.kind == "image" else "text"
        raise BatchError(f"{loaded.name!r} takes {takes}; got the batch {source!r}")


def _text(source: str, path: Path, loaded: LoadedModel, n_tokens: int, batch_size: int) -> Batch:
    if n_tokens > loaded.max_tokens:
        raise BatchError(f"{n_tokens} tokens are more than the {loaded.max_tokens} positions of {loaded.name!r}")
    if source == "text":
        topics = importlib.import_module("pydoc_data.topics").topics
        raw = "\n".join(topics[key] for key in sorted(topics)).encode("utf-8")
    else:
        raw = _read(path)
    needed = n_tokens * batch_size
    if len(raw) < needed:
        raise BatchError(f"{source!r} holds {len(raw)} bytes; {batch_size} samples of {n_tokens} tokens need {needed}")
    if loaded.vocabulary < 256:
        raise BatchError(f"{loaded.name!r} knows {loaded.vocabulary} tokens; text as bytes needs 256")
    stride = len(raw) // batch_size
    rows = [np.frombuffer(raw, dtype=np.uint8, count=n_tokens, offset=i * stride) for i in range(batch_size)]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    label = f"{batch_size} x {n_tokens} bytes of " + ("the interpreter's documentation" if source == "text" else source)
    if loaded.kind == "any":
        return Batch(ids, label)
    return Batch({"input_ids": ids, **(loaded.call or {})}, label)


def _images(source: str, path: Path, loaded: LoadedModel, batch_size: int) -> Batch:
    if source == "photographs":
        try:
            datasets = importlib.import_module("sklearn.datasets")
            importlib.import_module("PIL")
        except ImportError:
            raise MissingExtraError("scikit-learn", "data") from None
        pictures = datasets.load_sample_images().images
    else:
        try:
            image = importlib.import_module("PIL.Image")
        except ImportError:
            raise MissingExtraError("pillow", "data") from None
        _read(path)
        try:
            pictures = [np.asarray(image.open(path).convert("RGB"))]
        except OSError as error:
            raise BatchError(f"{source!r} is not a readable image: {error}") from None
    crops = []
    for i in range(batch_size):
        picture = torch.from_numpy(np.array(pictures[i % len(pictures)])).permute(2, 0, 1).float()
        side = min(picture.shape[1:])
        shift = (i // len(pictures)) * 37 % max(max(picture.shape[1:]) - side, 1)
        window = (
            picture[:, :side, shift : shift + side]
            if picture.shape[2] >= picture.shape[1]
            else picture[:, shift : shift + side, :side]
        )
        crops.append(
            nn.functional.interpolate(window[None], size=(loaded.image_size,) * 2, mode="bilinear", antialias=True)[0]
        )
    pixels = torch.stack(crops) / 255
    pixels = (pixels - 0.5) / 0.5
    label = f"{batch_size} photographs" if source == "photographs" else source
    if loaded.name.startswith("hf:"):
        return Batch({"pixel_values": pixels}, label)
    return Batch(pixels, label)


def _gaussian(source: str, batch_size: int) -> Batch:
    try:
        width, count = (int(part) for part in source.removeprefix("tokens:").split("x"))
    except ValueError:
        raise BatchError(
            f"Gaussian tokens are written tokens:WIDTHxCOUNT, as in tokens:256x64; got {source!r}"
        ) from None
    if not (1 <= width <= 1_000_000 and 2 <= count <= 100_000):
        raise BatchError(f"tokens:WIDTHxCOUNT needs a width in [1, 1000000] and a count in [2, 100000]; got {source!r}")
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(batch_size, count, width, generator=generator), f"{batch_size} x {count} Gaussian tokens")


def _tensors(source: str, path: Path, loaded: LoadedModel) -> Batch:
    _read(path)
    try:
        if path.suffix == ".npy":
            inputs: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            inputs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BatchError(f"{source!r} cannot be read as tensors: {type(error).__name__}: {error}") from None
    batch = as_batch(inputs)
    if isinstance(batch.inputs, dict):
        return Batch({**batch.inputs, **(loaded.call or {})}, source)
    return Batch(batch.inputs, source)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise BatchError(f"there is no file {str(path)!r}")
    return path.read_bytes()
