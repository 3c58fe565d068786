"""What every command that builds a model does before it imports torch."""

from __future__ import annotations

import os

from fathometer.errors import MissingExtraError


def prepare_torch() -> None:
    """Keep model libraries from looking for hubs or printing advice, and make sure that torch is there.

    Raises:
        MissingExtraError: if torch is not installed.
    """
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtraError("torch", "torch") from None
