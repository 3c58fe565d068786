r"""From what a network is given to the Gram matrix of its tokens at the first block.

A stem adds rows of independent tables, or linear maps of patches. Each contributes the overlap of its inputs times its
variance,

.. math:: G_{ab} = \sigma_{\rm token}^2 [\mathrm{id}_a = \mathrm{id}_b] + \sigma_{\rm position}^2 [t_a = t_b]
          + \dots, \qquad
          G_{ab} = \sigma_{\rm patch}^2\, \frac{x_a \cdot x_b}{n_{\rm patch}} + \sigma_{\rm position}^2 [t_a = t_b] .

The overlaps alone are the tangent kernels of the tables, at learning rates over fan-in. Rows of one table are shared
by all samples: two tokens at one position overlap across samples.

Source: E. Dinan, S. Yaida, S. Zhang, arXiv:2304.02034v1, Eqs. 1.40-1.45 and 1.122-1.131; segments, class token and
biases derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathometer.errors import BatchError
from fathometer.propagation.gram import check_gram
from fathometer.spec import PatchStem, Stem, TokenStem

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StemGram:
    """Tokens of all samples at the first block; token t of sample s is number ``s * n_tokens + t``.

    Attributes:
        gram: Gram matrix per coordinate, shape ``(n_samples * n_tokens,) * 2``.
        overlaps: By parameter role, what the tokens share of that parameter's inputs; same shape. Parameters that the
            stem need not have (biases, a position table of zeros) are included: they matter once they are trained.
        n_samples: Number of samples.
        n_tokens: Tokens of one sample.
    """

    gram: FloatArray
    overlaps: Mapping[str, FloatArray]
    n_samples: int
    n_tokens: int


def stem_gram(
    stem: Stem,
    *,
    tokens: Any | None = None,
    patches: Any | None = None,
    patch_gram: Any | None = None,
    positions: Any | None = None,
    segments: Any | None = None,
) -> StemGram:
    """Return the Gram matrix of the tokens a stem makes, in evaluation mode.

    Args:
        stem: The stem, with scalar fields.
        tokens: For a :class:`TokenStem`: vocabulary indices, shape ``(n_samples, n_tokens)`` or ``(n_tokens,)``.
        patches: For a :class:`PatchStem`: patch vectors, shape ``(n_samples, n_patches, fan_in)`` or without samples.
        patch_gram: In place of ``patches``: their overlaps ``x_a . x_b / fan_in``, shape
            ``(n_samples, n_patches, n_samples, n_patches)`` or ``(n_patches, n_patches)``.
        positions: Rows of the position table, shape ``(n_samples, n_tokens)`` or ``(n_tokens,)``, a class token first;
            by default 0, 1, 2, ...
        segments: Rows of the segment table, alike; by default all tokens are of one segment.
    Returns:
        The Gram matrix and what it is made of. Cost: O((n_samples n_tokens)^2), and the products of patches.
    Raises:
        BatchError: if the stem is given too little, too much, or arrays that do not fit.
        DomainError: if some token is a vector of zeros.
    """
    if isinstance(stem, TokenStem):
        if tokens is None or patches is not None or patch_gram is not None:
            raise BatchError("a TokenStem takes `tokens`, and neither `patches` nor `patch_gram`")
        ids = _indices("tokens", tokens)
        samples, length = ids.shape
        overlaps = {"token_embedding": _same(ids)}
        variances = {"token_embedding": stem.token, "position_embedding": stem.position}
        if stem.segment or segments is not None:
            rows = np.zeros(ids.shape, dtype=np.int64) if segments is None else _rows("segments", segments, ids.shape)
            overlaps["segment_embedding"] = _same(rows)
            variances["segment_embedding"] = stem.segment
    else:
        if tokens is not None or segments is not None or (patches is None) == (patch_gram is None):
            raise BatchError("a PatchStem takes either `patches` or `patch_gram`, and neither `tokens` nor `segments`")
        seen = _patch_overlaps(patches) if patch_gram is None else _given_overlaps(patch_gram)
        overlaps, variances, samples, length = _patch_parts(stem, seen)
    where = np.arange(length) if positions is None else positions
    overlaps["position_embedding"] = _same(_rows("positions", where, (samples, length)))
    gram = sum((variances[role] ** 2 * overlaps[role] for role in variances), np.zeros((samples * length,) * 2))
    return StemGram(gram=check_gram(gram), overlaps=overlaps, n_samples=samples, n_tokens=length)


def _patch_parts(stem: PatchStem, seen: FloatArray) -> tuple[dict[str, FloatArray], dict[str, Any], int, int]:
    """Return overlaps and deviations by role, the number of samples and the tokens of one."""
    samples, n_patches = seen.shape[:2]
    extra = 0 if stem.class_token is None else 1
    length = n_patches + extra

    def placed(block: Any) -> FloatArray:
        whole = np.zeros((samples, length, samples, length))
        whole[:, extra:, :, extra:] = block
        return whole.reshape(samples * length, samples * length)

    overlaps = {"patch_embedding": placed(seen), "patch_embedding_bias": placed(1.0)}
    variances: dict[str, Any] = {"patch_embedding": stem.patch, "position_embedding": stem.position}
    if stem.class_token is not None:
        whole = np.zeros((samples, length, samples, length))
        whole[:, 0, :, 0] = 1.0
        overlaps["class_token"] = whole.reshape(samples * length, samples * length)
        variances["class_token"] = stem.class_token
    return overlaps, variances, samples, length


def _patch_overlaps(patches: Any) -> FloatArray:
    array = np.asarray(patches, dtype=np.float64)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.size == 0:
        raise BatchError(f"`patches` must have shape (n_samples, n_patches, fan_in); got {np.shape(patches)}")
    if not np.all(np.isfinite(array)):
        raise BatchError("`patches` must be finite")
    return np.asarray(np.einsum("sti,rui->stru", array, array) / array.shape[-1])


def _given_overlaps(patch_gram: Any) -> FloatArray:
    array = np.asarray(patch_gram, dtype=np.float64)
    if array.ndim == 2:
        array = array[None, :, None, :]
    if array.ndim != 4 or array.shape[:2] != array.shape[2:] or array.size == 0:
        raise BatchError(
            "`patch_gram` must have shape (n_samples, n_patches, n_samples, n_patches) or (n_patches, n_patches); "
            f"got {np.shape(patch_gram)}"
        )
    if not np.all(np.isfinite(array)):
        raise BatchError("`patch_gram` must be finite")
    return array


def _indices(name: str, values: Any) -> IntArray:
    array = np.asarray(values)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise BatchError(
            f"`{name}` must be integers of shape (n_samples, n_tokens); got shape {np.shape(values)} of {array.dtype}"
        )
    if np.any(array < 0):
        raise BatchError(f"`{name}` are rows of a table and cannot be negative; got {int(array.min())}")
    return array.astype(np.int64)


def _rows(name: str, values: Any, shape: tuple[int, ...]) -> IntArray:
    array = _indices(name, values)
    if array.shape not in (shape, (1, shape[1])):
        raise BatchError(f"`{name}` must have shape {shape} or {shape[1:]}; got {np.shape(values)}")
    return np.broadcast_to(array, shape)


def _same(rows: IntArray) -> FloatArray:
    flat = rows.ravel()
    return np.asarray(flat[:, None] == flat[None, :], dtype=np.float64)
