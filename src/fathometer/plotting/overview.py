"""One figure that says it all: six panels under the model's name and the verdict."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from fathometer.plotting import layers
from fathometer.plotting.canvas import ALARM, CALM, CAUTION, INK, MUTED, new_figure
from fathometer.plotting.folds import draw_fold_errors
from fathometer.plotting.marks import source_handles
from fathometer.plotting.subject import subject_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fathometer.diagnosis import Report

_PANELS = (
    layers.draw_stream,
    layers.draw_cosine,
    layers.draw_gradients,
    layers.draw_branches,
    layers.draw_attention_entropy,
    draw_fold_errors,
)


def draw_overview(report: Report) -> Figure:
    """Return a figure of 2 x 3 panels with the model's name, its sizes and the verdict."""
    figure = new_figure(15.5, 9.2)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 8.6), hspace=0.0)
    head, body = halves
    head.set_facecolor("none")
    body.set_facecolor("none")
    subject = subject_of(report)
    colour = ALARM if not report.healthy else CALM if report.predicted is not None else CAUTION
    verdict = report.verdict
    if report.healthy and report.predicted is None:
        verdict = "healthy as measured; the theory does not cover it"
    plain = {"parse_math": False}  # names may hold dollar signs
    head.text(0.012, 0.66, _short(report.name, 60), fontsize=17, fontweight="bold", color=INK, va="center", **plain)
    head.text(0.012, 0.2, _sizes(report), fontsize=10, color=MUTED, va="center", **plain)
    head.text(
        0.988,
        0.66,
        "\n".join(textwrap.wrap(verdict, 66)[:2]),
        fontsize=13,
        fontweight="bold",
        color=colour,
        ha="right",
        va="center",
        linespacing=1.25,
        **plain,
    )
    handles = source_handles(subject, INK, limited=bool(subject.limits))
    head.legend(
        handles=handles,
        loc="center right",
        bbox_to_anchor=(0.992, 0.17),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        borderaxespad=0,
    )
    for draw, ax in zip(_PANELS, body.subplots(2, 3).flat, strict=True):
        draw(subject, ax, sources=False)
    return figure


def _sizes(report: Report) -> str:
    about = report.about
    parts = [f"{report.measured.n_layers} blocks"]
    if "d_model" in about:
        parts.append(f"width {about['d_model']}")
    if "batch" in about:
        parts.append(_short(str(about["batch"]), 70))
    if "weight_draws" in about:
        parts.append(f"{about['weight_draws']} weight draws")
    return "   ·   ".join(parts)


def _short(text: str, length: int) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= length else text[: length - 1] + "…"
