r"""Many transformers of one architecture as one module: every weight carries a leading axis over networks.

A diagram over initialisations needs thousands of small networks. One at a time, each small operation pays for its call;
stacked, the weights have shape ``(n_networks, fan_out, fan_in)`` and one batched matrix product serves all networks.
Inside, the stream is stored features first, ``(n_networks, d_model, batch * n_tokens)``: then a linear map is ``W x``
with long contiguous rows, norms reduce over a strided axis without shuffling within vector registers, and no weight or
activation is transposed in memory.

Cost: one network costs the floating-point operations of :func:`fathometer.models.reference_network`; what is saved is
the overhead of small calls. Memory: the weights of all networks, and in training all their activations. Nothing is
divided up here; split a grid that does not fit and give each part a seed of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fathometer.errors import BatchError, DomainError, NotCoveredError, SpecError
from fathometer.models.reference import (
    EPSILON,
    ReferenceTransformer,
    activation_module,
    needs_a_memory,
    reference_network,
)
from fathometer.models.seeding import named_generator
from fathometer.spec import (
    MLP,
    Block,
    Branch,
    Derf,
    DyT,
    GatedMLP,
    LayerNorm,
    Norm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
    array_fields,
    at_point,
    batch_shape,
    hidden_width,
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How numbers of a spec are spread over networks: grid points first, copies of each last.

    Attributes:
        shape: Common broadcast shape of all arrays in the spec.
        n_copies: Independent weight draws of each grid point.
    """

    shape: tuple[int, ...]
    n_copies: int

    @property
    def n_networks(self) -> int:
        """Number of networks."""
        return math.prod(self.shape) * self.n_copies

    def column(self, value: Any) -> Tensor:
        """Return a number or array of the spec as one float64 per network, shape ``(n_networks, 1, 1)``."""
        spread = np.broadcast_to(value, self.shape).ravel().repeat(self.n_copies)
        return torch.from_numpy(spread.astype(np.float64)).view(-1, 1, 1)


class Standardise(torch.autograd.Function):
    """``gain * (x - mean) / std`` over the features of ``(n_networks, d_model, positions)``, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, centred: bool, epsilon: float) -> Tensor:
        """Return the standardised stream."""
        if centred:
            x = x - x.mean(-2, keepdim=True)
        out = x.square()
        inverse = out.mean(-2, keepdim=True).add_(epsilon).rsqrt_()
        unit = x.mul_(inverse) if centred else x * inverse
        ctx.save_for_backward(unit, inverse, gain)
        ctx.centred = centred
        return torch.mul(unit, gain, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradient in the stream and the gain."""
        (gradient,) = gradients
        unit, inverse, gain = ctx.saved_tensors
        product = gradient * unit
        # The means over features of gain * gradient and gain * product, as products with a row vector.
        weights = gain.mT / gain.shape[-2]
        inner = (gradient * gain).addcmul_(unit, weights @ product, value=-1)
        if ctx.centred:
            inner.sub_(weights @ gradient)
        return inner.mul_(inverse), product.sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None, None, None


def standardised(x: Tensor, gain: Tensor, *, centred: bool, epsilon: float = EPSILON) -> Tensor:
    """Return :class:`Standardise` of ``x``: LayerNorm where ``centred``, else RMSNorm.

    Args:
        x: Shape ``(n_networks, d_model, positions)``.
        gain: Shape ``(n_networks, d_model, 1)``.
        centred: Whether the mean is subtracted.
        epsilon: Added to the mean square.
    """
    out: Tensor = Standardise.apply(x, gain, centred, epsilon)  # type: ignore[no-untyped-call]
    return out


class Attend(torch.autograd.Function):
    """Softmax attention of stacked heads, with its gradient: two batched products there, four back.

    ``heads`` holds queries, keys and values, shape ``(3, n_networks * n_heads * batch, d_head, n_tokens)``, and
    ``multiplier`` one factor on the scores a network, shape ``(n_networks, 1)``.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, multiplier: Tensor, causal: bool) -> Tensor:
        """Return the mixed values, shaped like the queries."""
        query, key, value = heads.unbind()
        scores = key.mT @ query  # (keys, queries): values then mix without a transposition
        scores.view(len(multiplier), -1).mul_(multiplier)
        if causal:
            n_tokens = scores.shape[-1]
            hidden = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=scores.device).tril_(-1)
            scores.masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-2)
        mixed = value @ weights
        ctx.save_for_backward(heads, weights, mixed, multiplier)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the heads."""
        gradient = gradients[0].contiguous()
        heads, weights, mixed, multiplier = ctx.saved_tensors
        query, key, value = heads.unbind()
        out = torch.empty_like(heads)
        torch.bmm(gradient, weights.mT, out=out[2])
        scores = value.mT @ gradient
        # sum_b weights_b d(weights)_b of the softmax's gradient equals gradient . mixed of the query's position.
        scores.sub_((gradient * mixed).sum(-2, keepdim=True)).mul_(weights)
        scores.view(len(multiplier), -1).mul_(multiplier)
        torch.bmm(key, scores, out=out[0])
        torch.bmm(query, scores.mT, out=out[1])
        return out, None, None


class StackedNorm(nn.Module):
    """A norm with gain, and alpha and shift where it has them, of its own in every network.

    Attributes:
        weight: Gains, shape ``(n_networks, d_model, 1)``.
        alpha, shift: Shape ``(n_networks, 1, 1)``; only in :class:`DyT` and :class:`Derf`.
    """

    weight: nn.Parameter
    alpha: nn.Parameter
    shift: nn.Parameter

    def __init__(self, norm: Norm, d_model: int, grid: Grid, like: Tensor) -> None:
        super().__init__()
        assert isinstance(norm, (LayerNorm, RMSNorm, DyT, Derf))
        self.norm = norm
        self.weight = nn.Parameter(grid.column(norm.gain).to(like).repeat(1, d_model, 1))
        for name in ("alpha", "shift"):
            if hasattr(norm, name):
                self.register_parameter(name, nn.Parameter(grid.column(getattr(norm, name)).to(like)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n_networks, d_model, positions)`` to the same shape."""
        match self.norm:
            case DyT():
                return self.weight * torch.tanh(self.alpha * x)
            case Derf():
                return self.weight * torch.erf(self.alpha * x + self.shift)
        return standardised(x, self.weight, centred=isinstance(self.norm, LayerNorm))


class StackedBranch(nn.Module):
    """What branches share: one matrix that reads the stream, one that writes to it, and their biases.

    Attributes:
        branch: The description.
        inward: The maps from the stream on top of each other, in the order of the spec's scales, shape
            ``(n_networks, n_maps * width, d_model)``.
        outward: The map to the stream, shape ``(n_networks, d_model, width)``.
        inner_bias, outer_bias: Shape ``(n_networks, width, 1)`` and ``(n_networks, d_model, 1)``; ``None`` where the
            scale is zero in every network. Where it is zero in some, those networks have none, in training neither.
    """

    inner_bias: nn.Parameter | None
    outer_bias: nn.Parameter | None
    _inner_present: Tensor
    _outer_present: Tensor

    def __init__(self, branch: Branch, d_model: int, width: int, grid: Grid, like: Tensor) -> None:
        super().__init__()
        self.branch = branch
        self.grid = grid
        self.width = width
        *reading, self._writing = branch.scale_names
        self._reading = tuple(reading)
        n = grid.n_networks
        self.inward = nn.Parameter(like.new_empty(n, len(reading) * width, d_model))
        self.outward = nn.Parameter(like.new_empty(n, d_model, width))
        for side, field, size in (("inner", reading[-1], width), ("outer", self._writing, d_model)):
            present = grid.column(getattr(branch, _bias_field(field), 0.0)) > 0
            bias = nn.Parameter(like.new_empty(n, size, 1)) if present.any() else None
            self.register_parameter(f"{side}_bias", bias)
            self.register_buffer(f"_{side}_present", None if bias is None else present.to(like), persistent=False)

    def random_parts(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield everything drawn at random: its name in a reference network, the tensor, and the standard deviations.

        The tensors are views of shape ``(n_networks, fan_out, fan_in)``, fan_in 1 for a bias; the standard deviations
        have shape ``(n_networks, 1, 1)``.
        """
        d_model = self.inward.shape[-1]
        parts = zip(self._reading, self.inward.chunk(len(self._reading), dim=1), strict=True)
        for field, weight in (*parts, (self._writing, self.outward)):
            fan_in = self.width if field == self._writing else d_model
            yield f"{field}.weight", weight, self.grid.column(getattr(self.branch, field)) / fan_in**0.5
        for field, bias in ((self._reading[-1], self.inner_bias), (self._writing, self.outer_bias)):
            if bias is not None:
                yield f"{field}.bias", bias, self.grid.column(getattr(self.branch, _bias_field(field)))

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """Map ``(n_networks, d_model, batch * n_tokens)`` to the same shape."""
        hidden = self.hidden(x, n_tokens)
        if self.outer_bias is None:
            return torch.bmm(self.outward, hidden)
        return torch.baddbmm(self.outer_bias * self._outer_present, self.outward, hidden)

    def hidden(self, x: Tensor, n_tokens: int) -> Tensor:
        """Return what ``outward`` acts on, shape ``(n_networks, width, batch * n_tokens)``."""
        raise NotImplementedError


class StackedAttention(StackedBranch):
    """Softmax self-attention."""

    multiplier: Tensor

    def __init__(self, branch: SelfAttention, d_model: int, grid: Grid, like: Tensor) -> None:
        if branch.n_kv_heads not in (None, branch.n_heads):
            raise NotCoveredError("stacked networks have as many key as query heads; n_kv_heads must be None")
        super().__init__(branch, d_model, d_model, grid, like)
        self.n_heads, self.causal, self.qk_norm = branch.n_heads, branch.causal, branch.qk_norm
        self.centred = branch.centred
        multiplier = grid.column(branch.score_multiplier).view(-1, 1) / (d_model // branch.n_heads) ** 0.5
        self.register_buffer("multiplier", multiplier.to(like), persistent=False)

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """Map ``(n_networks, d_model, batch * n_tokens)`` to the same shape."""
        out = super().forward(x, n_tokens)
        if not self.centred:
            return out
        tokens = out.view(*out.shape[:-1], -1, n_tokens)
        return (tokens - tokens.mean(-1, keepdim=True)).view(out.shape)

    def hidden(self, x: Tensor, n_tokens: int) -> Tensor:
        """Return the mixed values, shape ``(n_networks, d_model, batch * n_tokens)``."""
        n, d_model, _ = x.shape
        split = (n, 3, self.n_heads, d_model // self.n_heads, -1, n_tokens)
        heads = torch.bmm(self.inward, x).view(split).permute(1, 0, 2, 4, 3, 5)
        n_batch = heads.shape[3]
        heads = heads.reshape(3, -1, d_model // self.n_heads, n_tokens)
        if self.qk_norm:
            paired = heads[:2]
            paired = paired * torch.rsqrt(paired.square().mean(-2, keepdim=True) + EPSILON)
            heads = torch.cat((paired, heads[2:]))
        mixed: Tensor = Attend.apply(heads, self.multiplier, self.causal)  # type: ignore[no-untyped-call]
        mixed = mixed.view(n, self.n_heads, n_batch, -1, n_tokens).transpose(2, 3).reshape(x.shape)
        # Attention weights sum to one, so that a bias of the values passes unchanged.
        return mixed if self.inner_bias is None else mixed + self.inner_bias * self._inner_present


class StackedMLP(StackedBranch):
    """Perceptron, gated or not."""

    def __init__(self, branch: MLP | GatedMLP, d_model: int, grid: Grid, like: Tensor) -> None:
        super().__init__(branch, d_model, hidden_width(branch, d_model), grid, like)
        self.gated = isinstance(branch, GatedMLP)
        self.activation = activation_module(branch.activation)

    def hidden(self, x: Tensor, n_tokens: int) -> Tensor:
        """Return the activations, shape ``(n_networks, width, batch * n_tokens)``."""
        if self.inner_bias is None:
            before = torch.bmm(self.inward, x)
        else:
            before = torch.baddbmm(self.inner_bias * self._inner_present, self.inward, x)
        if not self.gated:
            return self.activation(before)  # type: ignore[no-any-return]
        gate, linear = before.chunk(2, dim=1)
        return self.activation(gate) * linear  # type: ignore[no-any-return]


class StackedSublayer(nn.Module):
    """One residual step of the streams of all networks."""

    skip_scale: Tensor | None
    branch_scale: Tensor | None
    input_norm: nn.Module
    output_norm: nn.Module
    stream_norm: nn.Module

    def __init__(self, sublayer: Sublayer, d_model: int, grid: Grid, like: Tensor) -> None:
        super().__init__()
        for name in ("skip_scale", "branch_scale"):
            scale = grid.column(getattr(sublayer, name))
            self.register_buffer(name, None if bool((scale == 1).all()) else scale.to(like), persistent=False)
        for slot in ("input_norm", "output_norm", "stream_norm"):
            norm = getattr(sublayer, slot)
            self.add_module(slot, nn.Identity() if norm is None else StackedNorm(norm, d_model, grid, like))
        match sublayer.branch:
            case SelfAttention():
                self.branch: StackedBranch = StackedAttention(sublayer.branch, d_model, grid, like)
            case MLP() | GatedMLP():
                self.branch = StackedMLP(sublayer.branch, d_model, grid, like)

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """Map ``(n_networks, d_model, batch * n_tokens)`` to the same shape."""
        added = self.output_norm(self.branch(self.input_norm(x), n_tokens))
        if self.branch_scale is not None:
            added = self.branch_scale * added
        out: Tensor = self.stream_norm(added.add_(x if self.skip_scale is None else self.skip_scale * x))
        return out


class StackedBlock(nn.Module):
    """The sublayers of one block, in order."""

    def __init__(self, block: Block, d_model: int, grid: Grid, like: Tensor) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(StackedSublayer(sublayer, d_model, grid, like) for sublayer in block.sublayers)

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """Map ``(n_networks, d_model, batch * n_tokens)`` to the same shape."""
        for sublayer in self.sublayers:
            x = sublayer(x, n_tokens)
        return x


class StackedTransformer(nn.Module):
    """Independent transformers of one architecture, without embeddings or heads. See :func:`stacked_network`.

    Gradients may be taken once: the gradient of a gradient is refused by torch.

    Attributes:
        spec: What it was built from, arrays included.
        grid_shape: Common broadcast shape B of the arrays in the spec, ``()`` without any.
        n_copies: Independent weight draws of each grid point.
        n_networks: ``prod(B) * n_copies``; network ``i`` is the C-order position in the shape ``B + (n_copies,)``.
        blocks: One :class:`StackedBlock` a layer; they act on streams ``(n_networks, d_model, batch * n_tokens)``.
    """

    def __init__(self, spec: Transformer, n_copies: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        if isinstance(n_copies, bool) or not isinstance(n_copies, int) or n_copies < 1:
            raise DomainError(f"n_copies must be a positive integer; got {n_copies!r}", value=n_copies)
        shape = batch_shape(spec)
        if 0 in shape:
            raise SpecError(f"the grid of a spec must not be empty; got the shape {shape}")
        for where, _ in array_fields(spec):
            if where.endswith(".ratio"):
                raise SpecError(f"stacked networks need one width; {where} is an array")
        if spec.has_cross_attention:
            raise needs_a_memory()
        if spec.has_dropout:
            raise NotCoveredError("stacked networks have no dropout; spec.without_dropout() takes it out")
        self.spec = spec
        self._grid = Grid(shape, n_copies)
        self.grid_shape, self.n_copies, self.n_networks = shape, n_copies, self._grid.n_networks
        with torch.device("meta"):
            ReferenceTransformer(self.point(0))  # refuses what no network has, with its own messages
        like = torch.empty(0, dtype=dtype, device=device)
        self.blocks = nn.ModuleList(StackedBlock(block, spec.d_model, self._grid, like) for block in spec.layers())

    def forward(self, x: Tensor) -> Tensor:
        """Run every network on its own tokens.

        Args:
            x: Shape ``(n_networks, n_tokens, d_model)`` or ``(n_networks, batch, n_tokens, d_model)``; expand a
                leading axis of size one to show all networks the same tokens.
        Returns:
            The same shape.
        Raises:
            BatchError: for any other shape.
        """
        n, d_model = self.n_networks, self.spec.d_model
        if x.ndim not in (3, 4) or x.shape[0] != n or x.shape[-1] != d_model or 0 in x.shape:
            raise BatchError(
                f"expected tokens of shape ({n}, n_tokens, {d_model}) or ({n}, batch, n_tokens, {d_model}); "
                f"got {tuple(x.shape)}"
            )
        stream = x.reshape(n, -1, d_model).mT.contiguous()
        return self.advance(stream, x.shape[-2]).mT.reshape(x.shape)

    def advance(self, stream: Tensor, n_tokens: int) -> Tensor:
        """Map a stream stored features first, ``(n_networks, d_model, batch * n_tokens)``, to the same shape."""
        for block in self.blocks:
            stream = block(stream, n_tokens)
        return stream

    def draw(self, seed: int) -> None:
        """Draw every weight and bias anew, in place.

        Each named parameter has one generator for the whole stack, seeded by a hash of ``seed`` and the name it has in
        a reference network; the networks' weights are consecutive pieces of its stream, in float32 on the CPU. A stack
        of one network is the reference network of that seed.
        """
        with torch.no_grad():
            for prefix, module in self.named_modules():
                if not isinstance(module, StackedBranch):
                    continue
                for name, part, std in module.random_parts():
                    generator = named_generator(seed, f"{prefix}.{name}")
                    in_place = part.is_contiguous() and part.dtype == torch.float32 and part.device.type == "cpu"
                    values = part if in_place else torch.empty(part.shape, dtype=torch.float32)
                    values.normal_(generator=generator).mul_(std.to(torch.float32))
                    if not in_place:
                        part.copy_(values)

    def point(self, index: int) -> Transformer:
        """Return the spec of one network, with single numbers in every field.

        Raises:
            DomainError: if there is no such network.
        """
        if not 0 <= index < self.n_networks:
            raise DomainError(f"index must lie in [0, {self.n_networks - 1}]; got {index}", value=index)
        place = np.unravel_index(index // self.n_copies, self.grid_shape)
        return at_point(self.spec, self.grid_shape, place)

    def single(self, index: int) -> ReferenceTransformer:
        """Return a copy of one network as a plain module.

        Args:
            index: Position in the shape ``grid_shape + (n_copies,)``, C order.
        Raises:
            DomainError: if there is no such network.
        """
        like = next(self.parameters())
        network = reference_network(self.point(index), dtype=like.dtype, device=like.device)
        found = dict(network.named_parameters())
        with torch.no_grad():
            for prefix, module in self.named_modules():
                if isinstance(module, StackedBranch):
                    parts = {name: part for name, part, _ in module.random_parts()}
                elif isinstance(module, StackedNorm):
                    parts = dict(module.named_parameters())
                else:
                    continue
                for name, part in parts.items():
                    target = found.get(f"{prefix}.{name}")
                    if target is not None:  # a bias whose scale is zero at this grid point does not exist there
                        target.copy_(part[index].view(target.shape))
        return network


def stacked_network(
    spec: Transformer,
    *,
    n_copies: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StackedTransformer:
    """Build many transformers as one module and draw their weights.

    Network ``i`` computes what :func:`reference_network` computes for the spec at its grid point; weights have standard
    deviation ``scale / sqrt(fan_in)`` with the scale of the network. All parameters, norms included, are trainable and
    belong to one network each.

    Drawing takes about 4 ns a weight on one core, more than a forward pass over a few hundred tokens needs.

    Args:
        spec: The transformer. Scales, biases, norm numbers, ``score_multiplier``, ``skip_scale`` and ``branch_scale``
            may be arrays; together they broadcast to the grid.
        n_copies: Independent weight draws of each grid point.
        seed: Which draw, see :meth:`StackedTransformer.draw`. Parts of one grid need different seeds.
        dtype: Type of the parameters.
        device: Where the parameters live; the draw does not depend on it.
    Raises:
        SpecError: for arrays that do not broadcast, an array of MLP ratios, or heads that do not divide ``d_model``.
        NotCoveredError: for grouped key and value heads, dropout, or a user's numpy function.
        DomainError: if ``n_copies`` is no positive integer.
    """
    model = StackedTransformer(spec, n_copies, dtype, device)
    model.draw(seed)
    return model


def _bias_field(field: str) -> str:
    """Return the name of the bias scale beside a weight scale."""
    return f"{field.removeprefix('mlp_')}_bias"
