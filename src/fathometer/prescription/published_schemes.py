"""Published schemes besides DeepScaleLM: fixed deviations, Xavier weights, factors that grow with depth."""

from __future__ import annotations

import math

from fathometer.errors import DomainError, SpecError
from fathometer.prescription.plans import (
    EncoderDecoderPlan,
    SchemePlan,
    Setting,
    every_sublayer,
    fan_in,
    fan_out,
    paired,
    planned,
)
from fathometer.spec import EncoderDecoder, Sublayer, Transformer


def xavier(spec: Transformer) -> SchemePlan:
    """Give every matrix ``std = sqrt(2 / (fan_in + fan_out))``, with plain residual connections.

    Source: X. Glorot and Y. Bengio, 2010. Fans are those of whole matrices; some codes count one head, a choice.
    """
    return planned("xavier", spec, lambda layer, s: Setting(_glorot(spec, s), "sqrt(2 / (fan_in + fan_out))"), [])


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

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        factor = alpha / math.sqrt(layer + 1)
        stds = {role: factor * std for role, std in _glorot(spec, sublayer).items()}
        return Setting(stds, "Xavier times alpha / sqrt(layer + 1)")

    return planned("ds-init", spec, rule, ["Written for post-norm; a uniform distribution of this variance."])


def deepnorm(spec: Transformer) -> SchemePlan:
    r"""Strengthen the skip and weaken the branch of post-norm stacks by powers of the number of layers N.

    .. math:: x \leftarrow \mathrm{LN}(\alpha x + B(x)), \qquad \alpha = (2N)^{1/4}, \quad \beta = (8N)^{-1/4}

    Xavier weights; those of values, outputs and the MLP are multiplied by beta. Encoder-only and decoder-only models
    have the same constants.

    Source: H. Wang et al., DeepNet, arXiv:2203.00555. That a gate is multiplied too is a choice.

    Raises:
        SpecError: unless a norm follows every residual sum.
    """
    return _deepnorm(spec, (2 * spec.n_layers) ** 0.25, (8 * spec.n_layers) ** -0.25, "(8 N)^(-1/4)")


def deepnorm_encoder_decoder(spec: EncoderDecoder) -> EncoderDecoderPlan:
    r"""Do what :func:`deepnorm` does, with N layers in the encoder and M in the decoder.

    .. math:: \alpha_e = 0.81\,(N^4 M)^{1/16}, \quad \beta_e = 0.87\,(N^4 M)^{-1/16}, \qquad
              \alpha_d = (3M)^{1/4}, \quad \beta_d = (12M)^{-1/4}

    Source: H. Wang et al., DeepNet, arXiv:2203.00555, written from memory.
    """
    n, m = spec.encoder.n_layers, spec.decoder.n_layers
    mixed = (n**4 * m) ** (1 / 16)
    encoder = _deepnorm(spec.encoder, 0.81 * mixed, 0.87 / mixed, "0.87 (N^4 M)^(-1/16)")
    decoder = _deepnorm(spec.decoder, (3 * m) ** 0.25, (12 * m) ** -0.25, "(12 M)^(-1/4)")
    return paired("deepnorm", spec, encoder, decoder, "N counts the encoder's layers, M the decoder's.")


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

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        if sublayer.is_attention:
            stds = _glorot(spec, sublayer)
            return Setting(
                stds | {"value": stds["value"] * branches**-0.5, "output": 0.0}, "Xavier; value M^(-1/2), output 0"
            )
        m = len(sublayer.branch.scale_names)
        std = math.sqrt(2 / spec.d_model) * branches ** (-1 / (2 * m - 2))
        return Setting(
            dict.fromkeys(sublayer.branch.scale_names, std) | {"mlp_out": 0.0}, "He times M^(-1/(2m-2)); last matrix 0"
        )

    notes = [
        "Branches are zero at initialisation: at the first step only their last matrices receive gradients.",
        "Choices: He and Xavier bases, queries and keys unscaled, m = 3 for a gated MLP.",
    ]
    return planned("fixup", spec, rule, notes)


def t_fixup(spec: Transformer) -> SchemePlan:
    """Scale Xavier weights of values, outputs and the MLP: ``0.67 N^(-1/4)`` in encoders, ``(9N)^(-1/4)`` in decoders.

    Source: X. S. Huang et al., Improving Transformer Optimization Through Better Initialization, ICML 2020. The paper
    has encoder-decoder models; here a causal spec or one with cross attention counts as a decoder and any other as an
    encoder, and a gate is scaled too. These are choices.

    Raises:
        SpecError: if the spec has norms.
    """
    _refuse_norms("t-fixup", spec)
    layers = spec.n_layers
    factor, formula = (
        ((9 * layers) ** -0.25, "(9 N)^(-1/4)")
        if spec.is_causal or spec.has_cross_attention
        else (0.67 * layers**-0.25, "0.67 N^(-1/4)")
    )

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        stds = {
            role: std if role in ("query", "key") else factor * std for role, std in _glorot(spec, sublayer).items()
        }
        return Setting(stds, f"Xavier; values, outputs and MLP times {formula}")

    return planned(
        "t-fixup", spec, rule, [f"Embeddings: std d_model^(-1/2) times (9 N)^(-1/4) = {(9 * layers) ** -0.25:.5g}."]
    )


def _deepnorm(spec: Transformer, skip: float, gain: float, formula: str) -> SchemePlan:
    if any(sublayer.stream_norm is None for sublayer in every_sublayer(spec)):
        raise SpecError("the scheme 'deepnorm' is defined on post-norm stacks: a norm after every residual sum")

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        stds = {role: std if role in ("query", "key") else gain * std for role, std in _glorot(spec, sublayer).items()}
        return Setting(stds, f"Xavier; values, outputs and MLP times {formula}", skip)

    return planned("deepnorm", spec, rule, [f"alpha = {skip:.5g}, beta = {gain:.5g}."])


def _fixed_std(name: str, spec: Transformer, std: float) -> SchemePlan:
    if not (math.isfinite(std) and std > 0):
        raise DomainError(f"std must be positive and finite; got {std!r}", value=std)
    writers = sum(len(block.sublayers) * block.repeat for block in spec.blocks)

    def rule(layer: int, sublayer: Sublayer) -> Setting:
        last = sublayer.branch.scale_names[-1]
        stds = dict.fromkeys(sublayer.branch.scale_names, std) | {last: std / math.sqrt(writers)}
        return Setting(stds, "one std; matrices that write to the stream over sqrt(2 n_layers)")

    return planned(name, spec, rule, [])


def _silent_branches(name: str, spec: Transformer) -> SchemePlan:
    def rule(layer: int, sublayer: Sublayer) -> Setting:
        return Setting(_glorot(spec, sublayer), "Xavier; the branch multiplier starts at zero", 1.0, 0.0)

    notes = [
        "Branches add nothing at initialisation: gradients to their weights vanish until the multipliers, which are "
        "trained, have left zero.",
        "Norms of the spec are kept and weights are Xavier; both are choices.",
    ]
    return planned(name, spec, rule, notes)


def _refuse_norms(name: str, spec: Transformer) -> None:
    if any(norm is not None for s in every_sublayer(spec) for norm in (s.input_norm, s.output_norm, s.stream_norm)):
        raise SpecError(f"the scheme {name!r} is defined on stacks without norms")


def _glorot(spec: Transformer, sublayer: Sublayer) -> dict[str, float]:
    return {
        role: math.sqrt(2 / (fan_in(spec, sublayer, role) + fan_out(spec, sublayer, role)))
        for role in sublayer.branch.scale_names
    }
