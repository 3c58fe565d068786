"""The architecture: which package may import which, and what must stay unloaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fathometer"

FREE = {"errors", "_version"}
THEORY = ("spec", "results", "kernels", "attention", "propagation", "observables", "prescription")
INSIDE = (*THEORY, "models", "measurement", "application", "training", "diagnosis")
OUTSIDE = ("diagrams", "sweep", "plotting", "report", "explorer", "cli", "papers", "testing")

# Room -> the other rooms it may import, besides FREE.
ALLOWED: dict[str, set[str]] = {
    **{room: set() for room in FREE},
    **{room: set(THEORY[:position]) for position, room in enumerate(THEORY)},
    "models": {"spec"},
    "measurement": {"models", "spec", "results"},
    "application": {"models", "measurement", "spec", "prescription"},
    "training": {"models", "measurement", "application", "prescription", "spec", "results"},
    "diagnosis": set(INSIDE) - {"diagnosis"},
    **{room: {*INSIDE, *OUTSIDE} for room in OUTSIDE},
}
# The public API (__init__) and `python -m fathometer` gather everything; only outside rooms may import them back.
FACADE = {"__init__", "__main__"}

HEAVY = ("torch", "matplotlib", "xarray")
NEVER_IN_THEORY = {*HEAVY, "torchvision", "transformers", "timm", "plotly", "h5netcdf", "h5py", "ray", "sklearn", "PIL"}


def room_of(path: Path) -> str:
    """Return the package directly under ``fathometer`` that a file belongs to, or its own name for a top file."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of each import in ``source``, also lazy ones and literal dynamic ones."""
    package = ("fathometer", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1],) if node.level else ()
            module = ".".join((*base, *filter(None, (node.module,))))
            # `from fathometer import spec` names a room only through its alias.
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def violations(source: str, path: Path) -> list[str]:
    """Return one line per import in ``source`` that the architecture forbids to the file at ``path``."""
    room = room_of(path)
    if room not in ALLOWED and room not in FACADE:
        return [f"{path}: room {room!r} is not in the table of layers; add it to tests/test_layers.py"]
    found = []
    for line, module in imported_modules(source, path):
        top, *rest = module.split(".")
        where = f"{path.relative_to(SOURCE.parent)}:{line}: {room} must not import {module}"
        if top in NEVER_IN_THEORY and room in {*THEORY, *FREE}:
            found.append(where)
        if top != "fathometer" or room in FACADE:
            continue
        target = rest[0] if rest else ""
        if target in ALLOWED:
            permitted = target == room or target in ALLOWED[room] or (target in FREE and room not in FREE)
        else:  # the public API: `import fathometer`, `from fathometer import predict`
            permitted = room in OUTSIDE
        if not permitted:
            found.append(where)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("spec", "from fathometer.kernels import relu"),
        ("spec", "import fathometer.kernels.relu"),
        ("kernels", "from ..attention import closures"),
        ("kernels", "from fathometer import attention"),
        ("attention", "def f():\n    from fathometer.propagation.trajectory import Trajectory"),
        ("propagation", "import importlib\nimportlib.import_module('fathometer.observables')"),
        ("observables", "import fathometer"),
        ("models", "from fathometer.propagation import gram"),
        ("measurement", "from fathometer.diagnosis import verdict"),
        ("application", "from fathometer.training import train"),
        ("training", "from fathometer.propagation import gram"),
        ("diagnosis", "from fathometer.report import html"),
        ("diagnosis", "from fathometer import diagnose"),
        ("errors", "from fathometer import spec"),
        ("kernels", "import torch"),
        ("prescription", "def f():\n    import torch.nn as nn"),
        ("propagation", "def f():\n    from matplotlib import pyplot"),
        ("observables", "if False:\n    import xarray as xr"),
        ("attention", "__import__('transformers')"),
        ("errors", "def f():\n    import torch"),
        ("unheard_of", "x = 1"),
    ],
)
def test_a_planted_violation_is_found(room: str, source: str) -> None:
    assert violations(source, SOURCE / room / "planted.py") != []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("spec", "from .norms import LayerNorm\nfrom fathometer.errors import SpecError\nimport numpy as np"),
        (
            "propagation",
            "from fathometer.attention import Exact\nfrom ..kernels import relu",
        ),
        ("kernels", "from fathometer import spec, errors"),
        ("models", "from fathometer.spec import Transformer\nimport torch"),
        ("diagnosis", "from fathometer.training import train\nfrom fathometer.kernels import relu"),
        ("cli", "import fathometer as fm\nfrom fathometer.report import html\nfrom fathometer.spec import Transformer"),
    ],
)
def test_a_permitted_import_passes(room: str, source: str) -> None:
    assert violations(source, SOURCE / room / "planted.py") == []


# The detector of loaded packages. Stand-ins for the heavy packages come first on the path, so that an import is
# noticed (even a guarded one) whether or not the real package is installed.

CALL_HELP = """
from fathometer.cli import main
sys.argv = ["fathometer", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def heavy_packages_loaded_by(code: str, stand_ins: Path) -> set[str]:
    """Run ``code`` in a fresh interpreter and return which heavy packages it loaded."""
    for name in HEAVY:
        (stand_ins / f"{name}.py").write_text("")
    report = f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    path = os.pathsep.join([str(stand_ins), str(SOURCE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{report}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    label, *loaded = done.stdout.splitlines()[-1].split()
    assert label == "loaded:"
    return set(loaded)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import fathometer", id="import"),
        pytest.param(CALL_HELP, id="help"),
        *(
            pytest.param(f"import fathometer.{room}", id=room)
            for room in THEORY
            if (SOURCE / room / "__init__.py").exists()
        ),
    ],
)
def test_nothing_heavy_is_loaded(code: str, tmp_path: Path) -> None:
    assert heavy_packages_loaded_by(code, tmp_path) == set()


@pytest.mark.parametrize("name", HEAVY)
def test_the_detector_can_fail(name: str, tmp_path: Path) -> None:
    assert heavy_packages_loaded_by(f"import fathometer\nimport {name}", tmp_path) == {name}
