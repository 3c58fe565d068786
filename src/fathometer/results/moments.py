"""Moments of every component of a transformer, one table for theory and measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import SpecError, nearest
from fathometer.results.plain import plain

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: What a sublayer consists of, in the order signals pass, and what each entry is.
COMPONENTS: dict[str, str] = {
    "input_norm": "behind the norm in front of the branch",
    "query": "behind the query matrix",
    "key": "behind the key matrix",
    "scores": "attention scores before the softmax, over pairs of query and key",
    "weights": "attention weights, over pairs of query and key, hidden keys counting as zeros",
    "value": "behind the value matrix",
    "mixed": "values averaged by attention, in front of the output matrix",
    "gate": "behind the gate matrix, in front of the activation",
    "mlp_in": "behind the first MLP matrix",
    "activation": "hidden units of the MLP, in front of its last matrix",
    "branch": "behind the branch's last matrix",
    "output_norm": "behind the norm at the end of the branch",
    "added": "what is added to the stream: behind dropout, times the branch scale",
    "sum": "the residual sum",
    "stream_norm": "behind the norm that follows the sum",
}
#: Numbers of a component; the last two belong to the gradient at the same place.
QUANTITIES = ("mean", "q", "p", "variance", "covariance", "correlation", "gradient_log", "gradient_alignment")


@dataclass(frozen=True, kw_only=True)
class ComponentMoments:
    r"""Moments at one place of every layer that has it.

    Attributes:
        layers: The layers; shape ``(n,)``, as all arrays here.
        mean: Mean of an entry.
        q: Second moment of an entry, over tokens and features; of scores and weights over pairs of query and key.
        p: Mean product of the same feature at two different tokens; of scores and weights that of two different
            queries at the same key.
        gradient_log: ``ln`` of the mean square of an entry's gradient over that at the output of the last block.
        gradient_alignment: Mean product of the gradients of two tokens over their mean square.
        errors: Standard errors over weight draws by quantity, that of ``gradient_log`` being relative; only where
            measured.

    Entries a theory or a measurement cannot give are NaN.
    """

    layers: IntArray
    mean: FloatArray
    q: FloatArray
    p: FloatArray
    gradient_log: FloatArray
    gradient_alignment: FloatArray
    errors: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def variance(self) -> FloatArray:
        """``q - mean^2``."""
        return np.asarray(self.q - self.mean**2)

    @property
    def covariance(self) -> FloatArray:
        """``p - mean^2``."""
        return np.asarray(self.p - self.mean**2)

    @property
    def correlation(self) -> FloatArray:
        """Covariance over variance; NaN where the variance is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.covariance / np.where(self.variance > 0, self.variance, np.nan))


@dataclass(frozen=True, kw_only=True)
class ModelMoments:
    """Moments of all components of a stack of blocks.

    Attributes:
        source: ``"theory"`` or ``"measurement"``.
        components: ``"stream"`` at block borders (``n_layers + 1`` entries), and ``"attention.query"``,
            ``"mlp.activation"`` and so on: the kind of sublayer and a name of :data:`COMPONENTS`. A second sublayer of
            the same kind in a block is ``"attention_2"``.
        about: What produced it.
    """

    source: str
    components: Mapping[str, ComponentMoments]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.components:
            known = name == "stream" or name.partition(".")[2] in COMPONENTS
            if not known:
                raise SpecError(f"there is no component {name!r}{nearest(name.partition('.')[2], COMPONENTS)}")

    def __getitem__(self, name: str) -> ComponentMoments:
        """Return a component by name."""
        if name not in self.components:
            raise SpecError(f"these moments have no component {name!r}{nearest(name, self.components)}")
        return self.components[name]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.components["stream"].layers) - 1

    def rows(self, layer: int) -> dict[str, dict[str, float]]:
        """Return, for one layer, component by component in the order signals pass, every quantity.

        Raises:
            SpecError: if there is no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise SpecError(f"layer must lie in [0, {self.n_layers - 1}]; got {layer}")
        out = {}
        for name, component in self.components.items():
            at = np.flatnonzero(component.layers == layer)
            if at.size:
                out[name] = {quantity: float(getattr(component, quantity)[at[0]]) for quantity in QUANTITIES}
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; entries that are not finite become ``None``."""
        return {
            "schema": 1,
            "source": self.source,
            "components": {
                name: {
                    "layers": component.layers.tolist(),
                    **{quantity: plain(getattr(component, quantity)) for quantity in QUANTITIES},
                    "errors": {quantity: plain(error) for quantity, error in component.errors.items()},
                }
                for name, component in self.components.items()
            },
            "about": dict(self.about),
        }

    def to_json(self) -> str:
        """Return the moments as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)
