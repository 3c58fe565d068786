"""Tangent kernels of encoder-decoders against gradients of finite networks, closed forms and the backward maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fathometer.attention import Annealed, Exact, Uniform, UniformLargeN
from fathometer.errors import BatchError, DomainError, NotCoveredError, SpecError
from fathometer.models import reference_encoder_decoder
from fathometer.observables import encoder_decoder_tangent_kernel
from fathometer.observables.tangent import TangentKernel
from fathometer.propagation.cross_gram import CrossGramHalfLayer
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    EncoderDecoder,
    Head,
    LayerNorm,
    PatchStem,
    RMSNorm,
    SelfAttention,
    Sublayer,
    TokenStem,
    Transformer,
)

Array = np.ndarray
Draws = dict[tuple[str, object], Array]
OUTPUTS = 4
ENCODER_STEM = TokenStem(token=1.0, position=0.5, segment=0.7)
DECODER_STEM = TokenStem(token=1.0, position=0.6, segment=0.5)
HEAD = Head(scale=1.1, norm=LayerNorm(gain=0.9))


def network(
    *, d_model: int, d_memory: int, query: float = 0.95, key: float = 0.85, layers: int = 2, post: bool = False
) -> EncoderDecoder:
    """Return different scales everywhere; ``post`` puts norms behind branches and on the stream."""

    def sublayer(branch: SelfAttention | CrossAttention | MLP) -> Sublayer:
        if post:
            return Sublayer(branch=branch, output_norm=RMSNorm(gain=0.8), stream_norm=LayerNorm(gain=1.1))
        return Sublayer(branch=branch, input_norm=LayerNorm(gain=1.1), branch_scale=0.9, skip_scale=0.95)

    biases = {"value_bias": 0.4, "output_bias": 0.2, "n_heads": 8}
    own = SelfAttention(query=query, key=key, value=1.2, output=0.9, **biases)
    cross = CrossAttention(query=key, key=query, value=1.3, output=1.1, d_memory=d_memory, **biases)
    mlp = MLP(mlp_in=1.2, mlp_out=1.0, activation="relu", ratio=1.0)
    encoder = Block(sublayers=(sublayer(own), sublayer(mlp)))
    decoder = Block(sublayers=(sublayer(own), sublayer(cross), sublayer(mlp)), repeat=layers)
    return EncoderDecoder(
        encoder=Transformer(blocks=(encoder,), d_model=d_memory),
        decoder=Transformer(blocks=(decoder,), d_model=d_model),
        memory_norm=None if post else LayerNorm(gain=0.8),
    )


def grouped(name: str) -> tuple[str, object]:
    """Return role and place of a parameter of the reference network."""
    parts = name.split(".")
    if parts[0] == "memory_norm":
        return "norm_gain", ("encoder", None)
    place = (parts[0], int(parts[2]))
    if "norm" in parts[-2]:
        return "norm_gain", place
    return parts[-2] + ("_bias" if parts[-1] == "bias" else ""), place


def drawn_kernels(spec: EncoderDecoder, tokens: tuple[list[int], list[int]], seed: int, shared: bool) -> Draws:
    """Return the tangent kernels of one finite network, averaged over its outputs, per unit factor."""
    model = reference_encoder_decoder(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, tuple[tuple[str, object], Tensor, int]] = {}

    def table(role: str, stack: str, width: int, std: float) -> Tensor:
        values = (torch.randn(6, width, generator=generator) * std).requires_grad_()
        entries[f"{stack} {role}"] = ((role, (stack, None)), values, 1)
        return values

    streams, first = [], None
    stems = {"encoder": (ENCODER_STEM, spec.encoder), "decoder": (DECODER_STEM, spec.decoder)}
    for ids, (stack, (stem, trunk)) in zip(tokens, stems.items(), strict=True):
        words = first if shared and first is not None else table("token_embedding", stack, trunk.d_model, stem.token)
        first = words
        positions = table("position_embedding", stack, trunk.d_model, stem.position)
        segment = table("segment_embedding", stack, trunk.d_model, stem.segment)
        streams.append((words[ids] + positions[: len(ids)] + segment[0])[None])
    if shared:
        entries["encoder token_embedding"] = (("token_embedding", None), first, 1)
    n = spec.decoder.d_model
    head = (torch.randn(OUTPUTS, n, generator=generator) * HEAD.scale / n**0.5).requires_grad_()
    gain = torch.full((n,), float(HEAD.norm.gain), requires_grad=True)
    entries["head"] = (("head", ("decoder", None)), head, n)
    entries["gain"] = (("norm_gain", ("decoder", None)), gain, 1)
    for name, parameter in model.named_parameters():
        entries[name] = (grouped(name), parameter, parameter.shape[-1] if parameter.ndim == 2 else 1)
    out = F.linear(F.layer_norm(model(*streams)[0], (n,), gain, None, 1e-12), head)
    parameters = [parameter for _, parameter, _ in entries.values()]
    length = len(out)
    gradients = [
        torch.autograd.grad(out[a, i], parameters, retain_graph=True) for i in range(OUTPUTS) for a in range(length)
    ]
    kernels: Draws = {}
    for (group, _, fan_in), *rows in zip(entries.values(), *gradients, strict=True):
        flat = torch.stack(rows).reshape(OUTPUTS, length, -1)
        gram = (flat @ flat.mT).mean(dim=0).numpy() / fan_in
        kernels[group] = kernels[group] + gram if group in kernels else gram
    return kernels


def check(theory: TangentKernel, draws: list[Draws], *, silent: tuple[str, ...] = ()) -> None:
    """Compare every entry of every group within 4.5 standard errors or 5 % of its largest."""
    assert set(draws[0]) | {group for group in theory.groups if group[0] in silent} == set(theory.groups)
    for group in draws[0]:
        found = np.stack([draw[group] for draw in draws])
        error = found.std(axis=0, ddof=1) / len(found) ** 0.5
        expected = theory.groups[group]
        size = np.abs(expected).max()
        assert error.max() < 0.06 * size, f"{group}: too few draws to tell anything"
        miss = np.abs(found.mean(axis=0) - expected)
        assert np.all(miss <= np.maximum(4.5 * error, 0.05 * size)), (
            f"{group}: {found.mean(axis=0)} for {expected} +- {error}"
        )


ABSENT = ("query_bias", "key_bias", "mlp_in_bias", "mlp_out_bias", "norm_bias", "head_bias")  # of the reference network


@pytest.mark.parametrize(
    ("tokens", "options", "shared", "draws"),
    [
        (([0, 1, 2], [1, 2, 3]), {"d_model": 160, "d_memory": 128}, False, 130),
        (([0, 1, 2], [1, 2, 3]), {"d_model": 128, "d_memory": 128, "layers": 1}, True, 150),
        (([0, 1, 2], [1, 2, 3]), {"d_model": 128, "d_memory": 96, "layers": 1, "post": True}, False, 150),
        (([0, 1, 1], [2, 0, 2]), {"d_model": 128, "d_memory": 128, "layers": 1, "query": 0.6, "key": 0.9}, False, 150),
    ],
    ids=["two_layers", "shared", "post_norm", "repeated"],
)
def test_every_group_against_gradients_of_finite_networks(tokens, options, shared, draws) -> None:
    spec = network(**options)
    theory = encoder_decoder_tangent_kernel(
        ENCODER_STEM,
        DECODER_STEM,
        spec,
        HEAD,
        encoder_tokens=tokens[0],
        decoder_tokens=tokens[1],
        shared_embedding=shared,
    )
    check(theory, [drawn_kernels(spec, tokens, seed, shared) for seed in range(draws)], silent=ABSENT)


def overlap(matrix: Array) -> Array:
    """Return what LayerNorm without gain makes of a Gram matrix."""
    return matrix * slope(matrix)


def slope(matrix: Array) -> Array:
    size = np.sqrt(np.diagonal(matrix))
    return 1 / np.outer(size, size)


def test_no_scores_by_hand() -> None:
    """With queries of zero, every weight is 1/N whatever the tokens; the memory's keys then get no gradient."""
    rng = np.random.default_rng(3)
    into, out, gain, v, o, k, s = 1.3, 0.7, 0.8, 1.2, 0.9, 1.4, 1.1
    encoder = Sublayer(branch=MLP(mlp_in=into, mlp_out=out, activation="identity"))
    cross = CrossAttention(query=0.0, key=k, value=v, output=o, score_multiplier=0.5)
    decoder = Sublayer(branch=cross, input_norm=LayerNorm())
    spec = EncoderDecoder(
        encoder=Transformer(blocks=(Block(sublayers=(encoder,)),), d_model=64),
        decoder=Transformer(blocks=(Block(sublayers=(decoder,)),), d_model=64),
        memory_norm=LayerNorm(gain=gain),
    )
    patches, words = rng.normal(size=(4, 6)), [0, 1, 0]
    source = patches @ patches.T / 6
    found = encoder_decoder_tangent_kernel(
        PatchStem(patch=1.0),
        TokenStem(token=0.9, position=0.4),
        spec,
        Head(scale=s),
        encoder_patches=patches,
        decoder_tokens=words,
        rates={"value": 3.0},
    )
    same = np.equal.outer(words, words) * 1.0
    stream = 0.81 * same + 0.16 * np.eye(3)
    raw = source * (1 + into**2 * out**2)
    memory, at_memory = gain**2 * overlap(raw), gain**2 * slope(raw)
    centred = memory - memory.mean(axis=0) - memory.mean(axis=1)[:, None] + memory.mean()
    last = stream + v**2 * o**2 * memory.mean()
    expected = {
        ("patch_embedding", "encoder", None): v**2 * o**2 * np.mean(at_memory * raw) * np.ones((3, 3)),
        ("mlp_in", "encoder", 0): v**2 * o**2 * np.mean(at_memory * out**2 * source) * np.ones((3, 3)),
        ("mlp_out", "encoder", 0): v**2 * o**2 * np.mean(at_memory * into**2 * source) * np.ones((3, 3)),
        ("norm_gain", "encoder", None): v**2 * o**2 * np.mean(overlap(raw)) * np.ones((3, 3)),
        ("norm_bias", "encoder", None): v**2 * o**2 * np.ones((3, 3)),
        ("token_embedding", "decoder", None): same,
        ("position_embedding", "decoder", None): np.eye(3),
        ("output", "decoder", 0): v**2 * memory.mean() * np.ones((3, 3)),
        ("value", "decoder", 0): 3.0 * o**2 * memory.mean() * np.ones((3, 3)),
        ("query", "decoder", 0): 0.25 * (k * v * o) ** 2 * overlap(stream) * np.mean(centred * memory),
        ("query_bias", "decoder", 0): 0.25 * (k * v * o) ** 2 * np.mean(centred * memory) * np.ones((3, 3)),
        ("key", "decoder", 0): np.zeros((3, 3)),
        ("key_bias", "decoder", 0): np.zeros((3, 3)),
        ("value_bias", "decoder", 0): o**2 * np.ones((3, 3)),
    }
    for (role, *place), kernel in expected.items():
        np.testing.assert_allclose(
            found.groups[role, tuple(place)], s**2 * slope(last) * kernel, rtol=1e-8, atol=1e-12, err_msg=role
        )
    np.testing.assert_allclose(found.output, s**2 * overlap(last), rtol=1e-10)
    assert found.total(["output"]) == pytest.approx(found.groups["output", ("decoder", 0)])


def random_gram(n: int, seed: int) -> Array:
    x = np.random.default_rng(seed).normal(size=(n, 2 * n))
    return x @ x.T / (2 * n)


def equal(n: int, q: float, p: float) -> Array:
    return p + (q - p) * np.eye(n)


def step(memory: Array, stream: Array, closure=None, *, dropout: float = 0.0, multiplier: float = 1.0):
    branch = CrossAttention(
        query=1.1, key=0.9, value=1.2, output=0.8, attention_dropout=dropout, score_multiplier=multiplier
    )
    sublayer = Sublayer(
        branch=branch,
        input_norm=LayerNorm(gain=1.2),
        output_norm=RMSNorm(gain=0.9),
        stream_norm=LayerNorm(),
        dropout=dropout,
        skip_scale=0.9,
        branch_scale=0.7,
    )
    return CrossGramHalfLayer(sublayer, stream, memory, Exact() if closure is None else closure)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("closure", [Exact(), Annealed(), Uniform()], ids=lambda c: c.name)
def test_forward_maps_are_adjoint_to_backward_maps(closure, dropout) -> None:
    found = step(random_gram(5, 1), random_gram(3, 2), closure, dropout=dropout)
    gradient, tangent, of_memory = random_gram(3, 3), random_gram(3, 4), random_gram(5, 5)
    assert np.sum(gradient * found.forward(tangent)) == pytest.approx(np.sum(found.backward(gradient) * tangent))
    there = np.sum(gradient * found.from_memory(of_memory))
    assert there == pytest.approx(np.sum(found.to_memory(gradient) * of_memory), rel=1e-12)


def jacobians(scores: Array) -> Iterator[Array]:
    """Yield softmax weights and their Jacobians, shapes ``(draws, n, N)`` and ``(draws, n, N, N)``."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    yield weights
    yield weights[..., None] * np.eye(scores.shape[-1]) - weights[..., None] * weights[..., None, :]


def test_operators_against_softmax_rows_drawn_at_random() -> None:
    """Both operators over a memory of tokens that are alike, at scores that are not small."""
    memory, stream = equal(4, 1.2, 0.3), equal(2, 1.0, 0.4)
    rows = step(memory, stream, multiplier=1.2).rows
    factor = (1.1 * 0.9 * 1.2) ** 2
    normed = 1.44 * stream
    noise = np.random.default_rng(0).normal(size=(100_000, 2, 4))
    scores = np.sqrt(factor) * np.linalg.cholesky(normed) @ noise @ np.linalg.cholesky(memory).T
    weights, jacobian = jacobians(scores)
    for tangent in (memory, equal(4, 1.0, 0.0), equal(4, 0.7, -0.2)):
        for read, drawn in (
            (rows.forward(tangent), np.einsum("pac,pbd,cd->pab", weights, weights, tangent, optimize=True)),
            (
                rows.score_response(tangent),
                np.einsum("pace,ef,pbfd,cd->pab", jacobian, memory, jacobian, tangent, optimize=True),
            ),
        ):
            error = drawn.std(axis=0) / len(drawn) ** 0.5
            assert np.all(np.abs(read - drawn.mean(axis=0)) <= 4.5 * error + 1e-4 * np.abs(read).max())
    both = rows.forward(tangent) + factor * normed * rows.score_response(tangent)
    np.testing.assert_allclose(rows.from_memory(tangent), both, rtol=1e-12)


SMALL = network(d_model=64, d_memory=64, layers=1)
WORDS = {"encoder_tokens": [0, 1, 2], "decoder_tokens": [1, 2, 3]}


def kernel(**options) -> TangentKernel:
    arguments = {"encoder_stem": ENCODER_STEM, "decoder_stem": DECODER_STEM, "spec": SMALL, "head": HEAD} | WORDS
    return encoder_decoder_tangent_kernel(**arguments | options)


def test_a_shared_table_adds_two_tables_and_a_tied_head_a_third() -> None:
    apart, shared, tied = kernel(), kernel(shared_embedding=True), kernel(shared_embedding=True, head=Head(tied=True))
    stems = sum(apart.groups["token_embedding", (stack, None)] for stack in ("encoder", "decoder"))
    np.testing.assert_allclose(shared.groups["token_embedding", None], stems)
    np.testing.assert_allclose(apart.roles["token_embedding"], stems)
    plain = kernel(shared_embedding=True, head=Head(scale=8.0))  # sqrt(d_model) times the table's deviation of 1
    np.testing.assert_allclose(
        tied.roles["token_embedding"], plain.roles["token_embedding"] + 64 * plain.roles["head"], rtol=1e-12
    )
    assert "head" not in tied.roles


def test_rates_pooling_dropout_and_closures() -> None:
    full = kernel()
    np.testing.assert_allclose(kernel(rates={"key": 2.5}).roles["key"], 2.5 * full.roles["key"])
    for pooling, expected in (("mean", lambda x: x.mean()), ("first", lambda x: x[0, 0])):
        pooled = kernel(head=Head(scale=1.1, norm=LayerNorm(gain=0.9), pooling=pooling))
        for group, matrix in full.groups.items():
            np.testing.assert_allclose(pooled.groups[group], [[expected(matrix)]])
    uniform = kernel(closure="uniform")
    assert np.all(uniform.roles["query"] == 0) and np.all(uniform.roles["value"] > 0)
    damped = kernel(norm_epsilon=0.3)
    assert damped.output[0, 0] < full.output[0, 0]
    for group, matrix in full.groups.items():
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-12, err_msg=str(group))
        assert np.linalg.eigvalsh(matrix).min() > -1e-9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": {"quary": 1.0}}, SpecError, "query"),
        ({"rates": {"query": -1.0}}, DomainError, "learning-rate factor"),
        ({"norm_epsilon": float("nan")}, DomainError, "norm_epsilon"),
        ({"encoder_tokens": [[0, 1], [1, 2]]}, NotCoveredError, "encoder: 2"),
        ({"encoder_tokens": None}, BatchError, "tokens"),
        ({"closure": UniformLargeN()}, NotCoveredError, "self-attention"),
        ({"shared_embedding": True, "encoder_stem": TokenStem(token=0.5)}, SpecError, "one scale"),
        ({"shared_embedding": True, "spec": network(d_model=64, d_memory=32)}, SpecError, "one width"),
        ({"shared_embedding": True, "encoder_stem": PatchStem(patch=1.0)}, SpecError, "TokenStems"),
        ({"decoder_stem": PatchStem(patch=1.0), "head": Head(tied=True)}, SpecError, "tied head"),
        ({"head": Head(scale=np.ones(2))}, SpecError, "head"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        kernel(**options)
