"""Markup that cannot forget to escape: text becomes :class:`Markup` only through :func:`text`."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


class Markup(str):
    """A string that is markup already."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Escape plain text; characters that no page may hold are dropped."""
    allowed = "".join(c for c in value if c in "\n\t" or (c.isprintable() or c == " "))
    return Markup(html.escape(allowed, quote=True))


def numeric(value: str) -> Markup:
    """Escape a number written by :mod:`fathometer.report.numbers` and set its power of ten.

    >>> numeric("(8.7 ± 0.2)e-7")
    '(8.7 ± 0.2)·10<sup>−7</sup>'
    """
    parts = re.fullmatch(r"(.*[\d)])e(-?[\d.]+)(×?)", value)
    if parts is None:
        return text(value)
    exponent = parts[2].replace("-", "−")
    mantissa = "" if parts[1] == "1" else f"{html.escape(parts[1])}·"
    return Markup(f"{mantissa}10<sup>{exponent}</sup>{parts[3]}")


def joined(*parts: Markup) -> Markup:
    """Put markup one after the other."""
    return Markup("".join(parts))


def element(tag: str, *content: Markup, class_: str = "", **attributes: str) -> Markup:
    """Return ``<tag ...>content</tag>``; attribute values are escaped, an underscore in a name stands for a hyphen."""
    for part in content:
        if not isinstance(part, Markup):
            raise TypeError(f"content of <{tag}> must be markup; pass plain strings through text()")
    named = {**({"class": class_} if class_ else {}), **attributes}
    written = "".join(f' {name.replace("_", "-")}="{html.escape(value, quote=True)}"' for name, value in named.items())
    return Markup(f"<{tag}{written}>{''.join(content)}</{tag}>")


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Markup]],
    *,
    caption: str = "",
    plain: Sequence[int] | None = (0,),
    off: Sequence[bool] = (),
) -> Markup:
    """Return a table whose first column names the row.

    Args:
        heads: Column titles; none for a table of two columns that explains itself.
        rows: Cells.
        caption: A line above.
        plain: Columns that hold words; the others hold numbers. ``None``: all of them.
        off: Per row, whether its first number is to stand out.
    """
    wide = max([len(heads), *map(len, rows)], default=0)
    words = set(range(wide)) if plain is None or not heads else set(plain)
    parts = [element("caption", text(caption))] if caption else []
    if heads:
        kinds = ["" if i in words else "num" for i in range(wide)]
        cells = [element("th", text(head), class_=kinds[i], scope="col") for i, head in enumerate(heads)]
        parts.append(element("thead", element("tr", *cells)))
    body = []
    for position, row in enumerate(rows):
        cells = [element("th", row[0], scope="row")]
        for i, cell in enumerate(row[1:], start=1):
            kind = "" if i in words else "num"
            if i == 1 and position < len(off) and off[position]:
                kind = f"{kind} off".strip()
            cells.append(element("td", cell, class_=kind))
        body.append(element("tr", *cells))
    parts.append(element("tbody", *body))
    return element("table", *parts)
