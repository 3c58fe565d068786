"""An assertion for users' own test suites."""

from __future__ import annotations

from typing import Any

from torch import nn

from fathometer.diagnosis import Report, diagnose


def assert_healthy(model: nn.Module, batch: Any, **options: Any) -> Report:
    """Fail a test unless the model is healthy at initialisation.

    Args:
        model: Any torch module with residual blocks.
        batch: What to call it with.
        **options: As in :func:`fathometer.diagnose`, for instance ``seeds=2`` or ``thresholds=...``.
    Returns:
        The report, for further assertions.
    Raises:
        UnhealthyError: an ``AssertionError`` that lists every finding with its evidence.

    In a test suite::

        def test_my_model_will_train():
            assert_healthy(build_model(), example_batch(), seeds=2)
    """
    report = diagnose(model, batch, **options)
    __tracebackhide__ = True  # the report, not this frame, is what failed
    report.assert_healthy()
    return report
