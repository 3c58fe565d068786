"""The result of a diagnosis: what was predicted, what was seen, where they part, what is wrong and what would help."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fathometer.diagnosis.comparison import Comparison
from fathometer.diagnosis.criteria import Evidence
from fathometer.errors import FathometerError
from fathometer.results import Profile


class UnhealthyError(FathometerError, AssertionError):
    """Raised by :meth:`Report.assert_healthy`; carries the report."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(f"{finding.title}: {finding.evidence.text}" for finding in report.findings))
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One failure.

    Attributes:
        name: Machine-readable kind, as in the table of criteria.
        title: For people.
        evidence: Value, limit, depth and a sentence.
        agreement: Share of weight draws in which the criterion fails.
        predicted: Whether the theory fails the same criterion; ``None`` where there is no theory.
    """

    name: str
    title: str
    evidence: Evidence
    agreement: float
    predicted: bool | None

    @property
    def confidence(self) -> str:
        """``"high"``, ``"medium"`` or ``"low"``: from the draws and from whether the theory agrees."""
        if self.agreement >= 1.0 and self.predicted is not False:
            return "high"
        return "medium" if self.agreement >= 0.5 else "low"


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change and what the theory says it would do.

    Attributes:
        title: What to change.
        cures: Names of the findings it removes, by the theory.
        before, after: Headline numbers predicted without and with the change.
        snippet: Lines to paste.
        factor: The computed factor or value, if the change is one number.
    """

    title: str
    cures: tuple[str, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    snippet: str
    factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A diagnosis.

    Attributes:
        name: The model.
        measured: Averages over weight draws, with standard errors.
        predicted: Theory from the measured first Gram matrix and the scales read off the weights; ``None`` if not
            covered.
        not_covered: Why there is no theory, or ``None``.
        comparison: Fold errors, or ``None``.
        findings: Failures, gravest first; empty means healthy.
        remedies: Computed changes, best first.
        about: Batch, sizes, seeds, versions, notes.
    """

    name: str
    measured: Profile
    predicted: Profile | None
    not_covered: str | None
    comparison: Comparison | None
    findings: tuple[Finding, ...]
    remedies: tuple[Remedy, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether no criterion failed."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """``"healthy"``, or the titles of the findings."""
        return "healthy" if self.healthy else ", ".join(finding.title.lower() for finding in self.findings)

    def assert_healthy(self) -> None:
        """Raise :class:`UnhealthyError` unless healthy; for use in a test suite."""
        if not self.healthy:
            raise UnhealthyError(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "schema": 1,
            "name": self.name,
            "verdict": self.verdict,
            "healthy": self.healthy,
            "not_covered": self.not_covered,
            "findings": [
                {
                    "name": f.name,
                    "title": f.title,
                    "value": f.evidence.value,
                    "limit": f.evidence.limit,
                    "depth": f.evidence.depth,
                    "text": f.evidence.text,
                    "agreement": f.agreement,
                    "predicted": f.predicted,
                    "confidence": f.confidence,
                }
                for f in self.findings
            ],
            "remedies": [
                {
                    "title": r.title,
                    "cures": list(r.cures),
                    "before": dict(r.before),
                    "after": dict(r.after),
                    "factor": r.factor,
                    "snippet": r.snippet,
                }
                for r in self.remedies
            ],
            "comparison": None if self.comparison is None else _finite(self.comparison.to_dict()),
            "measured": self.measured.to_dict(),
            "predicted": None if self.predicted is None else self.predicted.to_dict(),
            "about": dict(self.about),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
