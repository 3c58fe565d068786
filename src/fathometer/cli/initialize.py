"""A scheme on a real model, from the command line: a table, code, or a file of weights."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from fathometer.cli.libraries import prepare_torch
from fathometer.errors import SpecError, nearest
from fathometer.prescription import SCHEMES


def initialize_model(
    name: str,
    scheme: str,
    *,
    layers: int | None,
    batch: str | None,
    tokens: int,
    seed: int,
    options: dict[str, Any],
    emit: str | None,
    apply: Path | None,
    as_json: bool,
) -> None:
    """Build a model, initialise it, and print or save what was done.

    Args:
        name: As for ``fathometer diagnose``.
        scheme: Name of the scheme.
        layers: Number of blocks, ``None`` for the architecture's own.
        batch: Source of the batch, ``None`` for the default of the architecture.
        tokens: Tokens of a text sample, at most the model's positions.
        seed: Which draw.
        options: Of the scheme.
        emit: Style of code to print in place of the table.
        apply: File for the ``state_dict``, the multipliers, the scheme's name and options and the seed.
        as_json: Whether to print JSON in place of the table.
    """
    prepare_torch()
    from fathometer import application, measurement, models

    if scheme not in SCHEMES:
        raise SpecError(
            f"there is no scheme {scheme!r}{nearest(scheme, SCHEMES)} Learning rates and deviations across widths are "
            "those of `fathometer widths`."
        )
    if emit is not None and emit not in application.STYLES:
        raise SpecError(f"--emit {emit!r} is unknown; accepted: {', '.join(application.STYLES)}")
    if emit is not None and as_json:
        raise SpecError("--emit prints code and --json the table; give one")
    if apply is not None:
        _check_file(apply)
    loaded = models.load_model(name, layers=layers, seed=seed)
    inputs = measurement.load_batch(batch, loaded, n_tokens=min(tokens, loaded.max_tokens))
    done = application.initialize(loaded.model, scheme, inputs, seed=seed, **options)
    if apply is not None:
        _save(apply, loaded.model, {"scheme": scheme, "options": options, "seed": seed})
    if emit is not None:
        print(application.emit(done, emit), end="")  # type: ignore[arg-type]
    elif as_json:
        print(json.dumps(_plain(done), indent=1, allow_nan=False))
    else:
        print(done.table())
    if apply is not None and emit is None and not as_json:
        print(f"Weights and multipliers: {apply}")


def _check_file(path: Path) -> None:
    """Refuse a file that could not be written, before a model is built for it.

    Raises:
        SpecError: for a folder, a path below a file, or a folder that is not writable.
    """
    if path.is_dir():
        raise SpecError(f"{str(path)!r} is a folder; name a file with --apply")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise SpecError(f"--apply cannot write {str(path)!r}: {str(above)!r} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SpecError(f"--apply cannot write {str(path)!r}: no permission to write in {str(above)!r}")


def _save(path: Path, model: Any, about: dict[str, Any]) -> None:
    import torch

    from fathometer.application import multiplier_table
    from fathometer.report import OutputError
    from fathometer.results.files import write_atomically

    content = BytesIO()
    torch.save({"state_dict": model.state_dict(), "multipliers": multiplier_table(model), **about}, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _plain(done: Any) -> dict[str, Any]:
    ends = [{"parameter": r.parameter.key, "role": r.parameter.role, "std": r.std} for r in done.ends]
    rows = [{"layer": r.layer, "parameter": r.key, "role": r.role, "std": r.std} for r in done.blocks.rows]
    residual = [{"layer": r.layer, "module": r.module, "factor": r.factor} for r in done.blocks.residual]
    head = [{"module": module, "factor": factor} for module, factor in done.head_multipliers]
    notes = list(dict.fromkeys([*done.plan_notes(), *done.notes, *done.blocks.notes]))
    return {
        "schema": 1,
        "scheme": done.plan.name,
        "ends": ends,
        "weights": rows,
        "residual": residual,
        "head": head,
        "notes": notes,
    }
