r"""The moments of tokens in front of the first block, from how often two tokens share a row of a table.

A sum of table rows with independent entries of variance :math:`s_t^2`, then dropout at rate :math:`\delta`, has

.. math:: q = \frac{\sum_t s_t^2}{1 - \delta}, \qquad p = \sum_t s_t^2 P_t,

with :math:`P_t` the probability that two tokens of a sequence share the row: :math:`\sum_i f_i^2` for words of
frequencies f, zero for positions, 2/3 for two segments with a uniformly placed border.

Source: A. Kedia et al., arXiv:2403.09635.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fathometer.errors import DomainError, SpecError
from fathometer.observables.components.state import TokenState
from fathometer.spec import PatchStem, Stem, TokenStem

#: Of two segments whose border is uniform over the sequence.
SEGMENT_OVERLAP = 2 / 3
_LARGEST_VOCABULARY = 100_000_000


def zipf_overlap(vocabulary: int, exponent: float = 1.0, *, published: bool = False) -> float:
    r"""Return the probability that two words are equal under Zipf's law.

    .. math:: \sum_i f_i^2 = \frac{\sum_{i \le V} i^{-2s}}{\left(\sum_{i \le V} i^{-s}\right)^2}
              \simeq \frac{\pi^2/6}{(\ln V + \gamma)^2} \quad (s = 1)

    Args:
        vocabulary: Number of words V, at least 2.
        exponent: The s.
        published: Return the published ``(pi^2/6)/(ln V)^2`` instead, which leaves out Euler's constant and is 12 %
            high at 30 000 words; for exponent one.
    Raises:
        DomainError: for a vocabulary below 2, whose tokens would all be equal.
        SpecError: for the published form at another exponent.

    >>> round(zipf_overlap(30522) / 3 + 2 / 9, 4)
    0.2268
    """
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, (int, np.integer)) or vocabulary < 2:
        raise DomainError(
            f"vocabulary must be an integer >= 2, or all tokens are equal, correlation 1; got {vocabulary!r}",
            value=vocabulary,
        )
    if vocabulary > _LARGEST_VOCABULARY:
        raise DomainError(f"vocabulary must be at most {_LARGEST_VOCABULARY}; got {vocabulary}", value=vocabulary)
    if not (np.isfinite(exponent) and exponent >= 0):
        raise DomainError(f"exponent must be finite and >= 0; got {exponent:g}", value=exponent)
    if published:
        if exponent != 1.0:
            raise SpecError(f"the published overlap is that of exponent 1; got {exponent:g}")
        return float(np.pi**2 / 6 / np.log(vocabulary) ** 2)
    weights = np.arange(1.0, vocabulary + 1) ** -exponent
    return float(np.sum(weights**2) / np.sum(weights) ** 2)


def corpus_overlap(tokens: Any) -> float:
    """Return the fraction of equal pairs of tokens within sequences.

    Args:
        tokens: Token numbers of shape ``(n_sequences, n_tokens)`` or ``(n_tokens,)``, or sequences of any lengths.
            Cost: one sort of all tokens.
    Raises:
        DomainError: if there is no pair, or all tokens are one and the same, whose correlation would be 1.

    >>> corpus_overlap([[1, 2, 1], [3, 3]])
    0.5
    """
    sequences = _sequences(tokens)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    pairs = int(np.sum(lengths * (lengths - 1)))
    if pairs == 0:
        raise DomainError("a corpus needs a sequence of at least two tokens to compare", value=tokens)
    words, numbered = np.unique(np.concatenate(sequences), return_inverse=True)
    if len(words) < 2:
        raise DomainError(
            f"every token of the corpus is {words[0]}, so that the correlation of two tokens would be 1; "
            "give text with at least two distinct tokens",
            value=words[0],
        )
    owner = np.repeat(np.arange(len(sequences)), lengths)
    _, counts = np.unique(owner * len(words) + numbered.reshape(-1), return_counts=True)
    return float(np.sum(counts * (counts - 1)) / pairs)


def count_overlap(counts: Any) -> float:
    """Return the probability that two different places of a text hold the same word, from the words' counts.

    Args:
        counts: How often each word occurs, integers >= 0.
    Raises:
        DomainError: for counts that are no counts, or fewer than two words that occur.
    """
    array = np.asarray(counts, dtype=np.float64).reshape(-1)
    if not np.all(np.isfinite(array) & (array >= 0) & (array == np.floor(array))):
        raise DomainError("counts must be integers >= 0", value=counts)
    if np.count_nonzero(array) < 2:
        raise DomainError("fewer than two words occur, so that the correlation of two tokens would be 1", value=counts)
    total = array.sum()
    return float(np.sum(array * (array - 1)) / (total * (total - 1)))


def stem_state(
    stem: Stem,
    *,
    token_overlap: float | None = None,
    segment_overlap: float = SEGMENT_OVERLAP,
    patches: TokenState | None = None,
    n_tokens: int | None = None,
) -> TokenState:
    """Return the moments of the tokens a stem makes.

    Args:
        stem: The stem.
        token_overlap: Probability that two tokens of a sequence are equal, for a :class:`~fathometer.spec.TokenStem`:
            :func:`zipf_overlap`, :func:`corpus_overlap` or :func:`count_overlap`.
        segment_overlap: Probability that they belong to the same segment, 1 where there is one.
        patches: Raw moments of the inputs of a :class:`~fathometer.spec.PatchStem` (pixels, spectrogram bins), not
            centred, measured on data.
        n_tokens: Number of tokens with the class token; needed if there is one. Moments are then averages over all
            tokens and their pairs.
    Returns:
        The state; its ``cosine`` is the input correlation.
    Raises:
        SpecError: if a number the stem needs is missing.
        DomainError: for overlaps that are no probabilities, or tokens that are all equal.
    """
    keep = 1 - stem.dropout
    if isinstance(stem, TokenStem):
        if token_overlap is None:
            raise SpecError("a TokenStem needs token_overlap; zipf_overlap and corpus_overlap compute it")
        if not 0 <= token_overlap < 1:
            raise DomainError(f"token_overlap must lie in [0, 1); got {token_overlap:g}", value=token_overlap)
        if not 0 <= segment_overlap <= 1:
            raise DomainError(f"segment_overlap must lie in [0, 1]; got {segment_overlap:g}", value=segment_overlap)
        token, segment = stem.token**2, stem.segment**2
        q = (token + stem.position**2 + segment) / keep
        return TokenState(q=q, p=token * token_overlap + segment * segment_overlap)
    if patches is None:
        raise SpecError("a PatchStem needs the moments of its patches")
    return _patch_state(stem, patches, n_tokens)


def _patch_state(stem: PatchStem, patches: TokenState, n_tokens: int | None) -> TokenState:
    q, p = stem.patch**2 * patches.q, stem.patch**2 * patches.p
    if stem.class_token is not None:
        if n_tokens is None or n_tokens < 2:
            raise SpecError(f"a PatchStem with a class token needs n_tokens >= 2; got {n_tokens!r}")
        q = q + (stem.class_token**2 - q) / n_tokens
        p = p * (n_tokens - 2) / n_tokens
    return TokenState(q=(q + stem.position**2) / (1 - stem.dropout), p=p)


def _sequences(tokens: Any) -> list[Any]:
    rows = tokens if isinstance(tokens, Iterable) and not isinstance(tokens, (str, bytes)) else [tokens]
    rows = list(rows)
    if rows and np.ndim(rows[0]) == 0:
        rows = [rows]
    arrays = [np.asarray(row).reshape(-1) for row in rows]
    if not arrays or any(row.size and row.dtype.kind not in "iu" for row in arrays):
        raise DomainError("tokens must be integers: token numbers, one row a sequence", value=None)
    return [row.astype(np.int64) for row in arrays]
