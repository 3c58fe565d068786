"""Progress of a measurement, on the error stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fathometer.report.wording import printable

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]


@contextmanager
def progress_reporter(console: Console | None = None, *, every: float = 10.0) -> Iterator[Progress]:
    """Give a callable ``(label, done, total)`` that shows how far a measurement is.

    On a terminal: one bar that disappears at the end. Elsewhere (a log file, a batch job): a plain line at most every
    ``every`` seconds, so that short runs say nothing and long ones show that they live.

    Args:
        console: Where to write; the error stream if ``None``.
        every: Seconds between lines where there is no terminal.
    """
    from rich.console import Console

    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield _lines(console, every)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def report(label: str, done: int, total: int) -> None:
            progress.update(task, description=printable(label), completed=done, total=total)

        yield report


def _lines(console: Console, every: float) -> Progress:
    spoken = time.monotonic()

    def report(label: str, done: int, total: int) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= every:
            spoken = now
            (console.file or sys.stderr).write(f"{printable(label)}: {done}/{total}\n")

    return report
