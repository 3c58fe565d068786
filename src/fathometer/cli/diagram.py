"""``fathometer diagram``: a map of what theory predicts over two fields of a spec."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fathometer.cli.specs import named_spec
from fathometer.errors import MissingExtraError, SpecError, nearest

_MOST = 4000  # values of an axis


def diagram(
    spec: Annotated[str, typer.Argument(help="A .toml or .json spec, or preset:NAME.")],
    x: Annotated[str, typer.Option("--x", help="Horizontal axis, FIELD=LOW:HIGH or FIELD=LOW:HIGH:COUNT.")],
    y: Annotated[str, typer.Option("--y", help="Vertical axis, likewise; 200 values each by default.")],
    observable: Annotated[
        list[str] | None,
        typer.Option(help="What to map, repeatable or separated by commas: angle_exponent, phase, apjn_log, ..."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens.")] = 256,
    cosine: Annotated[float, typer.Option(help="Cosine between tokens at the first block.")] = 0.5,
    q: Annotated[
        float | None, typer.Option(help="Mean square of a token there; by default what the last block preserves.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks; the spec's own by default.")] = None,
    log_x: Annotated[bool, typer.Option("--log-x", help="Space the horizontal axis geometrically.")] = False,
    log_y: Annotated[bool, typer.Option("--log-y", help="Space the vertical axis geometrically.")] = False,
    critical: Annotated[
        str | None, typer.Option(help="Solve for this axis where each mapped exponent vanishes, and draw that line.")
    ] = None,
    closure: Annotated[str, typer.Option(help="How the softmax is averaged.")] = "exact",
    out: Annotated[Path, typer.Option(help="Folder for figure.png, diagram.json and diagram.nc.")] = Path(
        "fathometer-diagram"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Map exponents, phases or gradients over two fields of a spec; theory only, no torch."""
    from fathometer.diagrams import diagram as map_over

    axes = {"--x": _axis("--x", x, is_log=log_x), "--y": _axis("--y", y, is_log=log_y)}
    fields = [field for field, _ in axes.values()]
    if critical is not None and critical not in fields:
        raise SpecError(f"--critical must name an axis; got {critical!r}{nearest(critical, fields)}")
    if out.exists() and not out.is_dir():
        raise SpecError(f"{str(out)!r} is a file; name a folder with --out")
    names = _observables(observable)
    described = named_spec(spec, layers)
    found = map_over(
        described,
        x=axes["--x"],
        y=axes["--y"],
        observable=names,
        n_tokens=tokens,
        cosine=cosine,
        q=q,
        closure=closure,
    )
    lines: list[Any] = []
    notes: list[str] = []
    if critical is not None:
        lines, notes = _critical_lines(found, described, critical, q=q, cosine=cosine)
    text = json.dumps(
        {**found.to_dict(), "critical_lines": [_plain_line(line) for line in lines], "notes": notes},
        indent=1,
        allow_nan=False,
    )
    paths = _write(out, text, found, lines)
    if as_json:
        print(text)
        return
    from rich.console import Console

    console = Console()
    console.print(_table(found, title=f"{spec}: {fields[1]} over {fields[0]}, {tokens} tokens, {closure} closure"))
    for note in notes:
        console.print(f"Note: {note}.", highlight=False, markup=False, soft_wrap=True)
    if out / "diagram.nc" not in paths:
        console.print("Note: diagram.nc needs: pip install 'fathometer[grid]'", highlight=False, markup=False)
    console.print("Written: " + ", ".join(str(path) for path in paths), highlight=False, markup=False, soft_wrap=True)


def _axis(option: str, text: str, *, is_log: bool) -> tuple[str, Any]:
    """Read ``FIELD=LOW:HIGH[:COUNT]``."""
    field, _, span = text.partition("=")
    pieces = span.split(":")
    try:
        low, high = float(pieces[0]), float(pieces[1])
        count = int(pieces[2]) if len(pieces) > 2 else 200
        if not field or len(pieces) > 3:
            raise ValueError(text)
    except (ValueError, IndexError):
        raise SpecError(
            f"{option} {text!r} is no axis; accepted: FIELD=LOW:HIGH or FIELD=LOW:HIGH:COUNT, for instance "
            "mlp_in=0.5:4:200"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SpecError(f"{option} {text!r} is no axis; accepted: finite numbers with LOW < HIGH")
    if not 2 <= count <= _MOST:
        raise SpecError(f"{option} {text!r} is no axis; accepted: a COUNT from 2 to {_MOST}")
    if is_log and low <= 0:
        raise SpecError(f"{option} {text!r} cannot be spaced geometrically; accepted with --log-{option[-1]}: LOW > 0")
    return field, np.geomspace(low, high, count) if is_log else np.linspace(low, high, count)


def _observables(given: list[str] | None) -> list[str]:
    pieces = [piece.strip() for text in given or ["angle_exponent"] for piece in text.split(",")]
    return list(dict.fromkeys(pieces))


def _critical_lines(
    found: Any, described: Any, field: str, *, q: float | None, cosine: float
) -> tuple[list[Any], list[str]]:
    """Return a line for each exponent that vanishes somewhere on the map, and remarks."""
    from fathometer.prescription import EXPONENTS, NoRootError, critical_line

    solved, given = (found.x, found.y) if field == found.x.name else (found.y, found.x)
    lines: list[Any] = []
    notes: list[str] = []
    for name in found.values:
        if name not in EXPONENTS:
            continue
        try:
            line = critical_line(
                described,
                x=solved.name,
                y=(given.name, given.values),
                low=float(solved.values[0]),
                high=float(solved.values[-1]),
                n_tokens=found.about["n_tokens"],
                observable=name,
                cosine=cosine,
                q=q,
                closure=found.about["closure"],
            )
        except NoRootError as error:
            notes.append(f"no critical line: {error}")
            continue
        lines.append(line)
        if np.max(line.crossings) > 1:
            notes.append(
                f"{name} vanishes up to {np.max(line.crossings)} times along {solved.name}; its critical line is the "
                "smallest solution"
            )
    if not lines and not notes:
        notes.append(f"no critical line: none of the observables is one of {', '.join(EXPONENTS)}")
    return lines, notes


def _plain_line(line: Any) -> dict[str, Any]:
    def finite(values: Any) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values.tolist()]

    return {
        "observable": line.observable,
        "x": line.x,
        "y": line.y,
        "x_values": finite(line.x_values),
        "y_values": finite(line.y_values),
        "status": line.status.tolist(),
        "residual": finite(line.residual),
    }


def _write(folder: Path, text: str, found: Any, lines: list[Any]) -> list[Path]:
    """Render everything, then replace each file in one step."""
    from fathometer.plotting import to_png
    from fathometer.plotting.diagram import draw_diagram
    from fathometer.report import OutputError
    from fathometer.results.files import write_atomically

    files = {"figure.png": to_png(draw_diagram(found, lines=lines)), "diagram.json": text.encode("utf-8")}
    paths = [folder / name for name in files]
    try:
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        with suppress(MissingExtraError):
            paths.append(found.save(folder / "diagram.nc"))
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return paths


def _table(found: Any, title: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("observable", no_wrap=True)
    for heading in ("min", "median", "max", "ok", "of these"):
        table.add_column(heading, justify="right")
    for name, values in found.values.items():
        table.add_row(name, *_row(name, values, found.status[name] == "ok"))
    return table


def _row(name: str, values: Any, ok: Any) -> tuple[str, ...]:
    """Return minimum, median and maximum of the points that are ok, their share, and how they divide."""
    from fathometer.diagrams import OBSERVABLES
    from fathometer.report.numbers import MISSING, number

    good = values[ok]
    share = f"{np.mean(ok):.1%}"
    if good.dtype.kind == "U":
        kinds, counts = np.unique(good, return_counts=True)
        divided = ", ".join(f"{count / good.size:.1%} {kind}" for kind, count in zip(kinds, counts, strict=True))
        return MISSING, MISSING, MISSING, share, divided
    numbers = [number(float(read(good)), 4) for read in (np.min, np.median, np.max)] if good.size else [MISSING] * 3
    is_signed = OBSERVABLES[name].is_signed and good.size > 0
    return *numbers, share, f"{np.mean(good < 0):.1%} negative" if is_signed else ""
