"""Cross attention: laws of its transfer matrices, simulation one sublayer at a time and in whole stacks, bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fathometer.attention import Annealed, Exact, Uniform, UniformLargeN
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.models import (
    draw_weights,
    equiangular_tokens,
    reference_encoder_decoder,
    reference_network,
    stacked_network,
)
from fathometer.observables import backward_encoder_decoder, growth, predict, predict_encoder_decoder, weight_gradients
from fathometer.prescription import compare_schemes
from fathometer.propagation import Memory, Moments, propagate, propagate_encoder_decoder, propagate_ends
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    DyT,
    EncoderDecoder,
    LayerNorm,
    Norm,
    SelfAttention,
    Sublayer,
    Transformer,
    dumps_json,
    dumps_toml,
    encoder_decoder_from_dict,
    load,
    load_encoder_decoder,
    to_dict,
    with_field,
)


def decoder_block(norm: Norm | None, placement=Sublayer.pre_norm, **cross: float) -> Block:
    given = {"query": 1.2, "key": 1.0, "value": 1.3, "output": 0.9, "n_heads": 2, **cross}
    own = {key: given[key] for key in ("query", "key", "value", "output", "n_heads")}
    return Block(
        sublayers=(
            placement(SelfAttention(**own), norm),
            placement(CrossAttention(**given), norm),
            placement(MLP(mlp_in=1.2, mlp_out=1.0, activation="relu"), norm),
        )
    )


def network(
    n_layers: int = 2, d_model: int = 64, d_memory: int | None = None, norm: Norm | None = None, **cross: float
) -> EncoderDecoder:
    norm = LayerNorm() if norm is None else norm
    block = decoder_block(norm, d_memory=d_memory, **cross)
    return EncoderDecoder(
        encoder=Transformer(
            blocks=(Block(sublayers=(block.sublayers[0], block.sublayers[2]), repeat=n_layers),),
            d_model=d_memory or d_model,
        ),
        decoder=Transformer(blocks=(replace(block, repeat=n_layers),), d_model=d_model),
        memory_norm=norm,
    )


def alone(d_model: int, norm: Norm | None, **cross: float) -> Transformer:
    """Return one cross attention without skip, so that every gradient at its input went through it."""
    given = {"query": 1.2, "key": 1.0, "value": 1.3, "output": 0.9, "n_heads": 2, **cross}
    sublayer = replace(Sublayer.pre_norm(CrossAttention(**given), norm), skip_scale=0.0)
    return Transformer(blocks=(Block(sublayers=(sublayer,)),), d_model=d_model)


@dataclass(frozen=True)
class Case:
    """Numbers of tokens and moments of one simulated cross attention."""

    n: int
    keys: int
    cosine: float
    p_memory: float
    alignment: float
    coupling: float
    dropout: float = 0.0
    d_memory: int = 256
    q_memory: float = 1.0
    n_kv_heads: int | None = None


CASES = [
    Case(n=12, keys=12, cosine=0.3, p_memory=0.2, alignment=0.0, coupling=1.2),
    Case(n=24, keys=6, cosine=0.6, p_memory=0.1, alignment=0.5, coupling=1.5),
    Case(n=4, keys=32, cosine=0.0, p_memory=0.5, alignment=1.0, coupling=1.2),
    Case(n=8, keys=16, cosine=0.8, p_memory=0.7, alignment=0.3, coupling=2.0, q_memory=1.4),
    Case(n=10, keys=14, cosine=0.2, p_memory=0.0, alignment=0.2, coupling=0.3, d_memory=128, n_kv_heads=1),
    Case(n=10, keys=14, cosine=0.4, p_memory=0.3, alignment=0.4, coupling=1.2, dropout=0.4),
    Case(n=1, keys=5, cosine=0.0, p_memory=0.3, alignment=0.0, coupling=1.0),
]


def predicted(case: Case) -> np.ndarray:
    """Return (q, p) of the output, (J, K) at the tokens that ask and at the memory."""
    spec = _spec(case)
    memory = Memory(Moments(case.q_memory, case.p_memory), case.keys, spec.d_model / case.d_memory)
    found = propagate(spec, n_tokens=case.n, q=1.0, p=case.cosine, closure=Exact(), memory=memory)
    start = np.array([1.0, case.alignment])
    return np.concatenate([[found.q[-1], found.p[-1]], found.transfer[0] @ start, found.to_memory[0] @ start])


def simulated(case: Case, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over draws of weights, inputs and masks, and its standard error."""
    spec = _spec(case)
    source = replace(network(n_layers=1, d_model=spec.d_model, d_memory=case.d_memory), decoder=spec, memory_norm=None)
    decoder = reference_encoder_decoder(source).decoder.train()
    found = []
    for seed in range(draws):
        draw_weights(decoder, seed)
        torch.manual_seed(seed)
        x, g = (
            equiangular_tokens(n_tokens=case.n, d_model=spec.d_model, q=1.0, p=overlap, seed=2 * seed + i)
            for i, overlap in enumerate((case.cosine, case.alignment))
        )
        memory = equiangular_tokens(
            n_tokens=case.keys, d_model=case.d_memory, q=case.q_memory, p=case.p_memory, seed=-1 - seed
        )
        out = decoder(x.requires_grad_(), memory.requires_grad_())
        gradients = torch.autograd.grad((out * g).sum(), (x, memory))
        found.append([moment for tensor in (out, *gradients) for moment in moments(tensor)])
    values = np.array(found)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(draws)


def moments(tokens: torch.Tensor) -> tuple[float, float]:
    """Return mean square and mean overlap of two tokens per coordinate; of one token, no overlap."""
    x = tokens.detach()[0]
    n, own = len(x), float(x.square().mean())
    return own, (float(x.sum(0).square().mean()) / n - own) / max(n - 1, 1)


def _spec(case: Case) -> Transformer:
    return alone(
        256,
        LayerNorm(),
        query=case.coupling,
        d_memory=case.d_memory,
        attention_dropout=case.dropout,
        output_bias=0.1,
        n_kv_heads=case.n_kv_heads,
    )


#: Scores of 128 dimensions a head vary by sqrt(2/128) between queries: at most 2 % of what goes through them.
ALLOWANCE = 0.025


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.n}-{c.keys}-{c.coupling}")
def test_one_sublayer_against_simulation(case: Case) -> None:
    theory = predicted(case)
    mean, error = simulated(case, draws=200)
    size = np.abs(theory)
    size[5] += abs(theory[4]) / case.keys  # an overlap that cancels is known to the accuracy of its parts
    if case.n == 1:
        theory[[1, 3]] = mean[[1, 3]] = 0.0
    assert np.all(np.abs(mean - theory) <= 4.5 * error + ALLOWANCE * size), (theory, mean, error)


@pytest.mark.parametrize("closure", [Exact(), Annealed(), Uniform()], ids=lambda c: c.name)
def test_attention_to_oneself_is_the_sum_of_both_ways(closure) -> None:
    norm, moments, n = LayerNorm(), Moments(1.0, 0.3), 9
    cross = alone(64, norm, attention_dropout=0.2)
    given = {key: getattr(cross.blocks[0].sublayers[0].branch, key) for key in CrossAttention.scale_names}
    branch = SelfAttention(**given, n_heads=2, attention_dropout=0.2)
    own = cross.map_sublayers(lambda s: replace(s, branch=branch))
    there = propagate(cross, n_tokens=n, q=1.0, p=0.3, closure=closure, memory=Memory(moments, n))
    here = propagate(own, n_tokens=n, q=1.0, p=0.3, closure=closure)
    np.testing.assert_allclose(there.q, here.q, rtol=1e-12)
    np.testing.assert_allclose(there.p, here.p, rtol=1e-12)
    np.testing.assert_allclose(there.transfer + there.to_memory, here.transfer, rtol=1e-12)
    assert there.attention["row_overlap"] == here.attention["row_overlap"]


@pytest.mark.parametrize(("n", "keys"), [(5, 9), (9, 5), (1, 4), (4, 1)])
def test_the_memory_receives_the_sum_of_all_gradients(n: int, keys: int) -> None:
    # Rows sum to one and score gradients to zero: sum_c g_c = V^T W_O^T sum_a g_a, whatever the attention.
    spec = alone(64, None)
    memory = Memory(Moments(1.3, 0.4), keys, 2.0)
    found = propagate(spec, n_tokens=n, q=1.1, p=0.2, closure=Exact(), memory=memory)
    for own, shared in ((1.0, 0.0), (1.0, 0.4)):
        j, k = found.to_memory[0] @ [own, shared]
        gain = 2.0 * (1.3 * 0.9) ** 2
        np.testing.assert_allclose(keys * (j + (keys - 1) * k), gain * n * (own + (n - 1) * shared), rtol=1e-10)


def test_gradients_of_the_encoder_are_the_sum_over_decoder_layers() -> None:
    spec, given = network(n_layers=3, norm=DyT(alpha=0.7)), {"n_tokens": 6, "q": 1.2, "p": 0.3}
    found = propagate_encoder_decoder(spec, **given, n_memory=9, q_memory=0.9, p_memory=0.2, closure=Exact())
    gradients = backward_encoder_decoder(found, alignment=0.3)
    state, total = np.array([1.0, 0.3]), np.zeros(2)
    for half in range(8, -1, -1):
        total += found.decoder.to_memory[half] @ state
        state = found.decoder.transfer[half] @ state
    np.testing.assert_allclose(np.exp(gradients.decoder.log_norm[0]), state[0], rtol=1e-12)
    state = found.memory_slopes * total
    np.testing.assert_allclose(np.exp(gradients.encoder.log_norm[-1]), state[0], rtol=1e-12)
    np.testing.assert_allclose(gradients.encoder.alignment[-1], state[1] / state[0], rtol=1e-12)
    for half in range(5, -1, -1):
        state = found.encoder.transfer[half] @ state
    np.testing.assert_allclose(np.exp(gradients.encoder.log_norm[0]), state[0], rtol=1e-12)
    parts = gradients.layers_log
    assert np.all(np.isfinite(parts) == ([False, True, False] * 3))
    np.testing.assert_allclose(
        found.encoder.transfer,
        propagate(spec.encoder, n_tokens=9, q=0.9, p=0.2, closure=Exact()).transfer,
    )


def test_a_grid_is_many_points() -> None:
    spec = network()
    values = np.array([0.3, 1.0, 1.9])
    grid = replace(spec, decoder=with_field(spec.decoder, "query", values))
    tokens = {"n_tokens": 6, "q": 1.2, "p": 0.3, "n_memory": 9, "q_memory": 0.9, "closure": Exact()}
    p_memory = np.array([[0.1], [0.6]])
    together = propagate_encoder_decoder(grid, **tokens, p_memory=p_memory)
    log_norm = backward_encoder_decoder(together).encoder.log_norm
    assert log_norm.shape == (5, 2, 3)
    for i, overlap in enumerate(p_memory[:, 0]):
        for j, value in enumerate(values):
            point = replace(spec, decoder=with_field(spec.decoder, "query", value))
            one = propagate_encoder_decoder(point, **tokens, p_memory=overlap)
            np.testing.assert_allclose(together.decoder.p[:, i, j], one.decoder.p, rtol=1e-6)
            np.testing.assert_allclose(log_norm[:, i, j], backward_encoder_decoder(one).encoder.log_norm, rtol=1e-5)


@pytest.mark.parametrize("placement", [Sublayer.pre_norm, Sublayer.post_norm], ids=lambda p: p.__name__)
def test_whole_networks_against_simulation(placement) -> None:
    """Two layers each, d = 192 and 128: 4.5 standard errors plus sublayers over width and 2 % as above."""
    n, keys, alignment = 8, 12, 0.3
    spec = network(2, 192, 128)
    spec = replace(
        spec,
        encoder=spec.encoder.map_sublayers(lambda s: replace(placement(s.branch, LayerNorm()), dropout=0.1)),
        decoder=spec.decoder.map_sublayers(lambda s: replace(placement(s.branch, LayerNorm()), dropout=0.1)),
        memory_norm=LayerNorm() if placement is Sublayer.pre_norm else None,
    )
    found = propagate_encoder_decoder(
        spec, n_tokens=n, q=1.0, p=0.2, n_memory=keys, q_memory=1.0, p_memory=0.3, closure=Exact()
    )
    gradients = backward_encoder_decoder(found, alignment=alignment)
    theory = [found.decoder.q[-1], found.decoder.p[-1]]
    for stack in (gradients.decoder, gradients.encoder):
        level = np.exp(stack.log_norm[0])
        theory += [level, level * stack.alignment[0]]
    model = reference_encoder_decoder(spec).train()
    rows = []
    for seed in range(100):
        draw_weights(model, seed)
        torch.manual_seed(seed)
        x, g = (
            equiangular_tokens(n_tokens=n, d_model=192, q=1.0, p=p, seed=2 * seed + i)
            for i, p in enumerate((0.2, alignment))
        )
        source = equiangular_tokens(n_tokens=keys, d_model=128, q=1.0, p=0.3, seed=-1 - seed)
        out = model(source.requires_grad_(), x.requires_grad_())
        both = torch.autograd.grad((out * g).sum(), (x, source))
        rows.append([moment for tensor in (out, *both) for moment in moments(tensor)])
    mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    assert np.all(np.abs(mean - theory) <= 4.5 * error + (6 / 192 + 0.025) * np.abs(theory)), (theory, mean, error)


def test_specs_that_do_not_fit_are_refused() -> None:
    spec = network()
    with pytest.raises(SpecError, match=r"EncoderDecoder.encoder has cross attention"):
        replace(spec, encoder=spec.decoder)
    with pytest.raises(SpecError, match="decoder has no cross attention"):
        replace(spec, decoder=spec.encoder)
    with pytest.raises(SpecError, match=r"blocks\[0\].sublayers\[1\] attends to a memory of width 32.*d_memory=64"):
        replace(spec, decoder=network(d_memory=32).decoder)
    with pytest.raises(SpecError, match="must be a Transformer; got Block"):
        replace(spec, encoder=spec.encoder.blocks[0])
    with pytest.raises(SpecError, match=r"CrossAttention.n_heads must be a multiple of n_kv_heads; got 4 and 3"):
        CrossAttention(query=1, key=1, value=1, output=1, n_heads=4, n_kv_heads=3)
    with pytest.raises(SpecError, match=r"CrossAttention.attention_dropout must lie in \[0, 1\); got 1"):
        CrossAttention(query=1, key=1, value=1, output=1, attention_dropout=1.0)


def test_functions_without_a_memory_say_where_to_go() -> None:
    decoder = network().decoder
    for call in (
        lambda: propagate(decoder, n_tokens=4, q=1.0, p=0.1, closure=Exact()),
        lambda: reference_network(decoder),
        lambda: predict(decoder, n_tokens=4, q=1.0, p=0.1),
        lambda: predict(decoder, gram=np.eye(4)),
        lambda: growth(decoder, n_tokens=4, q=1.0, p=0.1),
        lambda: weight_gradients(decoder, n_tokens=4, q=1.0, p=0.1),
        lambda: propagate_ends(decoder, n_tokens=4, q=1.0, p=0.1, closure=Exact()),
        lambda: stacked_network(decoder),
    ):
        with pytest.raises(NotCoveredError, match="propagate_encoder_decoder"):
            call()
    for row in compare_schemes(decoder, ["gpt2", "xavier"], n_tokens=4, p=0.1).rows:
        assert row.status == "not covered" and "propagate_encoder_decoder" in row.reason
    tokens = {"n_tokens": 4, "q": 1.0, "p": 0.1, "n_memory": 4, "q_memory": 1.0}
    with pytest.raises(NotCoveredError, match="large-n average"):
        propagate_encoder_decoder(network(), **tokens, p_memory=0.1, closure=UniformLargeN())
    with pytest.raises(DomainError, match="Did you pass a cosine"):
        propagate_encoder_decoder(network(), **tokens, p_memory=1.1, closure=Exact())
    silent = network()
    silent = replace(silent, decoder=with_field(silent.decoder, "attention.branch_scale", 0.0))
    found = propagate_encoder_decoder(silent, **tokens, p_memory=0.1, closure=Exact())
    with pytest.raises(DomainError, match="no gradient reaches the encoder"):
        backward_encoder_decoder(found)
    with pytest.raises(DomainError, match="'random_energy', whose rows are spread over infinitely many keys"):
        predict_encoder_decoder(network(), **tokens, p_memory=0.1, closure="random_energy")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files_hold_both_stacks(tmp_path, suffix: str) -> None:
    for spec in (network(d_memory=32), replace(network(attention_dropout=0.1), memory_norm=None)):
        path = tmp_path / f"spec.{suffix}"
        path.write_text(dumps_toml(spec) if suffix == "toml" else dumps_json(spec))
        assert load_encoder_decoder(path) == spec
        with pytest.raises(SpecError, match="this is an encoder-decoder; read it with load_encoder_decoder"):
            load(path)
    path.write_text(dumps_toml(spec.decoder) if suffix == "toml" else dumps_json(spec.decoder))
    assert load(path) == spec.decoder


def test_places_in_files_are_named() -> None:
    data = to_dict(network())
    data["decoder"]["blocks"][0]["sublayers"][1]["branch"]["query"] = -1.0
    with pytest.raises(SpecError, match=r"decoder.blocks\[0\].sublayers\[1\].branch: CrossAttention.query must be"):
        encoder_decoder_from_dict(data)
    with pytest.raises(SpecError, match="spec lacks decoder"):
        encoder_decoder_from_dict({"encoder": to_dict(network().encoder)})
    with pytest.raises(SpecError, match="no field 'encode'; did you mean 'encoder'"):
        encoder_decoder_from_dict({"encode": {}})
