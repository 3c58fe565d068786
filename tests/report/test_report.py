"""Reports: self-contained, escaped, whole or not there, and saying the verdict."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fathometer.diagnosis.comparison import COMPARED
from fathometer.diagnosis.report import Report
from fathometer.diagnosis.thresholds import Thresholds
from fathometer.plotting import panels_of
from fathometer.report import OutputError, progress_reporter, render_page, render_terminal, save_report
from fathometer.report.markup import element, text
from fathometer.report.numbers import curve_value, number, with_error
from fathometer.report.wording import CURVES, LIMITS, bites, some_layers, support
from fathometer.results import Profile
from fathometer.results.files import write_atomically

Maker = Callable[..., Report]

EVIL = '--><b></title></style><script>alert(1)</script><img src=x onerror="alert(1)">&"\'\x1b[2J\x00[red]'


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def evil(report: Report) -> Report:
    """Put hostile text wherever a report holds text."""
    return replace(
        report,
        name=EVIL,
        not_covered=EVIL,
        comparison=None if report.comparison is None else replace(report.comparison, reasons=(EVIL,)),
        findings=tuple(replace(f, title=EVIL, evidence=replace(f.evidence, text=EVIL)) for f in report.findings),
        remedies=tuple(
            replace(r, title=EVIL, snippet=EVIL, cures=(EVIL,), before={EVIL: 1.0}, after={EVIL: 2.0})
            for r in report.remedies
        ),
        about={
            **report.about,
            "batch": EVIL,
            "blocks": EVIL,
            "notes": [EVIL],
            "other_stacks": [EVIL],
            "versions": {EVIL: EVIL},
            "thresholds": {**report.about["thresholds"], EVIL: 1.0},
            "spec": {"blocks": [{"sublayers": [{"branch": {"kind": EVIL, EVIL: EVIL}, "input_norm": {"kind": EVIL}}]}]},
        },
    )


@pytest.fixture(scope="module")
def pages(healthy: Report, broken: Report, uncovered: Report) -> dict[str, str]:
    return {"healthy": render_page(healthy), "broken": render_page(broken), "uncovered": render_page(uncovered)}


# The page.


@pytest.mark.parametrize("kind", ["healthy", "broken", "uncovered"])
def test_the_page_needs_nothing_but_itself(kind: str, pages: dict[str, str]) -> None:
    page = pages[kind]
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe", page)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= set(re.findall(r"url\((#[^)]*)\)", page))
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith("#")


def test_every_identifier_is_there_once_and_every_link_leads_somewhere(pages: dict[str, str]) -> None:
    tags = Page(pages["broken"]).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("href", "xlink:href")]
    assert {str(link)[1:] for link in links} <= set(names)


@pytest.mark.parametrize(
    ("kind", "banner", "words"),
    [
        ("healthy", "banner healthy", "Healthy Signal and gradients pass all 24 blocks"),
        ("broken", "banner unhealthy", "Exploding gradients"),
        ("uncovered", "banner uncovered", "Healthy as measured"),
    ],
)
def test_the_banner_has_the_colour_of_the_verdict(kind: str, banner: str, words: str, pages: dict[str, str]) -> None:
    page = Page(pages[kind])
    assert [a["class"] for _, a in page.tags if str(a.get("class")).startswith("banner")] == [banner]
    assert words in page.said


def test_the_page_says_what_is_wrong_how_sure_and_what_to_change(broken: Report, pages: dict[str, str]) -> None:
    said = Page(pages["broken"]).said
    for finding in broken.findings:
        assert finding.title in said
        assert finding.evidence.text[1:] in said
        assert bites(finding, 40) in said
    assert "3 of 4 weight draws show it; the theory predicts it" in said
    remedy = broken.remedies[0]
    assert remedy.title in said
    assert " ".join(remedy.snippet.split()) in said
    assert "gradient amplification" in said and "0.91" in said and "0.62" in said


def test_a_snippet_keeps_its_lines(broken: Report, pages: dict[str, str]) -> None:
    assert f">{broken.remedies[0].snippet}</pre>" in pages["broken"]


def test_the_page_says_why_the_theory_does_not_cover_a_model(uncovered: Report, pages: dict[str, str]) -> None:
    said = Page(pages["uncovered"]).said
    assert uncovered.not_covered is not None
    assert uncovered.not_covered in said
    assert "theory below" not in said


def test_the_page_shows_scales_sizes_limits_and_versions(pages: dict[str, str]) -> None:
    said = Page(pages["healthy"]).said
    for words in (
        "attention: query 0.4 0.4",
        "LayerNorm",
        "width (d_model) 256",
        "entropy_low",
        "python 3.11.2",
        "a remark",
    ):
        assert words in said


@pytest.mark.parametrize("kind", ["healthy", "broken", "uncovered"])
def test_hostile_text_stays_text(kind: str, request: pytest.FixtureRequest) -> None:
    page = render_page(evil(request.getfixturevalue(kind)))
    tags = Page(page).tags
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page and "\x00" not in page


def test_markup_does_not_take_plain_strings() -> None:
    with pytest.raises(TypeError, match="must be markup"):
        element("p", "<b>")  # type: ignore[arg-type]
    assert element("p", text("<b>"), title='"') == '<p title="&quot;">&lt;b&gt;</p>'


def test_the_page_is_deterministic(healthy: Report, pages: dict[str, str]) -> None:
    assert render_page(healthy) == pages["healthy"]


def test_words_exist_for_every_limit_and_curve() -> None:
    assert set(LIMITS) == {field.name for field in dataclasses.fields(Thresholds)}
    assert set(CURVES) == set(COMPARED)


# The folder.


def test_a_folder_holds_page_data_and_pictures(healthy: Report, tmp_path: Path) -> None:
    written = save_report(healthy, tmp_path / "new" / "report")
    names = [path.name for path in written]
    assert names[:3] == ["report.html", "report.json", "overview.png"]
    assert names[3:] == [f"{panel.name}.png" for panel in panels_of(healthy)]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new" / "report").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")


def test_the_data_survive_the_way_through_json(healthy: Report, tmp_path: Path) -> None:
    save_report(healthy, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data == json.loads(healthy.to_json())
    assert data["verdict"] == "healthy"
    assert data["about"] == healthy.about
    for name, curve in healthy.measured.curves.items():
        np.testing.assert_array_equal(np.array(data["measured"]["curves"][name]), curve)


def test_a_file_is_no_folder(healthy: Report, tmp_path: Path) -> None:
    target = tmp_path / "report"
    target.write_text("mine")
    with pytest.raises(OutputError, match=r"report' is a file; name a folder"):
        save_report(healthy, target)
    assert target.read_text() == "mine"


def test_a_parent_that_is_a_file_is_refused(healthy: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write the report to"):
        save_report(healthy, tmp_path / "file" / "report")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    write_atomically(target, b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(target, b"new")
        assert target.read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_full_disk_is_reported_in_one_sentence(
    uncovered: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"cannot write the report to .*: No space left on device"):
        save_report(uncovered, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rendering_writes_nothing(uncovered: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Report) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("fathometer.report.save.render_page", fail)
    with pytest.raises(RuntimeError, match="no page"):
        save_report(uncovered, tmp_path / "report")
    assert not (tmp_path / "report").exists()


# The terminal.


def printed(report: Report, width: int = 80, **options: Any) -> str:
    out = io.StringIO()
    render_terminal(report, Console(file=out, width=width, **options))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_says_the_verdict(healthy: Report, broken: Report, uncovered: Report, width: int) -> None:
    assert "Healthy" in printed(healthy, width)
    assert "Healthy as measured" in printed(uncovered, width)
    said = " ".join(printed(broken, width).replace("│", " ").split())
    for finding in broken.findings:
        assert finding.title in said
    assert broken.remedies[0].snippet in printed(broken, width)
    assert max(map(len, printed(healthy, width).splitlines())) <= width


def test_the_terminal_shows_numbers_with_errors_beside_the_theory(healthy: Report) -> None:
    said = printed(healthy, 140)
    assert healthy.predicted is not None
    assert curve_value(healthy.measured, "q", 24) in said
    assert curve_value(healthy.predicted, "q", 24) in said
    assert "mean square q" in said


def test_hostile_text_cannot_steer_the_terminal(broken: Report) -> None:
    said = printed(evil(broken))
    assert "\x1b" not in said and "\x00" not in said
    assert "[red]" in said


def test_a_terminal_without_unicode_gets_ascii_numbers(healthy: Report) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render_terminal(replace(healthy, name="日本"), Console(file=stream, width=80))
    stream.flush()
    assert b"+-" in raw.getvalue()


# Progress.


def test_without_a_terminal_progress_is_rare_lines() -> None:
    out = io.StringIO()
    with progress_reporter(Console(file=out), every=3600.0) as report:
        report("draw 1/2", 1, 10)
    assert out.getvalue() == ""
    with progress_reporter(Console(file=out), every=0.0) as report:
        report("draw\x1b 1/2", 1, 10)
    assert out.getvalue() == "draw  1/2: 1/10\n"


def test_lines_are_no_more_frequent_than_asked() -> None:
    out = io.StringIO()
    with progress_reporter(Console(file=out), every=0.2) as report:
        stop = time.monotonic() + 0.5
        while time.monotonic() < stop:
            report("draw", 1, 10)
    assert 1 <= out.getvalue().count("\n") <= 2


def test_on_a_terminal_progress_leaves_nothing_behind() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with progress_reporter(console) as report:
        report("weight draw 1/2", 3, 10)
        report("weight draw 2/2", 10, 10)
    assert "weight draw 2/2" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[2K")


# Numbers in words.


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (12345.6, "12346"),
        (-3.21e-9, "-3.21e-9"),
        (float("nan"), "–"),
        (float("inf"), "inf"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value: float | None, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize(
    ("value", "error", "written"),
    [
        (1.2345, 0.067, "1.234 ± 0.067"),
        (-0.00741, 0.00046, "-0.00741 ± 0.00046"),
        (1.0, 0.0, "1"),
        (0.9975142, 0.0000153, "0.99751 ± 0.00002"),
        (0.001, 5.0, "0.0 ± 5.0"),
        (float("nan"), 1.0, "–"),
        (2.0, float("nan"), "2"),
        (0.0, 0.0, "0"),
    ],
)
def test_values_are_rounded_to_their_errors(value: float, error: float, written: str) -> None:
    assert with_error(value, error) == written


def test_a_curve_beyond_a_float_is_written_by_its_exponent() -> None:
    profile = Profile(source="theory", curves={"apjn_log": np.array([3000.0, np.log(2.0)])})
    assert curve_value(profile, "apjn_log", 0) == "1e1302.9"
    assert curve_value(profile, "apjn_log", 1) == "2"
    assert curve_value(profile, "apjn_log", 2) == "–"
    assert curve_value(None, "q", 0) == "–"


def test_depths_reach_from_end_to_end() -> None:
    for n_layers in (1, 2, 7, 96, 1000):
        layers = some_layers(n_layers)
        assert layers[0] == 0 and layers[-1] == n_layers
        assert len(layers) == min(8, n_layers + 1)


def test_support_counts_draws(broken: Report) -> None:
    finding = replace(broken.findings[0], agreement=0.5, predicted=False)
    assert support(finding, broken) == "2 of 4 weight draws show it; the theory does not predict it"
    bare = replace(broken, about={})
    assert support(replace(finding, predicted=None), bare) == "50% of the weight draws show it; no theory for it"
