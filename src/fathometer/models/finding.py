"""Finding the residual blocks of any torch module by following tensors, not names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathometer.errors import ModelError, nearest
from fathometer.models.trace import first_tensor, hooked, same_tensor, watch_attention


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


@dataclass
class _Run:
    """Calls of one class chained by their tensors."""

    names: list[str]
    end: Tensor
    attends: bool


def find_stacks(model: nn.Module, forward: Callable[[], Any]) -> list[Stack]:
    """Return every run of two or more same-class blocks, the best first.

    One hooked forward pass. A block's output must *be* the next one's input: the same memory, with equal shapes for
    input and output. Runs in which every module attends come before those in which some do not (a run of single
    sublayers); then the longest, then the outermost.

    Args:
        model: The model.
        forward: Runs it once.
    Raises:
        ModelError: if no run exists; names what was seen and the override.
    """
    candidates = {name: module for name, module in model.named_modules() if name and _matrices(module) >= 2}
    runs: list[_Run] = []
    open_runs: dict[type, list[_Run]] = {}
    seen: set[str] = set()
    attention: list[None] = []
    entered: dict[str, int] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[name] = len(attention)

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        source, result = first_tensor(args, kwargs), first_tensor((out,), {})
        if source is None or result is None or source.shape != result.shape or source.ndim < 3:
            return
        seen.add(type(module).__name__)
        attends = len(attention) > entered[name]
        waiting = open_runs.setdefault(type(module), [])
        run = next((run for run in waiting if same_tensor(run.end, source)), None)
        if run is None:
            run = _Run([], result, attends)
            waiting.append(run)
            runs.append(run)
        run.names.append(name)
        run.end, run.attends = result.detach(), run.attends and attends

    with (
        torch.no_grad(),
        hooked(candidates, after=after, before=before),
        watch_attention(lambda _: attention.append(None)),
    ):
        forward()
    runs = [run for run in runs if len(run.names) >= 2 and len(set(run.names)) == len(run.names)]
    if not runs:
        raise ModelError(
            "no blocks found: no two modules of one class pass a tensor on unchanged in shape"
            f" (looked at {', '.join(sorted(seen)) or 'no module with two weight matrices'}); "
            "name them with blocks='path.to.modulelist'"
        )
    runs.sort(key=lambda run: (not run.attends, -len(run.names), run.names[0].count(".")))
    return [Stack(tuple(run.names), tuple(candidates[name] for name in run.names)) for run in runs]


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
