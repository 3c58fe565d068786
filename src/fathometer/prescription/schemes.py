r"""Initialisation schemes as tables: what each sets, layer by layer, and what the theory says of the result.

A scheme maps a :class:`~fathometer.spec.Transformer` to the same architecture with the scheme's weight scales and
residual factors. Norms keep their place and gains, scores their multiplier; biases become zero. Embeddings and heads
are no part of a spec; where a scheme sets them its notes say so.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fathometer.attention import DEFAULT_CLOSURE
from fathometer.errors import DomainError, SpecError, nearest
from fathometer.kernels import activation_kernel, norm_kernel
from fathometer.observables import backward
from fathometer.propagation import Moments, check_moments, check_tokens, propagate_gram
from fathometer.propagation.exchangeable import AttentionMap, HalfLayer, Record
from fathometer.spec import MLP, Block, GatedMLP, SelfAttention, Sublayer, Transformer, array_fields

FloatArray = NDArray[np.float64]

COUNTS = ("layers", "blocks")

_BIASES = ("value_bias", "output_bias", "in_bias", "out_bias")
_HOMOGENEOUS = ("relu", "identity")  # f(a x) = a f(x), so both matrices of the MLP may share one deviation
_OVERFLOW = 1e150


class Row(NamedTuple):
    """One weight matrix of a plan: where it is, its standard deviation and ``scale = std * sqrt(fan_in)``, and why."""

    layer: int
    sublayer: int
    role: str
    std: float
    scale: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SchemePlan:
    """What a scheme sets in one architecture.

    Attributes:
        name: Of the scheme.
        spec: The architecture with the scheme's scales and residual factors.
        rows: One for each weight matrix, in order of depth.
        residual: The factors on skip and branch of every sublayer, in order of depth.
        notes: Choices, limits, and what else the scheme asks for.
    """

    name: str
    spec: Transformer
    rows: tuple[Row, ...]
    residual: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, without the spec."""
        return {
            "schema": 1,
            "scheme": self.name,
            "rows": [row._asdict() for row in self.rows],
            "residual": [{"skip_scale": skip, "branch_scale": branch} for skip, branch in self.residual],
            "notes": list(self.notes),
        }


class _Setting(NamedTuple):
    """What a scheme does to one sublayer: standard deviations by role, residual factors, and the formula."""

    stds: Mapping[str, float]
    reason: str
    skip: float = 1.0
    branch: float = 1.0


_Rule = Callable[[int, Sublayer], _Setting]


def apply_scheme(spec: Transformer, name: str, **options: Any) -> SchemePlan:
    """Return what the scheme ``name`` sets in the architecture of ``spec``.

    Args:
        spec: The architecture, with single numbers in every field. Its own weight scales are ignored.
        name: One of :data:`SCHEMES`.
        options: Those of the scheme, see its function and :func:`scheme_options`.
    Raises:
        SpecError: for an unknown scheme or option (the nearest one is suggested), a missing option, arrays in the
            spec, or an architecture the scheme is not defined on.
        DomainError: for an option outside its range.

    >>> from fathometer.spec import preset
    >>> plan = apply_scheme(preset("vit"), "deepscalelm", r0=0.3, n_tokens=196)
    >>> [(row.role, round(row.scale, 3)) for row in plan.rows[:3]]
    [('query', 1.0), ('key', 1.0), ('value', 1.343)]
    """
    known = scheme_options(name)
    for option in options:
        if option not in known:
            raise SpecError(
                f"the scheme {name!r} has no option {option!r}{nearest(option, known) if known else '; it has none'}"
            )
    missing = [option for option, required in known.items() if required and option not in options]
    if missing:
        raise SpecError(f"the scheme {name!r} needs {' and '.join(missing)}")
    for where, array in array_fields(spec):
        raise SpecError(f"a scheme needs single numbers; {where} is an array of shape {array.shape}")
    return SCHEMES[name](spec, **options)


def scheme_options(name: str) -> dict[str, bool]:
    """Return the options of a scheme, and whether each must be given."""
    if name not in SCHEMES:
        raise SpecError(f"there is no scheme {name!r}{nearest(name, SCHEMES)}")
    parameters = list(inspect.signature(SCHEMES[name]).parameters.values())[1:]
    return {parameter.name: parameter.default is parameter.empty for parameter in parameters}


def deepscalelm(
    spec: Transformer,
    *,
    r0: float,
    n_tokens: int | None = None,
    k: float = 2.0,
    alpha: float = 1.0,
    count: str = "layers",
    dropout: float = 0.0,
    reference: bool = False,
) -> SchemePlan:
    r"""Let every branch add unit second moment to a stream of unit second moment.

    .. math:: x \leftarrow \lambda x + \beta\,\mathrm{drop}(B(x)), \quad \lambda^2 = 1 - \beta^2, \quad
              \beta^2 = k / N^\alpha, \qquad
              \mathrm{var}\,W_{V,O} = \frac1d \sqrt{\frac{1 - p}{a_v}}

    with the dropout rate p and the second moment a_v of attention with unit value and output scales. Queries and keys
    have scale one. A ReLU MLP has equal deviations in both matrices, ``var W = sqrt(2 (1-p) / (d d_mlp))``; of any
    other, the first matrix (and a gate) has scale one and the second brings its output to ``1 - p``.

    By default a_v is computed by the recursion of this library with exact softmax averages, at the cosine of the
    tokens in front of each attention, for any activation and norm. ``reference`` uses the published leading order
    instead: ``a_v = r`` with ``r <- lambda^2 r + beta^2 (1-p)`` at attention and ``r <- lambda^2 r + beta^2 (1-p)
    kappa_1(r)`` at the MLP, and ``var W = (1/d) sqrt((1-p)/2)``, meant for a ReLU MLP of ratio four.

    Source: A. Kedia et al., Transformers Get Stable, arXiv:2403.09635. What N counts is not settled: the published
    text is read as layers, the default of the published code as blocks; the default here is a choice. The rule for
    activations other than ReLU, for gated MLPs and for causal masks is derived here.

    Args:
        spec: The architecture.
        r0: Cosine of two tokens' embeddings, before dropout, which lowers it by ``1 - dropout``.
        n_tokens: Number of tokens; needed unless ``reference``.
        k, alpha: Of beta.
        count: Whether N is the number of ``"layers"`` or of ``"blocks"``, that is of sublayers.
        dropout: Rate, on what each branch adds.
        reference: Whether to use the published recurrence.
    Raises:
        DomainError: for an option outside its range, or attention whose output vanishes.
        SpecError: for an unknown ``count``, a missing ``n_tokens``, or a gated MLP under ``reference``.
    """
    beta_squared = _branch_share(spec, k, alpha, count)
    _check_unit("dropout", dropout, open_end=True)
    _check_unit("r0", r0)
    if reference:
        rule = _reference_rule(spec, r0, beta_squared, dropout)
    elif n_tokens is None:
        raise SpecError("the scheme 'deepscalelm' needs n_tokens, unless reference=True")
    else:
        rule = _refined_rule(spec, r0, n_tokens, beta_squared, dropout)
    notes = [*_stability_notes(spec, beta_squared, k, count), *_stream_notes(spec, dropout)]
    if reference:
        notes.append(
            "Published leading order: a_v = r. It loses what attention to single tokens adds, (1-r) E sum A^2."
        )
        if any(
            isinstance(s.branch, MLP) and (s.branch.activation, s.branch.ratio) != ("relu", 4.0) for s in _all(spec)
        ):
            notes.append("The published MLP variance is meant for ReLU and ratio 4; here the MLP is not of unit gain.")
    elif spec.is_causal:
        notes.append(
            "Causal attention: second moments are averaged over positions, tokens taken as alike (derived here)."
        )
    return _plan("deepscalelm", spec, rule, notes)


def deepscalelm_simple(
    spec: Transformer, *, k: float = 2.0, alpha: float = 1.0, count: str = "layers", dropout: float = 0.0
) -> SchemePlan:
    r"""Use one variance, ``(1/d) sqrt((1-p)/2)``, for values, outputs and the MLP, and DeepScaleLM's residual factors.

    Queries and keys have variance ``1/d``. The stream settles below one, at a depth-independent level.

    Source: the simplified form of A. Kedia et al., arXiv:2403.09635, as re-implemented by others; not checked against
    the paper. A gate matrix gets the same variance, which is a choice.

    Args:
        spec, k, alpha, count, dropout: As in :func:`deepscalelm`.
    """
    beta_squared = _branch_share(spec, k, alpha, count)
    _check_unit("dropout", dropout, open_end=True)
    std = math.sqrt(math.sqrt((1 - dropout) / 2) / spec.d_model)
    factors = _factors(beta_squared)

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        stds = dict.fromkeys(sublayer.branch.scale_names, std)
        if sublayer.is_attention:
            stds |= dict.fromkeys(("query", "key"), spec.d_model**-0.5)
        return _Setting(stds, "var (1/d) sqrt((1-p)/2); queries and keys 1/d", *factors)

    notes = [*_stability_notes(spec, beta_squared, k, count), "Branches do not add unit second moments."]
    return _plan("deepscalelm-simple", spec, rule, notes)


def xavier(spec: Transformer) -> SchemePlan:
    """Give every matrix ``std = sqrt(2 / (fan_in + fan_out))``, with plain residual connections.

    Source: X. Glorot and Y. Bengio, 2010. Fans are those of whole matrices; some codes count one head, a choice.
    """
    return _plan("xavier", spec, lambda layer, s: _Setting(_glorot(spec, s), "sqrt(2 / (fan_in + fan_out))"), [])


def gpt2(spec: Transformer, *, std: float = 0.02) -> SchemePlan:
    """Give every matrix the same ``std`` and divide those that write to the stream by ``sqrt(2 n_layers)``.

    Source: A. Radford et al., Language Models are Unsupervised Multitask Learners, 2019; Megatron-LM (M. Shoeybi et
    al., arXiv:1909.08053) does the same. Where a layer has other than two sublayers their number replaces
    ``2 n_layers``, a choice.

    Args:
        spec: The architecture.
        std: Of all matrices that do not write to the stream.
    """
    return _fixed_std("gpt2", spec, std)


def megatron(spec: Transformer, *, std: float = 0.02) -> SchemePlan:
    """Do what :func:`gpt2` does; Megatron-LM (M. Shoeybi et al., arXiv:1909.08053) leaves ``std`` to the user."""
    return _fixed_std("megatron", spec, std)


def ds_init(spec: Transformer, *, alpha: float = 1.0) -> SchemePlan:
    """Scale Xavier weights of layer l (from one) by ``alpha / sqrt(l)``, with plain residual connections.

    Source: B. Zhang, I. Titov and R. Sennrich, arXiv:1908.11365, written from memory. The paper draws from a uniform
    distribution of this variance; it scales all matrices of a layer, queries and keys included.

    Args:
        spec: The architecture; meant for post-norm.
        alpha: In ``(0, 1]``.
    """
    if not 0 < alpha <= 1:
        raise DomainError(f"alpha must lie in (0, 1]; got {alpha!r}", value=alpha)

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        factor = alpha / math.sqrt(layer + 1)
        stds = {role: factor * std for role, std in _glorot(spec, sublayer).items()}
        return _Setting(stds, "Xavier times alpha / sqrt(layer + 1)")

    return _plan("ds-init", spec, rule, ["Written for post-norm; a uniform distribution of this variance."])


def deepnorm(spec: Transformer) -> SchemePlan:
    r"""Strengthen the skip and weaken the branch of post-norm stacks by powers of the number of layers N.

    .. math:: x \leftarrow \mathrm{LN}(\alpha x + B(x)), \qquad \alpha = (2N)^{1/4}, \quad \beta = (8N)^{-1/4}

    Xavier weights; those of values, outputs and the MLP are multiplied by beta. Encoder-only and decoder-only models
    have the same constants.

    Source: H. Wang et al., DeepNet, arXiv:2203.00555. That a gate is multiplied too is a choice.

    Raises:
        SpecError: unless a norm follows every residual sum.
    """
    if any(sublayer.stream_norm is None for sublayer in _all(spec)):
        raise SpecError("the scheme 'deepnorm' is defined on post-norm stacks: a norm after every residual sum")
    skip, gain = (2 * spec.n_layers) ** 0.25, (8 * spec.n_layers) ** -0.25

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        stds = {role: std if role in ("query", "key") else gain * std for role, std in _glorot(spec, sublayer).items()}
        return _Setting(stds, "Xavier; values, outputs and MLP times (8 N)^(-1/4)", skip)

    return _plan("deepnorm", spec, rule, [f"alpha = {skip:.5g}, beta = {gain:.5g}."])


def skipinit(spec: Transformer) -> SchemePlan:
    """Multiply each branch by a trained scalar that starts at zero.

    Source: S. De and S. L. Smith, arXiv:2002.10444, for networks without normalisation. Norms of the spec are kept,
    and weights are Xavier; both are choices.
    """
    return _silent_branches("skipinit", spec)


def rezero(spec: Transformer) -> SchemePlan:
    """Multiply each branch by a trained scalar that starts at zero, in place of a norm.

    Source: T. Bachlechner et al., arXiv:2003.04887. Norms of the spec are kept, and weights are Xavier; both are
    choices.
    """
    return _silent_branches("rezero", spec)


def fixup(spec: Transformer) -> SchemePlan:
    """Start the last matrix of each branch at zero and scale the others by ``M^(-1/(2m-2))``.

    M is the number of branches and m the number of matrices multiplied along a branch: two, or three of a gated MLP.

    Source: H. Zhang, Y. N. Dauphin and T. Ma, arXiv:1901.09321, for residual networks without normalisation. Choices:
    base weights He for the MLP and Xavier for attention, queries and keys unscaled, m = 3 for a gated MLP. The paper's
    scalar biases and multipliers start at zero and one.

    Raises:
        SpecError: if the spec has norms.
    """
    _refuse_norms("fixup", spec)
    branches = sum(len(block.sublayers) * block.repeat for block in spec.blocks)

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        if sublayer.is_attention:
            stds = _glorot(spec, sublayer)
            return _Setting(
                stds | {"value": stds["value"] * branches**-0.5, "output": 0.0}, "Xavier; value M^(-1/2), output 0"
            )
        m = len(sublayer.branch.scale_names)
        std = math.sqrt(2 / spec.d_model) * branches ** (-1 / (2 * m - 2))
        return _Setting(
            dict.fromkeys(sublayer.branch.scale_names, std) | {"mlp_out": 0.0}, "He times M^(-1/(2m-2)); last matrix 0"
        )

    notes = [
        "Branches are zero at initialisation: at the first step only their last matrices receive gradients.",
        "Choices: He and Xavier bases, queries and keys unscaled, m = 3 for a gated MLP.",
    ]
    return _plan("fixup", spec, rule, notes)


def t_fixup(spec: Transformer) -> SchemePlan:
    """Scale Xavier weights of values, outputs and the MLP: ``0.67 N^(-1/4)`` in encoders, ``(9N)^(-1/4)`` in decoders.

    Source: X. S. Huang et al., Improving Transformer Optimization Through Better Initialization, ICML 2020. The paper
    has encoder-decoder models; here a causal spec counts as a decoder and any other as an encoder, and a gate is
    scaled too. These are choices.

    Raises:
        SpecError: if the spec has norms.
    """
    _refuse_norms("t-fixup", spec)
    layers = spec.n_layers
    factor, formula = (
        ((9 * layers) ** -0.25, "(9 N)^(-1/4)") if spec.is_causal else (0.67 * layers**-0.25, "0.67 N^(-1/4)")
    )

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        stds = {
            role: std if role in ("query", "key") else factor * std for role, std in _glorot(spec, sublayer).items()
        }
        return _Setting(stds, f"Xavier; values, outputs and MLP times {formula}")

    return _plan(
        "t-fixup", spec, rule, [f"Embeddings: std d_model^(-1/2) times (9 N)^(-1/4) = {(9 * layers) ** -0.25:.5g}."]
    )


#: Every scheme by name.
SCHEMES: dict[str, Callable[..., SchemePlan]] = {
    "deepscalelm": deepscalelm,
    "deepscalelm-simple": deepscalelm_simple,
    "xavier": xavier,
    "gpt2": gpt2,
    "megatron": megatron,
    "ds-init": ds_init,
    "deepnorm": deepnorm,
    "skipinit": skipinit,
    "rezero": rezero,
    "fixup": fixup,
    "t-fixup": t_fixup,
}


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """What the theory says of one scheme; numbers are NaN unless ``status`` is ``"ok"``.

    Attributes:
        scheme: Its name.
        status: ``"ok"``, ``"undefined"`` (on this architecture, see ``reason``) or ``"overflow"`` (of the stream).
        reason: Why there are no numbers.
        q_final: Second moment of the stream after the last residual sum, in front of a norm there.
        q_spread: Largest over smallest such second moment, of the input too unless norms follow the sums.
        apjn_log: ``ln J^{L,0}``, natural log of the averaged partial Jacobian norm.
        gradient_log: Log gradient amplification of a mean-pooled loss, from the output to the input.
        cosine_final: Cosine of two tokens at the output.
        largest_step: Largest ``|change of ln q|`` or ``|change of ln J|`` over one layer, q as above.
    """

    scheme: str
    status: str = "ok"
    reason: str = ""
    q_final: float = math.nan
    q_spread: float = math.nan
    apjn_log: float = math.nan
    gradient_log: float = math.nan
    cosine_final: float = math.nan
    largest_step: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Schemes side by side on one architecture, in the order asked for, and the tokens they were given."""

    rows: tuple[ComparisonRow, ...]
    n_tokens: int
    q: float
    p: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that do not exist become ``None``."""
        rows = [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
            for row in self.rows
        ]
        return {"schema": 1, "n_tokens": self.n_tokens, "q": self.q, "p": self.p, "rows": rows}


def compare_schemes(
    spec: Transformer,
    names: Sequence[str] | None = None,
    *,
    n_tokens: int,
    p: float,
    q: float = 1.0,
    **options: Any,
) -> Comparison:
    """Predict one architecture under several schemes.

    Args:
        spec: The architecture.
        names: Schemes, all of :data:`SCHEMES` by default.
        n_tokens: Number of tokens.
        p: Mean overlap of two tokens at the first block.
        q: Mean square per coordinate there.
        options: Given to every scheme that has them; ``r0`` is ``p / q`` unless given. Predictions are without
            dropout.
    Returns:
        One row a scheme. Cost at 1000 layers: 0.2 s a scheme, or that of full Gram matrices for a causal spec.
    Raises:
        SpecError, DomainError: for an unknown scheme, an option none of them has, or moments no tokens can have. A
            scheme that is not defined on this architecture is a row that says so.
    """
    start = check_moments(n_tokens, q, p)
    if np.ndim(start.q):
        raise DomainError("compare_schemes takes single numbers q and p", value=np.shape(start.q))
    chosen = list(SCHEMES) if names is None else list(names)
    accepted = {name: scheme_options(name) for name in chosen}
    known = {option for table in accepted.values() for option in table}
    for option in options:
        if option not in known:
            raise SpecError(f"none of these schemes has an option {option!r}{nearest(option, known)}")
    for where, array in array_fields(spec):
        raise SpecError(f"a scheme needs single numbers; {where} is an array of shape {array.shape}")
    given = {"r0": max(p / q, 0.0), "n_tokens": n_tokens, **options}
    rows = []
    for name in chosen:
        try:
            plan = apply_scheme(spec, name, **{key: given[key] for key in given if key in accepted[name]})
        except (SpecError, DomainError) as error:
            rows.append(ComparisonRow(scheme=name, status="undefined", reason=str(error)))
        else:
            rows.append(_predicted(plan, spec, n_tokens, Moments(float(q), float(p))))
    return Comparison(rows=tuple(rows), n_tokens=n_tokens, q=float(q), p=float(p))


def _predicted(plan: SchemePlan, spec: Transformer, n_tokens: int, start: Moments) -> ComparisonRow:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            curves = (_causal_curves if spec.is_causal else _curves)(plan.spec, spec, n_tokens, start)
    except OverflowError as error:
        return ComparisonRow(scheme=plan.name, status="overflow", reason=str(error))
    ends = np.cumsum([len(block.sublayers) for block in spec.layers()])
    borders = np.concatenate([[0], ends])
    counted = spec.blocks[0].sublayers[0].stream_norm is None  # else the input is no sum in front of a norm
    sums = np.concatenate([[start.q], curves.sums]) if counted else curves.sums
    sums_log = np.log(sums[borders if counted else ends - 1])
    steps = np.concatenate([np.diff(sums_log), np.diff(curves.apjn_log[borders])])
    return ComparisonRow(
        scheme=plan.name,
        q_final=float(sums[-1]),
        q_spread=float(sums.max() / sums.min()),
        apjn_log=float(curves.apjn_log[0]),
        gradient_log=float(curves.gradient_log),
        cosine_final=float(curves.cosine),
        largest_step=float(np.max(np.abs(steps))),
    )


class _Curves(NamedTuple):
    """Second moments after each residual sum, ln J at every border, and what a pooled loss and two tokens see."""

    sums: FloatArray
    apjn_log: FloatArray
    gradient_log: float
    cosine: float


def _curves(planned: Transformer, spec: Transformer, n_tokens: int, stream: Moments) -> _Curves:
    """Propagate a plan; transfer matrices of all layers that share an architecture are built in one call."""
    records: list[Record] = []
    sublayers: list[Sublayer] = []
    for block in planned.blocks:
        steps = [HalfLayer(sublayer, n_tokens, DEFAULT_CLOSURE) for sublayer in block.sublayers]
        for _ in range(block.repeat):
            for step in steps:
                stream, _, record = step.forward(stream)
                if not record.residual.q < _OVERFLOW:
                    raise OverflowError(f"the stream overflows at sublayer {len(records)}")
                records.append(record)
                sublayers.append(step.sublayer)
    transfer = np.empty((len(records), 2, 2))
    start = 0
    for block in spec.blocks:
        width = len(block.sublayers)
        for offset in range(width):
            where = slice(start + offset, start + width * block.repeat, width)
            step = HalfLayer(_gathered(sublayers[where]), n_tokens, DEFAULT_CLOSURE)
            matrices = step.transfer(_gathered_records(records[where]))
            transfer[where] = np.moveaxis(np.broadcast_to(matrices, (2, 2, block.repeat)), 2, 0)
        start += width * block.repeat
    pooled = backward(transfer, alignment=1.0 if n_tokens > 1 else 0.0)
    return _Curves(
        np.array([record.residual.q for record in records], dtype=np.float64),
        backward(transfer).log_norm,
        pooled.log_norm[0],
        stream.p / stream.q,
    )


def _causal_curves(planned: Transformer, spec: Transformer, n_tokens: int, start: Moments) -> _Curves:
    """Propagate a plan on full Gram matrices; second moments are averages over positions."""
    trajectory = propagate_gram(planned, start.p + (start.q - start.p) * np.eye(n_tokens), closure=DEFAULT_CLOSURE)
    (apjn, _), (pooled, _) = trajectory.backward(None, np.ones((n_tokens, n_tokens)))
    own = np.trace(trajectory.grams, axis1=-2, axis2=-1) / n_tokens
    skips = np.array([sublayer.skip_scale for sublayer in _all(planned)], dtype=np.float64)
    sums = skips**2 * own[:-1] + np.trace(trajectory.added, axis1=-2, axis2=-1) / n_tokens
    if not np.all(sums < _OVERFLOW):
        raise OverflowError(f"the stream overflows at sublayer {int(np.argmin(sums < _OVERFLOW))}")
    shared = (trajectory.grams[-1].sum() / n_tokens - own[-1]) / (n_tokens - 1) if n_tokens > 1 else 0.0
    return _Curves(sums, apjn, pooled[0], shared / own[-1])


def _gathered(sublayers: Sequence[Sublayer]) -> Sublayer:
    """Return one sublayer whose scales are arrays over those given, which differ in nothing else."""
    first = sublayers[0]
    if all(sublayer is first for sublayer in sublayers):
        return first
    scales: dict[str, Any] = {
        name: np.array([getattr(s.branch, name) for s in sublayers], dtype=np.float64)
        for name in first.branch.scale_names
    }
    branch = replace(first.branch, **scales)
    return replace(first, branch=branch)


def _gathered_records(records: Sequence[Record]) -> Record:
    return Record(*(Moments(*np.array([r[slot] for r in records], dtype=np.float64).T) for slot in range(4)))


def _plan(name: str, spec: Transformer, rule: _Rule, notes: Sequence[str]) -> SchemePlan:
    """Apply a rule to every sublayer in order of depth; layers that come out alike share one block."""
    blocks: list[Block] = []
    rows: list[Row] = []
    residual: list[tuple[float, float]] = []
    made: dict[tuple[int, tuple[float, ...]], Sublayer] = {}
    biased = False
    for layer, block in enumerate(spec.layers()):
        sublayers = []
        for j, sublayer in enumerate(block.sublayers):
            setting = rule(layer, sublayer)
            scales: dict[str, Any] = {
                role: std * math.sqrt(_fan_in(spec, sublayer, role)) for role, std in setting.stds.items()
            }
            rows += [Row(layer, j, role, setting.stds[role], scale, setting.reason) for role, scale in scales.items()]
            residual.append((setting.skip, setting.branch))
            key = (id(sublayer), (*scales.values(), setting.skip, setting.branch))
            if key not in made:
                biases: dict[str, Any] = {bias: 0.0 for bias in _BIASES if getattr(sublayer.branch, bias, 0.0)}
                biased = biased or bool(biases)
                branch = replace(sublayer.branch, **scales, **biases)
                made[key] = replace(sublayer, branch=branch, skip_scale=setting.skip, branch_scale=setting.branch)
            sublayers.append(made[key])
        if blocks and list(map(id, blocks[-1].sublayers)) == list(map(id, sublayers)):
            blocks[-1] = replace(blocks[-1], repeat=blocks[-1].repeat + 1)
        else:
            blocks.append(Block(sublayers=tuple(sublayers)))
    told = (*notes, "Biases of the spec were set to zero.") if biased else tuple(notes)
    return SchemePlan(
        name=name,
        spec=replace(spec, blocks=tuple(blocks)),
        rows=tuple(rows),
        residual=tuple(residual),
        notes=told,
    )


def _refined_rule(spec: Transformer, r0: float, n_tokens: int, beta_squared: float, dropout: float) -> _Rule:
    """Return DeepScaleLM's rule with exact attention gains; it carries the tokens' moments from layer to layer."""
    check_tokens(n_tokens)
    keep, factors = 1 - dropout, _factors(beta_squared)
    stream = Moments(1.0, float(r0) * keep)
    unit_steps: dict[int, HalfLayer] = {}

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        nonlocal stream
        if id(sublayer) not in unit_steps:
            unit_steps[id(sublayer)] = HalfLayer(_unit_branch(sublayer), n_tokens, DEFAULT_CLOSURE)
        step = unit_steps[id(sublayer)]
        _, added, record = step.forward(stream)
        branch, known = record.branch, record.known
        if isinstance(sublayer.branch, SelfAttention) and sublayer.branch.causal:
            branch = _causal_average(step, record.normed, known.variance, known.statistics.y12)
        gain = float(branch.q)
        if not gain > 1e-12:
            raise DomainError(
                f"the branch of layer {layer} puts out nothing to scale up: its second moment is {gain:g}", value=gain
            )
        if sublayer.output_norm is None:
            added = Moments(keep, keep * branch.p / gain)
        share = beta_squared
        residual = Moments((1 - share) * stream.q + share * added.q / keep, (1 - share) * stream.p + share * added.p)
        stream = _after(sublayer, residual)
        return _Setting(_unit_stds(spec, sublayer, keep / gain), _unit_reason(sublayer), *factors)

    return rule


def _after(sublayer: Sublayer, residual: Moments) -> Moments:
    if sublayer.stream_norm is None:
        return residual
    kernel, (q, p) = norm_kernel(sublayer.stream_norm), residual
    return Moments(float(kernel.overlap(q, q, q)), float(kernel.overlap(q, q, p)))


def _unit_branch(sublayer: Sublayer) -> Sublayer:
    """Return the sublayer with every weight scale at one and no bias, adding its branch unscaled."""
    changes: dict[str, Any] = dict.fromkeys(sublayer.branch.scale_names, 1.0)
    changes |= {bias: 0.0 for bias in _BIASES if hasattr(sublayer.branch, bias)}
    return replace(sublayer, branch=replace(sublayer.branch, **changes), skip_scale=1.0, branch_scale=1.0)


def _causal_average(step: HalfLayer, x: Moments, variance: Any, y12: Any) -> Moments:
    r"""Return the moments of causal attention averaged over positions, for tokens that are alike.

    .. math:: \overline{Y_2} = \frac1n \sum_{i \le n} Y_2(v, i), \qquad
              \overline{Y_{12}} = Y_{12}\, \frac{2 (n - H_n)}{n - 1}, \quad H_n = \sum_{i \le n} 1/i

    The second is leading order: two rows share the keys of the earlier one, and overlap as ``1/max(i, i')``.
    """
    assert isinstance(step.map, AttentionMap)
    n = step.map.n_tokens
    if n == 1:
        return Moments(x.q, x.p)
    y2 = DEFAULT_CLOSURE.statistics(np.arange(1, n + 1), float(variance), 0.0, entropy=False).y2
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    spread = x.q - x.p
    own = float(np.mean(y2))
    return Moments(x.p + spread * own, x.p + spread * min(float(y12) * 2 * (n - harmonic) / (n - 1), own))


def _unit_stds(spec: Transformer, sublayer: Sublayer, wanted: float) -> dict[str, float]:
    """Return the deviations under which a branch, of unit gain at unit scales, multiplies that by ``wanted``."""
    branch, d = sublayer.branch, spec.d_model
    if isinstance(branch, SelfAttention):
        even = wanted**0.25 / math.sqrt(d)
        return {"query": d**-0.5, "key": d**-0.5, "value": even, "output": even}
    d_mlp = _fan_in(spec, sublayer, "mlp_out")
    if isinstance(branch, MLP) and branch.activation in _HOMOGENEOUS:
        even = (wanted / (d * d_mlp)) ** 0.25
        return {"mlp_in": even, "mlp_out": even}
    return dict.fromkeys(branch.scale_names, d**-0.5) | {"mlp_out": math.sqrt(wanted / d_mlp)}


def _unit_reason(sublayer: Sublayer) -> str:
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        return "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/a_v)"
    if isinstance(branch, MLP) and branch.activation in _HOMOGENEOUS:
        return "both matrices var sqrt((1-p) / (M d d_mlp)), M = E f^2 at unit input"
    return "first matrices var 1/d; the last brings the output to 1 - p"


def _reference_rule(spec: Transformer, r0: float, beta_squared: float, dropout: float) -> _Rule:
    """Return DeepScaleLM's published rule; it carries the published correlation from layer to layer."""
    if r0 == 0:
        raise DomainError("the published value variance diverges at r0 = 0; use the refined scheme", value=r0)
    if any(isinstance(sublayer.branch, GatedMLP) for sublayer in _all(spec)):
        raise SpecError("the published formulas of 'deepscalelm' have no gated MLP; use the refined scheme")
    keep, d, factors = 1 - dropout, spec.d_model, _factors(beta_squared)
    relu = activation_kernel("relu")
    mlp = math.sqrt(math.sqrt(keep / 2) / d)
    r = r0 * keep

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        nonlocal r
        if sublayer.is_attention:
            even = math.sqrt(math.sqrt(keep / r) / d)
            r = (1 - beta_squared) * r + beta_squared * keep
            stds = {"query": d**-0.5, "key": d**-0.5, "value": even, "output": even}
            return _Setting(stds, "queries and keys var 1/d; values and outputs var (1/d) sqrt((1-p)/r)", *factors)
        r = (1 - beta_squared) * r + beta_squared * keep * 2 * float(relu.overlap(1.0, 1.0, min(r, 1.0)))
        return _Setting({"mlp_in": mlp, "mlp_out": mlp}, "var (1/d) sqrt((1-p)/2)", *factors)

    return rule


def _branch_share(spec: Transformer, k: float, alpha: float, count: str) -> float:
    """Return beta^2 = k / N^alpha."""
    if count not in COUNTS:
        raise SpecError(f"count {count!r} is unknown{nearest(str(count), COUNTS)}")
    if not (math.isfinite(k) and k > 0):
        raise DomainError(f"k must be positive and finite; got {k!r}", value=k)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise DomainError(f"alpha must be finite and >= 0; got {alpha!r}", value=alpha)
    number = spec.n_layers if count == "layers" else sum(len(b.sublayers) * b.repeat for b in spec.blocks)
    with np.errstate(over="ignore"):
        share = float(k / np.float_power(number, alpha))
    if share >= 1:
        raise DomainError(
            f"beta^2 = k / N^alpha must be below one; got {share:.4g} with k = {k:g}, N = {number} {count}, "
            f"alpha = {alpha:g}. Lower k or use a deeper stack",
            value=share,
        )
    return share


def _factors(beta_squared: float) -> tuple[float, float]:
    return math.sqrt(1 - beta_squared), math.sqrt(beta_squared)


def _check_unit(name: str, value: float, *, open_end: bool = False) -> None:
    if not (0 <= value < 1 or (value == 1 and not open_end)):
        raise DomainError(f"{name} must lie in [0, 1{')' if open_end else ']'}; got {value!r}", value=value)


def _stability_notes(spec: Transformer, beta_squared: float, k: float, count: str) -> list[str]:
    attentions = sum(b.repeat * sum(s.is_attention for s in b.sublayers) for b in spec.blocks)
    lowest = attentions * math.log1p(-beta_squared)
    return [
        f"lambda^2 = {1 - beta_squared:.6g}, beta^2 = {beta_squared:.6g}, N counts {count} (a choice).",
        "Where MLPs pass gradients with a gain of at least one, the mean square of gradients falls by no more than "
        f"(1 - beta^2)^{attentions} = e^{lowest:.4g} from output to input; with N layers and alpha = 1 that tends to "
        f"e^-k = {math.exp(-k):.4g}.",
    ]


def _stream_notes(spec: Transformer, dropout: float) -> list[str]:
    notes = [
        f"The stream must start at second moment one: n_e embedding tables of variance {1 - dropout:g} / n_e each."
    ]
    if any(s.output_norm is not None for s in _all(spec)):
        notes.append("A norm at the end of a branch undoes the scales in front of it; its gain sets what is added.")
    return notes


def _fixed_std(name: str, spec: Transformer, std: float) -> SchemePlan:
    if not (math.isfinite(std) and std > 0):
        raise DomainError(f"std must be positive and finite; got {std!r}", value=std)
    writers = sum(len(block.sublayers) * block.repeat for block in spec.blocks)

    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        last = sublayer.branch.scale_names[-1]
        stds = dict.fromkeys(sublayer.branch.scale_names, std) | {last: std / math.sqrt(writers)}
        return _Setting(stds, "one std; matrices that write to the stream over sqrt(2 n_layers)")

    return _plan(name, spec, rule, [])


def _silent_branches(name: str, spec: Transformer) -> SchemePlan:
    def rule(layer: int, sublayer: Sublayer) -> _Setting:
        return _Setting(_glorot(spec, sublayer), "Xavier; the branch multiplier starts at zero", 1.0, 0.0)

    notes = [
        "Branches add nothing at initialisation: gradients to their weights vanish until the multipliers, which are "
        "trained, have left zero.",
        "Norms of the spec are kept and weights are Xavier; both are choices.",
    ]
    return _plan(name, spec, rule, notes)


def _refuse_norms(name: str, spec: Transformer) -> None:
    if any(norm is not None for s in _all(spec) for norm in (s.input_norm, s.output_norm, s.stream_norm)):
        raise SpecError(f"the scheme {name!r} is defined on stacks without norms")


def _all(spec: Transformer) -> list[Sublayer]:
    return [sublayer for block in spec.layers() for sublayer in block.sublayers]


def _glorot(spec: Transformer, sublayer: Sublayer) -> dict[str, float]:
    return {
        role: math.sqrt(2 / (_fan_in(spec, sublayer, role) + _fan_out(spec, sublayer, role)))
        for role in sublayer.branch.scale_names
    }


def _hidden(spec: Transformer, sublayer: Sublayer) -> int:
    assert not isinstance(sublayer.branch, SelfAttention)
    return max(1, round(sublayer.branch.ratio * spec.d_model))


def _fan_in(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    return _hidden(spec, sublayer) if role == "mlp_out" else spec.d_model


def _fan_out(spec: Transformer, sublayer: Sublayer, role: str) -> int:
    branch = sublayer.branch
    if isinstance(branch, SelfAttention):
        shared = role in ("key", "value") and branch.n_kv_heads is not None
        return spec.d_model * (branch.n_kv_heads or 1) // branch.n_heads if shared else spec.d_model
    return spec.d_model if role == "mlp_out" else _hidden(spec, sublayer)
