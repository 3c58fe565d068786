r"""Stems that start the stream at second moment one, and heads whose outputs have it, as DeepScaleLM asks.

A sum of ``n_e`` tables of variance ``(1 - p)/n_e``, divided by ``1 - p`` through dropout at rate p, has second moment
one; a linear map of patches takes the place of a table if the second moment of its inputs is divided out. Behind a norm
a matrix of variance ``1/d`` keeps it, and so does a tied table of variance ``s_e`` behind a factor ``1/sqrt(d s_e)``.

Source: A. Kedia et al., arXiv:2403.09635, for text; patches, class tokens and other front ends are derived here from
the same principle, and the paper's own constants for them were not at hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fathometer.errors import DomainError, SpecError
from fathometer.prescription.plans import EndRow
from fathometer.spec import Head, PatchStem, Stem, TokenStem


def unit_stem(
    stem: Stem, *, dropout: float, input_second_moment: float | None = None, input_fan_in: int | None = None
) -> tuple[Stem, tuple[EndRow, ...]]:
    """Return the stem whose output has second moment one, and its table.

    Tables the stem does not have, those of scale zero, stay away.

    Args:
        stem: Which tables and maps there are.
        dropout: Rate of the dropout on the sum.
        input_second_moment: Mean square of what a patch map is applied to, one by default: pixels, or the values of a
            spectrogram.
        input_fan_in: Their number in a patch; without it the map has a scale and no standard deviation.
    Raises:
        DomainError: for a rate outside ``[0, 1)``, a second moment that is not positive, or a fan-in below one.
        SpecError: for either of a stem without patches.
    """
    _check_rate(dropout)
    if isinstance(stem, TokenStem):
        if (input_second_moment, input_fan_in) != (None, None):
            raise SpecError("input_second_moment and input_fan_in belong to a PatchStem; this is a TokenStem")
        tables = [name for name in ("token", "position", "segment") if name == "token" or np.any(getattr(stem, name))]
        std = math.sqrt((1 - dropout) / len(tables))
        reason = f"var (1-p)/n_e, n_e = {len(tables)} tables"
        rows = tuple(EndRow(f"{name}_embedding", std, std, 1.0, reason) for name in tables)
        position, segment = (std if name in tables else 0.0 for name in ("position", "segment"))
        return TokenStem(token=std, position=position, segment=segment, dropout=dropout), rows
    moment = 1.0 if input_second_moment is None else input_second_moment
    _check_positive("input_second_moment", moment)
    return _unit_patches(stem, dropout, moment, input_fan_in)


def unit_head(head: Head, stem: Stem, *, d_model: int) -> tuple[Head, tuple[EndRow, ...]]:
    """Return the head whose outputs have second moment one behind its norm, and its table.

    Args:
        head: Whether it is tied, and what it pools; pooling lowers the second moment to the tokens' mean overlap.
        stem: The scaled stem, whose token table a tied head shares.
        d_model: Width of the stream.
    """
    if head.tied:
        assert isinstance(stem, TokenStem)
        token = float(stem.token)
        factor = 1 / (math.sqrt(d_model) * token)
        row = EndRow("head", token, token, factor, "the token table behind a factor 1 / sqrt(d s_e)")
        return replace(head, multiplier=factor), (row,)
    row = EndRow("head", d_model**-0.5, 1.0, 1.0, "var 1/d")
    return replace(head, scale=1.0, multiplier=1.0), (row,)


def unit_front_end(second_moment: float, *, dropout: float = 0.0, position: bool = False) -> tuple[EndRow, ...]:
    """Return how to start the stream at second moment one behind a front end of its own, as of speech models.

    Its output is multiplied by one number; a position table may be added.

    Args:
        second_moment: Mean square per coordinate of the front end's output, measured on data.
        dropout: Rate of the dropout on the sum.
        position: Whether there is a position table.
    Raises:
        DomainError: for a second moment that is not positive, or a rate outside ``[0, 1)``.

    >>> [round(row.multiplier, 3) for row in unit_front_end(4.0, dropout=0.19)]
    [0.45]
    """
    _check_positive("second_moment", second_moment)
    _check_rate(dropout)
    std = math.sqrt((1 - dropout) / (1 + position))
    factor = std / math.sqrt(second_moment)
    front = EndRow("front_end", None, factor, factor, "its output times sqrt((1-p) / (n_e m)), m its second moment")
    return (front, EndRow("position_embedding", std, std, 1.0, "var (1-p)/n_e")) if position else (front,)


def _unit_patches(
    stem: PatchStem, dropout: float, second_moment: float, fan_in: int | None
) -> tuple[PatchStem, tuple[EndRow, ...]]:
    if fan_in is not None and fan_in < 1:
        raise DomainError(f"input_fan_in must be at least 1; got {fan_in!r}", value=fan_in)
    positions = bool(np.any(stem.position))
    std = math.sqrt((1 - dropout) / (1 + positions))
    scale = std / math.sqrt(second_moment)
    patch_std = None if fan_in is None else scale / math.sqrt(fan_in)
    rows = [EndRow("patch_embedding", patch_std, scale, 1.0, "var (1-p) / (n_e fan_in m), m of the inputs")]
    if positions:
        rows.append(EndRow("position_embedding", std, std, 1.0, "var (1-p)/n_e"))
    if stem.class_token is not None:
        rows.append(EndRow("class_token", std, std, 1.0, "var (1-p)/n_e, in place of a patch"))
    scaled = replace(
        stem,
        patch=scale,
        position=std if positions else stem.position,
        class_token=None if stem.class_token is None else std,
        dropout=dropout,
    )
    return scaled, tuple(rows)


def _check_rate(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise DomainError(f"dropout must lie in [0, 1); got {dropout!r}", value=dropout)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise DomainError(f"{name} must be positive and finite; got {value!r}", value=value)
