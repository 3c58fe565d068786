"""Known failures of real code get the right verdict, and healthy models no false alarm."""

from __future__ import annotations

import pytest

import fathometer as fm
from tests.diagnosis.planted import HEALTHY, UNHEALTHY, Case


@pytest.mark.parametrize("case", UNHEALTHY, ids=lambda case: case.name)
def test_planted_failure_is_found(case: Case) -> None:
    model, batch = case.build()
    report = fm.diagnose(model, batch, seeds=2, forward=False)
    found = {finding.name for finding in report.findings}
    assert case.must <= found, report.verdict
    assert found <= case.must | case.may, report.verdict
    assert all(finding.evidence.text and finding.agreement > 0 for finding in report.findings)


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_healthy_model_raises_no_alarm(case: Case) -> None:
    model, batch = case.build()
    report = fm.diagnose(model, batch, seeds=2, forward=False)
    assert report.healthy, report.verdict
    report.assert_healthy()
