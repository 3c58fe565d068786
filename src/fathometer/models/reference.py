r"""The network a spec describes, as a plain torch module with Gaussian weights.

Every sublayer is one line,

.. math:: x \leftarrow N_\mathrm{stream}\bigl(\mu\, x + \tau\, \mathrm{drop}(N_\mathrm{out}(B(N_\mathrm{in}(x))))\bigr),

and every linear map is an ``nn.Linear`` named like its scale in the spec, with weights of standard deviation
``scale / sqrt(fan_in)``. This is the network whose averages arXiv:2604.11890v3 (Alekseev) and the rest of the theory
predict at infinite width. Dropout acts in training mode only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.errors import NotCoveredError, SpecError
from fathometer.models.seeding import named_generator
from fathometer.spec import (
    MLP,
    Activation,
    Block,
    Branch,
    CrossAttention,
    Derf,
    DyT,
    GatedMLP,
    LayerNorm,
    Norm,
    Pointwise,
    PointwiseNorm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
    array_fields,
    hidden_width,
    memory_width,
)

#: Small enough that the theory's norms, which have none, describe any stream a float32 network can carry.
EPSILON = 1e-12


class DynamicTanh(nn.Module):
    """The norm substitute ``weight * tanh(alpha * x)``."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        return self.weight * torch.tanh(self.alpha * x)


class DynamicErf(nn.Module):
    """The norm substitute ``weight * erf(alpha * x + shift)``."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.shift = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        return self.weight * torch.erf(self.alpha * x + self.shift)


class Erf(nn.Module):
    """The error function as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        return torch.erf(x)


class ReferenceAttention(nn.Module):
    """Softmax attention with separate query, key, value and output matrices, to the tokens themselves or a memory."""

    def __init__(self, branch: SelfAttention | CrossAttention, d_model: int) -> None:
        super().__init__()
        if d_model % branch.n_heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {d_model} and {branch.n_heads}")
        self.branch = branch
        self.d_head = d_model // branch.n_heads
        n_kv_heads = branch.n_kv_heads or branch.n_heads
        self.grouped = n_kv_heads != branch.n_heads
        d_source = memory_width(branch, d_model) if isinstance(branch, CrossAttention) else d_model
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_source, n_kv_heads * self.d_head, bias=False)
        self.value = nn.Linear(d_source, n_kv_heads * self.d_head, bias=bool(branch.value_bias))
        self.output = nn.Linear(d_model, d_model, bias=bool(branch.output_bias))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Map tokens of shape ``(batch, n_tokens, d_model)`` to the same shape.

        Args:
            x: The tokens that ask.
            memory: The tokens that are read, shape ``(batch, n_memory, d_memory)``; by default those that ask.
        """
        branch, source = self.branch, x if memory is None else memory
        q, k, v = self._heads(self.query(x)), self._heads(self.key(source)), self._heads(self.value(source))
        if isinstance(branch, SelfAttention) and branch.qk_norm:
            q, k = (F.rms_norm(t, (self.d_head,), eps=EPSILON) for t in (q, k))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=float(branch.attention_dropout) if self.training else 0.0,
            is_causal=isinstance(branch, SelfAttention) and branch.causal,
            scale=float(branch.score_multiplier) / self.d_head**0.5,
            enable_gqa=self.grouped,
        )
        out: Tensor = self.output(mixed.transpose(-3, -2).flatten(-2))
        centred = isinstance(branch, SelfAttention) and branch.centred
        return out - out.mean(dim=-2, keepdim=True) if centred else out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.d_head).transpose(-3, -2)


class ReferenceMLP(nn.Module):
    """Two-layer perceptron."""

    def __init__(self, branch: MLP, d_model: int) -> None:
        super().__init__()
        self.branch = branch
        d_mlp = hidden_width(branch, d_model)
        self.mlp_in = nn.Linear(d_model, d_mlp, bias=bool(branch.in_bias))
        self.activation = activation_module(branch.activation)
        self.mlp_out = nn.Linear(d_mlp, d_model, bias=bool(branch.out_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens of shape ``(batch, n_tokens, d_model)`` to the same shape."""
        out: Tensor = self.mlp_out(self.activation(self.mlp_in(x)))
        return out


class ReferenceGatedMLP(nn.Module):
    """Gated perceptron."""

    def __init__(self, branch: GatedMLP, d_model: int) -> None:
        super().__init__()
        self.branch = branch
        d_mlp = hidden_width(branch, d_model)
        self.gate = nn.Linear(d_model, d_mlp, bias=False)
        self.activation = activation_module(branch.activation)
        self.mlp_in = nn.Linear(d_model, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens of shape ``(batch, n_tokens, d_model)`` to the same shape."""
        out: Tensor = self.mlp_out(self.activation(self.gate(x)) * self.mlp_in(x))
        return out


ReferenceBranch = ReferenceAttention | ReferenceMLP | ReferenceGatedMLP


class ReferenceSublayer(nn.Module):
    """One residual step of the stream."""

    def __init__(self, sublayer: Sublayer, d_model: int) -> None:
        super().__init__()
        self.skip_scale = float(sublayer.skip_scale)
        self.branch_scale = float(sublayer.branch_scale)
        self.input_norm = norm_module(sublayer.input_norm, d_model)
        self.branch = branch_module(sublayer.branch, d_model)
        self.output_norm = norm_module(sublayer.output_norm, d_model)
        self.dropout = nn.Dropout(float(sublayer.dropout)) if sublayer.dropout else nn.Identity()
        self.stream_norm = norm_module(sublayer.stream_norm, d_model)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Map the stream, shape ``(batch, n_tokens, d_model)``, to the same shape; cross attention reads ``memory``."""
        normed = self.input_norm(x)
        crossed = isinstance(self.branch.branch, CrossAttention)
        out = self.branch(normed, memory) if crossed else self.branch(normed)
        added = self.dropout(self.output_norm(out))
        stream: Tensor = self.stream_norm(self.skip_scale * x + self.branch_scale * added)
        return stream


class ReferenceBlock(nn.Module):
    """The sublayers of one block, in order."""

    def __init__(self, block: Block, d_model: int) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(ReferenceSublayer(sublayer, d_model) for sublayer in block.sublayers)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Map the stream, shape ``(batch, n_tokens, d_model)``, to the same shape."""
        for sublayer in self.sublayers:
            x = sublayer(x) if memory is None else sublayer(x, memory)
        return x


class ReferenceTransformer(nn.Module):
    """A stack of blocks, without embedding or head.

    Attributes:
        spec: What it was built from.
        blocks: One :class:`ReferenceBlock` a layer.
    """

    def __init__(self, spec: Transformer) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(ReferenceBlock(block, spec.d_model) for block in spec.layers())

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Map the stream, shape ``(batch, n_tokens, d_model)``, to the same shape; a decoder also takes its memory."""
        for block in self.blocks:
            x = block(x) if memory is None else block(x, memory)
        return x


def reference_network(
    spec: Transformer,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ReferenceTransformer:
    """Build the network a spec describes and draw its weights.

    Args:
        spec: The transformer, with single numbers in every field.
        seed: Which draw of the weights, see :func:`draw_weights`.
        dtype: Type of the parameters.
        device: Where the parameters live; the draw does not depend on it.
    Raises:
        SpecError: for fields that hold arrays, or heads that do not divide ``d_model``.
        NotCoveredError: for a user's numpy function, which torch cannot differentiate, or cross attention.
    """
    if spec.has_cross_attention:
        raise needs_a_memory()
    refuse_arrays(spec)
    with torch.device("meta"):  # no memory, no default initialisation, no random numbers
        model = ReferenceTransformer(spec)
    model = model.to(dtype).to_empty(device=device)
    set_norms(model)
    draw_weights(model, seed)
    return model


def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw every weight and bias of the reference branches inside ``module``, in place.

    Each parameter has a generator of its own, seeded by a hash of ``seed`` and the parameter's name, on the CPU and in
    float32: the draw depends on nothing else, neither on order, device, precision nor on the other layers.

    Args:
        module: A :class:`ReferenceTransformer` or any part of one; names are those of ``module.named_parameters()``.
        seed: Which draw.
    """
    with torch.no_grad():
        for name, parameter, std in weight_stds(module):
            generator = named_generator(seed, name)
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator)
            parameter.copy_(values.mul_(std))


def weight_stds(module: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """Yield name, parameter and standard deviation of everything drawn at random in ``module``."""
    for prefix, owner in module.named_modules():
        if not isinstance(owner, ReferenceBranch):
            continue
        for field in owner.branch.scale_names:
            linear = owner.get_submodule(field)
            assert isinstance(linear, nn.Linear)
            name = f"{prefix}.{field}" if prefix else field
            yield f"{name}.weight", linear.weight, getattr(owner.branch, field) / linear.in_features**0.5
            if linear.bias is not None:
                yield f"{name}.bias", linear.bias, getattr(owner.branch, f"{field.removeprefix('mlp_')}_bias")


def branch_module(branch: Branch, d_model: int) -> ReferenceBranch:
    """Return the module of a branch, its weights not drawn."""
    match branch:
        case SelfAttention() | CrossAttention():
            return ReferenceAttention(branch, d_model)
        case MLP():
            return ReferenceMLP(branch, d_model)
        case GatedMLP():
            return ReferenceGatedMLP(branch, d_model)
    assert_never(branch)


def activation_module(activation: Activation) -> nn.Module:
    """Return the module of an activation.

    Raises:
        NotCoveredError: for a user's :class:`Pointwise`.
    """
    if isinstance(activation, Pointwise):
        raise _not_differentiable(activation)
    modules: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "gelu": nn.GELU(approximate="none"),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
        "tanh": nn.Tanh(),
        "erf": Erf(),
        "identity": nn.Identity(),
    }
    return modules[activation]


def norm_module(norm: Norm | None, d_model: int) -> nn.Module:
    """Return the module of a norm, its gains not set; ``None`` is the identity.

    Raises:
        NotCoveredError: for a user's :class:`PointwiseNorm`.
    """
    module: nn.Module
    match norm:
        case None:
            return nn.Identity()
        case LayerNorm():
            module = nn.LayerNorm(d_model, eps=EPSILON, bias=False)
        case RMSNorm():
            module = nn.RMSNorm(d_model, eps=EPSILON)
        case DyT():
            module = DynamicTanh(d_model)
        case Derf():
            module = DynamicErf(d_model)
        case PointwiseNorm():
            raise _not_differentiable(norm.function)
        case _:
            assert_never(norm)
    return module


def set_norms(model: ReferenceTransformer) -> None:
    """Fill the parameters of every norm with the numbers of the spec."""
    for block, module in zip(model.spec.layers(), model.blocks, strict=True):
        for j, sublayer in enumerate(block.sublayers):
            for slot in ("input_norm", "output_norm", "stream_norm"):
                set_norm(getattr(sublayer, slot), module.get_submodule(f"sublayers.{j}.{slot}"))


def set_norm(norm: Norm | None, module: nn.Module) -> None:
    """Fill the parameters of one norm's module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(getattr(norm, "gain" if name == "weight" else name))


def refuse_arrays(spec: object) -> None:
    """Refuse a spec that is a grid."""
    for where, array in array_fields(spec):
        raise SpecError(
            f"a network needs single numbers; {where} is an array of shape {array.shape}. "
            "Build a stack of networks, or one for each grid point."
        )


def needs_a_memory() -> NotCoveredError:
    """Return the error for a decoder built on its own."""
    return NotCoveredError(
        "cross attention reads a memory, which this network does not have: build an EncoderDecoder and use "
        "reference_encoder_decoder; for the theory, propagate_encoder_decoder"
    )


def _not_differentiable(function: Pointwise) -> NotCoveredError:
    return NotCoveredError(
        f"the function {function.name!r} is given in numpy and torch cannot differentiate it; "
        "predictions take it, networks need a named activation or norm"
    )
