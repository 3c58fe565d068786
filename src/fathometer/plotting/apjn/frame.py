"""What the pictures of one paper share: a title close to its axes, and ticks for logarithmic axes of any length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathometer.plotting.canvas import INK, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def framed(ax: Axes, title: str, *, xlabel: str, ylabel: str, keyed: bool = False) -> None:
    """Dress axes; without a key of their own (``keyed``) the title needs no room below it."""
    dress(ax, title, xlabel=xlabel, ylabel=ylabel)
    if not keyed:
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)


def log_ticks(ax: Axes) -> None:
    """Label a logarithmic y axis: plain numbers over less than two decades, else powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    if high / low > 100:
        return
    subs = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 5, 7)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
