r"""Does a learning rate tuned on a narrow model serve wider ones? One rate for all against three scaling schemes.

The paper trains vision and language models of ImageNet and book size; here are a byte-level language model on prose
that ships with Python, and a vision transformer on 8 x 8 digits, both of two blocks. Every run has the same steps, the
loss is that of training, and rates are those of the narrowest model, at which all recipes are alike.

The vision model's table of positions has standard deviation 0.5. With the paper's 0.02 and the same 100 steps, tried
first, optima moved up over an 8-fold width by two grid steps under neural-tangent rates (1.7 +- 0.4 by the parabolas)
and by one under the other two schemes. Presumably that small table has to grow by an amount that no width changes
before the model can tell where a patch is, and in short runs this decides the loss.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Sec. 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fathometer._version import __version__
from fathometer.papers.effective.models import language_model, vision_model
from fathometer.papers.item import SMALL, Cell, Progress, Size, Table, plain

if TYPE_CHECKING:
    from fathometer.training.transfer import Optimum, TransferCheck

N_TOKENS, WINDOWS = 16, 8
DIGITS = 8
LANGUAGE_RATES, VISION_RATES = range(-11, -3), range(-12, -4)  # powers of two


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A transfer check and what it was made of.

    Attributes:
        check: Losses, optima and shifts.
        about: Protocol and versions.
    """

    check: TransferCheck
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, "check": self.check.to_dict(), "about": plain(self.about)}

    def table(self) -> Table:
        """Return the optimum of every recipe and width, and how far it moves."""
        check = self.check
        rows: list[tuple[Cell, ...]] = []
        for name in check.schemes:
            shift = check.shift(name)
            optima = check.optima(name)
            cells = [_optimum(one) for one in optima]
            rows.append((name, *cells, str(shift), f"{optima[-1].loss:.3f}"))
        return Table(
            title=f"log2 of the best learning rate, by width; {self.about['task']}, {check.protocol['steps']} steps",
            headings=("recipe", *(f"width {w}" for w in check.widths), "shift, grid (fit)", "best loss, widest"),
            rows=tuple(rows),
        )


def transfer_language(size: Size, progress: Progress) -> Transfer:
    """Train language models of four or five widths.

    Args:
        size: At the small size widths 16 to 128, else 32 to 512; half its ``seeds``, at least three.
        progress: Told after every run.
    """
    from fathometer.training.families import language_task
    from fathometer.training.text import byte_text

    text = byte_text()
    build = partial(language_model, log_frequencies=text.log_frequencies, n_tokens=N_TOKENS)
    task = language_task(text, n_tokens=N_TOKENS, batch_size=WINDOWS)
    return _transfer(build, task, "next byte of English prose", LANGUAGE_RATES, size, progress)


def transfer_vision(size: Size, progress: Progress) -> Transfer:
    """Train classifiers of digits of four or five widths; sizes as in :func:`transfer_language`."""
    from fathometer.training import load_digits
    from fathometer.training.families import digits_task

    task = digits_task(load_digits(), batch_size=DIGITS)
    return _transfer(vision_model, task, "handwritten digits", VISION_RATES, size, progress)


def _transfer(build: Any, task: Any, name: str, powers: Iterable[int], size: Size, progress: Progress) -> Transfer:
    from fathometer.training.transfer import transfer_check

    small = size.d_model <= SMALL.d_model
    widths = [16, 32, 64, 128] if small else [32, 64, 128, 256, 512]
    check = transfer_check(
        build,
        widths,
        task=task,
        rates=[2.0**power for power in powers],
        base_width=widths[0],
        steps=min(max(5, 5 * size.grid // 8), 400),
        seeds=max(3, size.seeds // 2) if small else 5,
        progress=progress,
    )
    about = {"paper": "arXiv:2304.02034", "task": name, "batches": task.name, "version": __version__}
    return Transfer(check=check, about=about)


def _optimum(one: Optimum) -> str:
    place = f"{math.log2(one.rate):.2f}" if one.rate > 0 else "-"
    return f"{place} +- {one.error:.1g}" if one.status == "ok" else f"{place} ({one.status})"
