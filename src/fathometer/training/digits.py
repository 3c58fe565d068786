"""Handwritten digits that ship with scikit-learn, cut into patches: a real task of seconds."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fathometer.errors import MissingExtraError

PATCHES, PATCH_PIXELS, CLASSES = 16, 4, 10


@dataclass(frozen=True)
class Digits:
    """Patches of shape ``(n, 16, 4)``, standardised, and labels; training and test parts."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits(*, n_test: int = 360) -> Digits:
    """Return the 1797 digits, 8 x 8 pixels, as 16 patches of 2 x 2; the last ``n_test`` are the test part.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        data = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError:
        raise MissingExtraError("scikit-learn", "data") from None
    pixels = torch.tensor(data.images, dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    patches = pixels.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(pixels), PATCHES, PATCH_PIXELS)
    labels = torch.tensor(data.target, dtype=torch.long)
    return Digits(patches[:-n_test], labels[:-n_test], patches[-n_test:], labels[-n_test:])
