"""``fathometer widths``, ``coordinate-check`` and ``transfer-check``: a recipe that survives a change of width."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathometer.cli.libraries import prepare_torch
from fathometer.cli.output import check_folder, write_result
from fathometer.errors import SpecError, nearest

if TYPE_CHECKING:
    from fathometer.training.families import Build, Task

LANGUAGE, DIGITS = "language", "digits"

Family = Annotated[
    str,
    typer.Argument(
        help="language (bytes of prose), digits (a small ViT), or path/to/file.py:function taking width=... and "
        "returning a torch module from token numbers to one logit vector a token."
    ),
]
Base = Annotated[int | None, typer.Option(help="Width the learning rates are named for; the narrowest by default.")]
Optimizer = Annotated[str, typer.Option(help="adamw or sgd.")]
Fixed = Annotated[str, typer.Option(help="What stays while the width changes: d_head or n_heads.")]
Text = Annotated[Path | None, typer.Option(help="File to read as bytes; help topics of Python by default.")]
Tokens = Annotated[int, typer.Option(help="Length of a window of text.")]
Samples = Annotated[int, typer.Option(help="Samples a step.")]
Seeds = Annotated[int, typer.Option(help="Draws of weights and data, at least 2.")]
Out = Annotated[Path | None, typer.Option(help="Folder for result.json and figure.png.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def widths(
    model: Annotated[str, typer.Argument(help="hf:NAME, timm:NAME, or path/to/file.py:function.")],
    scheme: Annotated[
        str, typer.Option(help="neural-tangent, hybrid, maximal-update, complete-p, or a number s in [0, 1].")
    ],
    base_width: Annotated[
        int | None, typer.Option(help="Width the rate was tuned at; absolute factors without.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks; the architecture's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the stream.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    base_layers: Annotated[int | None, typer.Option(help="Blocks of the base; the same by default.")] = None,
    optimizer: Optimizer = "adamw",
    fixed: Fixed = "d_head",
    batch: Annotated[
        str | None, typer.Option(help="text, photographs, tokens:WIDTHxCOUNT, or a .txt, .pt, .npy or image file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a width scaling does to a model: factors on std, learning rate, decay and epsilon by role."""
    prepare_torch()
    from fathometer import measurement, models
    from fathometer.application import scaling_table
    from fathometer.models.roles import read_roles

    loaded = models.load_model(model, layers=layers, width=width, heads=heads)
    inputs = measurement.load_batch(batch, loaded, n_tokens=16, batch_size=2).inputs
    table = scaling_table(
        read_roles(loaded.model, inputs),
        _scheme(scheme),
        base_width=base_width,
        optimizer=optimizer,  # type: ignore[arg-type]
        fixed=fixed,  # type: ignore[arg-type]
        base_layers=base_layers,
    )
    print(json.dumps(table.to_dict(), indent=1, allow_nan=False) if as_json else table.table())


def coordinate_check(
    family: Family,
    widths: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "64,128,256,512",
    schemes: Annotated[
        str, typer.Option(help="uniform, neural-tangent, hybrid, maximal-update or s, separated by commas.")
    ] = "uniform,neural-tangent,hybrid,maximal-update",
    rate: Annotated[float, typer.Option(help="Learning rate at the base width, small.")] = 1e-5,
    steps: Annotated[str, typer.Option(help="Numbers of steps, separated by commas.")] = "1,3",
    base_width: Base = None,
    optimizer: Optimizer = "adamw",
    fixed: Fixed = "d_head",
    text: Text = None,
    tokens: Tokens = 16,
    samples: Samples = 4,
    seeds: Seeds = 4,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Take a few steps at several widths: how far features and outputs move, with slopes against width."""
    if out is not None:
        check_folder(out)
    build, task = _family(family, text, tokens, samples)
    from fathometer.plotting.effective import draw_coordinates
    from fathometer.report import progress_reporter
    from fathometer.training.coordinates import coordinate_check as check

    numbers = _whole("--widths", widths)
    with progress_reporter() as progress:
        found = [
            check(
                build,
                numbers,
                task=task,
                scheme=_scheme(name),
                lr=rate,
                base_width=min(numbers) if base_width is None else base_width,
                steps=_whole("--steps", steps),
                seeds=seeds,
                optimizer=optimizer,  # type: ignore[arg-type]
                fixed=fixed,  # type: ignore[arg-type]
                progress=progress,
            )
            for name in _names(schemes)
        ]
    content = json.dumps([one.to_dict() for one in found], indent=1, allow_nan=False)
    _deliver(content, lambda: draw_coordinates(found), out, as_json)
    if as_json:
        return
    for one in found:
        for step in one.steps:
            slopes, expected = one.slopes(step), one.expected
            rows = [
                (place, f"{slope:+.3f} +- {error:.3f}", f"{expected[place]:+.2f}" if place in expected else "-")
                for place, (slope, error) in slopes.items()
            ]
            _show(f"{one.scheme}, {step} step{'s' * (step > 1)}", ("change of", "slope against width", "theory"), rows)


def transfer_check(
    family: Family,
    widths: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "16,32,64,128",
    schemes: Annotated[
        str, typer.Option(help="uniform, neural-tangent, hybrid, maximal-update or s, separated by commas.")
    ] = "uniform,neural-tangent,hybrid,maximal-update",
    lowest: Annotated[float, typer.Option(help="Lowest learning rate of the grid, at the base width.")] = 2.0**-11,
    count: Annotated[int, typer.Option(help="Rates of the grid, each twice the one before.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of every run.")] = 100,
    warmup: Annotated[int, typer.Option(help="Steps over which rates rise linearly.")] = 0,
    base_width: Base = None,
    optimizer: Optimizer = "adamw",
    fixed: Fixed = "d_head",
    text: Text = None,
    tokens: Tokens = 16,
    samples: Samples = 8,
    seeds: Seeds = 3,
    journal: Annotated[
        Path | None, typer.Option(help="File of finished runs: the same command goes on where it was interrupted.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train at several widths and learning rates: where the best rate goes, under each recipe."""
    if count < 3:
        raise SpecError(f"--count must be at least 3; got {count}")
    if out is not None:
        check_folder(out)
    build, task = _family(family, text, tokens, samples)
    from fathometer.plotting.effective import draw_transfer
    from fathometer.report import progress_reporter
    from fathometer.training.transfer import transfer_check as check

    numbers = _whole("--widths", widths)
    with progress_reporter() as progress:
        found = check(
            build,
            numbers,
            task=task,
            rates=[lowest * 2.0**i for i in range(count)],
            base_width=min(numbers) if base_width is None else base_width,
            schemes=[_scheme(name) for name in _names(schemes)],
            steps=steps,
            warmup=warmup,
            seeds=seeds,
            optimizer=optimizer,  # type: ignore[arg-type]
            fixed=fixed,  # type: ignore[arg-type]
            journal=journal,
            progress=progress,
        )
    _deliver(found.to_json(), lambda: draw_transfer(found), out, as_json)
    if as_json:
        return
    rows = []
    for name in found.schemes:
        cells = [f"{one.rate:.2e}{'' if one.status == 'ok' else f' ({one.status})'}" for one in found.optima(name)]
        rows.append((name, *cells, str(found.shift(name))))
    headings = ("recipe", *(f"width {width}" for width in found.widths), "shift in factors of 2, grid (fit)")
    _show("Best learning rate", headings, rows)


def _family(name: str, text: Path | None, tokens: int, samples: int) -> tuple[Build, Task]:
    """Return how to build a model of a width, and its task."""
    prepare_torch()
    from functools import partial

    from fathometer.papers.effective.models import language_model, vision_model
    from fathometer.training import load_digits
    from fathometer.training.families import digits_task, language_task
    from fathometer.training.text import byte_text

    if name == DIGITS:
        return vision_model, digits_task(load_digits(), batch_size=samples)
    if name != LANGUAGE and ".py:" not in name:
        raise SpecError(f"there is no family of models {name!r}{nearest(name, [LANGUAGE, DIGITS, 'file.py:function'])}")
    read = byte_text(text)
    task = language_task(read, n_tokens=tokens, batch_size=samples)
    if name == LANGUAGE:
        return partial(language_model, log_frequencies=read.log_frequencies, n_tokens=tokens), task
    from fathometer.models import load_model

    return lambda width, seed: load_model(name, width=width, seed=seed).model, task


def _scheme(text: str) -> str | float:
    """Return the name of a scheme, or s as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _names(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _whole(option: str, text: str) -> list[int]:
    try:
        return [int(piece) for piece in _names(text)]
    except ValueError:
        raise SpecError(f"{option} must be whole numbers separated by commas; got {text!r}") from None


def _deliver(content: str, draw: Any, out: Path | None, as_json: bool) -> None:
    """Write result and figure where a folder is given, and print the result where asked for."""
    if out is not None:
        paths = write_result(out, content, draw())
        if not as_json:
            print("Written: " + ", ".join(str(path) for path in paths))
    if as_json:
        print(content)


def _show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(emoji=False).print(table)
