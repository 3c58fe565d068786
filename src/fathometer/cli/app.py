"""Thin commands over the Python interface.

Errors are one line and exit code 2; an unhealthy verdict under ``--strict`` is exit code 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fathometer.cli.diagram import diagram
from fathometer.cli.libraries import prepare_torch
from fathometer.cli.predict import predict
from fathometer.cli.prescribe import prescribe
from fathometer.cli.reproduce import reproduce
from fathometer.cli.train import train
from fathometer.cli.widths import coordinate_check, transfer_check, widths
from fathometer.errors import FathometerError

app = typer.Typer(
    name="fathometer",
    help="A depth sounder for transformers: will it train, why not, and what to change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[
    str, typer.Argument(help="hf:NAME, timm:NAME, or path/to/file.py:function returning a torch module.")
]
Layers = Annotated[int | None, typer.Option(help="Number of blocks; the architecture's own by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def _root() -> None:
    """Collect commands."""


@app.command()
def diagnose(
    model: ModelName,
    layers: Layers = None,
    width: Annotated[int | None, typer.Option(help="Width of the stream.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="text, photographs, tokens:WIDTHxCOUNT, or a .txt, .pt, .npy or image file."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per text sample.")] = 64,
    samples: Annotated[int, typer.Option(help="Samples in the batch.")] = 2,
    seeds: Annotated[int, typer.Option(help="Weight draws; more give smaller error bars.")] = 4,
    draws: Annotated[int, typer.Option(help="Random output gradients per weight draw.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    blocks: Annotated[str | None, typer.Option(help="Path of the block container, if it is not found.")] = None,
    forward: Annotated[bool, typer.Option(help="Also measure the forward APJN.")] = True,
    closure: Annotated[
        str, typer.Option(help="How theory averages the softmax: exact, annealed, random_energy, uniform.")
    ] = "exact",
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and figures.")] = Path(
        "fathometer-report"
    ),
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 on an unhealthy verdict.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict and measure signal propagation on a real model, and say whether it will train."""
    prepare_torch()
    from rich.console import Console

    from fathometer import diagnosis, measurement, models, report

    loaded = models.load_model(model, layers=layers, width=width, heads=heads, seed=seed)
    inputs = measurement.load_batch(batch, loaded, n_tokens=tokens, batch_size=samples)
    with report.progress_reporter() as progress:
        result = diagnosis.diagnose(
            loaded.model,
            inputs,
            name=model,
            draws=draws,
            seeds=seeds,
            seed=seed,
            blocks=blocks,
            closure=closure,
            forward=forward,
            progress=progress,
        )
    paths = report.save_report(result, out)
    if as_json:
        print(result.to_json())
    else:
        console = Console()
        report.render_terminal(result, console)
        page = next((path for path in paths if path.suffix == ".html"), out)
        console.print(f"Report: {page}", highlight=False)
    if strict and not result.healthy:
        raise typer.Exit(1)


app.command()(predict)
app.command()(diagram)
app.command()(prescribe)
app.command()(reproduce)
app.command()(train)
app.command()(widths)
app.command()(coordinate_check)
app.command()(transfer_check)


def main() -> None:
    """Run the command line; print errors in one line."""
    try:
        app()
    except FathometerError as error:
        print(f"fathometer: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("fathometer: interrupted; nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
