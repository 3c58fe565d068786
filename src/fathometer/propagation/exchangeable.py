r"""The Markov chain on two numbers: every token alike.

Forward state: ``q``, the mean square per coordinate, and ``p``, the mean overlap of two different tokens. Backward
state: ``J`` and ``K``, the same two numbers for gradients. One sublayer

.. math:: x \leftarrow N_s(\mu x + \tau\, \mathrm{drop}_\delta(N_o(B(N_i(x)))))

acts forward by moments and backward by the 2 x 2 transfer matrix

.. math:: \Bigl[\mu^2 + \tau^2\, \mathrm{diag}(\hat q_i, \hat p_i)\; T_B\;
          \mathrm{diag}\bigl(\tfrac{\hat q_o}{1 - \delta}, \hat p_o\bigr)\Bigr] \mathrm{diag}(\hat q_s, \hat p_s)

with hats for the slope averages of each norm and ``T_B`` the transfer matrix of the branch. Dropout at rate delta
divides mean squares by ``1 - delta`` and leaves what two tokens share.

Sources: forward maps and the MLP transfer, Alekseev, arXiv:2604.11890v3; centred attention, Giorlandino and Goldt,
arXiv:2505.24333, at finite n; dropout, Kedia et al., arXiv:2403.09635; exact finite-n attention transfer, the score
path and dropout on attention weights, derived in the documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fathometer.attention import (
    Annealed,
    Closure,
    Uniform,
    UniformLargeN,
    along_cosine,
)
from fathometer.errors import DomainError, NotCoveredError
from fathometer.kernels import FixedMomentKernel, PairKernel, ProjectionKernel, activation_kernel, norm_kernel
from fathometer.propagation.branch_maps import (
    AttentionMap,
    GatedMLPMap,
    MLPMap,
    Moments,
    effective_coupling,
)
from fathometer.propagation.cross import CrossAttentionMap, Memory
from fathometer.propagation.trajectory import StreamOverflowError, Trajectory
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    SelfAttention,
    Sublayer,
    Transformer,
)


class Record(NamedTuple):
    """What the transfer matrix of one sublayer needs from its forward pass.

    ``known`` is what the branch computed there for itself, ``None`` where it is to be computed again.
    """

    stream: Moments
    normed: Moments
    branch: Moments
    residual: Moments
    known: Any = None


class HalfLayer:
    """One sublayer as a map on moments, and its transfer matrix.

    Args:
        sublayer: What it describes.
        n_tokens, closure: Number of tokens, and how the softmax is averaged.
        activation: The kernel of an MLP's activation, by default that of its name.
        memory: What cross attention reads.
    Raises:
        NotCoveredError: for cross attention without a memory.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        n_tokens: int,
        closure: Closure,
        *,
        activation: PairKernel | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.sublayer = sublayer
        branch = sublayer.branch
        self.map: AttentionMap | CrossAttentionMap | MLPMap | GatedMLPMap
        if isinstance(branch, SelfAttention):
            self.map = AttentionMap(branch, n_tokens, closure)
        elif isinstance(branch, CrossAttention):
            if memory is None:
                raise without_memory()
            self.map = CrossAttentionMap(branch, n_tokens, closure, memory)
        else:
            kernel = activation_kernel(branch.activation) if activation is None else activation
            self.map = MLPMap(branch, kernel) if isinstance(branch, MLP) else GatedMLPMap(branch, kernel)
        self._norms = [
            None if norm is None else norm_kernel(norm)
            for norm in (sublayer.input_norm, sublayer.output_norm, sublayer.stream_norm)
        ]

    def forward(self, stream: Moments) -> tuple[Moments, Moments, Record]:
        """Return the new stream, what the branch added to it, and the record for :meth:`transfer`."""
        skip, weight = self.sublayer.skip_scale**2, self.sublayer.branch_scale**2
        normed = self._normalise(0, stream)
        known: Any = self.map.inspect(normed)
        branch = self.map.forward(normed, known)
        out = self._normalise(1, branch)
        added = Moments(weight * self._drop(out.q), weight * out.p)
        residual = Moments(skip * stream.q + added.q, skip * stream.p + added.p)
        return self._normalise(2, residual), added, Record(stream, normed, branch, residual, known)

    def transfer(self, record: Record) -> Any:
        """Return the transfer matrices of a stack of records, shape ``(2, 2, *stack)``."""
        (jj, jk), (kj, kk) = self.entries(record)
        stacked = np.stack(np.broadcast_arrays(jj, jk, kj, kk))
        return stacked.reshape((2, 2, *stacked.shape[1:]))

    def entries(self, record: Record) -> list[list[Any]]:
        """Return the entries of the transfer matrix; zeros stay plain numbers."""
        skip, weight = self.sublayer.skip_scale**2, self.sublayer.branch_scale**2
        rows = self._slopes(0, record.stream)
        columns = self._columns(record)
        after = self._slopes(2, record.residual)
        known: Any = self.map.inspect(record.normed) if record.known is None else record.known
        matrix = self.map.transfer(record.normed, known)
        weighted = [weight * row for row in rows] if rows[0] is not rows[1] else [weight * rows[0]] * 2
        out: list[list[Any]] = []
        for i in range(2):
            through = [_times(weighted[i] * matrix[i][j], columns[j]) for j in range(2)]
            through[i] = skip + through[i]
            out.append([_times(through[j], after[j]) for j in range(2)])
        return out

    def to_memory(self, record: Record) -> Any:
        """Return the matrices that carry (J, K) from the output of cross attention to its memory."""
        assert isinstance(self.map, CrossAttentionMap)
        weight = self.sublayer.branch_scale**2
        columns, after = self._columns(record), self._slopes(2, record.residual)
        rows = self.map.to_memory(record.normed, self.map.inspect(record.normed))
        entries = [weight * row[j] * columns[j] * after[j] for row in rows for j in range(2)]
        stacked = np.stack(np.broadcast_arrays(*entries))
        return stacked.reshape((2, 2, *stacked.shape[1:]))

    def at_branch(self, record: Record, own: Any, shared: Any) -> tuple[Any, Any]:
        """Return (J, K) of gradients at the branch output; of centred attention, before the mean is subtracted.

        Args:
            record: The forward pass.
            own, shared: J and K of gradients at the output of the sublayer.
        """
        weight = self.sublayer.branch_scale**2
        columns, after = self._columns(record), self._slopes(2, record.residual)
        own, shared = weight * columns[0] * after[0] * own, weight * columns[1] * after[1] * shared
        return self.map.before_centring(own, shared) if isinstance(self.map, AttentionMap) else (own, shared)

    def _columns(self, record: Record) -> tuple[Any, Any]:
        """Return what dropout and the output norm do to (J, K)."""
        own, shared = self._slopes(1, record.branch)
        return self._drop(own), shared

    def _drop(self, mean_square: Any) -> Any:
        rate = self.sublayer.dropout
        return mean_square if isinstance(rate, float) and rate == 0.0 else mean_square / (1 - rate)

    def _normalise(self, slot: int, x: Moments) -> Moments:
        kernel = self._norms[slot]
        if kernel is None:
            return x
        p = kernel.overlap(x.q, x.q, x.p)
        if isinstance(kernel, ProjectionKernel):  # one number, also on a grid
            return Moments(kernel.second_moment, p)
        return Moments(kernel.overlap(x.q, x.q, x.q), p)

    def _slopes(self, slot: int, x: Moments) -> tuple[Any, Any]:
        kernel = self._norms[slot]
        if kernel is None:
            return 1.0, 1.0
        own = kernel.slope_overlap(x.q, x.q, x.q)
        return own, own if isinstance(kernel, ProjectionKernel) else kernel.slope_overlap(x.q, x.q, x.p)


def without_memory() -> NotCoveredError:
    """Return the error for a decoder met where nothing tells what its cross attention reads."""
    return NotCoveredError(
        "cross attention reads a memory, which this function does not have: build an EncoderDecoder and use "
        "propagate_encoder_decoder"
    )


def _times(value: Any, factor: Any) -> Any:
    """Return a product, without a pass over an array where the factor is the plain number one."""
    return value if isinstance(factor, float) and factor == 1.0 else value * factor


def fixed_activation(sublayer: Sublayer) -> FixedMomentKernel | None:
    """Return the tabulated kernel of an activation whose second moment the norm in front of it fixes, else ``None``."""
    branch, norm = sublayer.branch, sublayer.input_norm
    if not isinstance(norm, (LayerNorm, RMSNorm)) or not isinstance(branch, (MLP, GatedMLP)):
        return None
    if isinstance(branch, MLP):
        q = branch.mlp_in**2 * norm.gain**2 + branch.in_bias**2
    else:
        q = branch.gate**2 * norm.gain**2
    try:
        return FixedMomentKernel(activation_kernel(branch.activation), q)
    except ArithmeticError:  # too sharp for the finest table: evaluated directly
        return None


def tabulated_closure(sublayer: Sublayer, n_tokens: int, closure: Closure) -> Closure:
    """Return the closure tabulated over the cosine where that alone varies, else itself."""
    branch, norm = sublayer.branch, sublayer.input_norm
    if not isinstance(branch, SelfAttention) or not isinstance(norm, (LayerNorm, RMSNorm)):
        return closure
    q = norm.gain**2
    strength = effective_coupling(branch, q) * q**2
    if np.ndim(strength) or isinstance(closure, (Annealed, Uniform, UniformLargeN)):  # those are cheaper than a table
        return closure
    return along_cosine(closure, n_tokens, float(strength))


class BlockMap:
    """One block as a map on moments, with its transfer matrix: the sublayers composed.

    Args:
        block: What it describes.
        n_tokens, closure: Number of tokens, and how the softmax is averaged.
        tabulate: Whether activations behind LayerNorm are tabulated, which pays for large grids.
    """

    def __init__(self, block: Block, n_tokens: int, closure: Closure, *, tabulate: bool = False) -> None:
        self.steps = [
            HalfLayer(
                sublayer,
                n_tokens,
                tabulated_closure(sublayer, n_tokens, closure) if tabulate else closure,
                activation=fixed_activation(sublayer) if tabulate else None,
            )
            for sublayer in block.sublayers
        ]
        self.n_others = closure.others(n_tokens)

    def forward(self, stream: Moments) -> Moments:
        """Return the stream after the block."""
        for step in self.steps:
            stream, _, _ = step.forward(stream)
        return stream

    def transfer(self, stream: Moments) -> Any:
        """Return the matrix that carries (J, K) back through the block, shape ``(2, 2, *batch)``."""
        product: Any = None
        for step in self.steps:
            stream, _, record = step.forward(stream)
            matrix = step.transfer(record)
            product = matrix if product is None else np.einsum("ij...,jk...->ik...", product, matrix)
        return product


def check_tokens(n_tokens: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, (int, np.integer)) or n_tokens < 1:
        raise DomainError(f"n_tokens must be an integer >= 1; got {n_tokens!r}", value=n_tokens)


def check_moments(n_tokens: int, q: Any, p: Any) -> Moments:
    """Validate initial moments and return them as float64 scalars or arrays.

    Raises:
        DomainError: unless q > 0 and -q/(n-1) <= p <= q; carries the first offending value and index.
    """
    check_tokens(n_tokens)
    q_array, p_array = np.broadcast_arrays(np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64))
    low = -q_array / (n_tokens - 1) if n_tokens > 1 else -q_array
    slack = 1e-12 * np.abs(q_array)
    good = np.isfinite(q_array) & (q_array > 0) & (p_array <= q_array + slack) & (p_array >= low - slack)
    if not np.all(good):
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        bad_q, bad_p = float(q_array[index]), float(p_array[index])
        where = f" at index {index}" if index else ""
        raise DomainError(
            f"q must be positive and p must lie in [-q/(n_tokens-1), q]; got q={bad_q:g}, p={bad_p:g} with "
            f"n_tokens={n_tokens}{where}. Did you pass a cosine? p is cosine * q.",
            value=(bad_q, bad_p),
            index=index or None,
        )
    return Moments(q_array[()], p_array[()])


def propagate(
    spec: Transformer, *, n_tokens: int, q: Any, p: Any, closure: Closure, memory: Memory | None = None
) -> Trajectory:
    """Carry (q, p) through every sublayer and build the transfer matrices of (J, K).

    Args:
        spec: The transformer. Its numbers may be arrays; they broadcast with ``q`` and ``p`` to one batch shape.
        n_tokens: Number of tokens seen by attention.
        q: Mean square per coordinate at the input of the first block.
        p: Mean overlap of two different tokens there.
        closure: How the softmax is averaged.
        memory: What the cross attention of a decoder reads, see
            :func:`~fathometer.propagation.propagate_encoder_decoder`.
    Returns:
        The trajectory. Cost: one pass over the depth, O(batch) work and memory a sublayer; only the forward pass is
        sequential, the transfer matrices of a run of equal blocks are built in one vectorised call.
    Raises:
        DomainError: for moments no set of tokens can have, or a single stack whose stream overflows, naming the
            sublayer. On a grid overflowing points hold infinities; :attr:`Trajectory.status` marks them.
        NotCoveredError: for cross attention without a memory.
    """
    stream = check_moments(n_tokens, q, p)
    streams: list[Moments] = [stream]
    added: list[Moments] = []
    records: list[Record] = []
    runs: list[tuple[list[HalfLayer], int, int]] = []
    for block in spec.blocks:
        steps = [HalfLayer(sublayer, n_tokens, closure, memory=memory) for sublayer in block.sublayers]
        runs.append((steps, len(records), block.repeat))
        with np.errstate(over="ignore", invalid="ignore"):  # a stream that overflows is reported below
            for step in steps * block.repeat:
                stream, branch, record = step.forward(stream)
                streams.append(stream)
                added.append(branch)
                records.append(record)
    shape = np.broadcast_shapes(np.shape(stream.q), np.shape(stream.p))
    if shape == () and not np.isfinite(stream.q):
        _refuse_overflow(streams)
    transfer = np.empty((len(records), 2, 2, *shape))
    to_memory = None if memory is None else np.zeros_like(transfer)
    attention: dict[str, Any] = {}
    for steps, start, repeat in runs:
        for offset, step in enumerate(steps):
            where = slice(start + offset, start + offset + repeat * len(steps), len(steps))
            stack = _stack_records(records[where], shape)
            transfer[where] = np.moveaxis(step.transfer(stack), 2, 0)
            if to_memory is not None and isinstance(step.map, CrossAttentionMap):
                to_memory[where] = np.moveaxis(step.to_memory(stack), 2, 0)
            if isinstance(step.map, (AttentionMap, CrossAttentionMap)):
                _collect(attention, step.map, stack, np.arange(len(records))[where], shape)
    return Trajectory(
        spec=spec,
        n_tokens=int(n_tokens),
        n_others=closure.others(int(n_tokens)),
        closure=closure.name,
        borders=block_borders(spec),
        q=_stack([s.q for s in streams], shape),
        p=_stack([s.p for s in streams], shape),
        added_q=_stack([a.q for a in added], shape),
        added_p=_stack([a.p for a in added], shape),
        is_attention=np.array([s.is_attention for b in spec.layers() for s in b.sublayers]),
        transfer=transfer,
        attention={
            key: np.concatenate(value)[np.argsort(np.concatenate(attention["index"]))]
            for key, value in attention.items()
            if key != "index"
        },
        to_memory=to_memory,
    )


def _refuse_overflow(streams: Sequence[Moments]) -> None:
    first = next(i for i, moments in enumerate(streams) if not np.isfinite(moments.q))
    level = float(streams[first - 1].q)
    raise StreamOverflowError(
        f"the stream overflows at sublayer {first - 1} of {len(streams) - 1}: q is {level:.3g} one sublayer before. "
        "Shorten the stack, scale branches down, or put norms in front of them",
        value=level,
        index=(first - 1,),
    )


def block_borders(spec: Transformer) -> Any:
    """Return the half-layer index at which every block starts, and the end; shape ``(n_layers + 1,)``."""
    counts = [len(block.sublayers) for block in spec.blocks for _ in range(block.repeat)]
    return np.concatenate([[0], np.cumsum(counts)])


def _collect(
    attention: dict[str, Any],
    step: AttentionMap | CrossAttentionMap,
    stack: Record,
    index: Any,
    shape: tuple[int, ...],
) -> None:
    statistics, variance, _ = step.inspect(stack.normed, entropy=True)
    full = (len(index), *shape)
    attention.setdefault("index", []).append(index)
    attention.setdefault("attention_entropy", []).append(np.broadcast_to(statistics.entropy, full))
    attention.setdefault("inverse_participation", []).append(np.broadcast_to(statistics.y2, full))
    attention.setdefault("row_overlap", []).append(np.broadcast_to(statistics.y12, full))
    attention.setdefault("logit_variance", []).append(np.broadcast_to(variance, full))


def _stack(values: Sequence[Any], shape: tuple[int, ...]) -> Any:
    if shape == ():
        return np.array(values, dtype=np.float64)
    return np.stack([np.broadcast_to(value, shape) for value in values])


def _stack_records(records: Sequence[Record], shape: tuple[int, ...]) -> Record:
    return Record(
        *(
            Moments(
                _stack([getattr(r, name).q for r in records], shape),
                _stack([getattr(r, name).p for r in records], shape),
            )
            for name in ("stream", "normed", "branch", "residual")
        )
    )
