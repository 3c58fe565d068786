"""Tangent kernels against printed numbers, a naive twin, closed forms and each other."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fathometer.attention import (
    Annealed,
    Exact,
    ExchangeableRows,
    JointAverages,
    JointRows,
    QuadratureRows,
    SampledRows,
    Uniform,
    Visibility,
)
from fathometer.errors import BatchError, DomainError, NotCoveredError, SpecError
from fathometer.kernels import activation_kernel
from fathometer.observables import backward
from fathometer.observables.tangent import TangentKernel, tangent_kernel
from fathometer.propagation import propagate, propagate_gram, propagate_tangent, stem_gram
from fathometer.propagation.exchangeable import HalfLayer
from fathometer.propagation.gram_half_layer import GramHalfLayer
from fathometer.spec import (
    MLP,
    Block,
    Branch,
    Derf,
    GatedMLP,
    Head,
    LayerNorm,
    Network,
    PatchStem,
    RMSNorm,
    Scales,
    SelfAttention,
    Sublayer,
    TokenStem,
    Transformer,
    with_field,
)

Array = np.ndarray
UNIT = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
PAPER = ("patch_embedding", "position_embedding", "query", "key", "value", "output", "mlp_in", "mlp_out", "head")


def stack(*branches: Branch, norm: object = None, repeat: int = 1, **options: object) -> Transformer:
    """Return pre-norm sublayers of these branches."""
    norm = LayerNorm() if norm is None else norm
    sublayers = tuple(Sublayer(branch=branch, input_norm=norm, **options) for branch in branches)
    return Transformer(blocks=(Block(sublayers=sublayers, repeat=repeat),), d_model=64)


def worked(*, causal: bool) -> Network:
    trunk = Transformer.uniform(n_layers=1, d_model=64, n_heads=4, norm=LayerNorm(), scales=UNIT, causal=causal)
    return Network(stem=PatchStem(patch=1.0), trunk=trunk, head=Head())


def random_gram(n: int, seed: int = 0, *, dimensions: int = 8) -> Array:
    """Return the Gram matrix of unequal random tokens that share a part."""
    x = np.random.default_rng(seed).standard_normal((n, dimensions)) + 0.6
    return x @ x.T / dimensions


# The two-token example -----------------------------------------------------------------------------------------------

START = [[1.0, 0.5], [0.5, 1.0]]
#: Entries 11, 12 and 22 after attention and after the MLP, bidirectional and masked.
GRAMS = {
    False: ((1.7933790359, 1.2714283256, 1.7933790359), (2.2186005184, 1.5746573810, 2.2186005184)),
    True: ((2.0, 1.25, 1.7933790359), (2.4252214826, 1.5346345236, 2.2186005184)),
}
TANGENTS = {
    False: ((5.2807488687, 3.4867116895, 5.2807488687), (7.5041107692, 4.8120934975, 7.5041107692)),
    True: ((6.0, 3.25, 5.2807488687), (8.2486249452, 4.4251342061, 7.5041107692)),
}
TOTALS = {False: (5.3823623076, 3.8787295529, 5.3823623076), True: (5.4011841823, 3.5692960477, 5.3823623076)}
GROUPS = {
    False: {
        "patch_embedding": 1.0644980047,
        "position_embedding": 0.9730403292,
        "output": 0.4485009530,
        "value": 0.4485009530,
        "query": 0.0253461411,
        "key": 0.0253461411,
        "mlp_out": 0.1916620316,
        "mlp_in": 0.2054677540,
        "head": 1.0,
        "head_bias": 1.0,
    },
    True: {
        "patch_embedding": 1.0126295199,
        "position_embedding": 1.0126295199,
        "output": 0.5063147600,
        "value": 0.5063147600,
        "query": 0.0,
        "key": 0.0,
        "mlp_out": 0.1753330513,
        "mlp_in": 0.1879625712,
        "head": 1.0,
        "head_bias": 1.0,
    },
}


def entries(matrix: Array) -> tuple[float, ...]:
    return matrix[0, 0], matrix[0, 1], matrix[1, 1]


def test_a_row_of_one_key_tilts_no_other_row() -> None:
    """Two masked tokens are exchangeable to the second one, so a closure that is exact on those is exact here."""
    trajectory = propagate_gram(worked(causal=True).trunk, START, closure=Exact())
    after = trajectory.grams[1]
    np.testing.assert_allclose([after[0, 0], after[0, 1], after[1, 1]], GRAMS[True][0], rtol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_worked_operators(causal: bool) -> None:
    gram = np.array(START)
    found = QuadratureRows().average(Visibility(2, causal=causal), gram, gram, 1.0)
    first = (1.0, 0.75, 0.7933790359) if causal else (0.7933790359, 0.7714283256, 0.7933790359)
    second = (0.0, 0.0, 0.0448362414) if causal else (0.0448362414, 0.0431900205, 0.0448362414)
    np.testing.assert_allclose(entries(found.mixing.forward(gram)), first, rtol=0, atol=6e-11)
    np.testing.assert_allclose(entries(found.path.response), second, rtol=0, atol=6e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_worked_example(causal: bool) -> None:
    network = worked(causal=causal)
    stem = stem_gram(network.stem, patch_gram=START)
    gram, kernels = stem.gram, {role: stem.overlaps[role] for role in ("patch_embedding", "position_embedding")}
    roles = set(PAPER)
    for half in (0, 1):
        sublayers = network.trunk.blocks[0].sublayers[: half + 1]
        trunk = dataclasses.replace(network.trunk, blocks=(Block(sublayers=sublayers),))
        found = propagate_tangent(trunk, gram, averaging=QuadratureRows(), kernels=kernels)
        total = sum(kernel for (role, _), kernel in found.kernels.items() if role in roles)
        np.testing.assert_allclose(entries(found.gram), GRAMS[causal][half], rtol=0, atol=6e-11)
        np.testing.assert_allclose(entries(total), TANGENTS[causal][half], rtol=0, atol=6e-11)
    kernel = tangent_kernel(network, patch_gram=START, averaging=QuadratureRows())
    for role, printed in GROUPS[causal].items():
        assert kernel.roles[role][0, 0] == pytest.approx(printed, abs=6e-11), role
    total = kernel.total([*PAPER, "head_bias"])
    np.testing.assert_allclose(entries(total), TOTALS[causal], rtol=0, atol=6e-11)


@pytest.mark.parametrize(
    ("q_a", "q_b", "p", "overlap", "slope"),
    [(1.5, 1.5, 0.5, 0.28396796777, 0.31345156292), (0.8, 0.8, 0.8, 0.32882885725, 0.44140644252)],
)
def test_gelu_kernels(q_a: float, q_b: float, p: float, overlap: float, slope: float) -> None:
    kernel = activation_kernel("gelu")
    assert float(kernel.overlap(q_a, q_b, p)) == pytest.approx(overlap, abs=6e-12)
    assert float(kernel.slope_overlap(q_a, q_b, p)) == pytest.approx(slope, abs=6e-12)


# A naive twin --------------------------------------------------------------------------------------------------------


def naive_pair(gram: Array, coupling: float, row_a: int, keys_a: list[int], row_b: int, keys_b: list[int]) -> Array:
    """Return E[A_c A'_d] and E[(J H J')_cd], by Gauss-Hermite over all scores less those of the last key."""
    rows = [(row_a, c, keys_a[-1]) for c in keys_a[:-1]]
    if row_a != row_b:
        rows += [(row_b, c, keys_b[-1]) for c in keys_b[:-1]]
    covariance = np.zeros((len(rows), len(rows)))
    for i, (a, c, last) in enumerate(rows):
        for j, (b, d, other) in enumerate(rows):
            step = gram[c, d] - gram[c, other] - gram[last, d] + gram[last, other]
            covariance[i, j] = coupling * gram[a, b] * step
    root = np.linalg.cholesky(covariance) if rows else np.zeros((0, 0))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60 if len(rows) <= 2 else 24)
    points = len(nodes) ** len(rows)
    grid = np.array(list(itertools.product(nodes, repeat=len(rows)))).reshape(points, len(rows))
    weight = np.prod(np.array(list(itertools.product(weights, repeat=len(rows)))).reshape(points, len(rows)), axis=1)
    weight = weight / weight.sum()
    scores = grid @ root.T
    first = np.concatenate([scores[:, : len(keys_a) - 1], np.zeros((len(grid), 1))], axis=1)
    second = np.concatenate([scores[:, len(keys_a) - 1 :], np.zeros((len(grid), 1))], axis=1)
    a = np.exp(first) / np.exp(first).sum(axis=1, keepdims=True)
    b = a if row_a == row_b else np.exp(second) / np.exp(second).sum(axis=1, keepdims=True)
    mean = np.zeros((2, len(keys_a), len(keys_b)))
    jacobian_a = np.einsum("pc,cd->pcd", a, np.eye(len(keys_a))) - np.einsum("pc,pd->pcd", a, a)
    jacobian_b = np.einsum("pc,cd->pcd", b, np.eye(len(keys_b))) - np.einsum("pc,pd->pcd", b, b)
    values = gram[np.ix_(keys_a, keys_b)]
    mean[0] = np.einsum("p,pc,pd->cd", weight, a, b, optimize=True)
    mean[1] = np.einsum("p,pce,ef,pfd->cd", weight, jacobian_a, values, jacobian_b, optimize=True)
    return mean


def gelu_kernels(q_a: float, q_b: float, p: float) -> tuple[float, float]:
    """Return E f f' and E f' f'' of GELU, by Gauss-Hermite in two dimensions."""
    x = np.linspace(-9, 9, 181)
    weight = np.exp(-(x**2) / 2)
    weight /= weight.sum()
    u = math.sqrt(q_a) * x[:, None]
    v = p / math.sqrt(q_a) * x[:, None] + math.sqrt(max(q_b - p * p / q_a, 0.0)) * x[None, :]
    erf = np.vectorize(math.erf)

    def cdf(z: Array) -> Array:
        return 0.5 * (1 + erf(z / math.sqrt(2)))

    def slope(z: Array) -> Array:
        return cdf(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return weight @ (u * cdf(u) * v * cdf(v)) @ weight, weight @ (slope(u) * slope(v)) @ weight


def naive_tangent(
    start: Array, c: dict[str, float], samples: int, *, causal: bool, epsilon: float
) -> tuple[Array, dict[str, Array]]:
    """Return outputs and tangent kernels of attention, a GELU MLP and a head, entry by entry in plain loops."""
    n = len(start)
    length = n // samples
    keys = [[k for k in range(n) if k // length == a // length and (not causal or k <= a)] for a in range(n)]
    gram = start.copy()
    theta = {"stem": start.copy()}

    def divide(matrix: Array, by: Array) -> Array:
        return np.array(
            [
                [matrix[a, b] / math.sqrt((by[a, a] + epsilon) * (by[b, b] + epsilon)) for b in range(n)]
                for a in range(n)
            ]
        )

    f = divide(gram, gram)
    pairs = {
        (a, b): naive_pair(f, c["q"] * c["k"], a, keys[a], b, keys[b]) for a in range(n) for b in range(n) if a <= b
    }
    pairs |= {(b, a): np.swapaxes(pair, -1, -2) for (a, b), pair in pairs.items()}

    def operator(which: int, matrix: Array) -> Array:
        out = np.zeros((n, n))
        for a in range(n):
            for b in range(n):
                for i, x in enumerate(keys[a]):
                    for j, y in enumerate(keys[b]):
                        out[a, b] += pairs[a, b][which][i, j] * matrix[x, y]
        return out

    gain, second = c["u"] * c["v"], operator(1, f)

    def attend(matrix: Array) -> Array:
        both = matrix * second + f * operator(1, matrix)
        return gain * operator(0, matrix) + gain * c["q"] * c["k"] * both

    theta = {role: kernel + attend(divide(kernel, gram)) for role, kernel in theta.items()}
    theta["norm_gain"], theta["norm_bias"] = attend(f), attend(np.ones((n, n)))
    theta["output"], theta["value"] = c["v"] * operator(0, f), c["u"] * operator(0, f)
    theta["query"], theta["key"] = gain * c["k"] * f * second, gain * c["q"] * f * second
    theta["query_bias"], theta["value_bias"] = gain * c["k"] * second, c["u"] * np.ones((n, n))
    theta["key_bias"], theta["output_bias"] = np.zeros((n, n)), np.ones((n, n))
    gram = gram + gain * operator(0, f)
    f = divide(gram, gram)
    both = [[gelu_kernels(c["w"] * f[a, a], c["w"] * f[b, b], c["w"] * f[a, b]) for b in range(n)] for a in range(n)]
    overlap, slope = np.array(both)[..., 0], np.array(both)[..., 1]
    theta = {role: kernel + c["x"] * c["w"] * slope * divide(kernel, gram) for role, kernel in theta.items()}
    theta["norm_gain"] = theta["norm_gain"] + c["x"] * c["w"] * slope * f
    theta["norm_bias"] = theta["norm_bias"] + c["x"] * c["w"] * slope
    theta["mlp_out"], theta["mlp_in"] = overlap, c["x"] * slope * f
    theta["mlp_out_bias"], theta["mlp_in_bias"] = np.ones((n, n)), c["x"] * slope
    gram = gram + c["x"] * overlap
    f = divide(gram, gram)
    theta = {role: c["h"] * divide(kernel, gram) for role, kernel in theta.items()}
    theta["norm_gain"] = theta["norm_gain"] + c["h"] * f
    theta["norm_bias"] = theta["norm_bias"] + c["h"]
    theta["head"], theta["head_bias"] = f, np.ones((n, n))
    return c["h"] * f, theta


@pytest.mark.parametrize(("samples", "causal"), [(1, False), (1, True), (2, True)])
def test_naive_twin_of_every_group(samples: int, causal: bool) -> None:
    c = {"q": 0.7, "k": 1.1, "v": 1.3, "u": 0.8, "w": 1.2, "x": 1.4, "h": 0.9}
    start = random_gram(3 if samples == 1 else 4, 5)
    trunk = stack(
        SelfAttention(
            **{name: math.sqrt(c[x]) for name, x in zip(SelfAttention.scale_names, "qkvu", strict=True)}, causal=causal
        ),
        MLP(mlp_in=math.sqrt(c["w"]), mlp_out=math.sqrt(c["x"])),
    )
    length = len(start) // samples
    network = Network(stem=PatchStem(patch=1.0), trunk=trunk, head=Head(scale=math.sqrt(c["h"])))
    kernel = tangent_kernel(
        network,
        patch_gram=start.reshape(samples, length, samples, length),
        averaging=QuadratureRows(),
        norm_epsilon=0.05,
    )
    output, theta = naive_tangent(start, c, samples, causal=causal, epsilon=0.05)
    theta["patch_embedding"] = theta.pop("stem")
    np.testing.assert_allclose(kernel.output, output, rtol=1e-7)
    assert set(kernel.roles) == {*theta, "position_embedding", "patch_embedding_bias"}
    for role, expected in theta.items():
        np.testing.assert_allclose(kernel.roles[role], expected, rtol=1e-7, atol=1e-12, err_msg=role)


# Attention operators -------------------------------------------------------------------------------------------------


def averages(rows: JointRows, *, causal: bool = False, samples: int = 1, coupling: float = 0.6) -> JointAverages:
    n = 3 * samples
    values, scores = random_gram(n, 1), random_gram(n, 2)
    return rows.average(Visibility(n, causal=causal, n_samples=samples), values, scores, coupling)


@pytest.mark.parametrize("causal", [False, True])
def test_sampled_heads_agree_with_quadrature(causal: bool) -> None:
    exact = averages(QuadratureRows(), causal=causal, samples=2)
    parts = [
        averages(part, causal=causal, samples=2) for part in SampledRows(n_heads=9600, replicates=12, seed=3).parts()
    ]
    tangent = random_gram(6, 9)
    for read in (
        lambda x: x.mixing.forward(tangent),
        lambda x: x.path.forward(tangent),
        lambda x: x.path.response,
        lambda x: x.entropy,
        lambda x: x.participation,
    ):
        found = np.stack([read(part) for part in parts])
        error = found.std(axis=0, ddof=1) / math.sqrt(len(parts))
        miss = np.abs(found.mean(axis=0) - read(exact))
        assert np.all(miss <= 5.5 * error + 1e-12)  # t distribution of 11 degrees of freedom, dozens of entries


def test_narrow_heads_against_jacobians_head_by_head() -> None:
    """The four-term sums, with queries and keys that fluctuate, against explicit Jacobians on the same heads."""
    rows = SampledRows(n_heads=5, d_head=2, replicates=1, seed=4)
    values, scores = random_gram(6, 1), random_gram(6, 2)
    visible = Visibility(6, causal=True, n_samples=2)
    found = rows.average(visible, values, scores, 1.5)
    response, keys, tangent = np.zeros((6, 6)), np.zeros((6, 6)), random_gram(6, 9)
    for attention, queries, key_gram in rows._draw(visible, 2, 3, scores, 1.5):
        for head in range(5):
            for a, b in itertools.product(range(6), repeat=2):
                own = [slice(x // 3 * 3, x // 3 * 3 + 3) for x in (a, b)]
                jacobians = [np.diag(w) - np.outer(w, w) for w in attention[head, [a, b]]]
                block = jacobians[0] @ values[own[0], own[1]] @ jacobians[1]
                response[a, b] += np.sum(block * key_gram[head][own[0], own[1]]) / 5
                keys[a, b] += queries[head, a, b] * np.sum(block * tangent[own[0], own[1]]) / 5
    np.testing.assert_allclose(found.path.response, response, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.path.forward(tangent), tangent * response + keys, rtol=1e-10, atol=1e-14)


def test_wide_heads_are_the_limit_of_narrow_ones() -> None:
    exact, narrow = averages(QuadratureRows()), averages(SampledRows(n_heads=6000, d_head=256))
    np.testing.assert_allclose(narrow.path.response, exact.path.response, rtol=0.05)


@pytest.mark.parametrize("rows", [QuadratureRows(), SampledRows(n_heads=64), SampledRows(n_heads=64, d_head=3)])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward_are_adjoint(rows: JointRows, causal: bool) -> None:
    found = averages(rows, causal=causal, samples=2)
    tangent, gradient = random_gram(6, 7), random_gram(6, 8)
    for part in (found.mixing, found.path):
        there, back = np.sum(gradient * part.forward(tangent)), np.sum(part.backward(gradient) * tangent)
        assert there == pytest.approx(back, rel=1e-12)


def test_identical_tokens_have_no_score_gradients() -> None:
    ones = np.ones((3, 3))
    found = QuadratureRows().average(Visibility(3, causal=False), ones, ones, 2.0)
    np.testing.assert_allclose(found.path.response, 0.0, atol=1e-14)
    np.testing.assert_allclose(found.mixing.forward(random_gram(3)), random_gram(3).mean(), rtol=1e-12)


def test_no_coupling_is_uniform_attention() -> None:
    found = averages(QuadratureRows(), causal=True, coupling=0.0)
    gram = random_gram(3, 6)
    expected = [[gram[: a + 1, : b + 1].mean() for b in range(3)] for a in range(3)]
    np.testing.assert_allclose(found.mixing.forward(gram), expected, rtol=1e-13)
    np.testing.assert_allclose(found.entropy, np.log([1, 2, 3]), atol=1e-13)


@pytest.mark.parametrize(
    ("tokens", "causal", "allowed", "allowed_scores"),
    [
        ([[0, 1, 2], [3, 4, 5]], False, 1e-5, 1e-5),  # alike within a sample: exact up to the closure's tables
        ([[0, 1, 2], [3, 4, 5]], True, 0.03, 0.05),
        ([[0, 1, 1], [2, 1, 0]], False, 0.03, 0.07),  # a token twice
        ([[0, 1, 1], [2, 1, 0]], True, 0.06, 0.16),
    ],
)
def test_closures_agree_with_exact_averages(
    tokens: list[list[int]], causal: bool, allowed: float, allowed_scores: float
) -> None:
    """What a closure costs in accuracy, relative to the largest entry of a group: least for tokens that are alike."""
    scales = dataclasses.replace(UNIT, query=0.9, value=1.2, mlp_out=1.3)
    trunk = Transformer.uniform(n_layers=1, d_model=64, n_heads=4, norm=LayerNorm(), scales=scales, causal=causal)
    network = Network(stem=TokenStem(token=1.0, position=0.5, segment=0.6), trunk=trunk)
    exact, fast = (
        tangent_kernel(network, tokens=tokens, averaging=averaging) for averaging in (QuadratureRows(), Exact())
    )
    for role, kernel in exact.roles.items():
        room = allowed_scores if role in ("query", "key", "query_bias") else allowed
        assert np.max(np.abs(fast.roles[role] - kernel)) <= room * np.max(np.diag(kernel)) + 1e-12, role


# Identities ----------------------------------------------------------------------------------------------------------


def small(branch: Branch | None = None, **options: object) -> Network:
    attention = SelfAttention(query=1.2, key=0.7, value=1.3, output=0.8, score_multiplier=1.1, causal=True)
    trunk = stack(attention, MLP(mlp_in=1.1, mlp_out=0.9), repeat=2) if branch is None else stack(branch, repeat=2)
    return Network(stem=TokenStem(token=0.9, position=0.4), trunk=trunk, **options)


def test_ratios_of_groups_layer_by_layer() -> None:
    kernel = tangent_kernel(small(), tokens=[0, 1, 2], averaging=QuadratureRows())
    for layer in (0, 1):
        value, output, query, key = (kernel.groups[role, layer] for role in ("value", "output", "query", "key"))
        np.testing.assert_allclose(value, output * (0.8 / 1.3) ** 2, rtol=1e-12)
        np.testing.assert_allclose(key, query * (1.2 / 0.7) ** 2, rtol=1e-12, atol=1e-16)
        assert np.all(kernel.groups["key_bias", layer] == 0)
        assert query[0, 0] == key[0, 0] == 0  # the first token sees itself only
        assert query[2, 2] > 0


def test_groups_of_a_role_add_up_over_layers() -> None:
    kernel = tangent_kernel(small(), tokens=[0, 1], averaging=QuadratureRows())
    np.testing.assert_allclose(kernel.roles["value"], kernel.groups["value", 0] + kernel.groups["value", 1])
    gains = [kernel.groups["norm_gain", layer] for layer in (0, 1, None)]
    np.testing.assert_allclose(kernel.roles["norm_gain"], sum(gains))


def test_relu_perceptrons_in_closed_form() -> None:
    """One token, zero epsilon: gains of a ReLU MLP depend on the size of the stream only."""
    scale_in, scale_out, head = 1.3, 1.1, 0.7
    trunk = stack(MLP(mlp_in=scale_in, mlp_out=scale_out, activation="relu"), repeat=3)
    network = Network(stem=TokenStem(token=1.2), trunk=trunk, head=Head(scale=math.sqrt(head)))
    kernel = tangent_kernel(network, tokens=[4])
    step = scale_out**2 * scale_in**2 / 2
    after = 1.44 + step * np.arange(1, 4)
    blocks = np.sum((scale_in**2 / 2 + scale_out**2 / 2) / after)
    found = kernel.total(["token_embedding", "mlp_in", "mlp_out", "head", "head_bias"])
    assert float(found[0, 0]) == pytest.approx(2 + head * (1 / 1.44 + blocks), rel=1e-12)


def test_the_stream_is_what_stem_and_last_matrices_add() -> None:
    """Each adds its variance times its tangent kernel where it is born."""
    network = small()
    stem = stem_gram(network.stem, tokens=[0, 1, 2])
    found = propagate_tangent(network.trunk, stem.gram, averaging=QuadratureRows(), kernels={})
    total = stem.gram.copy()
    for layer in (0, 1):
        trunk = network.trunk.with_depth(layer + 1)
        attended = dataclasses.replace(
            trunk, blocks=(*trunk.with_depth(1).blocks,) * layer + (Block(sublayers=trunk.blocks[0].sublayers[:1]),)
        )
        one = propagate_tangent(attended, stem.gram, averaging=QuadratureRows(), kernels={})
        both = propagate_tangent(trunk, stem.gram, averaging=QuadratureRows(), kernels={})
        total = total + 0.8**2 * one.kernels["output", layer] + 0.9**2 * both.kernels["mlp_out", layer]
    np.testing.assert_allclose(found.gram, total, rtol=1e-12)


@pytest.mark.parametrize("norm", [LayerNorm(gain=1.3), RMSNorm(), Derf(alpha=0.6, gain=0.9)])
@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich])
@pytest.mark.parametrize("gated", [False, True])
def test_exchangeable_tokens_by_two_of_them(norm: object, placement: object, gated: bool) -> None:
    scales = dataclasses.replace(UNIT, query=1.4, output=1.2, gate=1.1 if gated else None)
    trunk = Transformer.uniform(
        n_layers=2, d_model=64, n_heads=4, norm=norm, scales=scales, placement=placement, skip_scale=0.9
    )
    for pooling in ("none", "mean", "first"):
        network = Network(stem=TokenStem(token=0.9, segment=0.5), trunk=trunk, head=Head(pooling=pooling))
        full = tangent_kernel(network, tokens=list(range(6)), averaging=Exact())
        short = tangent_kernel(network, tokens=[0, 1], averaging=Exact(), n_tokens=6)
        assert short.n_tokens == 6
        for group, kernel in full.groups.items():
            np.testing.assert_allclose(short.groups[group], kernel[:2, :2], rtol=1e-9, atol=1e-13, err_msg=str(group))
        np.testing.assert_allclose(short.output, full.output[:2, :2], rtol=1e-9)


def test_two_tokens_carry_gradients_like_the_moments_do() -> None:
    attention = Sublayer(
        branch=SelfAttention(query=1.5, key=1.1, value=1.2, output=0.9), input_norm=LayerNorm(), skip_scale=0.8
    )
    n, gradient = 9, np.array([[1.0, 0.3], [0.3, 1.0]])
    step = GramHalfLayer(
        attention, np.array([[1.3, 0.4], [0.4, 1.3]]), ExchangeableRows(Exact(), n), Visibility(2, causal=False)
    )
    moments = HalfLayer(attention, n, Exact())
    trajectory = propagate(stack_of(attention), n_tokens=n, q=1.3, p=0.4, closure=Exact())
    assert moments.sublayer is attention
    expected = trajectory.transfer[0] @ np.array([1.0, 0.3])
    np.testing.assert_allclose(step.backward(gradient)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(step.output[0], [trajectory.q[-1], trajectory.p[-1]], rtol=1e-12)


def stack_of(*sublayers: Sublayer) -> Transformer:
    return Transformer(blocks=(Block(sublayers=sublayers),), d_model=64)


@pytest.mark.parametrize("averaging", [QuadratureRows(), Exact(), Annealed(), Uniform()])
def test_samples_do_not_see_each_other(averaging: object) -> None:
    alone = tangent_kernel(small(), tokens=[0, 1, 0], averaging=averaging)
    together = tangent_kernel(small(), tokens=[[0, 1, 0], [3, 3, 2]], averaging=averaging)
    for group, kernel in alone.groups.items():
        np.testing.assert_allclose(together.groups[group][:3, :3], kernel, rtol=1e-9, atol=1e-13, err_msg=str(group))


@pytest.mark.parametrize("averaging", [QuadratureRows(), Annealed()])
def test_equal_samples_have_equal_outputs(averaging: object) -> None:
    trunk = small().trunk.bidirectional()
    network = dataclasses.replace(small(), trunk=trunk)
    kernel = tangent_kernel(network, tokens=[[0, 1, 0], [0, 1, 0]], averaging=averaging)
    for group, matrix in kernel.groups.items():
        np.testing.assert_allclose(matrix[:3, 3:], matrix[:3, :3], rtol=1e-9, atol=1e-13, err_msg=str(group))


def test_samples_in_the_trajectory_too() -> None:
    trunk = small().trunk
    stem = stem_gram(TokenStem(token=0.9, position=0.4), tokens=[[0, 1, 2], [3, 1, 0]])
    found = propagate_gram(trunk, stem.gram, closure=QuadratureRows(), n_samples=2)
    tangent = propagate_tangent(trunk, stem.gram, averaging=QuadratureRows(), kernels={}, n_samples=2)
    np.testing.assert_allclose(found.grams[-1], tangent.gram, rtol=1e-13)
    alone = propagate_gram(trunk, stem.gram[:3, :3], closure=QuadratureRows())
    np.testing.assert_allclose(found.attention["row_overlap"][:, :3], alone.attention["row_overlap"], rtol=1e-12)
    ((log_norm, _),) = found.backward(None)
    assert float(log_norm[0]) == pytest.approx(float(found.forward_log[-1]), abs=1e-9)


# Heads, stems, rates -------------------------------------------------------------------------------------------------


def test_tied_heads() -> None:
    """The head scale is that of the token table times ``sqrt(d_model)``; its kernel is added to that of the table."""
    tied, untied = (
        tangent_kernel(small(head=head), tokens=[0, 1])
        for head in (Head(tied=True, multiplier=0.2), Head(scale=0.9 * 8, multiplier=0.2))
    )
    np.testing.assert_allclose(tied.output, untied.output, rtol=1e-12)
    assert "head" not in tied.roles
    expected = untied.roles["token_embedding"] + 64 * untied.roles["head"]
    np.testing.assert_allclose(tied.roles["token_embedding"], expected, rtol=1e-12)
    np.testing.assert_allclose(tied.roles["value"], untied.roles["value"], rtol=1e-12)


def test_pooling() -> None:
    every, mean, first = (
        tangent_kernel(small(head=Head(pooling=pooling)), tokens=[[0, 1], [2, 0]])
        for pooling in ("none", "mean", "first")
    )
    for role, kernel in every.roles.items():
        np.testing.assert_allclose(mean.roles[role], kernel.reshape(2, 2, 2, 2).mean(axis=(1, 3)), rtol=1e-12)
        np.testing.assert_allclose(first.roles[role], kernel[::2, ::2], rtol=1e-12)


def test_patches_and_their_overlaps() -> None:
    patches = np.random.default_rng(2).standard_normal((2, 3, 5))
    stem = PatchStem(patch=1.3, position=0.4, class_token=0.7)
    found = stem_gram(stem, patches=patches)
    assert (found.n_samples, found.n_tokens) == (2, 4)
    gram = found.gram.reshape(2, 4, 2, 4)
    assert gram[0, 0, 1, 0] == pytest.approx(0.7**2 + 0.4**2)  # class tokens, in different samples
    assert gram[0, 0, 1, 2] == 0  # a class token and a patch share nothing
    assert gram[0, 2, 1, 2] == pytest.approx(1.69 * patches[0, 1] @ patches[1, 1] / 5 + 0.16)
    assert gram[0, 2, 1, 3] == pytest.approx(1.69 * patches[0, 1] @ patches[1, 2] / 5)
    overlaps = np.einsum("sti,ruj,ij->stru", patches, patches, np.eye(5)) / 5
    np.testing.assert_allclose(stem_gram(stem, patch_gram=overlaps).gram, found.gram, rtol=1e-12)
    bias = found.overlaps["patch_embedding_bias"].reshape(2, 4, 2, 4)
    assert np.all(bias[:, 1:, :, 1:] == 1) and np.all(bias[:, 0] == 0)


def test_tokens_share_rows_of_tables() -> None:
    stem = TokenStem(token=0.9, position=0.4, segment=0.3)
    found = stem_gram(stem, tokens=[[5, 6, 5], [6, 6, 7]], segments=[[0, 0, 1], [0, 1, 1]])
    gram = found.gram.reshape(2, 3, 2, 3)
    assert gram[0, 0, 0, 2] == pytest.approx(0.81)
    assert gram[0, 1, 1, 1] == pytest.approx(0.81 + 0.16)
    assert gram[0, 1, 1, 0] == pytest.approx(0.81 + 0.09)
    shifted = stem_gram(stem, tokens=[[5, 6, 5]], positions=[3, 3, 4])
    assert shifted.gram[0, 1] == pytest.approx(0.16 + 0.09)


def test_rates_multiply_their_groups() -> None:
    plain, scaled = (
        tangent_kernel(small(), tokens=[0, 1], rates=rates, averaging="exact") for rates in (None, {"value": 2.5})
    )
    for role, kernel in plain.roles.items():
        np.testing.assert_allclose(scaled.roles[role], kernel * (2.5 if role == "value" else 1.0))


def test_gated_perceptrons_share_the_slope_of_their_hidden_layer() -> None:
    """A linear gate makes gate and input interchangeable."""
    kernel = tangent_kernel(
        small(GatedMLP(gate=1.2, mlp_in=0.7, mlp_out=1.1, activation="identity")), tokens=[0, 1, 0], averaging="exact"
    )
    np.testing.assert_allclose(kernel.roles["gate"] * 1.2**2, kernel.roles["mlp_in"] * 0.7**2, rtol=1e-12)


def test_normalised_queries_do_not_depend_on_their_scale() -> None:
    """Behind LayerNorm tokens have unit size: normalised scores are those of scales one, up to the learning rates."""
    sizes = (("query", 1.7), ("key", 0.6))
    plain, normalised = (
        tangent_kernel(small(branch), tokens=[0, 1, 2], averaging=QuadratureRows())
        for branch in (
            SelfAttention(query=1.0, key=1.0, value=1.1, output=0.9),
            SelfAttention(query=1.7, key=0.6, value=1.1, output=0.9, qk_norm=True),
        )
    )
    for role, size in sizes:
        np.testing.assert_allclose(normalised.roles[role], plain.roles[role] / size**2, rtol=1e-10)
    np.testing.assert_allclose(normalised.roles["value"], plain.roles["value"], rtol=1e-10)


def test_sampled_kernels_state_their_error() -> None:
    network = small()
    exact = tangent_kernel(network, tokens=[0, 1, 2], averaging=QuadratureRows())
    found = tangent_kernel(network, tokens=[0, 1, 2], averaging=SampledRows(n_heads=8000, seed=1))
    for role, kernel in exact.roles.items():
        assert np.all(np.abs(found.roles[role] - kernel) <= 7 * found.role_se[role] + 1e-12), role  # seven degrees
    assert 0 < found.role_se["query"][2, 2] < 0.05 * found.roles["query"][2, 2]
    assert np.all(exact.role_se["query"] == 0)


# Bad input -----------------------------------------------------------------------------------------------------------


def kernel_of(network: Network | None = None, **options: object) -> TangentKernel:
    return tangent_kernel(
        small() if network is None else network, **{"tokens": [0, 1], "averaging": "exact", **options}
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": {"valeu": 2.0}}, SpecError, "did you mean 'value'"),
        ({"rates": {"value": -1.0}}, DomainError, "learning-rate factor of 'value' must be finite and >= 0; got -1"),
        ({"norm_epsilon": -1e-5}, DomainError, "norm_epsilon must be finite and >= 0"),
        ({"tokens": [[0.5, 1.0]]}, BatchError, "`tokens` must be integers"),
        ({"tokens": [[0, -1]]}, BatchError, "cannot be negative; got -1"),
        ({"positions": [0, 1, 2]}, BatchError, r"`positions` must have shape \(1, 2\) or \(2,\)"),
        ({"patches": np.ones((1, 2, 3))}, BatchError, "a TokenStem takes `tokens`"),
        ({"n_tokens": 9}, NotCoveredError, "a causal mask"),
        ({"n_tokens": 9, "averaging": QuadratureRows()}, NotCoveredError, "give a closure for exchangeable tokens"),
        ({"n_tokens": 9, "tokens": [0, 1, 2]}, BatchError, "two tokens of one sample stand for all"),
        ({"tokens": list(range(6)), "averaging": QuadratureRows()}, NotCoveredError, "need a grid in"),
    ],
)
def test_bad_input(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernel_of(**options)


def test_more_bad_input() -> None:
    with pytest.raises(SpecError, match="has no tangent kernel of 'gate'"):
        kernel_of().total(["gate"])
    with pytest.raises(SpecError, match="needs single numbers"):
        kernel_of(small(MLP(mlp_in=np.array([1.0, 2.0]), mlp_out=1.0)))
    for place, part in (
        ("head.norm.gain", {"head": Head(norm=LayerNorm(gain=np.array([1.0, 2.0])))}),
        ("stem.token", {"stem": TokenStem(token=np.array([1.0, 2.0]))}),
    ):
        with pytest.raises(SpecError, match=rf"single numbers; network.{place} is an array of shape \(2,\)"):
            kernel_of(dataclasses.replace(small(), **part))
    grid = stack(MLP(mlp_in=1.0, mlp_out=np.linspace(1.0, 1.3, 5)))
    for run in (
        lambda: propagate_gram(grid, np.eye(5), closure=Exact()),
        lambda: propagate_tangent(grid, np.eye(5), averaging=Exact(), kernels={}),
    ):
        with pytest.raises(SpecError, match=r"single numbers; .*mlp_out is an array of shape \(5,\)"):
            run()
    with pytest.raises(BatchError, match="a PatchStem takes either"):
        stem_gram(PatchStem(patch=1.0), tokens=[0, 1])
    with pytest.raises(BatchError, match="`patches` must have shape"):
        stem_gram(PatchStem(patch=1.0), patches=[1.0, 2.0])
    with pytest.raises(DomainError, match="positive mean square"):
        stem_gram(PatchStem(patch=1.0, class_token=0.0), patches=np.ones((2, 3)))
    with pytest.raises(DomainError, match="n_heads must be an integer of at least 1"):
        SampledRows(n_heads=0)
    with pytest.raises(DomainError, match="a head for each of 8 replicates"):
        SampledRows(n_heads=4)
    with pytest.raises(NotCoveredError, match="one Gram matrix over all samples"):
        propagate_gram(small().trunk, np.stack([np.eye(2)] * 2), closure=QuadratureRows())
    with pytest.raises(DomainError, match="are not 2 samples of equal length"):
        propagate_gram(small().trunk, np.eye(3), closure=QuadratureRows(), n_samples=2)
    with pytest.raises(NotCoveredError, match="dropout on attention weights"):
        branch = SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, attention_dropout=0.1)
        propagate_gram(stack(branch), np.eye(2), closure=QuadratureRows())
    with pytest.raises(NotCoveredError, match="fixed attention leaves quadrature averages nothing to do"):
        propagate_gram(small().trunk, np.eye(2), closure=QuadratureRows(), attention=np.eye(2))
    with pytest.raises(NotCoveredError, match="sampled attention over 300 tokens"):
        kernel_of(tokens=list(range(300)), averaging=None)
    with pytest.raises(NotCoveredError, match="normalised queries and keys of sampled heads of finite width"):
        normalised = small(SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, qk_norm=True))
        kernel_of(normalised, averaging=SampledRows(n_heads=8, d_head=4))
    with pytest.raises(DomainError, match="two tokens stand for n_tokens >= 2; got 1"):
        ExchangeableRows(Exact(), 1)
    with pytest.raises(DomainError, match="equal mean squares"):
        unequal = np.array([[1.0, 0.2], [0.2, 2.0]])
        ExchangeableRows(Exact(), 4).average(Visibility(2, causal=False), unequal, unequal, 1.0)
    with pytest.raises(DomainError, match="two tokens of one sample without a causal mask"):
        ExchangeableRows(Exact(), 4).average(Visibility(3, causal=False), np.eye(3), np.eye(3), 1.0)
    with pytest.raises(NotCoveredError, match="query scale of 0"):
        kernel_of(small(SelfAttention(query=0.0, key=1.0, value=1.0, output=1.0, qk_norm=True)))


def test_replicates_share_all_heads() -> None:
    assert [part.n_heads for part in SampledRows(n_heads=21, replicates=8).parts()] == [3, 3, 3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_norm_of_gain_zero_leaves_the_stream(qk_norm: bool) -> None:
    """Tokens of zeros have scores of zero: nothing is divided by their size."""
    branch = SelfAttention(query=1.0, key=1.0, value=1.0, output=1.0, qk_norm=qk_norm, attention_dropout=0.1)
    trunk, gram = stack(branch, norm=LayerNorm(gain=0.0)), random_gram(4)
    full = propagate_gram(trunk, gram, closure=Exact())
    np.testing.assert_array_equal(full.grams[-1], gram)
    ((log_norm, _),) = full.backward(None)
    assert np.all(log_norm == 0) and np.all(full.forward_log == 0)
    two = propagate(trunk, n_tokens=4, q=1.0, p=0.3, closure=Exact())
    assert two.q.tolist() == [1.0, 1.0] and two.transfer[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    roles = tangent_kernel(Network(stem=TokenStem(token=1.0), trunk=trunk), tokens=[0, 1], n_tokens=9).roles
    assert roles["token_embedding"][0, 0] == 1.0 and np.all(roles["value"] == 0) and np.all(roles["query"] == 0)


def test_vanished_gradients_are_named() -> None:
    """Forward, a perturbation of which nothing is left has a log of minus infinity."""
    open_, shut = (
        Sublayer(branch=SelfAttention(query=1.0, key=1.0, value=1.0, output=scale, output_bias=0.5), skip_scale=skip)
        for scale, skip in ((1.0, 1.0), (0.0, 0.0))
    )
    trunk = Transformer(blocks=(Block(sublayers=(open_, shut, open_, open_)),), d_model=64)
    full = propagate_gram(trunk, np.eye(3), closure=Exact())
    assert np.isneginf(full.forward_log[2:]).all() and np.isfinite(full.forward_log[:2]).all()
    with pytest.raises(DomainError, match="the gradient vanishes in front of sublayer 1"):
        full.backward(None)
    two = propagate(trunk, n_tokens=3, q=1.0, p=0.0, closure=Exact())
    with pytest.raises(DomainError, match="the gradient vanishes in front of sublayer 1"):
        backward(two.transfer)
    grid = propagate(with_field(trunk, "skip_scale", np.array([0.0, 1.0])), n_tokens=3, q=1.0, p=0.0, closure=Exact())
    found = backward(grid.transfer)
    assert np.isneginf(found.log_norm[0, 0]) and np.isfinite(found.log_norm[:, 1]).all()
