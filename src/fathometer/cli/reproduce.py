"""``fathometer reproduce``: a figure or table of a paper, theory beside simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fathometer.cli.libraries import prepare_torch
from fathometer.cli.output import check_folder, write_result
from fathometer.errors import SpecError, nearest


def reproduce(
    item: Annotated[
        str | None, typer.Argument(help="PAPER/FIGURE, for instance apjn/forward; without it, everything is listed.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="small (minutes at most) or full (the paper's widths; hours and gigabytes).")
    ] = "small",
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json and figure.png; fathometer-reproduce/ITEM by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Reproduce a figure or table of a paper, theory beside simulation."""
    from fathometer import papers

    if item is None:
        _list(as_json)
        return
    chosen = papers.find_item(item)
    if size not in papers.SIZES:
        raise SpecError(f"there is no size {size!r}{nearest(size, papers.SIZES)}")
    folder = Path("fathometer-reproduce") / item.replace("/", "-") if out is None else out
    check_folder(folder)

    prepare_torch()
    from fathometer.report import progress_reporter

    with progress_reporter() as progress:
        result = chosen.run(papers.SIZES[size], progress)
    text = json.dumps({"item": item, "size": size, **result.to_dict()}, indent=1, allow_nan=False)
    paths = write_result(folder, text, chosen.draw(result))
    if as_json:
        print(text)
        return
    from rich.console import Console

    console = Console()
    console.print(_rendered(result.table()))
    console.print("Written: " + ", ".join(str(path) for path in paths), highlight=False, markup=False, soft_wrap=True)


def _list(as_json: bool) -> None:
    from fathometer import papers

    if as_json:
        print(json.dumps({name: item.about for name, item in papers.ITEMS.items()}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fathometer reproduce ITEM", title_justify="left", box=None, pad_edge=False)
    table.add_column("item", no_wrap=True)
    table.add_column("what it shows")
    for name, item in papers.ITEMS.items():
        table.add_row(name, item.about)
    Console().print(table)


def _rendered(table: Any) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if i == 0 else "right")
    for row in table.rows:
        shown.add_row(*(Text(_cell(cell)) for cell in row))
    return shown


def _cell(cell: Any) -> str:
    from fathometer.report.numbers import number, with_error

    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        return with_error(*cell)
    return number(cell, 4)
