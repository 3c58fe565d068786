"""The examples in the docstrings of the packages that need neither torch nor matplotlib."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
ROOMS = ("spec", "kernels", "attention", "propagation", "observables")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for room in ROOMS
    for path in sorted((SOURCE / "fathometer" / room).rglob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=OPTIONS).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert found


def test_a_false_example_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    planted = ModuleType("planted", "A false claim.\n\n>>> 1 + 1\n3\n")
    assert doctest.testmod(planted, optionflags=OPTIONS).failed == 1
    assert "Expected" in capsys.readouterr().out
