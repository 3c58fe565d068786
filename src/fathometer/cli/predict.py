"""``fathometer predict``: every layer's statistics from a spec, or the moments of every component; no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from fathometer.cli.specs import named_spec
from fathometer.errors import FathometerError, SpecError, nearest

VIEWS = ("curves", "moments")


def predict(
    spec: Annotated[str, typer.Argument(help="A .toml or .json spec, or preset:NAME (gpt2, bert, llama, vit).")],
    tokens: Annotated[int, typer.Option(help="Number of tokens.")] = 128,
    q: Annotated[float, typer.Option(help="Mean square of a token per coordinate at the first block.")] = 1.0,
    p: Annotated[float, typer.Option(help="Mean overlap of two tokens there, between -q/(tokens-1) and q.")] = 0.4,
    layers: Annotated[int | None, typer.Option(help="Number of blocks; the architecture's own by default.")] = None,
    view: Annotated[
        str, typer.Option(help="curves over layers, or the moments of every component inside a block.")
    ] = "curves",
    layer: Annotated[
        str | None, typer.Option(help="Of moments: layers to print, separated by commas; first, middle and last.")
    ] = None,
    top_alignment: Annotated[
        float, typer.Option(help="Of moments: mean cosine of two tokens' output gradients; 1 for a pooled loss.")
    ] = 0.0,
    closure: Annotated[
        str, typer.Option(help="How the softmax is averaged: exact, annealed, random_energy, uniform, uniform_large_n.")
    ] = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predict every layer's statistics from a spec; theory only, no torch."""
    if view not in VIEWS:
        raise SpecError(f"there is no view {view!r}{nearest(view, VIEWS)}")
    described = named_spec(spec, layers)
    given: dict[str, Any] = {"n_tokens": tokens, "q": q, "p": p, "closure": closure}
    if view == "curves":
        if layer is not None or top_alignment:
            named = "layer" if layer is not None else "top-alignment"
            raise SpecError(f"--{named} belongs to --view moments")
        _curves(spec, described, given, as_json)
    else:
        _moments(spec, described, given | {"top_alignment": top_alignment}, layer, as_json)


def _curves(title: str, spec: Any, given: dict[str, Any], as_json: bool) -> None:
    from fathometer import observables

    profile = observables.predict(spec, **given)
    if as_json:
        print(profile.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{title}: {profile.n_layers} blocks, {given['n_tokens']} tokens, {profile.about['closure']} closure"
    )
    columns = ("q", "cosine", "apjn_log", "gradient_log", "gradient_alignment")
    for heading in ("block", "q", "cosine", "ln J to output", "ln pooled gradient", "K/J"):
        table.add_column(heading, justify="right")
    count = min(profile.n_layers, 12)
    for index in sorted({round(i * profile.n_layers / count) for i in range(count + 1)}):
        table.add_row(str(index), *(f"{profile.curves[name][index]:.5g}" for name in columns))
    console = Console()
    console.print(table)
    try:
        grown = observables.growth(spec, **given, depth=2000)
    except FathometerError as error:
        console.print(f"Growth class not determined: {error}", highlight=False)
    else:
        console.print(f"Repeating the last block: {grown.sentence}.", highlight=False)


def _moments(title: str, spec: Any, given: dict[str, Any], layer: str | None, as_json: bool) -> None:
    from fathometer.observables.model_moments import moments

    found = moments(spec, **given)
    if as_json:
        print(found.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    chosen = _layers(layer, found.n_layers)
    console = Console()
    table = Table(
        title=f"{title}: {found.n_layers} blocks, {given['n_tokens']} tokens, {found.about['closure']} closure",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    table.add_column("component")
    for heading in ("mean", "q", "p", "variance", "covariance", "correlation", "ln gradient", "alignment"):
        table.add_column(heading, justify="right")
    for position, index in enumerate(chosen):
        if position:
            table.add_section()
        for name, row in found.rows(index).items():
            table.add_row(str(index), name, *(_cell(value) for value in row.values()))
    stream = found["stream"]
    table.add_section()
    ends = (stream.mean, stream.q, stream.p, stream.variance, stream.covariance, stream.correlation)
    table.add_row(
        "out",
        "stream",
        *(_cell(float(values[-1])) for values in (*ends, stream.gradient_log, stream.gradient_alignment)),
    )
    console.print(table)
    console.print(
        "q and p are not centred; ln gradient is the log mean square of an entry's gradient over that at the output, "
        "alignment that of two tokens over one token's own.",
        highlight=False,
    )


def _layers(text: str | None, n_layers: int) -> list[int]:
    if text is None:
        return sorted({0, n_layers // 2, n_layers - 1})
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise SpecError(f"--layer must be integers separated by commas; got {text!r}") from None


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
