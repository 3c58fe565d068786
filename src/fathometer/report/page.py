"""The report as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import resources

from fathometer.diagnosis.report import Report
from fathometer.diagnosis.thresholds import DEFAULT_THRESHOLDS
from fathometer.plotting import Panel, panels_of, to_svg
from fathometer.report.architecture import scales_table, sizes_table
from fathometer.report.markup import Markup, element, joined, numeric, table, text
from fathometer.report.numbers import MISSING, curve_value, number
from fathometer.report.wording import CURVES, LIMITS, bites, headline, sizes, some_layers, state, support
from fathometer.results import VOCABULARY

# Nothing may be loaded from anywhere, whatever a model is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_TILES = (
    ("Growth of the signal", "q"),
    ("Final cosine of tokens", "cosine"),
    ("Growth of gradients", "apjn_log"),
    ("Lowest attention entropy", "attention_entropy_relative"),
)


#: Fold errors beyond this stand out.
_FAR_APART = 1.5


def render_page(report: Report) -> str:
    """Return the whole page as text."""
    sections: list[tuple[str, str, Callable[[Report], Markup | None]]] = [
        ("findings", "What is wrong", _findings),
        ("remedies", "What to change", _remedies),
        ("agreement", "Theory against measurement", _agreement),
        ("figures", "Layer by layer", _figures),
        ("numbers", "Numbers at some depths", _numbers),
        ("architecture", "Architecture and measurement", _architecture),
        ("reading", "What the names mean", _reading),
        ("limits", "Where healthy ends", _limits),
    ]
    written = [(name, title, body) for name, title, make in sections if (body := make(report)) is not None]
    links = [element("a", text(title), href=f"#{name}") for name, title, _ in written]
    content = joined(
        element("header", _head(report), element("nav", *links)),
        *(element("section", element("h2", text(title)), body, id=name) for name, title, body in written),
        _footer(report),
    )
    style = Markup(resources.files("fathometer.report").joinpath("page.css").read_text(encoding="utf-8"))
    head = joined(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", text(f"{report.name}: {report.verdict}")),
        element("style", style),
    )
    body = element("body", element("main", content))
    return f'<!doctype html>\n<html lang="en">\n{element("head", head)}\n{body}\n</html>\n'


def _head(report: Report) -> Markup:
    title, sentence = headline(report)
    parts = [element("strong", text(title)), element("p", text(sentence))]
    if report.not_covered is not None:
        parts.append(element("p", text(f"Not covered by the theory: {report.not_covered}")))
    return joined(
        element("h1", text(report.name)),
        element("p", text(" · ".join(sizes(report))), class_="sizes"),
        element("div", *parts, class_=f"banner {state(report)}", role="status"),
        element("dl", *_tiles(report), class_="tiles"),
    )


def _tiles(report: Report) -> list[Markup]:
    """The four numbers everyone asks for, measured, with the theory's below."""
    out = []
    for label, name in _TILES:
        if name not in report.measured.curves:
            continue
        seen = _tile_value(report, name, predicted=False)
        values = [element("dd", numeric(seen), class_="value num")]
        if report.predicted is not None and name in report.predicted.curves:
            theory = Markup(f"theory {numeric(_tile_value(report, name, predicted=True))}")
            values.append(element("dd", theory, class_="theory num"))
        out.append(element("div", element("dt", text(label)), *values, class_="tile"))
    return out


def _tile_value(report: Report, name: str, *, predicted: bool) -> str:
    profile = report.predicted if predicted and report.predicted is not None else report.measured
    curve = profile.curves[name]
    if name == "q":
        return f"{number(float(curve[-1] / curve[0]))}×"
    layer = {"cosine": len(curve) - 1, "apjn_log": 0}.get(name, int(curve.argmin()))
    return curve_value(profile, name, layer)


def _findings(report: Report) -> Markup | None:
    cards = []
    for finding in report.findings:
        facts = (
            ("Bites", bites(finding, report.measured.n_layers)),
            ("Seen", support(finding, report)),
            ("Value", f"{number(finding.evidence.value)}, limit {number(finding.evidence.limit)}"),
        )
        cards.append(
            element(
                "article",
                element(
                    "div",
                    element("h3", text(finding.title)),
                    element("span", text(f"{finding.confidence} confidence"), class_="badge"),
                    class_="cardhead",
                ),
                element("p", text(_sentence(finding.evidence.text))),
                element("dl", *(_fact(*fact) for fact in facts), class_="facts"),
                class_="card finding",
            )
        )
    return joined(*cards) if cards else None


def _fact(label: str, value: str) -> Markup:
    return joined(element("dt", text(label)), element("dd", text(value)))


def _remedies(report: Report) -> Markup | None:
    if not report.findings:
        return None
    if not report.remedies:
        reason = "No remedy was found by the theory." if report.predicted is not None else "Remedies need the theory."
        return element("p", text(reason), class_="quiet")
    titles = {finding.name: finding.title.lower() for finding in report.findings}
    cards = []
    for remedy in report.remedies:
        cures = ", ".join(titles.get(name, name.replace("_", " ")) for name in remedy.cures)
        keys = list(dict.fromkeys([*remedy.before, *remedy.after]))
        rows = [
            (text(when), *(numeric(number(numbers.get(key))) for key in keys))
            for when, numbers in (("before", remedy.before), ("after", remedy.after))
        ]
        cards.append(
            element(
                "article",
                element(
                    "header",
                    element("h3", text(remedy.title)),
                    element("p", text(f"Cures, by the theory: {cures}"), class_="quiet"),
                ),
                element("div", table(("predicted", *map(_label, keys)), rows), class_="scroll"),
                element("pre", text(remedy.snippet), tabindex="0"),
                class_="card remedy",
            )
        )
    note = "Computed on this model's own scales, best first. One click selects a whole snippet."
    return joined(element("p", text(note), class_="quiet"), *cards)


def _agreement(report: Report) -> Markup | None:
    if report.comparison is None or not report.comparison.folds:
        return None
    rows, off = [], []
    for name, fold in report.comparison.folds.items():
        values = (fold.whole, *fold.thirds, fold.noise)
        rows.append((text(CURVES.get(name, name)), *(numeric(_fold(value)) for value in values)))
        off.append(fold.whole > _FAR_APART)
    heads = ("fold error", "whole depth", "first third", "middle", "last third", "noise of weight draws")
    note = (
        "The mean factor between theory and measurement; 1.05 means five percent apart. The theory is not fitted: it "
        "uses the scales read off the weights and the tokens measured at the first block. The last column is the "
        "factor that the scatter of weight draws alone would give."
    )
    parts = [
        element("p", text(note), class_="quiet"),
        _card(table(heads, rows, off=off)),
    ]
    if report.comparison.reasons:
        items = [element("li", text(_sentence(reason))) for reason in report.comparison.reasons]
        parts.append(element("p", text("Why they part:")))
        parts.append(element("ul", *items))
    return joined(*parts)


def _figures(report: Report) -> Markup | None:
    return element("div", *(_figure(report, panel) for panel in panels_of(report)), class_="figures")


def _figure(report: Report, panel: Panel) -> Markup:
    drawing = Markup(to_svg(panel.figure(report), prefix=panel.name))
    return element(
        "figure",
        element("div", drawing, role="img", aria_label=panel.title),
        element("figcaption", text(panel.reading)),
    )


def _numbers(report: Report) -> Markup | None:
    names = [name for name in VOCABULARY if name in report.measured.curves and name != "attention_entropy"]
    layers = some_layers(report.measured.n_layers, 5)
    rows = []
    for name in names:
        cells = [text(name.removesuffix("_log"))]
        for layer in layers:
            # Curves of blocks have one entry less than curves of borders: show their last block in the last column.
            at = min(layer, len(report.measured.curves[name]) - 1)
            cell = numeric(curve_value(report.measured, name, at))
            if report.predicted is not None and name in report.predicted.curves:
                cell = joined(cell, Markup("<br>"), element("small", numeric(curve_value(report.predicted, name, at))))
            cells.append(cell)
        rows.append(tuple(cells))
    note = "Measured, ± one standard error over weight draws"
    note += "; theory below." if report.predicted is not None else "."
    heads = ("block", *map(str, layers))
    return joined(
        element("p", text(note), class_="quiet"),
        _card(table(heads, rows), dense=True),
    )


def _architecture(report: Report) -> Markup | None:
    known = [(text(label), text(value)) for label, value in sizes_table(report)]
    cards = [element("div", table((), known), class_="card")]
    scales = [tuple(map(text, row)) for row in scales_table(report)]
    if scales:
        caption = "Read off the weights. A scale is std times the square root of the fan-in."
        heads = ("", "first block", "last block")
        cards.append(element("div", table(heads, scales, caption=caption, plain=None), class_="card"))
    parts = [element("div", *cards, class_="columns" if scales else "")]
    notes = report.about.get("notes")
    if isinstance(notes, (list, tuple)) and notes:
        parts.append(element("ul", *(element("li", text(str(note))) for note in notes)))
    return joined(*parts)


def _reading(report: Report) -> Markup | None:
    profiles = [profile for profile in (report.measured, report.predicted) if profile is not None]
    rows = [
        (element("code", text(name)), text(meaning), text(unit))
        for name, (_, unit, meaning) in VOCABULARY.items()
        if any(name in profile.curves for profile in profiles)
    ]
    note = (
        "Border l is the stream before block l; the last one is the output of the stack. All numbers are means over "
        "tokens and samples. Curves ending in _log are kept as logarithms; figures and tables show the number itself."
    )
    return joined(element("p", text(note), class_="quiet"), _card(table(("name", "meaning", "unit"), rows, plain=None)))


def _limits(report: Report) -> Markup | None:
    limits = report.about.get("thresholds") or vars(DEFAULT_THRESHOLDS)
    rows = [
        (element("code", text(name)), text(LIMITS.get(name, "")), numeric(number(float(value))))
        for name, value in limits.items()
    ]
    heads = ("limit", "what is compared with it", "value")
    return _card(table(heads, rows, plain=(0, 1)))


def _footer(report: Report) -> Markup:
    versions = report.about.get("versions")
    made = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    limits = (
        "Leading order in width at fixed depth and number of tokens, at initialisation. This is a statement about "
        "trainability, not about the accuracy that training will reach."
    )
    return element("footer", element("p", text(limits)), element("p", text(made)))


def _card(content: Markup, *, dense: bool = False) -> Markup:
    """Frame a table, which may be wider than the window."""
    return element("div", element("div", content, class_="scroll"), class_="card dense" if dense else "card")


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def _label(key: str) -> str:
    return key.replace("_", " ")


def _fold(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value < 10 else number(value)
