"""One vocabulary for theory and measurement: named curves over layers, with standard errors where measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import SpecError, nearest

FloatArray = NDArray[np.float64]

#: Every name a profile may hold: (axis, unit, meaning). Axis "border" has n_layers + 1 entries, "layer" has n_layers,
#: "token" has n_tokens.
VOCABULARY: dict[str, tuple[str, str, str]] = {
    "q": ("border", "1", "mean square of the stream per coordinate"),
    "p": ("border", "1", "mean overlap of two different tokens per coordinate"),
    "cosine": ("border", "1", "p / q"),
    "apjn_log": ("border", "nats", "ln J^{L,l}: log averaged partial Jacobian norm from layer l to the output"),
    "apjn_forward_log": ("border", "nats", "ln J^{l,0}: the same from the input to layer l"),
    "apjn_token_log": ("token", "nats", "ln J^{L,0} of every token position, averaged over samples"),
    "gradient_alignment": (
        "border",
        "1",
        "K / J: mean cosine of the gradients of two tokens, isotropic output gradient",
    ),
    "gradient_log": ("border", "nats", "log gradient amplification of a mean-pooled loss"),
    "attention_entropy": ("layer", "nats", "mean entropy of an attention row"),
    "attention_entropy_relative": ("layer", "1", "entropy over that of uniform attention on the visible keys"),
    "participation": ("layer", "keys", "effective number of keys a query attends to, 1 / E sum A^2"),
    "row_overlap": ("layer", "1", "mean of sum_c A_ac A_bc over two different queries"),
    "logit_variance": ("layer", "1", "variance of attention scores over the visible keys of one query"),
    "condensation": (
        "layer",
        "1",
        "spread of the scores over that at which a random energy model freezes, sqrt(v / (2 ln n))",
    ),
    "attention_added_q": ("layer", "1", "mean square of what attention adds to the stream"),
    "mlp_added_q": ("layer", "1", "mean square of what the MLP adds to the stream"),
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Curves over layers.

    Every curve is an attribute (``profile.q``); names ending in ``_log`` also answer without the suffix
    (``profile.apjn``), which raises ``OverflowError`` where the plain number does not fit a float.

    Args:
        source: ``"theory"`` or ``"measurement"``.
        curves: Name to array; the layer or border axis is first, swept axes follow.
        errors: Standard errors over weight draws, for measured curves; those of a ``_log`` curve are relative errors.
        about: What produced it: spec, closure, number of tokens, seeds, versions.
    """

    source: str
    curves: Mapping[str, FloatArray]
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.curves:
            if name not in VOCABULARY:
                raise SpecError(f"a profile has no curve {name!r}{nearest(name, VOCABULARY)}")

    def __getattr__(self, name: str) -> FloatArray:
        """Return a curve by name."""
        if name.startswith("__") or name in ("curves", "errors", "about", "source"):
            raise AttributeError(name)
        if name in self.curves:
            return self.curves[name]
        if f"{name}_log" in self.curves:
            logs = self.curves[f"{name}_log"]
            if np.any(logs > 709):
                raise OverflowError(
                    f"{name} reaches e^{np.max(logs):.0f}, beyond a float; use profile.{name}_log instead"
                )
            return np.exp(logs)
        raise AttributeError(f"this profile has no curve {name!r}{nearest(name, self.curves)}")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.curves["q"]) - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; entries that are not finite become ``None``."""
        return {
            "schema": 1,
            "source": self.source,
            "curves": {name: _plain(curve) for name, curve in self.curves.items()},
            "errors": {name: _plain(curve) for name, curve in self.errors.items()},
            "about": dict(self.about),
        }

    def to_json(self) -> str:
        """Return the profile as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _plain(curve: FloatArray) -> Any:
    values = np.asarray(curve, dtype=np.float64)
    if np.all(np.isfinite(values)):
        return values.tolist()
    return [_plain(row) for row in values] if values.ndim else None
