"""Writing a spec into real models: what is read back, what blocks compute, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fathometer as fm
from fathometer.application import emit, remove_multipliers, write_spec
from fathometer.errors import BatchError, ModelError, NotCoveredError, SpecError
from fathometer.measurement import observe
from fathometer.models import equiangular_tokens, load_model, reference_network
from fathometer.spec import SelfAttention

WANTED = {"query": 0.5, "key": 0.7, "value": 0.9, "output": 1.1, "gate": 1.0, "mlp_in": 1.2, "mlp_out": 0.8}
BIASES = ("value_bias", "output_bias", "in_bias", "out_bias")
SKIPS, SCALES = (0.8, 0.9), (0.6, 0.4)
WIDTH = 256
NAMES = ("gpt2", "bert", "llama", "vit", "t5", "encoder, pre", "encoder, post", "reference", "reference, sandwich")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(name: str, width: int = WIDTH, layers: int = 3) -> tuple[nn.Module, Any]:
    if name.startswith("encoder"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(
                width, 4, 4 * width, batch_first=True, norm_first="pre" in name, activation="gelu"
            )
            return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), torch.randn(
                2, 24, width, generator=_generator()
            )
    if name.startswith("reference"):
        spec = fm.Transformer.uniform(
            n_layers=layers,
            d_model=width,
            n_heads=4,
            norm=fm.RMSNorm(gain=1.2),
            scales=fm.Scales(query=1, key=1, value=1, output=1, mlp_in=1, mlp_out=1),
            placement=fm.Sublayer.sandwich if "sandwich" in name else fm.Sublayer.pre_norm,
            skip_scale=0.7,
            branch_scale=0.5,
        )
        tokens = equiangular_tokens(n_tokens=24, d_model=width, q=1.0, p=0.3, batch=2, seed=0)
        return reference_network(spec, seed=3), tokens
    loaded = load_model(f"hf:{name}", layers=layers, width=width, heads=4)
    if loaded.kind == "image":
        return loaded.model, {"pixel_values": torch.randn(2, 3, 224, 224, generator=_generator())}
    return loaded.model, {"input_ids": torch.randint(0, 256, (2, 24), generator=_generator()), **(loaded.call or {})}


def _observed(model: nn.Module, batch: Any, seeds: int = 1) -> Any:
    return observe(model, batch, seeds=seeds, forward=False, pooled=False)


def _target(model: nn.Module, batch: Any, change: Callable[[fm.Sublayer], fm.Sublayer] | None = None) -> fm.Transformer:
    reading = _observed(model, batch).reading
    assert reading is not None
    return reading.spec.map_sublayers(change or _changed)


def _changed(sublayer: fm.Sublayer) -> fm.Sublayer:
    j = 0 if sublayer.is_attention else 1
    return dataclasses.replace(_weights_only(sublayer), skip_scale=SKIPS[j], branch_scale=SCALES[j])


def _weights_only(sublayer: fm.Sublayer) -> fm.Sublayer:
    branch = sublayer.branch
    numbers = {name: WANTED[name] for name in branch.scale_names} | {b: 0.0 for b in BIASES if hasattr(branch, b)}
    if isinstance(branch, SelfAttention):  # logits of ordinary size in T5 too, which has no 1/sqrt(d_head)
        numbers["query"] /= branch.score_multiplier
    return dataclasses.replace(sublayer, branch=dataclasses.replace(branch, **numbers))


def _output(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_read_and_measured(name: str) -> None:
    model, batch = _model(name)
    keys, state = list(model.state_dict()), torch.get_rng_state()
    target = _target(model, batch)
    modes = [m.training for m in model.modules()]
    applied = write_spec(model, batch, target, seed=1)
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes

    parameters = dict(model.named_parameters())
    for row in applied.rows:
        part = row.part.of(parameters[row.parameter]).detach()
        assert float(part.square().mean().sqrt()) == pytest.approx(row.std, rel=0.03)
    found = _observed(model, batch, seeds=4)
    for wanted, read in zip(target.layers(), found.reading.spec.layers(), strict=True):
        for a, b in zip(wanted.sublayers, read.sublayers, strict=True):
            for field in a.branch.scale_names:
                assert getattr(b.branch, field) == pytest.approx(getattr(a.branch, field), rel=0.03)
    theory = fm.predict(target, gram=found.gram)
    assert np.max(np.abs(np.log(found.profile.q / theory.q))) < 0.1
    bare = fm.predict(target.map_sublayers(_without_factors), gram=found.gram)
    near, far = (np.mean(np.abs(found.profile.curves["apjn_log"] - t.curves["apjn_log"])) for t in (theory, bare))
    assert near < 0.1 and near < 0.6 * far


def _without_factors(sublayer: fm.Sublayer) -> fm.Sublayer:
    return dataclasses.replace(sublayer, skip_scale=1.0, branch_scale=1.0)


def _gpt2(block: nn.Module, x: Tensor, steps: list[Any]) -> Tensor:
    for (skip, scale), norm, branch in zip(steps, (block.ln_1, block.ln_2), (block.attn, block.mlp), strict=True):
        out = branch(norm(x))
        x = skip * x + scale * (out if isinstance(out, Tensor) else out[0])
    return x


def _t5(block: nn.Module, x: Tensor, steps: list[Any]) -> Tensor:
    bias = torch.zeros(1, 4, x.shape[1], x.shape[1])
    attention, mlp = block.layer
    x = steps[0][0] * x + steps[0][1] * attention.SelfAttention(attention.layer_norm(x), position_bias=bias)[0]
    return steps[1][0] * x + steps[1][1] * mlp.DenseReluDense(mlp.layer_norm(x))


def _bert(block: nn.Module, x: Tensor, steps: list[Any]) -> Tensor:
    first, second = block.attention.output, block.output
    x = first.LayerNorm(steps[0][0] * x + steps[0][1] * first.dense(block.attention.self(x)[0]))
    return second.LayerNorm(steps[1][0] * x + steps[1][1] * second.dense(block.intermediate(x)))


def _encoder(block: nn.Module, x: Tensor, steps: list[Any]) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        return block.linear2(block.activation(block.linear1(y)))

    def attention(y: Tensor) -> Tensor:
        return block.self_attn(y, y, y, need_weights=False)[0]

    for (skip, scale), norm, branch in zip(steps, (block.norm1, block.norm2), (attention, mlp), strict=True):
        x = skip * x + scale * branch(norm(x)) if block.norm_first else norm(skip * x + scale * branch(x))
    return x


def _reference(block: nn.Module, x: Tensor, steps: list[Any]) -> Tensor:
    for (skip, scale), step in zip(steps, block.sublayers, strict=True):
        x = step.stream_norm(skip * x + scale * step.output_norm(step.branch(step.input_norm(x))))
    return x


@pytest.mark.parametrize(
    ("name", "path", "direct"),
    [
        ("gpt2", "h.1", _gpt2),
        ("bert", "encoder.layer.1", _bert),
        ("t5", "encoder.block.1", _t5),
        ("encoder, pre", "layers.1", _encoder),
        ("encoder, post", "layers.1", _encoder),
        ("reference", "blocks.1", _reference),
        ("reference, sandwich", "blocks.1", _reference),
    ],
)
def test_a_block_computes_the_wanted_factors(name: str, path: str, direct: Any) -> None:
    model, batch = _model(name, width=64)
    write_spec(model, batch, _target(model, batch))
    model = model.double().eval()
    plain = copy.deepcopy(model)
    remove_multipliers(plain)
    for module in plain.modules():  # the identity holds up to the epsilon of the norms
        for field in ("eps", "variance_epsilon"):
            if hasattr(module, field):
                setattr(module, field, 0.0)
    with torch.no_grad():
        x = torch.randn(1, 7, 64, dtype=torch.float64, generator=_generator())
        options = {"position_bias": torch.zeros(1, 4, 7, 7, dtype=torch.float64)} if name == "t5" else {}
        out = model.get_submodule(path)(x, **options)
        wanted = direct(plain.get_submodule(path), x, list(zip(SKIPS, SCALES, strict=True)))
    out = out if isinstance(out, Tensor) else out[0]
    # the factors of the reference network's own code were read in single precision
    assert float((out - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["gpt2", "bert", "encoder, post"])
def test_removing_copying_pickling_and_training(name: str) -> None:
    model, batch = _model(name, width=64)
    plain = copy.deepcopy(model)
    target = _target(model, batch)
    applied = write_spec(model, batch, target)
    with_factors = _output(model, batch)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_output(other, batch), with_factors)
        remove_multipliers(other)
        assert not torch.equal(_output(other, batch), with_factors)
        assert not any(m._forward_hooks for m in other.modules())
    assert torch.equal(_output(model, batch), with_factors)

    write_spec(model, batch, target)
    assert torch.equal(_output(model, batch), with_factors)
    write_spec(model, batch, target, seed=1)
    assert not torch.equal(_output(model, batch), with_factors)
    applied.remove()  # of a write that was replaced: nothing left to do
    again = write_spec(model, batch, target)
    assert torch.equal(_output(model, batch), with_factors)

    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    (out if isinstance(out, Tensor) else out[0]).square().mean().backward()
    weight = dict(model.named_parameters())[applied.rows[0].parameter]
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0
    optimiser.step()

    again.remove()
    again.remove()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(_output(model, batch), _output(plain, batch))
    assert not any(m._forward_hooks for m in model.modules())


def test_draws_depend_on_seed_and_name_alone() -> None:
    models = []
    for layers in (2, 3):
        model, batch = _model("gpt2", width=64, layers=layers)
        torch.manual_seed(layers)
        write_spec(model, batch, _target(model, batch), seed=7)
        models.append(model)
    for name in ("attn.c_attn.weight", "mlp.c_proj.weight"):
        assert torch.equal(*(m.h[1].get_parameter(name) for m in models))
    assert not torch.equal(models[0].h[0].mlp.c_proj.weight, models[0].h[1].mlp.c_proj.weight)


def test_factors_of_the_code_and_biases_are_accounted_for() -> None:
    model, tokens = _model("reference", width=64)
    own = _target(model, tokens, _weights_only)
    applied = write_spec(model, tokens, own)
    assert applied.residual == ()
    assert any("the model's own residual factors are divided out: 0.7 on the skip" in note for note in applied.notes)
    applied = write_spec(model, tokens, _target(model, tokens))
    factors = [row.factor for row in applied.residual[:3]]
    assert factors == pytest.approx([0.6 / (0.5 * 0.8 / 0.7), 0.4 / (0.5 * 0.72 / 0.49), 0.72 / 0.49], rel=1e-4)

    model, batch = _model("gpt2", width=64)
    target = _target(model, batch)
    biased = fm.with_field(target, "out_bias", 0.3)
    nn.init.constant_(model.h[0].attn.c_attn.bias, 0.01)
    write_spec(model, batch, biased)
    assert float(model.h[0].attn.c_attn.bias.detach().abs().max()) == 0
    assert float(model.h[1].mlp.c_proj.bias.detach().std()) == pytest.approx(0.3, rel=0.35)


def test_emitted_code_initialises_alike() -> None:
    model, batch = _model("gpt2", width=64)
    target = _target(model, batch)
    blocks = [
        dataclasses.replace(block, sublayers=fm.with_field(target, "value", 0.5 + i).blocks[0].sublayers)
        for i, block in enumerate(target.layers())
    ]
    target = dataclasses.replace(target, blocks=tuple(dataclasses.replace(b, repeat=1) for b in blocks))
    applied = write_spec(model, batch, target)
    code = emit(applied)
    fresh, _ = _model("gpt2", width=64)
    exec(code, {"model": fresh})
    for row in applied.rows:
        std = float(row.part.of(dict(fresh.named_parameters())[row.parameter]).detach().std())
        assert std == pytest.approx(row.std, rel=0.06)
    assert len(code.splitlines()) < 25
    assert "#   x = 0.8 * x + 0.6 * attention(norm(x))" in code
    assert "nn.init.normal_(block.attn.c_attn.weight[:, 0:64], std=0.0625)  # query" in code
    assert "std=[0.0625, 0.1875, 0.3125][layer])  # value" in code
    assert "# value" in emit(applied, "megatron") and "linear_qkv" in emit(applied, "megatron")
    assert "self.feed_forward.w1.weight" in emit(applied, "torchtitan")
    for style in ("megatron", "torchtitan"):
        compile(emit(applied, style), style, "exec")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"no style 'torc'; did you mean 'torch'\?"):
        emit(applied, "torc")  # type: ignore[arg-type]
    assert "h.0.attn.c_attn.weight[:, 0:64]" in applied.table() and "0.0625" in applied.table()

    model, tokens = _model("reference", width=64)
    fresh, _ = _model("reference", width=64)
    applied = write_spec(model, tokens, _target(model, tokens))
    exec(emit(applied), {"model": fresh})
    weight = fresh.blocks[2].sublayers[1].branch.mlp_out.weight
    assert float(weight.detach().std()) == pytest.approx(0.8 / 16, rel=0.05)


def test_megatron_needs_one_flag_where_all_agree() -> None:
    model, batch = _model("gpt2", width=64)

    def change(sublayer: fm.Sublayer) -> fm.Sublayer:
        scales = {name: 0.02 * 8.0 for name in sublayer.branch.scale_names}
        for name in ("output", "mlp_out"):
            if name in scales:
                scales[name] = 0.02 / 6**0.5 * (8.0 if name == "output" else 16.0)
        return dataclasses.replace(sublayer, branch=dataclasses.replace(sublayer.branch, **scales))

    code = emit(write_spec(model, batch, _target(model, batch, change)), "megatron")
    assert code.splitlines()[0] == "# --init-method-std 0.02"
    assert len(code.splitlines()) == 2


@pytest.mark.parametrize("norm", [fm.DyT(alpha=0.5), fm.Derf(alpha=0.5), None])
def test_norms_that_see_the_size_of_the_stream(norm: Any) -> None:
    spec = fm.Transformer.uniform(
        n_layers=2,
        d_model=64,
        n_heads=4,
        norm=norm,
        scales=fm.Scales(query=1, key=1, value=1, output=1, mlp_in=1, mlp_out=1),
    )
    model = reference_network(spec)
    tokens = equiangular_tokens(n_tokens=9, d_model=64, q=1.0, p=0.3, batch=2, seed=0)
    branch_only = fm.with_field(spec, "branch_scale", 0.3)
    write_spec(model, tokens, branch_only, seed=2)
    expected = reference_network(branch_only)
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(_output(model, tokens), _output(expected, tokens), rtol=1e-4, atol=1e-5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = _output(model, tokens)
    what = type(norm).__name__ if norm is not None else "the absence of a norm"
    with pytest.raises(
        NotCoveredError, match=f"block 0: the skip factor in front of sublayer 1 cannot.*{what}.*by hand"
    ):
        write_spec(model, tokens, fm.with_field(spec, "skip_scale", 0.9))
    # a refusal changes nothing, and earlier multipliers are back
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(_output(model, tokens), out)
    with pytest.raises(NotCoveredError, match=r"a branch factor of 0 where the code has 1 .* trainable"):
        write_spec(model, tokens, fm.with_field(spec, "branch_scale", 0.0))
    with pytest.raises(NotCoveredError, match=r"a skip factor of 0 where the code has 1"):
        write_spec(model, tokens, fm.with_field(spec, "skip_scale", 0.0))


def test_shared_weights() -> None:
    model, tokens = _model("reference", width=64, layers=2)
    model.blocks[1].sublayers[1].branch.mlp_in.weight = model.blocks[0].sublayers[1].branch.mlp_in.weight
    target = _target(model, tokens, _weights_only)
    write_spec(model, tokens, target)
    first, second = target.layers()
    target = dataclasses.replace(
        target, blocks=(first, *fm.with_field(dataclasses.replace(target, blocks=(second,)), "mlp_in", 2.0).blocks)
    )
    target = dataclasses.replace(target, blocks=tuple(dataclasses.replace(b, repeat=1) for b in target.blocks))
    with pytest.raises(SpecError, match=r"blocks\.0.*mlp_in\.weight' and 'blocks\.1.*mlp_in\.weight' are one weight"):
        write_spec(model, tokens, target)
    write_spec(model, tokens, target, on_conflict="first")
    weight = model.blocks[1].sublayers[1].branch.mlp_in.weight.detach()
    assert float(weight.std()) == pytest.approx(1.2 / 8, rel=0.05)


def test_refusals() -> None:
    model, tokens = _model("reference", width=64)
    target = _target(model, tokens, _weights_only)
    with pytest.raises(SpecError, match="the model has 3 blocks of width 64; the spec 5 of width 64"):
        write_spec(model, tokens, target.with_depth(5))
    with pytest.raises(SpecError, match="is an array of shape"):
        write_spec(model, tokens, fm.with_field(target, "query", np.ones(3)))
    with pytest.raises(SpecError, match="on_conflict must be"):
        write_spec(model, tokens, target, on_conflict="last")  # type: ignore[arg-type]

    def relu(sublayer: fm.Sublayer) -> fm.Sublayer:
        if sublayer.is_attention:
            return sublayer
        return dataclasses.replace(sublayer, branch=dataclasses.replace(sublayer.branch, activation="relu"))

    with pytest.raises(SpecError, match="block 0, sublayer 1: the model has activation 'gelu', the spec 'relu'"):
        write_spec(model, tokens, target.map_sublayers(relu))
    with pytest.raises(BatchError, match="does not run"):
        write_spec(model, torch.randn(2, 5, 63), target)
    model.extra = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="parameter 'extra' has dtype"):
        write_spec(model, tokens, target)


def test_a_stream_that_overflows_can_be_repaired() -> None:
    model, tokens = _model("reference", width=64, layers=8)
    target = _target(model, tokens)
    with torch.no_grad():
        for block in model.blocks:
            for step in block.sublayers:
                step.input_norm.weight.fill_(1.0)
                step.skip_scale = 1e6
    assert not bool(torch.isfinite(_output(model, tokens)).all())
    applied = write_spec(model, tokens, target)
    assert bool(torch.isfinite(_output(model, tokens)).all())
    assert any("norm gains" in note for note in applied.notes)
