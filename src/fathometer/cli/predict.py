"""``fathometer predict``: every layer's statistics from a spec, or the moments of every component; no torch."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathometer.cli.specs import is_encoder_decoder, named_spec
from fathometer.errors import FathometerError, SpecError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from fathometer.results import Profile

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
    memory_tokens: Annotated[
        int | None, typer.Option(help="Of an encoder-decoder: tokens of the encoder; --tokens are the decoder's.")
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
    if is_encoder_decoder(spec):
        if view != "curves" or layer is not None or layers is not None or top_alignment:
            raise SpecError(
                "an encoder-decoder has curves of both stacks; --view, --layer and --layers are for one stack"
            )
        _both_stacks(spec, tokens, tokens if memory_tokens is None else memory_tokens, q, p, closure, as_json)
        return
    if memory_tokens is not None:
        raise SpecError("--memory-tokens belongs to the file of an encoder-decoder")
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
    from rich.console import Console

    from fathometer import observables

    profile = observables.predict(spec, **given)
    if as_json:
        print(profile.to_json())
        return
    console = Console()
    console.print(_table(title, profile))
    try:
        grown = observables.growth(spec, **given, depth=2000)
    except FathometerError as error:
        console.print(f"Growth class not determined: {error}", highlight=False)
    else:
        console.print(f"Repeating the last block: {grown.sentence}.", highlight=False)


def _both_stacks(name: str, tokens: int, memory_tokens: int, q: float, p: float, closure: str, as_json: bool) -> None:
    from rich.console import Console

    from fathometer.observables import predict_encoder_decoder
    from fathometer.spec import load_encoder_decoder

    stacks = predict_encoder_decoder(
        load_encoder_decoder(name),
        n_tokens=tokens,
        q=q,
        p=p,
        n_memory=memory_tokens,
        q_memory=q,
        p_memory=p,
        closure=closure,
    )
    named = dict(zip(("encoder", "decoder"), stacks, strict=True))
    if as_json:
        print(json.dumps({stack: profile.to_dict() for stack, profile in named.items()}, indent=1, allow_nan=False))
        return
    console = Console()
    for stack, profile in named.items():
        console.print(_table(f"{name}, {stack}", profile))
    console.print("ln J and ln pooled gradient of both are relative to the decoder's output.", highlight=False)


def _table(title: str, profile: Profile) -> Table:
    """Return a table of about a dozen layers."""
    from rich.table import Table

    about = profile.about
    table = Table(title=f"{title}: {profile.n_layers} blocks, {about['n_tokens']} tokens, {about['closure']} closure")
    columns = {
        "q": "q",
        "cosine": "cosine",
        "apjn_log": "ln J to output",
        "gradient_log": "ln pooled gradient",
        "gradient_alignment": "K/J",
    }
    known = {key: heading for key, heading in columns.items() if key in profile.curves}
    for heading in ("block", *known.values()):
        table.add_column(heading, justify="right")
    count = min(profile.n_layers, 12)
    for index in sorted({round(i * profile.n_layers / count) for i in range(count + 1)}):
        table.add_row(str(index), *(f"{profile.curves[key][index]:.5g}" for key in known))
    return table


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
