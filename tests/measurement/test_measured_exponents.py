"""Exponents of real networks against the theory, in standard errors over weight draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fathometer.errors import DomainError
from fathometer.measurement import measure_exponents, observe
from fathometer.models import equiangular_tokens, reference_network
from fathometer.observables import equal_token_gradients, exponents, gradient_exponent
from fathometer.spec import LayerNorm, Scales, Transformer, with_field

WIDTH, TOKENS, LAYERS = 256, 24, 4
ALLOWANCE = 0.25 * 2 / WIDTH * 4  # per block: two sublayers, as in the simulations of the recursion, times four


def network(attention: float, mlp: float, width: float) -> Transformer:
    scales = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=width, mlp_out=1.0)
    spec = Transformer.uniform(
        n_layers=LAYERS, d_model=WIDTH, n_heads=2, norm=LayerNorm(), activation="tanh", scales=scales
    )
    return with_field(with_field(spec, "attention.residual_strength", attention), "mlp.residual_strength", mlp)


@pytest.mark.parametrize("setting", [(0.35, 0.35, 2.0), (0.3, 0.8, 2.0), (0.7, 0.3, 5.0)])
def test_reference_networks(setting: tuple[float, float, float]) -> None:
    spec = network(*setting)
    theory = exponents(spec, n_tokens=TOKENS)
    q = float(theory.q)
    tokens = equiangular_tokens(n_tokens=TOKENS, d_model=WIDTH, q=q, p=q / 2, dtype=torch.float64)
    seen = measure_exponents(reference_network(spec, dtype=torch.float64), tokens, seeds=10, q=q)
    expected = {
        "token": float(theory.token),
        "coherent": float(theory.coherent),
        "angle": float(theory.angle),
        "gradient": float(gradient_exponent(spec, n_tokens=TOKENS, cosine=0.5)),
    }
    for name, value in expected.items():
        mean, error = getattr(seen, name)
        assert abs(mean - value) < 4.5 * error + ALLOWANCE, name
        wrong = value + 0.09 if name != "coherent" else value + 0.2  # e.g. attention's part left out
        assert abs(mean - wrong) > 4.5 * error + ALLOWANCE or error > 0.02, name
    assert seen.token[1] < seen.angle[1]  # type: ignore[index]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_models_of_a_library(family: str) -> None:
    import transformers

    torch.manual_seed(1)
    sizes: dict[str, Any]
    if family == "bert":
        sizes = {"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=90, **sizes))
    else:
        model = transformers.GPT2Model(transformers.GPT2Config(n_layer=3, n_embd=192, n_head=3, vocab_size=90))
    batch = {"input_ids": torch.randint(90, (2, 40))}
    seen = measure_exponents(model, batch, seeds=6, q=0.5)
    reading = observe(model, batch, seeds=1).reading
    assert reading is not None and seen.angle is None
    token, coherent = equal_token_gradients(reading.spec, n_tokens=40, q=0.5)
    for (mean, error), curve in ((seen.token, token), (seen.coherent, coherent)):
        assert abs(mean - curve[0] / 3) < 4.5 * error + 0.004


def test_the_model_is_left_alone_and_draws_repeat() -> None:
    model = reference_network(dataclasses.replace(network(0.3, 0.5, 2.0), d_model=32))
    tokens = equiangular_tokens(n_tokens=8, d_model=32, q=1.0, p=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (measure_exponents(model, tokens, seeds=3) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.token == second.token and first.curves["token"].shape == (3, LAYERS + 1)
    assert first.angle is None  # float32
    assert np.isnan(measure_exponents(model, tokens, seeds=1).token[1])


def test_bad_input() -> None:
    model = reference_network(dataclasses.replace(network(0.3, 0.5, 2.0), d_model=32))
    with pytest.raises(DomainError, match="at least 4 tokens; the batch has 3"):
        measure_exponents(model, torch.randn(1, 3, 32))
    with pytest.raises(DomainError, match="q must be positive and finite; got -1"):
        measure_exponents(model, torch.randn(1, 8, 32), q=-1.0)
