"""What a diagram can show of every point, and how a grid of specs is turned into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.observables import exponents, failure_modes, stable_state, starting_norm
from fathometer.propagation import Ends, check_moments, propagate_ends
from fathometer.spec import Transformer


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a stack is fed with.

    Args:
        n_tokens: Number of tokens.
        cosine: p/q at the first block.
        q: Second moment there; by default the one that the last block preserves for equal tokens, at every point.
        closure: How the softmax is averaged.
    """

    n_tokens: int
    cosine: float = 0.5
    q: float | None = None
    closure: Closure | str = DEFAULT_CLOSURE

    def __post_init__(self) -> None:
        check_moments(self.n_tokens, 1.0, self.cosine)
        as_closure(self.closure)

    def start(self, spec: Transformer) -> Any:
        """Return the second moment of the tokens at every point of a grid.

        Raises:
            DomainError: if none is given and the norm of the stream has no fixed point.
        """
        q: Any = self.q
        if q is None:
            q = starting_norm(spec, self.n_tokens, self.closure)
        return q

    def ends(self, spec: Transformer) -> Ends:
        """Return both ends of every stack of a grid."""
        q = self.start(spec)
        return propagate_ends(
            spec.bidirectional(),
            n_tokens=self.n_tokens,
            q=q,
            p=self.cosine * np.asarray(q),
            closure=as_closure(self.closure),
        )


class Mapped(NamedTuple):
    """Values of a grid and a status for every point, as in :class:`fathometer.diagrams.Diagram`."""

    values: NDArray[Any]
    status: NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Observable:
    """A number of every point.

    Attributes:
        label: For axes and colour bars.
        unit: ``"1"``, ``"nats"``, ``"nats per block"`` or ``"blocks"``.
        is_signed: Whether zero is a border that means something.
        compute: From a grid of specs to the numbers.
    """

    label: str
    unit: str
    is_signed: bool
    compute: Callable[[Transformer, Tokens], Mapped]


def _exponent(name: str, state: str = "collapsed") -> Callable[[Transformer, Tokens], Mapped]:
    def compute(spec: Transformer, tokens: Tokens) -> Mapped:
        found = exponents(spec, n_tokens=tokens.n_tokens, closure=tokens.closure, state=state)
        values = getattr(found, name)
        return Mapped(values, np.where(np.isneginf(values), "infinite", found.status))

    return compute


def _end(read: Callable[[Ends, Transformer], NDArray[np.float64]]) -> Callable[[Transformer, Tokens], Mapped]:
    def compute(spec: Transformer, tokens: Tokens) -> Mapped:
        ends = tokens.ends(spec)
        with np.errstate(invalid="ignore"):
            return Mapped(read(ends, spec), ends.status)

    return compute


def _stable(name: str) -> Callable[[Transformer, Tokens], Mapped]:
    def compute(spec: Transformer, tokens: Tokens) -> Mapped:
        found = stable_state(spec, n_tokens=tokens.n_tokens, closure=tokens.closure)
        return Mapped(getattr(found, name), np.where(found.phase == "none", "no fixed point", "ok"))

    return compute


def _failure(name: str) -> Callable[[Transformer, Tokens], Mapped]:
    def compute(spec: Transformer, tokens: Tokens) -> Mapped:
        found = failure_modes(
            spec, n_tokens=tokens.n_tokens, q=tokens.start(spec), cosine=tokens.cosine, closure=tokens.closure
        )
        return Mapped(getattr(found, name), found.status)

    return compute


#: What :func:`fathometer.diagram` knows, by name.
OBSERVABLES: dict[str, Observable] = {
    "angle_exponent": Observable(
        label="angle exponent", unit="nats per block", is_signed=True, compute=_exponent("angle")
    ),
    "token_exponent": Observable(
        label="token gradient exponent, stable state",
        unit="nats per block",
        is_signed=True,
        compute=_exponent("token", "stable"),
    ),
    "coherent_exponent": Observable(
        label="coherent gradient exponent, stable state",
        unit="nats per block",
        is_signed=True,
        compute=_exponent("coherent", "stable"),
    ),
    "gradient_exponent": Observable(
        label="gradient exponent at this depth",
        unit="nats per block",
        is_signed=True,
        compute=_end(lambda ends, spec: ends.gradient_log() / spec.n_layers),
    ),
    "crossover_depth": Observable(
        label="depth where coherent gradients take over",
        unit="blocks",
        is_signed=False,
        compute=_exponent("crossover_depth"),
    ),
    "stable_cosine": Observable(
        label="cosine after infinite depth", unit="1", is_signed=False, compute=_stable("cosine")
    ),
    "phase": Observable(label="phase", unit="1", is_signed=False, compute=_stable("phase")),
    "failure_mode": Observable(label="failure mode", unit="1", is_signed=False, compute=_failure("mode")),
    "condensation": Observable(
        label="score spread over the condensing one, first attention",
        unit="1",
        is_signed=False,
        compute=_failure("condensation"),
    ),
    "trainable_depth": Observable(
        label="blocks before rank collapse", unit="blocks", is_signed=False, compute=_failure("trainable_depth")
    ),
    "q": Observable(label="mean square at the output", unit="1", is_signed=False, compute=_end(lambda e, _: e.q)),
    "cosine": Observable(label="cosine at the output", unit="1", is_signed=False, compute=_end(lambda e, _: e.p / e.q)),
    "apjn_log": Observable(
        label="ln APJN, input to output", unit="nats", is_signed=True, compute=_end(lambda e, _: e.gradient_log())
    ),
    "gradient_log": Observable(
        label="ln gradient amplification, pooled loss",
        unit="nats",
        is_signed=True,
        compute=_end(lambda e, _: e.gradient_log(1.0)),
    ),
}
