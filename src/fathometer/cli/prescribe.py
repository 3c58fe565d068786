"""``fathometer prescribe``: the alpha or branch scale a depth asks for."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

from fathometer.errors import SpecError


def prescribe(
    spec: Annotated[str, typer.Argument(help="A .toml or .json spec, or preset:NAME.")],
    norm: Annotated[str | None, typer.Option(help="Put this norm in every input slot first: dyt or derf.")] = None,
    field: Annotated[str, typer.Option(help="What to solve for: alpha, branch_scale, mlp_out, ...")] = "alpha",
    match: Annotated[
        str, typer.Option(help="What to match: gradient (APJN), pooled (pooled loss) or growth (q out over q in).")
    ] = "gradient",
    value: Annotated[
        float | None, typer.Option(help="Wanted value; by default what LayerNorm gives in the same place.")
    ] = None,
    depths: Annotated[str, typer.Option(help="Depths, separated by commas.")] = "12,24,48,96,128",
    tokens: Annotated[int, typer.Option(help="Number of tokens.")] = 196,
    q: Annotated[float, typer.Option(help="Mean square of a token at the first block.")] = 0.27,
    p: Annotated[float, typer.Option(help="Mean overlap of two tokens there.")] = 0.11,
    closure: Annotated[str, typer.Option(help="How the softmax is averaged.")] = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Solve for the one number that gives each depth the gradients, or the growth, one wants."""
    from fathometer.prescription import solve_field

    described = _with_norm(_load(spec), norm)
    rows: list[dict[str, Any]] = []
    for depth in _depths(depths):
        found = solve_field(
            described.with_depth(depth),
            field,
            target=match,
            bound=value,
            n_tokens=tokens,
            q=q,
            p=p,
            closure=closure,
            collect=True,
        )
        solved = found.value if found.status == "ok" else None
        wanted = math.exp(found.target[1]) if found.target[1] < 700 else None
        rows.append({"depth": depth, field: solved, "status": found.status, f"wanted {match}": wanted})
    if as_json:
        print(json.dumps(rows, indent=1, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{spec}: {field} by depth, {tokens} tokens, q = {q:g}, p = {p:g}")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(f"{item:.4g}" if isinstance(item, float) else "-" if item is None else str(item) for item in row.values())
        )
    Console().print(table)


def _load(name: str) -> Any:
    from fathometer import spec as specs

    return specs.preset(name.removeprefix("preset:")) if name.startswith("preset:") else specs.load(name)


def _with_norm(spec: Any, norm: str | None) -> Any:
    from dataclasses import replace

    from fathometer.spec import Derf, DyT

    if norm is None:
        return spec
    kinds = {"dyt": DyT, "derf": Derf}
    if norm not in kinds:
        raise SpecError(f"--norm {norm!r} is unknown; accepted: {', '.join(kinds)}")
    return spec.map_sublayers(lambda s: replace(s, input_norm=kinds[norm](alpha=1.0)))


def _depths(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise SpecError(f"--depths must be integers separated by commas; got {text!r}") from None
