"""Encoder-decoders on full Gram matrices: agreement with two numbers, a naive sum, simulation of a causal decoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fathometer.attention import Annealed, CrossRows, Exact, Uniform, UniformLargeN
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.models import draw_weights, reference_encoder_decoder, tokens_with_gram
from fathometer.observables import backward_encoder_decoder, predict_encoder_decoder
from fathometer.propagation import propagate_encoder_decoder, propagate_encoder_decoder_gram, propagate_gram
from fathometer.spec import (
    MLP,
    Block,
    CrossAttention,
    DyT,
    EncoderDecoder,
    LayerNorm,
    Norm,
    Placement,
    SelfAttention,
    Sublayer,
    Transformer,
    with_field,
)

SCALES = {"query": 1.2, "key": 1.0, "value": 1.3, "output": 0.9, "n_heads": 2}


def network(
    placement: Placement = Sublayer.pre_norm,
    norm: Norm | None = None,
    *,
    n_layers: int = 2,
    d_model: int = 64,
    d_memory: int = 48,
    causal: bool = False,
    dropout: float = 0.2,
) -> EncoderDecoder:
    norm = LayerNorm() if norm is None else norm

    def sublayer(branch: SelfAttention | CrossAttention | MLP) -> Sublayer:
        return replace(placement(branch, norm), dropout=dropout)

    mlp = sublayer(MLP(mlp_in=1.2, mlp_out=1.0, activation="relu"))
    own = SelfAttention(**SCALES, attention_dropout=dropout)
    cross = CrossAttention(**SCALES, attention_dropout=dropout, d_memory=d_memory, output_bias=0.1)
    encoder, decoder = (sublayer(own), mlp), (sublayer(replace(own, causal=causal)), sublayer(cross), mlp)
    return EncoderDecoder(
        encoder=Transformer(blocks=(Block(sublayers=encoder, repeat=n_layers),), d_model=d_memory),
        decoder=Transformer(blocks=(Block(sublayers=decoder, repeat=n_layers),), d_model=d_model),
        memory_norm=norm if placement is Sublayer.pre_norm else None,
    )


def equal(n: int, q: float, p: float) -> np.ndarray:
    return p + (q - p) * np.eye(n)


@pytest.mark.parametrize("closure", [Exact(), Annealed(), Uniform()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "placement", [Sublayer.pre_norm, Sublayer.post_norm, Sublayer.sandwich], ids=lambda p: p.__name__
)
@pytest.mark.parametrize("norm", [LayerNorm(), DyT(alpha=0.7)], ids=["layer_norm", "dyt"])
def test_equal_tokens_and_gram_matrices_agree(closure, placement, norm) -> None:
    spec, n, keys = network(placement, norm), 7, 9
    two = propagate_encoder_decoder(
        spec, n_tokens=n, q=1.3, p=0.4, n_memory=keys, q_memory=0.8, p_memory=0.3, closure=closure
    )
    full = propagate_encoder_decoder_gram(
        spec, gram=equal(n, 1.3, 0.4), memory_gram=equal(keys, 0.8, 0.3), closure=closure
    )
    np.testing.assert_allclose(full.grams[:, 0, 0], two.decoder.q, rtol=1e-9)
    np.testing.assert_allclose(full.grams[:, 0, 1], two.decoder.p, rtol=1e-9)
    np.testing.assert_allclose(full.memory[0, :2], two.memory.moments, rtol=1e-9)
    assert np.array_equal(full.is_attention, two.decoder.is_attention)
    for name in ("attention_entropy", "inverse_participation", "row_overlap", "logit_variance"):
        np.testing.assert_allclose(full.attention[name][:, 0], two.decoder.attention[name], rtol=1e-7)
    expected = backward_encoder_decoder(two, alignment=0.2)
    for found, curve in zip(full.backward(equal(n, 1.0, 0.2)), (expected.decoder, expected.encoder), strict=True):
        np.testing.assert_allclose(found.log_norm, curve.log_norm, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(found.matrices[:, 0, 1], curve.alignment, rtol=1e-7)


def test_averages_are_the_literal_sums() -> None:
    # Annealed weights by the four-index sum; the score path of uniform weights by explicit Jacobians.
    rng = np.random.default_rng(0)
    n, keys, coupling = 4, 5, 0.7
    queries, memory, gradient = (x @ x.T / 8 for x in rng.normal(size=(3, 8, 8)))
    queries, memory, gradient = queries[:n, :n], memory[:keys, :keys], gradient[:n, :n]
    weights = np.exp(coupling * np.einsum("ab,cd->abcd", queries, memory))
    weights /= weights.sum(axis=(2, 3), keepdims=True)
    rows = CrossRows(queries, memory, coupling, Annealed(score_path=False))
    np.testing.assert_allclose(rows.forward(memory), np.einsum("abcd,cd->ab", weights, memory), rtol=1e-8)
    np.testing.assert_allclose(rows.to_memory(gradient), np.einsum("abcd,ab->cd", weights, gradient), rtol=1e-8)
    assert not np.any(rows.to_queries(gradient))
    lost = 0.5
    noisy = np.einsum("aacc,cc->a", weights, memory)
    added = rows.forward(memory, dropout_variance=lost) - rows.forward(memory)
    np.testing.assert_allclose(added, np.diag(lost * noisy), atol=1e-8)
    # At weak coupling A = 1/N, and the output responds to a score by J V M with J = (1 - 1/N)/N.
    weak, values_only = (CrossRows(queries, memory, 1e-6, Annealed(score_path=path)) for path in (True, False))
    jacobian = np.eye(keys) / keys - 1 / keys**2
    double = jacobian @ memory @ jacobian
    np.testing.assert_allclose(weak.to_queries(gradient), 1e-6 * gradient * np.sum(double * memory), rtol=1e-5)
    key_part = weak.to_memory(gradient) - values_only.to_memory(gradient)
    np.testing.assert_allclose(key_part, 1e-6 * double * np.sum(gradient * queries), rtol=1e-4)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_unequal_tokens_against_simulation(causal: bool) -> None:
    """Two layers each, d = 192 and 160: 4.5 standard errors plus sublayers over width and 2 %."""
    spec = network(causal=causal, d_model=192, d_memory=160, dropout=0.1)
    n, keys = 6, 8
    rng = np.random.default_rng(3)
    gram, source, start = (_random_gram(rng, m) for m in (n, keys, n))
    found = propagate_encoder_decoder_gram(spec, gram=gram, memory_gram=source, closure=Exact())
    theory = [found.grams[-1]]
    for stack in found.backward(start):
        theory.append(stack.matrices[0] * np.exp(stack.log_norm[0]) * np.trace(start) / n)
    model = reference_encoder_decoder(spec).train()
    draws: list[list[np.ndarray]] = []
    for seed in range(100):
        draw_weights(model, seed)
        torch.manual_seed(seed)
        x, g = (tokens_with_gram(matrix, d_model=192, seed=2 * seed + i) for i, matrix in enumerate((gram, start)))
        m = tokens_with_gram(source, d_model=160, seed=-1 - seed)
        out = model(m.requires_grad_(), x.requires_grad_())
        both = torch.autograd.grad((out * g).sum(), (x, m))
        draws.append([(t[0] @ t[0].T).numpy().astype(np.float64) / t.shape[-1] for t in (out.detach(), *both)])
    for i, expected in enumerate(theory):
        values = np.array([draw[i] for draw in draws])
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(draws))
        size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        assert np.all(np.abs(mean - expected) <= 4.5 * error + (6 / 192 + 0.02) * size), (i, mean / expected, error)
        assert np.all(np.diag(error) < 0.08 * np.diag(expected))  # small enough for the test to say something


def _random_gram(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return the Gram matrix of tokens with two clusters and unequal sizes."""
    cluster = np.arange(n) % 2
    gram = 0.2 + 0.3 * (cluster[:, None] == cluster) + 0.5 * np.eye(n)
    size = rng.uniform(0.7, 1.4, n)
    return np.asarray(size[:, None] * size * gram)


def test_predictions_agree_where_masks_do_not_matter() -> None:
    # A causal encoder of one token is none; the decoder's tokens then see one key and only their own mask.
    tokens = {"n_tokens": 5, "q": 1.0, "p": 0.2, "n_memory": 1, "q_memory": 1.3, "p_memory": 0.0}
    spec = network()
    plain = predict_encoder_decoder(spec, **tokens)
    masked = predict_encoder_decoder(replace(spec, encoder=_causal(spec.encoder)), **tokens)
    for one, other in zip(plain, masked, strict=True):
        assert one.n_layers == 2
        for name, curve in one.curves.items():
            if one.about["stack"] == "decoder" or name in ("q", "apjn_log", "gradient_log"):
                np.testing.assert_allclose(other.curves[name], curve, rtol=1e-7, atol=1e-8)
    assert plain[1].about["stack"] == "decoder" and plain[1].apjn_log[-1] == 0.0
    found = propagate_encoder_decoder(spec, **tokens, closure=Exact())
    np.testing.assert_allclose(plain[0].apjn_log, backward_encoder_decoder(found).encoder.log_norm[::2])
    np.testing.assert_allclose(plain[1].cosine, (found.decoder.p / found.decoder.q)[::3])
    with pytest.raises(SpecError, match="give single numbers q and p"):
        predict_encoder_decoder(network(causal=True), **(tokens | {"q": np.ones(2)}))


def _causal(stack: Transformer) -> Transformer:
    return stack.map_sublayers(
        lambda s: replace(s, branch=replace(s.branch, causal=True)) if isinstance(s.branch, SelfAttention) else s
    )


def test_batches_are_many_samples() -> None:
    spec = network(causal=True)
    grams = np.stack([equal(5, 1.0, p) for p in (0.1, 0.6)])
    sources = np.stack([equal(6, 1.0, p) for p in (0.5, 0.2)])
    together = propagate_encoder_decoder_gram(spec, gram=grams, memory_gram=sources, closure=Annealed())
    decoder, encoder = together.backward()
    for i in range(2):
        one = propagate_encoder_decoder_gram(spec, gram=grams[i], memory_gram=sources[i], closure=Annealed())
        np.testing.assert_allclose(together.grams[:, i], one.grams, rtol=1e-8)
        for many, alone in zip((decoder, encoder), one.backward(), strict=True):
            np.testing.assert_allclose(many.log_norm[:, i], alone.log_norm, rtol=1e-7, atol=1e-9)


def test_bad_input() -> None:
    spec = network()
    with pytest.raises(DomainError, match=r"one batch shape; got \(2,\) and \(\)"):
        propagate_encoder_decoder_gram(spec, gram=np.stack([np.eye(3)] * 2), memory_gram=np.eye(4), closure=Exact())
    with pytest.raises(DomainError, match="positive semidefinite"):
        propagate_encoder_decoder_gram(spec, gram=equal(3, 1.0, 1.2), memory_gram=np.eye(4), closure=Exact())
    with pytest.raises(NotCoveredError, match="large-n average"):
        propagate_encoder_decoder_gram(spec, gram=np.eye(3), memory_gram=np.eye(4), closure=UniformLargeN())
    with pytest.raises(NotCoveredError, match="propagate_encoder_decoder"):
        propagate_gram(spec.decoder, np.eye(3), closure=Exact())
    grid = replace(spec, decoder=with_field(network(causal=True).decoder, "mlp_out", np.ones(2)))
    for run in (
        lambda: propagate_encoder_decoder_gram(grid, gram=np.eye(3), memory_gram=np.eye(4), closure=Exact()),
        lambda: predict_encoder_decoder(grid, n_tokens=3, q=1.0, p=0.1, n_memory=4, q_memory=1.0, p_memory=0.1),
    ):
        with pytest.raises(SpecError, match=r"single numbers; spec.decoder.*mlp_out is an array of shape \(2,\)"):
            run()
    decoder = spec.decoder.map_sublayers(
        lambda s: replace(s, branch_scale=0.0) if isinstance(s.branch, CrossAttention) else s
    )
    silent = propagate_encoder_decoder_gram(
        replace(spec, decoder=decoder), gram=np.eye(3), memory_gram=np.eye(4), closure=Exact()
    )
    with pytest.raises(DomainError, match="no gradient reaches the encoder"):
        silent.backward()


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_token_overlaps_with_no_other(causal: bool) -> None:
    tokens = {"n_tokens": 1, "q": 1.0, "p": 0.3, "n_memory": 6, "q_memory": 1.0, "p_memory": 0.2}
    encoder, decoder = predict_encoder_decoder(network(causal=causal), **tokens)
    assert np.all(decoder.p == 0) and np.all(decoder.cosine == 0) and np.all(encoder.p > 0)
    other = predict_encoder_decoder(network(causal=not causal), **tokens)[1]
    np.testing.assert_allclose(decoder.q, other.q, rtol=1e-10)
    np.testing.assert_allclose(decoder.apjn_log, other.apjn_log, rtol=1e-10, atol=1e-12)


def test_tokens_behind_a_gain_of_zero_read_the_memory_evenly() -> None:
    branch = CrossAttention(**SCALES)
    decoder = Transformer(
        blocks=(Block(sublayers=(Sublayer(branch=branch, input_norm=LayerNorm(gain=0.0)),)),), d_model=64
    )
    spec = replace(network(dropout=0.0, d_memory=64), decoder=decoder)
    found = propagate_encoder_decoder_gram(spec, gram=np.eye(3), memory_gram=np.eye(4), closure=Exact())
    np.testing.assert_allclose(found.added[0], (1.3 * 0.9) ** 2 * found.memory.mean(), rtol=1e-12)
    assert all(np.isfinite(stack.log_norm).all() for stack in found.backward())
