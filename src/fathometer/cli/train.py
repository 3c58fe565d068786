"""``fathometer train``: a short, honest training run of a language model on bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fathometer.cli.libraries import prepare_torch
from fathometer.cli.specs import named_spec
from fathometer.errors import SpecError, nearest

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
    """Train a spec for a few steps and say whether it learned from context, beside what theory says of its start."""
    prepare_torch()
    from fathometer.prescription import apply_scheme, scheme_options
    from fathometer.report import progress_reporter
    from fathometer.spec import preset
    from fathometer.training.language import language_network, train_language_model
    from fathometer.training.text import byte_text

    if task not in TASKS:
        raise SpecError(f"there is no task {task!r}{nearest(task, TASKS)}")
    if seeds < 1:
        raise SpecError(f"--seeds must be at least 1; got {seeds}")
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
        usual = {"n_tokens": tokens, "r0": text.input_collision(objective) / 2}
        options = {name: value for name, value in usual.items() if name in scheme_options(scheme)}
        trunk = apply_scheme(trunk, scheme, **options).spec
    network = language_network(trunk)
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
            if runs[-1].status == "interrupted":
                break
    if as_json:
        print(
            json.dumps({"schema": 1, "objective": objective, "runs": [run.to_dict() for run in runs]}, allow_nan=False)
        )
        return
    _print(f"{spec}, {trunk.n_layers} blocks, {scheme or 'own scales'}: {objective} bytes of {text.name}", runs)


def _print(title: str, runs: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("seed", "status", "first loss", "last 10 %", "held out", "of frequencies", "ms a step"):
        table.add_column(heading, justify="right")
    for seed, run in enumerate(runs):
        tail = run.losses[-max(len(run.losses) // 10, 1) :]
        first = run.losses[0] if run.losses else math.nan
        last = sum(tail) / len(tail) if tail else math.nan
        numbers = (first, last, run.held_out, run.unigram_loss)
        shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in numbers]
        table.add_row(str(seed), run.status, *shown, f"{1000 * run.seconds_per_step:.1f}")
    console = Console()
    console.print(table)
    good = [run.held_out - run.unigram_loss for run in runs if run.status == "ok"]
    if not good:
        return
    mean = sum(good) / len(good)
    spread = (
        math.sqrt(sum((gap - mean) ** 2 for gap in good) / (len(good) - 1) / len(good)) if len(good) > 1 else math.nan
    )
    error = "" if math.isnan(spread) else f" ± {spread:.3f}"
    console.print(
        f"Held out minus the frequencies of bytes: {mean:+.3f}{error} nats; below zero is learned from context.",
        highlight=False,
    )
