r"""Every component's moments, forward and backward, published and refined, against simulation.

Forward the mean, ``q`` and ``p`` behind a component, backward ``J`` and ``K`` in front of it, for cross-attention at
the queries and at the memory (:mod:`fathometer.papers.moments.component_cases`). Weights, inputs and masks are fresh in
every draw and errors are those of the mean over draws. The refined theory is to lie within 4.5 of them plus the
declared bias of the component.

Source: A. Kedia et al., arXiv:2403.09635. Where its text could not be confirmed, the published form is that of the
authors' public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fathometer.papers.item import Cell, Progress, Size, Table, plain, silent
from fathometer.papers.moments.component_case import Case
from fathometer.papers.moments.component_cases import cases

DRAWS_PER_SEED = 8
_STANDARD_ERRORS, _ROUNDING = 4.5, 1e-6  # of float32
_SHOWN = ("q", "p", "J", "K")
_RESOLVED = 0.05  # relative standard error up to which a ratio says something


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity behind or in front of one component.

    Attributes:
        component, setting, quantity: What it is; ``_memory`` marks gradients at the memory of cross-attention.
        simulated, error: Mean and standard error over draws.
        refined, reference: The theories; the published one is ``None`` where it is the same or there is none.
        bias: Declared relative bias of the refined theory.
    """

    component: str
    setting: str
    quantity: str
    simulated: float
    error: float
    refined: float
    reference: float | None
    bias: float

    @property
    def agrees(self) -> bool:
        """Whether the refined theory lies within 4.5 standard errors plus the declared bias."""
        slack = _STANDARD_ERRORS * self.error + (self.bias + _ROUNDING) * abs(self.refined)
        return abs(self.refined - self.simulated) <= slack

    @property
    def resolved(self) -> bool:
        """Whether the simulated value is known well enough for ratios."""
        return self.error < _RESOLVED * abs(self.simulated)

    def deviation(self, *, published: bool = False) -> float | None:
        """Return theory over simulation minus one; ``None`` without that theory or where a ratio says nothing."""
        theory = self.reference if published else self.refined
        return None if theory is None or not self.resolved else theory / self.simulated - 1


@dataclass(frozen=True, kw_only=True)
class ComponentAccuracy:
    """All comparisons, in the order of the components.

    Attributes:
        comparisons: One for each quantity of each component in each setting.
        draws: Weight draws of each.
        about: Sizes.
    """

    comparisons: tuple[Comparison, ...]
    draws: int
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def components(self) -> list[str]:
        """Return the names of the components in order."""
        return list(dict.fromkeys(comparison.component for comparison in self.comparisons))

    def table(self) -> Table:
        """Return the largest deviation of each component in percent, with its standard error.

        ``bias`` is the largest declared, in percent; ``ok`` says whether the refined theory agrees in every setting.
        """
        rows: list[tuple[Cell, ...]] = []
        for name in self.components():
            mine = [one for one in self.comparisons if one.component == name]
            bias = max(one.bias for one in mine)
            rows.append(
                (
                    name,
                    *(_worst(mine, quantity) for quantity in _SHOWN),
                    f"{100 * bias:.2g}" if bias else "",
                    "yes" if all(one.agrees for one in mine) else "NO",
                )
            )
            published = [one for one in mine if one.reference not in (None, one.refined)]
            if published:
                rows.append(
                    ("  published", *(_worst(published, quantity, published=True) for quantity in _SHOWN), "", "")
                )
        return Table(
            title=f"Theory over simulation minus one, %: largest of all settings, {self.draws} draws each",
            headings=("component", *_SHOWN, "bias", "ok"),
            rows=tuple(rows),
        )


def component_accuracy(size: Size, progress: Progress = silent) -> ComponentAccuracy:
    """Predict and simulate every component. About a minute at the small size on one core."""
    draws, every = DRAWS_PER_SEED * size.seeds, cases(size)
    out: list[Comparison] = []
    for done, case in enumerate(every, start=1):
        out += compare(case, draws)
        progress(case.component, done, len(every))
    from fathometer import __version__

    about = {"paper": "arXiv:2403.09635", "version": __version__, "size": plain(size)}
    return ComponentAccuracy(comparisons=tuple(out), draws=draws, about=about)


def compare(case: Case, draws: int) -> list[Comparison]:
    """Simulate one case and put its theories beside."""
    refined, simulated = case.refined(), case.simulate(seeds=draws)
    reference = {} if case.reference is None else case.reference()
    return [
        Comparison(
            component=case.component,
            setting=case.setting,
            quantity=quantity,
            simulated=simulated[quantity][0],
            error=simulated[quantity][1],
            refined=value,
            reference=reference.get(quantity),
            bias=case.bias(quantity),
        )
        for quantity, value in refined.items()
    ]


def _worst(comparisons: Sequence[Comparison], quantity: str, *, published: bool = False) -> Cell:
    found = [
        (deviation, one.error / abs(one.simulated))
        for one in comparisons
        if one.quantity.removesuffix("_memory") == quantity
        and (deviation := one.deviation(published=published)) is not None
    ]
    if not found:
        return ""
    worst, error = max(found, key=lambda pair: abs(pair[0]))
    return f"{100 * worst:+.0f}" if abs(worst) > 0.1 else f"{100 * worst:+.1f}±{100 * error:.1f}"
