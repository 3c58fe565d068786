"""The main job: predict, measure, compare, judge, prescribe."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fathometer._version import __version__
from fathometer.attention import DEFAULT_CLOSURE, Closure, as_closure
from fathometer.diagnosis.cautions import cautions
from fathometer.diagnosis.comparison import compare
from fathometer.diagnosis.criteria import CRITERIA, Evidence
from fathometer.diagnosis.remedies import Start, remedies
from fathometer.diagnosis.report import Finding, Remedy, Report
from fathometer.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from fathometer.errors import DomainError, NotCoveredError
from fathometer.measurement import Measurement, observe
from fathometer.measurement.batches import as_batch
from fathometer.models.reading import ModelReading
from fathometer.observables import attention_beta, predict
from fathometer.results import Profile
from fathometer.spec import SelfAttention, to_dict

FloatArray = NDArray[np.float64]
_MAX_GRAM_SAMPLES = 2


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    name: str | None = None,
    draws: int = 1,
    seeds: int = 4,
    seed: int = 0,
    blocks: str | Sequence[nn.Module] | None = None,
    closure: Closure | str = DEFAULT_CLOSURE,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    forward: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Say whether a model will train, why not, and what would help.

    Theory uses the scales read off the model's weights, layer by layer, and the tokens' Gram matrix measured at the
    first block; nothing is fitted. The model is left untouched.

    Args:
        model: Any torch module with residual blocks.
        batch: A tensor, a tuple or dict of tensors, or a :class:`fathometer.measurement.Batch`.
        name: What to call it in the report.
        draws, seeds, seed, blocks, forward, progress: As in :func:`fathometer.measurement.measure`.
        closure: How the theory averages the softmax.
        thresholds: Where healthy ends.
    Returns:
        The report; ``report.healthy``, ``report.findings``, ``report.remedies``.
    Raises:
        ModelError, BatchError: in one sentence, with the model untouched.
    """
    averaging = as_closure(closure)
    found = observe(
        model,
        batch,
        draws=draws,
        seeds=seeds,
        seed=seed,
        blocks=blocks,
        forward=forward,
        progress=progress,
    )
    theory, reason = _theory(found, averaging)
    skips = _skips(found.reading)
    findings = _findings(found, theory, thresholds, skips)
    cures: tuple[Remedy, ...] = ()
    if found.reading is not None and findings:
        first = found.own.curves
        start = Start(
            n_tokens=int(found.gram.shape[-1]), q=float(first["q"][0]), p=float(first["p"][0]), closure=averaging
        )
        cures = (*_redraw(found, findings), *remedies(findings, found.reading, start, thresholds, skips))
    width = int(found.profile.about["d_model"])
    notes = [*found.notes, *cautions(model, as_batch(batch), found.reading)]
    return Report(
        name=name or type(model).__name__,
        measured=found.profile,
        predicted=theory,
        not_covered=reason,
        comparison=None if theory is None else compare(found.profile, theory, width=width),
        findings=findings,
        remedies=cures,
        about={**_about(found, theory, averaging, thresholds), "notes": notes},
    )


def _theory(found: Measurement, closure: Closure) -> tuple[Profile | None, str | None]:
    if found.reading is None:
        return None, found.not_covered
    try:
        return predict(found.reading.spec, gram=found.gram[:_MAX_GRAM_SAMPLES], closure=closure), None
    except (NotCoveredError, DomainError) as error:
        return None, str(error)


def _findings(
    found: Measurement, theory: Profile | None, limits: Thresholds, skips: FloatArray | None
) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    if found.duplicates:
        group = max(found.duplicates, key=len)
        findings.append(
            Finding(
                name="identical_layers",
                title="Identical layers",
                evidence=Evidence(
                    value=float(len(group)),
                    limit=1.0,
                    depth=int(group[1]),
                    text=(
                        f"{len(group)} of {len(found.stack)} blocks hold the same weights, entry by entry (blocks "
                        f"{', '.join(map(str, group[:4]))}{', ...' if len(group) > 4 else ''}); "
                        "were they copied instead of drawn?"
                    ),
                ),
                agreement=1.0,
                predicted=None,
            )
        )
    for criterion in CRITERIA:
        evidence = criterion.test(found.own.curves, limits, skips)
        if evidence is None:
            continue
        agreement = float(np.mean([criterion.test(draw, limits, skips) is not None for draw in found.draws]))
        predicted = None if theory is None else criterion.test(theory.curves, limits, skips) is not None
        findings.append(
            Finding(
                name=criterion.name, title=criterion.title, evidence=evidence, agreement=agreement, predicted=predicted
            )
        )
    return tuple(findings)


def _redraw(found: Measurement, findings: Sequence[Finding]) -> tuple[Remedy, ...]:
    """The remedy for copied layers: draw each block's weights independently."""
    if not any(f.name == "identical_layers" for f in findings):
        return ()
    snippet = "\n".join(
        [
            "with torch.no_grad():",
            "    for name, weight in model.named_parameters():",
            f"        if name.startswith({_prefixes(found)}) and weight.ndim >= 2:",
            "            weight.normal_(0, weight.std())   # every block its own draw",
        ]
    )
    return (
        Remedy(
            title="Draw every block's weights independently (copy.deepcopy copies values too)",
            cures=("identical_layers",),
            before={
                "blocks with weights of their own": float(len(found.stack) - sum(len(g) - 1 for g in found.duplicates))
            },
            after={"blocks with weights of their own": float(len(found.stack))},
            snippet=snippet,
        ),
    )


def _prefixes(found: Measurement) -> str:
    """Return the name, or tuple of names, under which a model's blocks live, as source text."""
    heads = sorted({name.rstrip("0123456789") for name in found.stack.names})
    return repr(heads[0]) if len(heads) == 1 else repr(tuple(heads))


def _skips(reading: ModelReading | None) -> FloatArray | None:
    """Return the squared skip factor of every block, or ``None`` where blocks were not read."""
    if reading is None:
        return None
    return np.array([np.prod([float(part.sublayer.skip_scale) ** 2 for part in layer]) for layer in reading.layers])


def _temperatures(reading: ModelReading, theory: Profile, n_tokens: int) -> dict[str, list[float]] | None:
    """Return beta of every attention layer, and the one at which it would condense; ``None`` where none belongs.

    Both count the tokens of the batch; a query that sees fewer keys condenses at a higher beta.
    """
    branches = [s.branch for block in reading.spec.layers() for s in block.sublayers]
    attention = [branch for branch in branches if isinstance(branch, SelfAttention)]
    ratio = theory.curves.get("condensation")
    if n_tokens < 2 or ratio is None or any(branch.qk_norm for branch in attention) or not np.all(ratio > 0):
        return None
    betas = np.array([float(attention_beta(branch, n_tokens)) for branch in attention])
    return {"beta": betas.tolist(), "beta_critical": (betas / ratio).tolist()}


def _about(found: Measurement, theory: Profile | None, closure: Closure, thresholds: Thresholds) -> dict[str, Any]:
    reading = found.reading
    return {
        **found.profile.about,
        "n_layers": len(found.stack),
        "closure": closure.name,
        "spec": None if reading is None else to_dict(reading.spec),
        "temperatures": None
        if reading is None or theory is None
        else _temperatures(reading, theory, int(found.gram.shape[-1])),
        "other_stacks": list(found.other_stacks),
        "thresholds": {key: float(value) for key, value in vars(thresholds).items()},
        "versions": {
            "fathometer": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in ("numpy", "torch")},
        },
    }
