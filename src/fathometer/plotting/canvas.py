"""Figures without global state: colours, fresh axes, the look of an axis, and bytes to write."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING

from fathometer.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#66707b"
GRID = "#e3e7eb"
PAPER = "#ffffff"
# Quantities of a panel: the blue, vermilion and green of Okabe and Ito, told apart with any colour vision and
# in grey.
FIRST = "#0072b2"
SECOND = "#d55e00"
THIRD = "#009e73"
# Thirds of the depth, from the input to the output.
THIRDS = ("#9ecae1", "#4292c6", "#08519c")
ALARM = "#b42318"
CALM = "#1a7f4b"
CAUTION = "#9a6700"
#: Width and height of one panel, inches.
PANEL_SIZE = (5.8, 3.7)

_NAMES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    FIRST: "first",
    SECOND: "second",
    THIRD: "third",
    ALARM: "alarm",
    **{colour: f"third-{i + 1}" for i, colour in enumerate(THIRDS)},
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure in inches that belongs to no window and no registry."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "viz") from None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure."""
    return new_figure(*PANEL_SIZE).add_subplot() if ax is None else ax


def dress(ax: Axes, title: str, *, xlabel: str = "block", ylabel: str = "") -> None:
    """Give axes the common look: open frame, quiet grid, title on the left."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=24)
    ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
    ax.set_ylabel(ylabel, fontsize=9, color=MUTED)
    ax.set_facecolor("none")
    ax.tick_params(which="both", labelsize=8.5, labelcolor=MUTED, color=GRID, length=3)
    ax.tick_params(which="minor", length=0)
    ax.grid(visible=True, which="major", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def to_png(figure: Figure, *, dpi: int = 144) -> bytes:
    """Return the figure as a PNG."""
    return _saved(figure, "png", dpi)


def to_svg(figure: Figure, *, prefix: str) -> str:
    """Return the figure as an ``<svg>`` element to put into a page.

    Colours become CSS variables (``--plot-ink``, ``--plot-first``, ...), so that the page decides between light and
    dark; identifiers
    start with ``prefix``, so that several figures can share a page, and the same figure always gives the same text.
    """
    text = _saved(figure, "svg", 72).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    names: dict[str, str] = {}
    for found in re.findall(r'\bid="([^"]+)"', text):
        names.setdefault(found, f"{prefix}-{len(names)}")
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{names[m[1]]}"', text)
    text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names.get(m[1], m[1])})", text)
    text = re.sub(r'href="#([^"]+)"', lambda m: f'href="#{names.get(m[1], m[1])}"', text)
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--plot-{name})")
    return text.strip()


def _saved(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": "fathometer"}
    with warnings.catch_warnings():
        # A model's name may hold characters the bundled font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, transparent=kind == "svg")
    return buffer.getvalue()
