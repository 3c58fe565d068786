"""Results and figures in a folder, for every command that writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fathometer.errors import SpecError


def check_folder(folder: Path) -> None:
    """Refuse a file in place of the folder before anything is computed.

    Raises:
        SpecError: naming the file.
    """
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{str(folder)!r} is a file; name a folder with --out")


def write_result(folder: Path, text: str, figure: Any) -> list[Path]:
    """Render everything, then replace ``result.json`` and ``figure.png`` in one step each.

    Raises:
        OutputError: if the folder cannot be written.
    """
    from fathometer.plotting import to_png
    from fathometer.report import OutputError
    from fathometer.results.files import write_atomically

    files = {"result.json": text.encode("utf-8"), "figure.png": to_png(figure)}
    try:
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return [folder / name for name in files]
