"""Maps over two fields of a spec as pictures: colours for numbers, fills for phases, hatches where there is no number.

Nothing here computes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fathometer.diagrams import OBSERVABLES, Axis, Diagram
from fathometer.errors import SpecError, nearest
from fathometer.observables import PHASES
from fathometer.plotting.canvas import INK, MUTED, PAPER, THIRD, dress, new_figure
from fathometer.plotting.scales import LOG_RANGE
from fathometer.prescription import CriticalLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

_PANEL = (5.8, 4.4)  # inches
# Blue below zero and vermilion above; the dark ends tell sizes apart in grey as well.
_DIVERGING = ("#08304f", "#0072b2", "#7ab8db", "#f6f5f2", "#f2ab7c", "#d55e00", "#6b2c05")
_FILLS = ("#a9cfe6", "#f4b98f", "#9ad9c2", "#dcb7d8", "#e9dc8b")
_LINE_COLOURS = (THIRD, "#a0529c", "#b8860b", "#4a4f57")
# Fill, hatch and its colour where there is no number.
_WITHOUT = {
    "overflow": ("#c9ced3", "////", "#8b949e"),
    "diverged": ("#c9ced3", "////", "#8b949e"),
    "no fixed point": ("#e3e6e9", "\\\\\\\\", "#a9b1b9"),
    "infinite": ("#eef0f2", "...", "#a9b1b9"),
}
_WITHOUT_OTHER = ("#d5d9dd", "xxxx", "#9aa3ab")
_COMMON = 0.98  # share of the points whose numbers the colours are to resolve
_FIELDS = {
    "query": "query scale",
    "key": "key scale",
    "value": "value scale",
    "output": "output scale",
    "mlp_in": "MLP input scale",
    "mlp_out": "MLP output scale",
    "gate": "gate scale",
    "alpha": "alpha of the norm",
    "shift": "shift of the norm",
    "gain": "gain of the norm",
}
# Lines belong to the collapsed state, while diagrams show token and coherent exponents of the stable one.
_LINES = {
    "angle_exponent": "angle exponent = 0",
    "token_exponent": "token exponent at collapse = 0",
    "coherent_exponent": "coherent exponent at collapse = 0",
    "gradient_exponent": "gradient exponent = 0",
}
_AT_DEPTH = ("gradient_exponent", "q", "cosine", "apjn_log", "gradient_log")
_KEY_WIDTH = 62  # characters of one row of the key, six of them for each sample


def draw_diagram(diagram: Diagram, *, observable: str | None = None, lines: Sequence[CriticalLine] = ()) -> Figure:
    """Draw a diagram: one panel per observable.

    Cells lie at their true coordinates; an axis is logarithmic where its values are spaced so. Signed observables have
    colours that are symmetric about zero and a contour there; arrows at a colour bar say that numbers beyond its ends
    share the last colour, and its label how far they reach. Points without a number are hatched, and the key says why.

    Args:
        diagram: What to draw.
        observable: The only one to draw; by default all.
        lines: Critical lines over the same two fields, in either order, drawn where they exist: each on the panel of
            its observable, or on every panel if there is none.
    Returns:
        A new figure that belongs to no window.
    Raises:
        SpecError: if the diagram has no such observable (the nearest is suggested), or a line has other fields.
        MissingExtraError: without matplotlib.
    """
    if observable is not None and observable not in diagram.values:
        raise SpecError(f"the diagram has no observable {observable!r}{nearest(observable, diagram.values)}")
    names = list(diagram.values) if observable is None else [observable]
    for line in lines:
        if {line.x, line.y} != {diagram.x.name, diagram.y.name}:
            raise SpecError(
                f"a line over {line.x!r} and {line.y!r} does not fit a diagram over {diagram.x.name!r} and "
                f"{diagram.y.name!r}"
            )
    across = 2 if len(names) in (2, 4) else min(len(names), 3)
    down = -(-len(names) // across)
    figure = new_figure(_PANEL[0] * across, _PANEL[1] * down + 0.3)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.12)
    figure.suptitle(_source(diagram, names), x=0.01, ha="left", fontsize=9.5, color=MUTED)
    axes = [figure.add_subplot(down, across, i + 1) for i in range(len(names))]
    keys = []
    for name, ax in zip(names, axes, strict=True):
        own = [line for line in lines if line.observable == name or line.observable not in names]
        keys.append(_panel(ax, diagram, name, own))
    rows = max(_key_rows(handles)[1] for handles in keys)
    for name, ax, handles in zip(names, axes, keys, strict=True):
        _keyed(ax, _title(name), handles, rows)
    return figure


@dataclass(frozen=True)
class _Cells:
    """One axis in growing order: its values, the borders of its cells, and whether it is logarithmic."""

    order: NDArray[np.int64]
    values: FloatArray
    edges: FloatArray
    is_log: bool

    @classmethod
    def of(cls, axis: Axis) -> _Cells:
        """Put borders half way between values, in logarithms where the values are geometrically spaced."""
        order = np.argsort(axis.values, kind="stable")
        values = axis.values[order]
        is_log = _is_geometric(values)
        at = np.log(values) if is_log else values
        if at.size == 1:
            half = np.array([0.05 * abs(at[0]) or 0.5])
            edges = np.concatenate([at - half, at + half])
        else:
            middle = (at[:-1] + at[1:]) / 2
            edges = np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])
        return cls(order, values, np.exp(edges) if is_log else edges, is_log)


def _is_geometric(values: FloatArray) -> bool:
    if values.size < 3 or values[0] <= 0 or values[-1] < 1.5 * values[0]:
        return False
    steps = np.diff(np.log(values))
    return bool(np.all(np.abs(steps - steps.mean()) <= 1e-3 * steps.mean()))


def _panel(ax: Axes, diagram: Diagram, name: str, lines: Sequence[CriticalLine]) -> list[Any]:
    """Draw one observable; return the entries of the key."""
    known = OBSERVABLES.get(name)
    columns, rows = _Cells.of(diagram.x), _Cells.of(diagram.y)
    order = np.ix_(rows.order, columns.order)
    values = diagram.values[name][order]
    status = _reasons(values, diagram.status[name][order])
    dress(ax, "", xlabel=_words(diagram.x.name), ylabel=_words(diagram.y.name))
    ax.grid(visible=False)
    handles: list[Any] = []
    if values.dtype.kind == "U":
        handles += _categories(ax, columns, rows, np.ma.masked_where(status != "ok", values))
    elif np.any(status == "ok"):
        numbers = np.ma.masked_where(status != "ok", values)
        is_signed = known is not None and known.is_signed
        _image(ax, columns, rows, numbers, is_signed, "1" if known is None else known.unit)
        if is_signed:
            handles += _zero(ax, columns, rows, numbers)
    handles += _critical(ax, diagram, lines)
    handles += _hatched(ax, columns, rows, status)
    for axis, cells in ((ax.xaxis, columns), (ax.yaxis, rows)):
        _scaled(axis, cells)
    ax.set_xlim(columns.edges[0], columns.edges[-1])
    ax.set_ylim(rows.edges[0], rows.edges[-1])
    return handles


def _reasons(values: NDArray[Any], status: NDArray[np.str_]) -> NDArray[np.str_]:
    """Return the status, with a reason also for numbers that no colour can show."""
    if values.dtype.kind == "U":
        return status
    out = np.where((status == "ok") & np.isinf(values), "infinite", status)
    return np.where((out == "ok") & np.isnan(values), "not a number", out)


def _image(ax: Axes, columns: _Cells, rows: _Cells, numbers: Any, is_signed: bool, unit: str) -> None:
    """Draw numbers as colours, with a colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    present = numbers.compressed()
    low, high = _signed_range(present) if is_signed else _range(present)
    is_log = not is_signed and low > 0 and high > LOG_RANGE * low
    image = ax.pcolormesh(
        columns.edges,
        rows.edges,
        numbers,
        cmap=LinearSegmentedColormap.from_list("diverging", _DIVERGING) if is_signed else "viridis",
        norm=LogNorm(low, high) if is_log else Normalize(low, high),
        rasterized=True,
        zorder=1,
    )
    least, most = float(present.min()), float(present.max())
    rounding = 1e-9 * (high - low)
    below, above = least < low - rounding, most > high + rounding
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = ax.figure.colorbar(image, ax=ax, pad=0.025, aspect=24, extend=extend, extendfrac=0.04)
    least, most = (float(f"{value:.3g}") for value in (least, most))
    words = [unit] * (unit != "1") + [f"down to {_plain(least)}"] * below + [f"up to {_plain(most)}"] * above
    bar.set_label(", ".join(words), fontsize=9, color=MUTED)
    if not is_log:
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    bar.ax.tick_params(which="both", labelsize=8.5, labelcolor=MUTED, color=MUTED, length=3)
    bar.ax.tick_params(which="minor", length=0)
    bar.outline.set_visible(False)


def _signed_range(present: FloatArray) -> tuple[float, float]:
    """Return limits that are symmetric about zero.

    Nearly all numbers lie within, unless those of one sign are so small that they would look like zero: then only most
    of them do.
    """
    size = np.abs(present)
    limit = float(np.quantile(size, _COMMON))
    if present.min() < 0 < present.max():
        weaker = min(np.quantile(size[present < 0], _COMMON), np.quantile(size[present > 0], _COMMON))
        limit = min(limit, max(3 * float(weaker), float(np.quantile(size, 0.8))))
    if size.max() <= 1.25 * limit:
        limit = float(size.max())
    return (-limit, limit) if limit > 0 else (-1.0, 1.0)


def _range(present: FloatArray) -> tuple[float, float]:
    """Return limits between which nearly all numbers lie; all of them where that costs few colours."""
    low, high = (float(v) for v in np.quantile(present, [(1 - _COMMON) / 2, (1 + _COMMON) / 2]))
    least, most = float(present.min()), float(present.max())
    if least > 0 and most > LOG_RANGE * least:
        spread, whole = np.log(high / low), np.log(most / least)
    else:
        spread, whole = high - low, most - least
    if whole <= 1.25 * spread:
        low, high = least, most
    if high > low:
        return low, high
    margin = 0.05 * abs(low) or 0.5
    return low - margin, high + margin


def _zero(ax: Axes, columns: _Cells, rows: _Cells, numbers: Any) -> list[Any]:
    """Draw where a signed observable changes sign; return the entry of the key."""
    from matplotlib.lines import Line2D

    if min(numbers.shape) < 2 or not numbers.min() < 0 < numbers.max():
        return []
    ax.contour(columns.values, rows.values, numbers, levels=[0.0], colors=INK, linewidths=1.1, zorder=4)
    return [Line2D([], [], color=INK, linewidth=1.1, label="zero")]


def _categories(ax: Axes, columns: _Cells, rows: _Cells, names: Any) -> list[Any]:
    """Fill phases; return the entries of the key."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    present = sorted(set(names.compressed().tolist()))
    known = [*PHASES, *(name for name in present if name not in PHASES)]
    if not present:
        return []
    fills = [_FILLS[i % len(_FILLS)] for i in range(len(known))]
    codes = np.zeros(names.shape, dtype=np.int64)
    for i, name in enumerate(known):
        codes[names.filled("") == name] = i
    ax.pcolormesh(
        columns.edges,
        rows.edges,
        np.ma.masked_array(codes, names.mask),
        cmap=ListedColormap(fills),
        norm=BoundaryNorm(np.arange(len(known) + 1) - 0.5, len(known)),
        rasterized=True,
        zorder=1,
    )
    return [Patch(facecolor=fills[known.index(name)], label=name) for name in known if name in present]


def _hatched(ax: Axes, columns: _Cells, rows: _Cells, status: NDArray[np.str_]) -> list[Any]:
    """Hatch the cells without a number, one path for each reason; return the entries of the key."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path

    handles = []
    for reason in sorted(set(status.ravel().tolist()) - {"ok"}):
        fill, hatch, colour = _WITHOUT.get(reason, _WITHOUT_OTHER)
        style: dict[str, Any] = {"facecolor": fill, "hatch": hatch, "edgecolor": colour, "linewidth": 0.0}
        corners = []
        for row, failed in enumerate(status == reason):
            borders = np.flatnonzero(np.diff(np.concatenate([[False], failed, [False]])))
            bottom, top = rows.edges[row], rows.edges[row + 1]
            for first, last in zip(borders[::2], borders[1::2], strict=True):
                left, right = columns.edges[first], columns.edges[last]
                corners += [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(corners) // 5)
        ax.add_patch(PathPatch(Path(corners, codes), zorder=2, **style))
        handles.append(Patch(label=reason, **style))
    return handles


def _critical(ax: Axes, diagram: Diagram, lines: Sequence[CriticalLine]) -> list[Any]:
    """Draw critical lines; return the entries of the key."""
    from matplotlib.lines import Line2D

    how = "theory" if diagram.source == "measurement" else "solved"
    handles = []
    for line, colour in zip(lines, cycle(_LINE_COLOURS), strict=False):
        order = np.argsort(line.y_values, kind="stable")
        solved = np.where(line.status == "ok", line.x_values, np.nan)[order]
        if np.all(np.isnan(solved)):
            continue
        ends = (solved, line.y_values[order])
        across, up = ends if line.x == diagram.x.name else ends[::-1]
        ax.plot(across, up, color=PAPER, linewidth=4.6, zorder=3, solid_capstyle="butt")
        ax.plot(across, up, color=colour, linewidth=2.8, zorder=3.5, label=line.observable, solid_capstyle="butt")
        handles.append(Line2D([], [], color=colour, linewidth=2.8, label=f"{_LINES[line.observable]}, {how}"))
    return handles


def _scaled(axis: Any, cells: _Cells) -> None:
    """Set scale and ticks: plain numbers, on a logarithmic axis as many as it has room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if cells.is_log:
        axis._set_axes_scale("log")
        ratio = cells.edges[-1] / cells.edges[0]
        subs = (1, 1.5, 2, 3, 5, 7) if ratio < 12 else (1, 2, 5) if ratio < 200 else (1,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _key_rows(handles: Sequence[Any]) -> tuple[int, int]:
    """Return how many entries of a key fit side by side, and the rows that makes; a legend fills columns first."""
    lengths = [len(handle.get_label()) + 6 for handle in handles]
    for across in range(len(lengths), 0, -1):
        if sum(max(column) for column in np.array_split(lengths, across)) <= _KEY_WIDTH:
            return across, -(-len(lengths) // across)
    return 1, len(lengths)


def _keyed(ax: Axes, title: str, handles: Sequence[Any], rows: int) -> None:
    """Write the title, and the key between it and the axes, where all panels have room for so many rows."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8 + 15 * rows)
    if handles:
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=_key_rows(handles)[0],
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
            borderaxespad=0.2,
            handlelength=1.8,
            columnspacing=1.3,
            handletextpad=0.5,
        )


def _title(name: str) -> str:
    label = OBSERVABLES[name].label if name in OBSERVABLES else _words(name)
    return label if label.startswith("ln ") else label[0].upper() + label[1:]


def _source(diagram: Diagram, names: Sequence[str]) -> str:
    """Say where the numbers come from; depth and cosine of the tokens where they matter."""
    about = diagram.about
    is_measured = diagram.source == "measurement"
    parts = ["Theory"]
    if is_measured:
        draws = about.get("weight_draws")
        parts = ["Measured" if draws is None else f"Measured, {draws} weight draw{'s' if draws != 1 else ''} per point"]
    has_depth = is_measured or any(name in _AT_DEPTH for name in names)
    if has_depth and "spec" in about:
        parts.append(f"{sum(block.get('repeat', 1) for block in about['spec']['blocks'])} blocks")
    if "n_tokens" in about:
        parts.append(
            f"{about['n_tokens']} tokens"
            + (f" of cosine {about['cosine']:g}" if has_depth and "cosine" in about else "")
        )
    if "closure" in about:
        parts.append(f"{about['closure']} closure")
    return ", ".join(parts)


def _words(name: str) -> str:
    """Return a field in words: ``"mlp.mlp_in"`` and ``"mlp_in"`` are both the input scale of the MLP."""
    scope, _, field = name.rpartition(".")
    words = _FIELDS.get(field, field.replace("_", " "))
    return f"{words} of {'the MLP' if scope == 'mlp' else scope}" if scope and not words.startswith("MLP") else words


def _plain(value: float) -> str:
    return f"{value:g}".replace("-", "−")
