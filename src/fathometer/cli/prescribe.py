"""``fathometer prescribe``: the alpha or branch scale a depth asks for, or an initialisation scheme as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathometer.cli.initialize import initialize_model
from fathometer.cli.specs import is_encoder_decoder, named_spec
from fathometer.errors import SpecError

if TYPE_CHECKING:
    from fathometer.prescription import SchemePlan


_SCHEME = {"scheme", "k", "alpha", "count", "dropout", "r0", "reference"}
#: What each job of this command reads, besides the spec and --json.
_READS = {
    "solving for one number": {"norm", "field", "match", "value", "depths", "tokens", "q", "p", "closure"},
    "a scheme on a spec": {*_SCHEME, "compare", "norm", "layers", "tokens", "q", "p"},
    "a scheme on a model": {*_SCHEME, "layers", "tokens", "batch", "seed", "emit", "apply"},
    "a scheme on an encoder-decoder": {*_SCHEME, "tokens", "memory_tokens", "q", "p"},
}


def prescribe(
    context: typer.Context,
    spec: Annotated[
        str,
        typer.Argument(
            help="A .toml or .json spec, or preset:NAME; with --scheme also hf:NAME or my_model.py:function."
        ),
    ],
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
    q: Annotated[
        float | None,
        typer.Option(help="Mean square of a token at the first block; 0.27 by default, 1 for schemes."),
    ] = None,
    p: Annotated[
        float | None, typer.Option(help="Mean overlap of two tokens there; 0.11 by default, 0.4 q for schemes.")
    ] = None,
    closure: Annotated[str, typer.Option(help="How the softmax is averaged.")] = "exact",
    scheme: Annotated[
        str | None, typer.Option(help="Print what this initialisation scheme sets instead: deepscalelm, gpt2, ...")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print what theory says of every scheme instead, at one dropout rate.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Of a scheme: number of blocks, by default the spec's.")] = None,
    k: Annotated[float | None, typer.Option(help="Of deepscalelm: beta^2 = k / N^alpha.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of deepscalelm and ds-init: its alpha.")] = None,
    count: Annotated[str | None, typer.Option(help="Of deepscalelm: what N counts, layers or blocks.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of deepscalelm: rate of the dropout.")] = None,
    r0: Annotated[
        float | None, typer.Option(help="Of deepscalelm: cosine of two embeddings, by default p / q.")
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Of deepscalelm: the published recurrence.")] = False,
    memory_tokens: Annotated[
        int | None, typer.Option(help="Of a scheme on an encoder-decoder: tokens of the encoder.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Of a scheme on a model: text, tokens:WIDTHxCOUNT, or a .pt, .npy or .txt file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a scheme on a model: which draw.")] = 0,
    emit: Annotated[
        str | None,
        typer.Option(help="Of a scheme on a model: print code instead, for torch, megatron or torchtitan."),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(help="Of a scheme on a model: write its state_dict and residual multipliers to this .pt file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Solve for the one number that gives each depth the gradients one wants, or print initialisation schemes."""
    from fathometer.prescription import solve_field
    from fathometer.propagation import check_moments

    options = {"k": k, "alpha": alpha, "count": count, "dropout": dropout, "r0": r0, "reference": reference or None}
    given = {name: option for name, option in options.items() if option is not None}
    if spec.startswith(("hf:", "timm:")) or ".py:" in spec:
        if scheme is None or compare or norm is not None:
            raise SpecError("a model takes --scheme; predictions from p and q are for specs")
        _refuse_unread(context, "a scheme on a model")
        initialize_model(
            spec,
            scheme,
            layers=layers,
            batch=batch,
            tokens=tokens,
            seed=seed,
            options=given,
            emit=emit,
            apply=apply,
            as_json=as_json,
        )
        return
    if is_encoder_decoder(spec):
        if scheme is None or compare or norm is not None or layers is not None:
            raise SpecError("an encoder-decoder takes --scheme; it is not compared, solved, renormed or deepened")
        _refuse_unread(context, "a scheme on an encoder-decoder")
        q = 1.0 if q is None else q
        p = 0.4 * q if p is None else p
        check_moments(tokens, q, p)
        memory = tokens if memory_tokens is None else memory_tokens
        _print_both_stacks(spec, scheme, tokens, memory, cosine=p / q, options=given, as_json=as_json)
        return
    if memory_tokens is not None:
        raise SpecError("--memory-tokens belongs to the file of an encoder-decoder")
    if emit is not None or apply is not None or batch is not None:
        raise SpecError("--emit, --apply and --batch belong to a model, as in hf:gpt2")
    described = _with_norm(named_spec(spec), norm)
    if scheme is not None or compare:
        q = 1.0 if q is None else q
        p = 0.4 * q if p is None else p
        if scheme is not None and compare:
            raise SpecError("--scheme prints one scheme and --compare all of them; give one")
        _refuse_unread(context, "a scheme on a spec")
        check_moments(tokens, q, p)
        described = described if layers is None else described.with_depth(layers)
        if scheme is None:
            _print_comparison(spec, described, tokens=tokens, q=q, p=p, options=given, as_json=as_json)
        else:
            _print_scheme(spec, described, scheme, tokens=tokens, cosine=p / q, options=given, as_json=as_json)
        return
    if layers is not None or given:
        named = ["layers"] * (layers is not None) + list(given)
        raise SpecError(f"--{named[0]} belongs to --scheme or --compare")
    _refuse_unread(context, "solving for one number")
    q, p = 0.27 if q is None else q, 0.11 if p is None else p
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
    Console(emoji=False).print(table)


def _refuse_unread(context: typer.Context, job: str) -> None:
    """Refuse an option on the command line that the job does not read."""
    for name in context.params:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE" and name not in {*_READS[job], "spec", "as_json"}:
            takes = ", ".join(f"--{known.replace('_', '-')}" for known in sorted(_READS[job]))
            raise SpecError(f"--{name.replace('_', '-')} is not read by {job}, which takes {takes}")


def _print_scheme(
    title: str, spec: Any, scheme: str, *, tokens: int, cosine: float, options: dict[str, Any], as_json: bool
) -> None:
    from fathometer.prescription import apply_scheme, scheme_options

    known = scheme_options(scheme)
    usual = {"n_tokens": tokens, "r0": max(cosine, 0.0)}
    plan = apply_scheme(spec, scheme, **{name: usual[name] for name in usual if name in known} | options)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1, allow_nan=False))
    else:
        _print_plan(title, plan)


def _print_both_stacks(
    title: str, scheme: str, tokens: int, memory: int, *, cosine: float, options: dict[str, Any], as_json: bool
) -> None:
    from fathometer.prescription import apply_scheme, scheme_options
    from fathometer.spec import EncoderDecoder, load_encoder_decoder

    known = scheme_options(scheme, EncoderDecoder)
    usual = {"n_tokens": tokens, "n_memory": memory, "r0": max(cosine, 0.0)}
    given = {name: usual[name] for name in usual if name in known} | options
    both = apply_scheme(load_encoder_decoder(title), scheme, **given)
    if as_json:
        print(json.dumps(both.to_dict(), indent=1, allow_nan=False))
        return
    _print_plan(f"{title}, encoder", both.encoder)
    _print_plan(f"{title}, decoder", both.decoder)
    for note in both.notes:
        print(f"- {note}")


def _print_plan(title: str, plan: SchemePlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: {plan.name}, {plan.spec.n_layers} layers")
    for heading in ("layers", "sublayer", "weight", "std", "scale", "skip", "branch", "why"):
        table.add_column(heading, justify="left" if heading in ("weight", "why") else "right")
    places = list(dict.fromkeys((row.layer, row.sublayer) for row in plan.rows))
    factors = dict(zip(places, plan.residual, strict=True))
    for roles, group in _groups(plan.rows, factors):
        first, last = group[0], group[-1]
        spans = [
            (first.std, last.std),
            (first.scale, last.scale),
            *zip(factors[first.layer, first.sublayer], factors[last.layer, last.sublayer], strict=True),
        ]
        table.add_row(
            f"{first.layer}" if first is last else f"{first.layer}-{last.layer}",
            str(first.sublayer),
            roles,
            *(f"{a:.4g}" if math.isclose(a, b) else f"{a:.4g} .. {b:.4g}" for a, b in spans),
            first.reason,
        )
    console = Console(emoji=False)
    console.print(table)
    for note in plan.notes:
        console.print(f"- {note}", highlight=False)


def _groups(
    rows: Sequence[Any], factors: dict[tuple[int, int], tuple[float, float]]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the names of equal matrices and their rows over runs of equal layers, or over quarters of many runs."""
    by_matrix: dict[tuple[int, str], list[Any]] = {}
    for row in rows:
        by_matrix.setdefault((row.sublayer, row.role), []).append(row)
    alike: dict[Any, list[str]] = {}
    for (sublayer, role), matrix in by_matrix.items():
        values = tuple((row.layer, row.std, row.scale, row.reason) for row in matrix)
        alike.setdefault((sublayer, values), []).append(role)
    for (sublayer, _), roles in alike.items():
        matrix = by_matrix[sublayer, roles[0]]
        runs = [
            list(run) for _, run in groupby(matrix, lambda row: (row.std, row.reason, factors[row.layer, row.sublayer]))
        ]
        if len(runs) > 4:
            bounds = [round(i * len(matrix) / 4) for i in range(5)]
            runs = [matrix[low:high] for low, high in pairwise(bounds)]
        for run in runs:
            yield ", ".join(roles), run


def _print_comparison(
    title: str, spec: Any, *, tokens: int, q: float, p: float, options: dict[str, Any], as_json: bool
) -> None:
    from fathometer.prescription import compare_schemes

    compared = compare_schemes(spec, n_tokens=tokens, q=q, p=p, **options)
    if as_json:
        print(json.dumps(compared.to_dict(), indent=1, allow_nan=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{title}: schemes at {spec.n_layers} layers, {tokens} tokens, q = {q:g}, p = {p:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = ("q_final", "q_spread", "apjn_log", "gradient_log", "cosine_final", "largest_step")
    headings = ("scheme", "q out", "max/min\nq", "ln J", "ln pooled\ngradient", "cosine\nout", "largest\nstep")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    console = Console(emoji=False)
    for row in compared.rows:
        if row.status == "ok":
            table.add_row(row.scheme, *(f"{getattr(row, column):.3g}" for column in columns))
    console.print(table)
    for row in compared.rows:
        if row.status != "ok":
            console.print(f"- {row.scheme}: {row.status}. {row.reason}", highlight=False)


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
