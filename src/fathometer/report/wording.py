"""What page and terminal both say, in the same words."""

from __future__ import annotations

from fathometer.diagnosis.report import Finding, Report

#: Findings whose depth is counted from the output.
FROM_OUTPUT = ("exploding_gradients", "vanishing_gradients")

#: Names of compared curves, for tables.
CURVES = {
    "q": "mean square q",
    "p": "overlap p",
    "apjn_log": "backward APJN",
    "apjn_forward_log": "forward APJN",
    "gradient_log": "pooled-loss gradient",
    "attention_entropy": "attention entropy",
    "logit_variance": "score variance",
}

#: Every limit in words: what is compared with it.
LIMITS = {
    "sensitivity_high": "largest relative sensitivity J q_l / q_L of the output to a block's stream",
    "amplification_high": "largest gradient growth J, from the second block on",
    "resolved_low": "smallest J - K, the part of the gradient that tells tokens apart",
    "angle_low": "smallest 1 - cosine between tokens",
    "angle_shrink": "... together with how much of the first block's 1 - cosine is left",
    "entropy_low": "smallest attention entropy, relative to uniform attention",
    "growth_high": "largest growth of q over the second half of the depth",
    "level_high": "largest q; beyond it half precision runs out of numbers",
    "share_low": "smallest share of attention or MLP in what branches add",
    "contribution_low": "smallest sum over blocks of what branches add, relative to the stream",
    "dominance_high": "largest share of branches in the stream, over most of the deeper half",
}


def state(report: Report) -> str:
    """Return ``"unhealthy"``, ``"healthy"``, or ``"uncovered"``: no failure seen, but no theory to compare with."""
    if not report.healthy:
        return "unhealthy"
    return "healthy" if report.predicted is not None else "uncovered"


def headline(report: Report) -> tuple[str, str]:
    """Return the verdict in a few words and in a sentence."""
    count = len(report.findings)
    if not report.healthy:
        says = "One criterion fails" if count == 1 else f"{count} criteria fail"
        more = " The theory does not cover this model." if report.predicted is None else ""
        return report.verdict[:1].upper() + report.verdict[1:], f"{says} at initialisation.{more}"
    if report.predicted is None:
        return "Healthy as measured", "No criterion fails, but the theory does not cover this model."
    agreement = ""
    if report.comparison is not None and "apjn_log" in report.comparison.folds:
        fold = report.comparison.folds["apjn_log"].whole
        apart = f"{100 * (fold - 1):.1f}%" if fold < 1.5 else f"a factor of {fold:.2g}"
        agreement = f" Theory and measurement of gradients are {apart} apart."
    return "Healthy", f"Signal and gradients pass all {report.measured.n_layers} blocks at initialisation.{agreement}"


def bites(finding: Finding, n_layers: int) -> str:
    """Say at what depth a finding begins."""
    depth = finding.evidence.depth
    if finding.name in FROM_OUTPUT:
        return f"a stack of {depth} blocks already crosses the limit" if depth < n_layers else "only at the full depth"
    if finding.name == "identical_layers":
        return f"from block {depth} on"
    return f"from block {depth} on" if depth > 0 else "at every depth"


def support(finding: Finding, report: Report) -> str:
    """Say how many weight draws show a finding and whether the theory does."""
    draws = report.about.get("weight_draws")
    if isinstance(draws, int) and draws > 1:
        seen = f"{round(finding.agreement * draws)} of {draws} weight draws show it"
    elif draws == 1:
        seen = "one weight draw shows it"
    else:
        seen = f"{100 * finding.agreement:.0f}% of the weight draws show it"
    theory = {True: "the theory predicts it", False: "the theory does not predict it", None: "no theory for it"}
    return f"{seen}; {theory[finding.predicted]}"


def sizes(report: Report) -> list[str]:
    """Return depth, width, batch and draws, as far as they are known."""
    about = report.about
    out = [f"{report.measured.n_layers} blocks"]
    if about.get("d_model") is not None:
        out.append(f"width {about['d_model']}")
    if about.get("batch") is not None:
        out.append(str(about["batch"]))
    if about.get("weight_draws") is not None:
        count = about["weight_draws"]
        out.append(f"{count} weight draw" + ("" if count == 1 else "s"))
    return out


def printable(text: object) -> str:
    """Return text on one line without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def some_layers(n_layers: int, count: int = 8) -> list[int]:
    """Return about ``count`` layers, evenly spaced from the first to the last border.

    >>> some_layers(24, 5), some_layers(2)
    ([0, 6, 12, 18, 24], [0, 1, 2])
    """
    steps = min(count - 1, n_layers)
    return sorted({round(i * n_layers / steps) for i in range(steps + 1)})
