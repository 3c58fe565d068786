"""What is drawn: a report, a profile, or theory and measurement together, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fathometer.errors import FathometerError
from fathometer.results import Profile

if TYPE_CHECKING:
    from fathometer.diagnosis import Comparison, Finding, Report

Drawable: TypeAlias = "Report | Profile | Sequence[Profile]"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything a panel may show.

    Attributes:
        measured, predicted: Curves; ``None`` where there are none.
        findings: Failures to mark.
        comparison: Fold errors.
        limits: Thresholds to draw, by name; empty for bare profiles, which nobody has judged.
    """

    measured: Profile | None = None
    predicted: Profile | None = None
    findings: tuple[Finding, ...] = ()
    comparison: Comparison | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The profiles there are, measurement first."""
        return tuple(profile for profile in (self.measured, self.predicted) if profile is not None)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.profiles[0].n_layers

    def has(self, *names: str) -> bool:
        """Whether any of these curves can be drawn."""
        return any(name in profile.curves for profile in self.profiles for name in names)

    def found(self, *names: str) -> list[Finding]:
        """Return the findings of these kinds."""
        return [finding for finding in self.findings if finding.name in names]


def subject_of(source: Drawable | Subject) -> Subject:
    """Bring what a user passes to one form.

    Raises:
        FathometerError: for two profiles of the same source, and for profiles over a grid.
    """
    if isinstance(source, Subject):
        return source
    if isinstance(source, Profile):
        source = (source,)
    if not isinstance(source, Sequence):
        return Subject(
            measured=source.measured,
            predicted=source.predicted,
            findings=source.findings,
            comparison=source.comparison,
            limits=_limits(source),
        )
    kinds = [profile.source for profile in source]
    if not kinds or len(set(kinds)) < len(kinds):
        raise FathometerError(
            f"one theory and one measured profile can share a panel; got {kinds}; draw more with ax=..."
        )
    for profile in source:
        if any(curve.ndim > 1 for curve in profile.curves.values()):
            raise FathometerError("these curves depend on more than the layer; pick one point of the grid to draw")
    chosen = dict(zip(kinds, source, strict=True))
    return Subject(measured=chosen.get("measurement"), predicted=chosen.get("theory"))


def _limits(report: Report) -> Mapping[str, float]:
    written = report.about.get("thresholds")
    if isinstance(written, Mapping):
        return written
    from fathometer.diagnosis.thresholds import DEFAULT_THRESHOLDS

    return vars(DEFAULT_THRESHOLDS)
