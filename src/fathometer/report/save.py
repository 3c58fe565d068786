"""A report as a folder: report.html, report.json, overview.png and one picture per panel."""

from __future__ import annotations

import os
from pathlib import Path

from fathometer.diagnosis.report import Report
from fathometer.errors import FathometerError
from fathometer.plotting import draw_overview, panels_of, to_png
from fathometer.report.page import render_page
from fathometer.results.files import write_atomically


class OutputError(FathometerError, OSError):
    """A report cannot be written where it was asked for."""


def save_report(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Write a report to a folder, created if needed.

    Everything is rendered before anything is written, and every file is replaced in one step, so a reader never meets
    half a file and a failure leaves the old ones.

    Args:
        report: What to write.
        folder: Where; files of the same names are replaced, others are left alone.
    Returns:
        The files, ``report.html`` first.
    Raises:
        OutputError: if the folder is a file, or cannot be written.
        MissingExtraError: without matplotlib.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{str(target)!r} is a file; name a folder for the report")
    files = {
        "report.html": render_page(report).encode("utf-8"),
        "report.json": report.to_json().encode("utf-8"),
        "overview.png": to_png(draw_overview(report)),
    }
    for panel in panels_of(report):
        files[f"{panel.name}.png"] = to_png(panel.figure(report))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(target / name, content)
    except OSError as error:
        raise OutputError(f"cannot write the report to {str(target)!r}: {error.strerror or error}") from error
    return [target / name for name in files]
