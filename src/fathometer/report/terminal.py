"""A report in the terminal: verdict, a table of a few layers, agreement, and what to change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fathometer.diagnosis.report import Remedy, Report
from fathometer.report.numbers import MISSING, curve_value, number
from fathometer.report.wording import CURVES, bites, headline, printable, sizes, some_layers, state, support

if TYPE_CHECKING:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

_COLOURS = {"healthy": "green", "unhealthy": "red", "uncovered": "yellow"}
_SHOWN = (("q", "q"), ("cosine", "cosine"), ("apjn_log", "J back"), ("attention_entropy_relative", "entropy"))


def render_terminal(report: Report, console: Console, *, layers: int = 8, remedies: int = 2) -> None:
    """Print a report.

    Args:
        report: What to print.
        console: Where.
        layers: About how many layers the table shows.
        remedies: How many remedies are printed with their lines to paste.
    """
    if not console.encoding.lower().startswith("utf"):
        with console.capture() as captured:
            _render(report, console, layers, remedies, "+-")
        # A model's name may hold what this terminal cannot show.
        console.file.write(captured.get().encode(console.encoding, "replace").decode(console.encoding))
        return
    _render(report, console, layers, remedies, "±")


def _render(report: Report, console: Console, layers: int, remedies: int, sign: str) -> None:
    console.print(_verdict(report))
    console.print(_layers(report, layers, sign, wide=console.width >= 112))
    if report.comparison is not None and report.comparison.folds:
        console.print(_folds(report))
        for reason in report.comparison.reasons:
            console.print(f"  {printable(reason)}", style="dim", markup=False, highlight=False)
    for note in report.about.get("notes", ()):
        console.print(f"Note: {printable(str(note))}", markup=False, highlight=False)
    for position, remedy in enumerate(report.remedies[:remedies], start=1):
        _remedy(console, remedy, position)
    left = len(report.remedies) - remedies
    if left > 0:
        console.print(f"{left} more in the report", style="dim", highlight=False)


def _verdict(report: Report) -> Panel:
    from rich.panel import Panel
    from rich.text import Text

    colour = _COLOURS[state(report)]
    title, sentence = headline(report)
    text = Text()
    text.append(f"{printable(title)}\n", style=f"bold {colour}")
    text.append(sentence)
    for finding in report.findings:
        text.append(f"\n\n{printable(finding.title)}", style="bold")
        text.append(f"  {finding.confidence} confidence", style="dim")
        text.append(f"\n{printable(finding.evidence.text)}")
        text.append(f"\nbites: {bites(finding, report.measured.n_layers)}; {support(finding, report)}", style="dim")
    if report.not_covered is not None:
        text.append("\n\nnot covered by the theory: ", style="bold yellow")
        text.append(printable(report.not_covered))
    name = Text(f" {printable(report.name)} ", style="bold")
    subtitle = Text(f" {printable(', '.join(sizes(report)))} ", style="dim")
    return Panel(text, title=name, subtitle=subtitle, title_align="left", subtitle_align="left", border_style=colour)


def _layers(report: Report, count: int, sign: str, *, wide: bool) -> Table:

    table = _table("Measured" + (", and theory below" if report.predicted is not None and not wide else ""))
    table.add_column("block", justify="right", no_wrap=True)
    shown = [(name, label) for name, label in _SHOWN if name in report.measured.curves]
    beside = wide and report.predicted is not None
    for _, label in shown:
        table.add_column(label, justify="right", no_wrap=True)
        if beside:
            table.add_column("theory", justify="right", style="dim", no_wrap=True)
    for layer in some_layers(report.measured.n_layers, count):
        cells = [str(layer)]
        for name, _ in shown:
            seen = curve_value(report.measured, name, layer, sign=sign)
            theory = curve_value(report.predicted, name, layer, sign=sign)
            seen, theory = seen.replace(MISSING, "-"), theory.replace(MISSING, "-")
            if beside:
                cells += [seen, theory]
            elif report.predicted is None:
                cells.append(seen)
            else:
                cells.append(f"{seen}\n[dim]{theory}[/dim]")
        table.add_row(*cells)
    return table


def _folds(report: Report) -> Table:
    assert report.comparison is not None
    table = _table("Fold error of the theory (1 is perfect)")
    table.add_column("")
    for label in ("whole", "first third", "middle", "last third", "weight noise"):
        table.add_column(label, justify="right")
    for name, fold in report.comparison.folds.items():
        values = (fold.whole, *fold.thirds, fold.noise)
        table.add_row(CURVES.get(name, name), *(_fold(value) for value in values))
    return table


def _remedy(console: Console, remedy: Remedy, position: int) -> None:
    from rich.text import Text

    title = Text(f"\nWhat to change ({position}): ", style="bold cyan")
    title.append(printable(remedy.title), style="bold")
    console.print(title)
    for key, value in remedy.after.items():
        before = number(remedy.before.get(key)).replace(MISSING, "-")
        console.print(f"  {printable(key)}: {before} -> {number(value)}", markup=False, highlight=False)
    lines = remedy.snippet.splitlines()
    # Not indented and not wrapped, so that it can be copied.
    console.print("\n".join(map(printable, lines)), style="green", markup=False, highlight=False, soft_wrap=True)


def _fold(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if value < 100 else number(value)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
