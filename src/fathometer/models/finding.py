"""Finding the residual blocks of any torch module by following tensors, not names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError, nearest
from fathometer.models.trace import first_tensor, hooked, same_tensor


@dataclass(frozen=True)
class Stack:
    """A run of blocks, each of which takes the previous one's output.

    Attributes:
        names: Module names within the model, in order.
        blocks: The modules.
    """

    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def label(self) -> str:
        """A short name such as ``"h.0 ... h.95"``."""
        return self.names[0] if len(self) == 1 else f"{self.names[0]} ... {self.names[-1]}"


def find_stacks(model: nn.Module, forward: Callable[[], Any]) -> list[Stack]:
    """Return every run of two or more same-class blocks, the longest first.

    One hooked forward pass. A block's output must *be* the next one's input: the same memory, with equal shapes for
    input and output. Among nested candidates of equal length the outermost wins.

    Args:
        model: The model.
        forward: Runs it once.
    Raises:
        ModelError: if no run exists; names what was seen and the override.
    """
    candidates = {name: module for name, module in model.named_modules() if name and _matrices(module) >= 2}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        source, result = first_tensor(args, kwargs), first_tensor((out,), {})
        if source is not None and result is not None and source.shape == result.shape and source.ndim >= 3:
            seen.append((name, source.detach(), result.detach()))

    with torch.no_grad(), hooked(candidates, after=after):
        forward()
    runs: list[list[str]] = []
    ends: dict[type, list[tuple[list[str], Tensor]]] = {}
    for name, source, result in seen:
        open_runs = ends.setdefault(type(candidates[name]), [])
        match = next((entry for entry in open_runs if same_tensor(entry[1], source)), None)
        if match is None:
            run: list[str] = []
            runs.append(run)
        else:
            run = match[0]
            open_runs.remove(match)
        run.append(name)
        open_runs.append((run, result))
    runs = [run for run in runs if len(run) >= 2 and len(set(run)) == len(run)]
    if not runs:
        tried = sorted({type(candidates[name]).__name__ for name, _, _ in seen})
        raise ModelError(
            "no blocks found: no two modules of one class pass a tensor on unchanged in shape"
            f" (looked at {', '.join(tried) or 'no module with two weight matrices'}); "
            "name them with blocks='path.to.modulelist'"
        )
    runs.sort(key=lambda run: (-len(run), run[0].count(".")))
    return [Stack(tuple(run), tuple(candidates[name] for name in run)) for run in runs]


def named_stack(model: nn.Module, blocks: str | Sequence[nn.Module]) -> Stack:
    """Return the stack a user names: the path of a container, or the modules themselves.

    Raises:
        ModelError: if the path does not exist (the nearest one is suggested) or a module is not part of the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(blocks, str):
        modules = dict(model.named_modules())
        if blocks not in modules:
            containers = [name for name, m in modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential))]
            raise ModelError(f"the model has no module {blocks!r}{nearest(blocks, containers)}")
        blocks = list(modules[blocks].children())
    missing = [type(block).__name__ for block in blocks if id(block) not in names]
    if missing or not blocks:
        raise ModelError(f"blocks must be modules of this model; got {', '.join(missing) or 'none'}")
    return Stack(tuple(names[id(block)] for block in blocks), tuple(blocks))


def _matrices(module: nn.Module) -> int:
    return sum(1 for parameter in module.parameters() if parameter.ndim >= 2)
