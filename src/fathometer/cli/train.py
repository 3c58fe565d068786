"""``fathometer train``: a short, honest training run of a language model on bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathometer._version import __version__
from fathometer.cli.libraries import prepare_torch
from fathometer.cli.specs import named_spec
from fathometer.errors import FathometerError, SpecError, nearest

if TYPE_CHECKING:
    from fathometer.spec import Transformer
    from fathometer.training.comparison import RepeatedRuns

TASKS = ("text",)


def train(
    spec: Annotated[str, typer.Argument(help="A .toml or .json spec, or preset:NAME (gpt2, bert, llama).")],
    task: Annotated[
        str, typer.Option(help="text: bytes; the next one, or masked ones if attention is not causal.")
    ] = "text",
    file: Annotated[Path | None, typer.Option(help="Your text; by default the documentation of Python.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks; the spec's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Of a preset: width of the stream.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Initialisation scheme; the spec's own scales by default.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of AdamW.")] = 300,
    rate: Annotated[float, typer.Option(help="Learning rate after warm-up.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 20,
    tokens: Annotated[int, typer.Option(help="Bytes in a window.")] = 64,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    seeds: Annotated[int, typer.Option(help="Number of runs, each with weights and windows of its own.")] = 1,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep one block's activations in memory at a time: for deep stacks.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train a spec for a few steps and say whether it learned from context, beside what theory says of its start.

    An interrupted run is printed and ends with exit code 130.
    """
    prepare_torch()
    from fathometer.report import progress_reporter
    from fathometer.spec import preset, to_dict
    from fathometer.training.comparison import RepeatedRuns, embedded_cosine, scheme_on_text
    from fathometer.training.language import INTERRUPTED, language_network, train_language_model
    from fathometer.training.text import byte_text

    if task not in TASKS:
        raise SpecError(f"there is no task {task!r}{nearest(task, TASKS)}")
    if seeds < 1:
        raise SpecError(f"--seeds must be at least 1; got {seeds}")
    _check_device(device)
    if width is not None and not spec.startswith("preset:"):
        raise SpecError("--width belongs to a preset; a file has its own")
    trunk = (
        named_spec(spec, layers)
        if width is None
        else preset(spec.removeprefix("preset:"), n_layers=layers, d_model=width)
    )
    text = byte_text(file)
    objective = "causal" if trunk.is_causal else "masked"
    if scheme is not None:
        trunk = scheme_on_text(trunk, scheme, text, objective=objective, n_tokens=tokens)
    network = language_network(trunk)
    theory = _theory(trunk, tokens, embedded_cosine(text, objective))
    runs = []
    with progress_reporter() as progress:
        for seed in range(seeds):
            runs.append(
                train_language_model(
                    network,
                    text,
                    objective=objective,
                    rate=rate,
                    steps=steps,
                    n_tokens=tokens,
                    batch_size=batch,
                    warmup=warmup,
                    seed=seed,
                    recompute=recompute,
                    device=device,
                    progress=progress,
                )
            )
            if runs[-1].status == INTERRUPTED:
                break
    found = RepeatedRuns(
        runs=tuple(runs),
        about={
            "spec": spec,
            "scheme": scheme,
            "network": to_dict(network),
            "theory": theory,
            "text": {"name": text.name, "digest": text.digest, "train_bytes": len(text.train)},
            "objective": objective,
            "rate": rate,
            "steps": steps,
            "warmup": warmup,
            "n_tokens": tokens,
            "batch_size": batch,
            "seeds": list(range(len(runs))),
            "optimizer": "adamw",
            "recompute": recompute,
            "device": device,
            "version": __version__,
        },
    )
    if as_json:
        print(found.to_json())
    else:
        title = f"{spec}, {trunk.n_layers} blocks, {scheme or 'own scales'}: {objective} bytes of {text.name}"
        _print(title, found)
    if runs[-1].status == INTERRUPTED:
        raise typer.Exit(130)


def _check_device(device: str) -> None:
    """Refuse a device that torch does not know or does not find.

    Raises:
        SpecError: naming it.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise SpecError(f"--device must be cpu or cuda; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"--device {device} needs a GPU, and torch finds none here; leave it out to train on the CPU")


def _theory(trunk: Transformer, tokens: int, cosine: float) -> dict[str, Any]:
    """Return what theory says of the blocks at the start, or why it says nothing.

    Tokens enter at unit size; ``apjn_log`` is that of the whole stack.
    """
    from fathometer.observables import predict

    try:
        curves = predict(trunk, n_tokens=tokens, q=1.0, p=cosine).curves
    except FathometerError as error:
        return {"status": str(error)}
    numbers = {"q": curves["q"][-1], "cosine": curves["cosine"][-1], "apjn_log": curves["apjn_log"][0]}
    return {"status": "ok", "cosine_in": cosine, **{name: float(value) for name, value in numbers.items()}}


def _print(title: str, found: RepeatedRuns) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from fathometer.training.comparison import MARGIN
    from fathometer.training.runs import last_fifth

    table = Table(title=title, title_justify="left")
    for heading in ("seed", "status", "first loss", "last fifth", "held out", "of frequencies", "ms a step"):
        table.add_column(heading, justify="right")
    for seed, run in enumerate(found.runs):
        ends = (run.losses[0], float(last_fifth(np.array(run.losses)))) if run.losses else (math.nan, math.nan)
        numbers = (*ends, run.held_out, run.unigram_loss)
        shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in numbers]
        pace = "-" if math.isnan(run.seconds_per_step) else f"{1000 * run.seconds_per_step:.1f}"
        table.add_row(str(seed), run.status, *shown, pace)
    console = Console()
    theory = found.about["theory"]
    if theory["status"] == "ok":
        console.print(
            f"Theory of the start: q 1 -> {theory['q']:.4g}, cosine {theory['cosine_in']:.3g} -> "
            f"{theory['cosine']:.3g}, ln J of all blocks {theory['apjn_log']:.4g}.",
            highlight=False,
        )
    else:
        console.print(f"Theory says nothing of the start: {theory['status']}", highlight=False, markup=False)
    console.print(table)
    mean, error = found.gap()
    if math.isnan(mean):
        return
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    console.print(
        f"Held out minus the frequencies of bytes: {mean:+.3f}{spread} nats. {found.learned} of {len(found.runs)} "
        f"learned from context: more than {MARGIN:g} below.",
        highlight=False,
    )
