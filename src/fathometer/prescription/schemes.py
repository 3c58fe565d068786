r"""Initialisation schemes as tables: what each sets, layer by layer, and what the theory says of the result.

A scheme maps a :class:`~fathometer.spec.Transformer` to the same architecture with the scheme's weight scales and
residual factors. Norms keep their place and gains, scores their multiplier; biases become zero. Given a
:class:`~fathometer.spec.Network`, DeepScaleLM scales stem and head as well; the other schemes leave them, and where
they say something about embeddings it is in their notes. An :class:`~fathometer.spec.EncoderDecoder` gets one plan for
each stack.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, overload

from fathometer.errors import SpecError, nearest
from fathometer.prescription.deepscalelm import (
    deepscalelm,
    deepscalelm_encoder_decoder,
    deepscalelm_simple,
)
from fathometer.prescription.plans import EncoderDecoderPlan, SchemePlan, paired
from fathometer.prescription.published_schemes import (
    deepnorm,
    deepnorm_encoder_decoder,
    ds_init,
    fixup,
    gpt2,
    megatron,
    rezero,
    skipinit,
    t_fixup,
    xavier,
)
from fathometer.prescription.unit_ends import unit_head, unit_stem
from fathometer.spec import EncoderDecoder, Network, Transformer, refuse_arrays

_END_OPTIONS = ("input_second_moment", "input_fan_in")


@overload
def apply_scheme(spec: Transformer | Network, name: str, **options: Any) -> SchemePlan: ...


@overload
def apply_scheme(spec: EncoderDecoder, name: str, **options: Any) -> EncoderDecoderPlan: ...


def apply_scheme(
    spec: Transformer | Network | EncoderDecoder, name: str, **options: Any
) -> SchemePlan | EncoderDecoderPlan:
    """Return what the scheme ``name`` sets in the architecture of ``spec``.

    Args:
        spec: The architecture, with single numbers in every field. Its own weight scales are ignored.
        name: One of :data:`SCHEMES`.
        options: Those of the scheme, see its function and :func:`scheme_options`. DeepScaleLM on a network with patches
            also takes ``input_second_moment`` and ``input_fan_in``, see
            :func:`~fathometer.prescription.unit_ends.unit_stem`; on an encoder-decoder ``r0_memory`` and ``n_memory``,
            see :func:`~fathometer.prescription.deepscalelm.deepscalelm_encoder_decoder`.
    Raises:
        SpecError: for an unknown scheme or option (the nearest one is suggested), a missing option, arrays in the
            spec, or an architecture the scheme is not defined on.
        DomainError: for an option outside its range.

    >>> from fathometer.spec import preset
    >>> plan = apply_scheme(preset("vit"), "deepscalelm", r0=0.3, n_tokens=196)
    >>> [(row.role, round(row.scale, 3)) for row in plan.rows[:3]]
    [('query', 1.0), ('key', 1.0), ('value', 1.343)]
    """
    kind = type(spec)
    known = scheme_options(name, kind)
    for option in options:
        if option not in known:
            raise SpecError(
                f"the scheme {name!r} has no option {option!r}{nearest(option, known) if known else '; it has none'}"
            )
    missing = [option for option, required in known.items() if required and option not in options]
    if missing:
        raise SpecError(f"the scheme {name!r} needs {' and '.join(missing)}")
    refuse_arrays(spec, "a scheme")
    if isinstance(spec, EncoderDecoder):
        return PAIRED[name](spec, **options) if name in PAIRED else _each_stack(spec, name, options)
    if isinstance(spec, Network):
        return _with_ends(spec, name, options)
    return SCHEMES[name](spec, **options)


def scheme_options(name: str, kind: type = Transformer) -> dict[str, bool]:
    """Return the options of a scheme on one kind of architecture, and whether each must be given."""
    if name not in SCHEMES:
        raise SpecError(f"there is no scheme {name!r}{nearest(name, SCHEMES)}")
    scheme = PAIRED.get(name, SCHEMES[name]) if kind is EncoderDecoder else SCHEMES[name]
    parameters = list(inspect.signature(scheme).parameters.values())[1:]
    options = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    return options | (dict.fromkeys(_END_OPTIONS, False) if kind is Network and name in UNIT_SCHEMES else {})


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


#: Schemes that tie the two stacks of an encoder-decoder together; the others treat each on its own.
PAIRED: dict[str, Callable[..., EncoderDecoderPlan]] = {
    "deepscalelm": deepscalelm_encoder_decoder,
    "deepnorm": deepnorm_encoder_decoder,
}

#: Schemes that set stem and head too.
UNIT_SCHEMES = ("deepscalelm", "deepscalelm-simple")


def _with_ends(network: Network, name: str, options: dict[str, Any]) -> SchemePlan:
    inside = {key: value for key, value in options.items() if key not in _END_OPTIONS}
    chosen = [options[key] for key in ("embedding_dropout", "dropout") if options.get(key) is not None]
    rate = chosen[0] if chosen else float(network.stem.dropout)
    if "embedding_dropout" in scheme_options(name):
        inside["embedding_dropout"] = rate
    plan = SCHEMES[name](network.trunk, **inside)
    if name not in UNIT_SCHEMES:
        kept = "The stem and the head keep their scales: this scheme is stated for the blocks."
        return replace(plan, network=replace(network, trunk=plan.spec), notes=(*plan.notes, kept))
    ends = {key: value for key, value in options.items() if key in _END_OPTIONS}
    stem, stem_rows = unit_stem(network.stem, dropout=rate, **ends)
    head, head_rows = unit_head(network.head, stem, d_model=network.trunk.d_model)
    return replace(
        plan, stem=stem_rows, head=head_rows, network=replace(network, stem=stem, trunk=plan.spec, head=head)
    )


def _each_stack(spec: EncoderDecoder, name: str, options: dict[str, Any]) -> EncoderDecoderPlan:
    encoder, decoder = (SCHEMES[name](stack, **options) for stack in (spec.encoder, spec.decoder))
    return paired(name, spec, encoder, decoder, "Depths are counted in each stack on its own, a choice.")
