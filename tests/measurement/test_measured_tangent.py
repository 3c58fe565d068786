"""The measured tangent kernel: against the Jacobian, exact identities, theory, and a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from fathometer.errors import BatchError, DomainError, ModelError
from fathometer.measurement.tangent import MeasuredTangentKernel, mean_and_error, measure_tangent_kernel
from fathometer.measurement.tangent_slopes import TangentSlopes, tangent_slopes
from fathometer.models import WeightSlice
from fathometer.models.roles import parameter_roles
from fathometer.models.seeding import named_generator

GROUP_OF = {
    "patch.weight": "patch_embedding",
    "position": "position_embedding",
    "class_token": "class_token",
    "query.weight": "query",
    "key.weight": "key",
    "value.weight": "value",
    "output.weight": "output",
    "mlp_in.weight": "mlp_in",
    "mlp_out.weight": "mlp_out",
    "head.weight": "head",
    "patch.bias": "patch_embedding_bias",
    "query.bias": "query_bias",
    "key.bias": "key_bias",
    "value.bias": "value_bias",
    "output.bias": "output_bias",
    "mlp_in.bias": "mlp_in_bias",
    "mlp_out.bias": "mlp_out_bias",
    "head.bias": "head_bias",
    "norm.weight": "norm_gain",
    "norm.bias": "norm_bias",
}


class Attention(nn.Module):
    def __init__(self, d: int, n_heads: int, causal: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=0)
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.n_heads, self.causal = n_heads, causal

    def forward(self, x: Tensor) -> Tensor:
        s = self.norm(x)
        q, k, v = (f(s).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Perceptron(nn.Module):
    def __init__(self, d: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=0)
        self.mlp_in, self.mlp_out = nn.Linear(d, ratio * d), nn.Linear(ratio * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(nn.functional.gelu(self.mlp_in(self.norm(x))))


class Encoder(nn.Module):
    """Patches, pre-norm blocks and an untied head; weights of variance C / fan-in, zero biases, no epsilon."""

    def __init__(
        self,
        d: int,
        *,
        seed: int = 0,
        n_patch: int = 4,
        n_tokens: int = 2,
        n_heads: int = 4,
        ratio: int = 4,
        n_blocks: int = 1,
        n_out: int = 4,
        causal: bool = False,
        scale: bool = False,
        **variances: float,
    ) -> None:
        super().__init__()
        self.patch = nn.Linear(n_patch, d)
        self.position = nn.Parameter(torch.empty(n_tokens, d))
        self.branches = nn.ModuleList()
        for _ in range(n_blocks):
            self.branches += [Attention(d, n_heads, causal), Perceptron(d, ratio)]
        self.norm = nn.LayerNorm(d, eps=0)
        self.head = nn.Linear(d, n_out)
        if scale:
            self.scale = nn.Parameter(torch.ones(()))
        self.double()
        for name, parameter in self.named_parameters():
            group = group_of(name)
            if group.endswith("_bias"):
                nn.init.zeros_(parameter)
            elif group not in ("norm_gain", "scale"):
                fan_in = 1 if group == "position_embedding" else parameter.shape[1]
                std = (variances.get(group, 1.0) / fan_in) ** 0.5
                parameter.data.normal_(0, std, generator=named_generator(seed, name))

    def forward(self, x: Tensor) -> Tensor:
        scale = getattr(self, "scale", 1.0)
        x = scale * (self.patch(x) + self.position)
        for branch in self.branches:
            x = x + scale * branch(x)
        return self.head(self.norm(x))


def group_of(name: str) -> str:
    return "scale" if name == "scale" else next(g for suffix, g in GROUP_OF.items() if name.endswith(suffix))


def groups_of(model: nn.Module) -> dict[str | WeightSlice, str]:
    return {name: group_of(name) for name, _ in model.named_parameters()}


def patches(samples: int = 1, n_tokens: int = 2, n_patch: int = 4) -> Tensor:
    return torch.randn(samples, n_tokens, n_patch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def jacobian_kernels(
    model: nn.Module, batch: Any, groups: dict[str | WeightSlice, str], read: Callable[[Any], Tensor]
) -> dict[str, np.ndarray]:
    """Return every entry of the kernel from the whole Jacobian, shape ``(n_outputs, n_outputs)``."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(theta: dict[str, Tensor]) -> Tensor:
        given = ((), batch) if isinstance(batch, dict) else ((batch,), {})
        return read(functional_call(model, theta, *given, tie_weights=True)).flatten()

    with sdpa_kernel([SDPBackend.MATH]):  # the fused kernel's derivative has no batched form
        rows = jacrev(outputs)(weights)
    kernels: dict[str, np.ndarray] = {}
    for key, group in groups.items():
        part = (
            rows[key]
            if isinstance(key, str)
            else rows[key.parameter].narrow(key.axis + 1, key.start, key.stop - key.start)
        )
        gram = (part.flatten(1) @ part.flatten(1).T).double().numpy()
        kernels[group] = kernels.get(group, 0) + gram
    return kernels


def _encoder() -> tuple[nn.Module, Any, dict[str | WeightSlice, str], Callable[[Any], Tensor]]:
    model = Encoder(8, n_tokens=3, n_blocks=2, causal=True, n_out=2)
    return model, patches(2, 3), groups_of(model), lambda out: out


def _vit() -> tuple[nn.Module, Any, dict[str | WeightSlice, str], Callable[[Any], Tensor]]:
    """A convolution as patch embedding, a class token; few patches for their size."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).double()
    groups = {name: name for name, _ in model.named_parameters()}
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return model, {"pixel_values": x}, dict(groups), lambda out: out.logits


def _gpt2(n_layers: int = 1) -> tuple[nn.Module, Any, dict[str | WeightSlice, str], Callable[[Any], Tensor]]:
    """Input-first and fused projections, and an embedding tied to the head."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=n_layers, n_embd=8, n_head=2, vocab_size=11, n_positions=5, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).double()
    groups: dict[str | WeightSlice, str] = {name: name for name, _ in model.named_parameters()}
    for name in [str(name) for name in groups if "c_attn" in str(name)]:
        del groups[name]
        axis = 1 if name.endswith("weight") else 0
        for i, role in enumerate(("query", "key", "value")):
            part = WeightSlice(parameter=name, axis=axis, start=8 * i, stop=8 * i + 8, size=24)
            groups[part] = f"{name} {role}"
    return model, {"input_ids": torch.tensor([[3, 1, 3, 7]])}, groups, lambda out: out.logits[:, 1:, :3]


class _Words(nn.Module):
    """An embedding of its own with a padding row, fused torch attention, overwriting, and a linear map used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.once, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.table(ids))
        return self.twice(torch.tanh_(self.once(self.twice(x))))


def _words() -> tuple[nn.Module, Any, dict[str | WeightSlice, str], Callable[[Any], Tensor]]:
    torch.manual_seed(3)
    model = _Words().double()
    return (
        model,
        torch.tensor([[4, 0, 4]]),
        {name: name for name, _ in model.named_parameters()},
        lambda out: out[..., :2],
    )


@pytest.mark.parametrize("memory", [50.0, 0.3], ids=["at once", "in segments"])
@pytest.mark.parametrize("case", [_encoder, _vit, _gpt2, _words], ids=lambda case: case.__name__[1:])
def test_every_entry_is_that_of_the_jacobian(case: Callable[[], Any], memory: float) -> None:
    model, batch, groups, read = case()
    model.eval()
    found = measure_tangent_kernel(model, batch, groups=groups, read=read, memory=memory)
    naive = jacobian_kernels(model, batch, groups, read)
    assert set(found.matrices) == set(naive)
    for group, expected in naive.items():
        np.testing.assert_allclose(
            found.matrices[group].reshape(expected.shape), expected, rtol=1e-9, atol=1e-12, err_msg=group
        )
    assert all(np.isnan(error).all() for error in found.errors.values())


def test_single_precision_agrees_with_the_jacobian() -> None:
    model, batch, groups, read = _encoder()
    model, batch = model.float(), batch.float()
    found = measure_tangent_kernel(model, batch, groups=groups)
    naive = jacobian_kernels(model, batch, groups, read)
    allowed = 1e-5 * max(kernel.max() for kernel in naive.values())
    for group, expected in naive.items():
        ours = found.matrices[group].reshape(expected.shape)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=allowed, err_msg=group)


class _Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.weight.T).square().sum(dim=-1, keepdim=True)


def test_long_sums_keep_single_precision() -> None:
    """Half a million squares in one single-precision sum are off by twenty times more."""
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1)) / 32
    kernel = measure_tangent_kernel(_Matrix(), x, groups={"weight": "weight"}).kernels["weight"]
    exact = measure_tangent_kernel(_Matrix().double(), x.double(), groups={"weight": "weight"}).kernels["weight"]
    np.testing.assert_allclose(kernel, exact, rtol=1e-6)


def test_components_tokens_and_factors_pick_and_scale() -> None:
    model, batch, groups, _ = _encoder()
    whole = measure_tangent_kernel(model, batch, groups=groups)
    factors = {group: 0.5 if group == "key" else 2.0 for group in set(groups.values())}
    part = measure_tangent_kernel(model, batch, groups=groups, lr_factors=factors, tokens=[2, 0], components=[1])
    assert part.positions.tolist() == [[0, 2], [0, 0], [1, 2], [1, 0]]
    rows = [2, 0, 5, 3]
    for group, factor in factors.items():
        expected = factor * whole.matrices[group][:, 1, :, 1][np.ix_(rows, rows)]
        np.testing.assert_allclose(part.kernels[group], expected, rtol=1e-12, atol=1e-14)
    one, other = (whole.matrices["value"][:, i, :, i] for i in (0, 1))
    np.testing.assert_allclose(whole.kernels["value"], (one + other) / 2)
    assert whole.sizes["value"][0] == pytest.approx(np.trace(whole.kernels["value"]) / 6)


def test_sketches_are_unbiased() -> None:
    """Every entry within its standard error of the exact mean over components; two fifths too much is seen."""
    model, batch, groups, _ = _encoder()
    model.head = nn.Linear(8, 12).double()
    exact = measure_tangent_kernel(model, batch, groups=groups)
    seen = measure_tangent_kernel(model, batch, groups=groups, sketches=200)
    assert seen.drawn == "sketches" and not seen.matrices
    assert seen.draws["query"].shape == (200, 6, 6)
    for group, kernel in exact.kernels.items():
        allowed = 4.5 * seen.errors[group] + 1e-12
        assert np.all(np.abs(seen.kernels[group] - kernel) < allowed), group
        if group in ("value", "output", "mlp_in", "mlp_out"):
            assert np.any(np.abs(seen.kernels[group] - 1.4 * kernel) > allowed), group


# The identities and the closed numbers below: Dinan, Yaida and Zhang, arXiv:2304.02034, section by section as named.


def test_exact_identities_of_one_network() -> None:
    """Head and biases exactly one, no key bias, no query or key at the first masked token, stem linear in patches."""
    d, batch = 16, patches(2, 3)
    model = Encoder(d, n_tokens=3, n_blocks=2, causal=True, scale=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                parameter.normal_(generator=named_generator(5, name))
    found = measure_tangent_kernel(model, batch, groups=groups_of(model))
    eye = np.eye(4)
    same = np.arange(6)
    head = found.matrices["head"] / d
    np.testing.assert_allclose(head[same, :, same, :], np.broadcast_to(eye, (6, 4, 4)), atol=1e-12)
    np.testing.assert_allclose(found.matrices["head_bias"], np.einsum("ab,ij->aibj", np.ones((6, 6)), eye), atol=1e-12)
    size = np.abs(found.kernels["key"]).max()
    assert size > 1e-3
    assert np.abs(found.kernels["key_bias"]).max() < 1e-24 * size  # a softmax does not see what all keys share
    single = measure_tangent_kernel(
        Encoder(d, n_tokens=3, n_blocks=1, causal=True), batch, groups=groups_of(Encoder(d)), tokens=[0]
    )
    for group in ("query", "key", "query_bias", "key_bias"):
        assert np.abs(single.kernels[group]).max() < 1e-24, group
    assert single.kernels["value"].max() > 1e-3


def test_the_last_norm_undoes_a_common_scale_of_all_that_is_added() -> None:
    """Sum of theta dz/dtheta over stem and last matrices, biases included, is zero: the kernel of a common factor."""
    model = Encoder(16, n_tokens=3, n_blocks=2, scale=True)
    kernels = measure_tangent_kernel(model, patches(2, 3), groups=groups_of(model)).kernels
    assert np.abs(kernels["scale"]).max() < 1e-24 * np.abs(kernels["output"]).max()
    model.norm = nn.LayerNorm(16, eps=0.1).double()
    kernels = measure_tangent_kernel(model, patches(2, 3), groups=groups_of(model)).kernels
    assert np.abs(kernels["scale"]).max() > 1e-6 * np.abs(kernels["output"]).max()


def _ensemble(d: int, seeds: int, batch: Tensor, **options: Any) -> MeasuredTangentKernel:
    def build(seed: int) -> nn.Module:
        return Encoder(d, seed=seed, **options)

    return measure_tangent_kernel(build, batch, groups=groups_of(build(0)), seeds=seeds)


def test_ratios_of_value_and_output_and_of_key_and_query() -> None:
    """Theta_V / Theta_U = C_U / C_V and Theta_K / Theta_Q = C_Q / C_K, paired draw by draw."""
    found = _ensemble(64, 120, patches(), output=1.5, value=0.5, query=1.2, key=0.8)
    for group, other, ratio in (("value", "output", 3.0), ("key", "query", 1.5)):
        large, small = (np.einsum("daa->d", found.draws[g]) for g in (group, other))
        for wanted, agrees in ((ratio, True), (1.2 * ratio, False)):
            gap = large - wanted * small
            error = gap.std(ddof=1) / math.sqrt(len(gap)) + 4 / 64 / 4.5 * large.mean()  # 4/n of finite width
            assert (abs(gap.mean()) < 4.5 * error) == agrees, (group, wanted)


# Two tokens of overlap 1/2, every C = 1 but that of positions = 0, one attention and one GELU block: entries 11 and 12.
WORKED = {
    "patch_embedding": 1.0644980047,
    "position_embedding": 0.9730403292,
    "value": 0.4485009530,
    "output": 0.4485009530,
    "query": 0.0253461411,
    "key": 0.0253461411,
    "mlp_out": 0.1916620316,
    "mlp_in": 0.2054677540,
    "head": 1.0,
    "head_bias": 1.0,
}
TOTAL_OFF_DIAGONAL = 3.8787295529


def test_the_kernel_of_a_wide_network() -> None:
    """Each group under the factors 1 / fan_in within max(4.5 SE, 4%) of the value at infinite width."""
    d, n_patch = 128, 4
    batch = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]]], dtype=torch.float64)
    fan_in = {"patch_embedding": n_patch, "mlp_out": 4 * d} | dict.fromkeys(
        ("query", "key", "value", "output", "mlp_in", "head"), d
    )
    names = set(groups_of(Encoder(d)).values())
    found = measure_tangent_kernel(
        lambda seed: Encoder(d, seed=seed, position_embedding=0.0),
        batch,
        groups=groups_of(Encoder(d)),
        lr_factors={name: 1 / fan_in.get(name, 1) for name in names},
        seeds=150,
        seed=10,
    )
    for group, theory in WORKED.items():
        mean, error = found.sizes[group]
        allowed = max(4.5 * error, 0.04 * theory)
        assert abs(mean - theory) < allowed, (group, mean, error)
    off = sum(found.kernels[group][0, 1] for group in WORKED)
    error = math.sqrt(sum(found.errors[group][0, 1] ** 2 for group in WORKED))
    assert abs(off - TOTAL_OFF_DIAGONAL) < max(4.5 * error, 0.04 * TOTAL_OFF_DIAGONAL)


def _left_alone(model: nn.Module, action: Callable[[], Any]) -> None:
    """Check that weights, gradients, flags, modes and random state are bitwise what they were before."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    model.branches[1].eval()
    model.patch.requires_grad_(False)
    weights = {name: (p.clone(), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    action()
    assert torch.equal(random, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        kept, where, flag = weights[name]
        assert torch.equal(parameter, kept) and parameter.data_ptr() == where and parameter.requires_grad == flag
        assert parameter.grad is not None and bool((parameter.grad == 1).all())
    for name, module in model.named_modules():
        assert module.training == modes[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.is_grad_enabled()


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("planted")


def test_model_is_left_as_found() -> None:
    model = Encoder(8, n_tokens=3)
    batch, groups = patches(1, 3), groups_of(model)
    calls: list[None] = []

    def late(out: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:  # in the first redraw
            raise RuntimeError("planted")
        return out

    def fails(read: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(RuntimeError, match="planted"):
            measure_tangent_kernel(model, batch, groups=groups, seeds=3, read=read)

    _left_alone(model, lambda: measure_tangent_kernel(model, batch, groups=groups, seeds=3))
    _left_alone(model, lambda: fails(late))
    _left_alone(model, lambda: fails(_FailsBackward.apply))


def test_errors_are_those_of_a_mean_over_draws() -> None:
    mean, error = mean_and_error(np.array([1.0, 2.0, 6.0]))
    assert (float(mean), float(error)) == pytest.approx((3.0, np.sqrt(7 / 3)))  # variance (4 + 1 + 9) / 2
    assert np.isnan(mean_and_error(np.ones(1))[1])


def test_redraws_scatter_and_keep_their_scale() -> None:
    """A redrawn model scatters like models built anew, also where one parameter holds several matrices."""
    built = _ensemble(32, 60, patches())
    redrawn = measure_tangent_kernel(Encoder(32), patches(), groups=groups_of(Encoder(32)), seeds=60)
    for group in ("patch_embedding", "value", "mlp_in", "position_embedding"):
        (one, e1), (two, e2) = built.sizes[group], redrawn.sizes[group]
        assert abs(one - two) < 4.5 * math.hypot(e1, e2)
        assert 0.5 < e1 / e2 < 2
    np.testing.assert_array_equal(built.draws["value"][0], redrawn.draws["value"][0])


def test_roles_are_the_default_groups() -> None:
    """A tied embedding is one parameter of one group, and its note says that its gradient is a sum."""
    model, batch, _, read = _gpt2(2)
    found = measure_tangent_kernel(model, batch, read=read)
    given = measure_tangent_kernel(model, batch, read=read, groups=parameter_roles(model, batch))
    np.testing.assert_array_equal(given.matrices["query_bias"], found.matrices["query_bias"])
    naive = jacobian_kernels(model.eval(), batch, {name: name for name, _ in model.named_parameters()}, read)
    ours = found.matrices["token_embedding"].reshape(9, 9)
    np.testing.assert_allclose(ours, naive["transformer.wte.weight"], rtol=1e-9)
    fused = sum(found.matrices[role] for role in ("query", "key", "value")).reshape(9, 9)
    expected = sum(naive[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in range(2))
    np.testing.assert_allclose(fused, expected, rtol=1e-9)
    assert found.notes == (
        "transformer.wte.weight = lm_head.weight is one parameter: its gradient is the sum over its uses",
    )


def _bad_groups(**changes: str | None) -> dict[str | WeightSlice, str]:
    groups = groups_of(Encoder(8)) | {key: value for key, value in changes.items() if value is not None}
    return {key: value for key, value in groups.items() if key not in changes or changes[str(key)] is not None}


def _rows(start: int, stop: int) -> WeightSlice:
    return WeightSlice(parameter="head.weight", axis=0, start=start, stop=stop, size=4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (_bad_groups(position=None), "in no group: 'position'; give each a group, as in groups={'position': 'mlp_in'}"),
        (_bad_groups(postion="a"), r"no parameter 'postion'; did you mean 'position'\?"),
        (_bad_groups() | {_rows(0, 4): "a"}, "'head.weight' is in two groups: 'a', 'head'"),
        (
            _bad_groups(**{"head.weight": None}) | {_rows(0, 3): "a", _rows(2, 4): "b"},
            r"'head.weight'\[2:3\] is in two groups: 'a' and 'b'",
        ),
        (_bad_groups(**{"head.weight": None}) | {_rows(0, 3): "a"}, r"'head.weight'\[3:4\] is in no group"),
        (_bad_groups(**{"head.weight": None}) | {_rows(1, 4): "a"}, r"'head.weight'\[0:1\] is in no group"),
        (_bad_groups(**{"head.weight": None}) | {_rows(0, 5): "a"}, "ends at 4; the group 'a' reaches to 5"),
    ],
)
def test_every_parameter_belongs_to_one_group(groups: dict[str | WeightSlice, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        measure_tangent_kernel(Encoder(8), patches(), groups=groups)


def test_two_names_of_a_tied_parameter_in_two_groups() -> None:
    model, batch, groups, read = _gpt2()
    with pytest.raises(ModelError, match=r"'transformer.wte.weight' is in two groups"):
        measure_tangent_kernel(model, batch, groups=groups | {"lm_head.weight": "head"}, read=read)


def test_bad_input_is_one_clear_sentence() -> None:
    model, batch = Encoder(8), patches()
    groups = groups_of(model)

    def run(error: type[Exception], message: str, given: Any = model, x: Any = batch, **options: Any) -> None:
        with pytest.raises(error, match=message):
            measure_tangent_kernel(given, x, groups=groups, **options)

    run(ModelError, "seeds must be a positive integer; got 0", seeds=0)
    run(DomainError, "sketches must be an integer of at least 0; got -1", sketches=-1)
    run(DomainError, "memory must be positive and finite; got 0", memory=0)
    run(DomainError, r"components must lie in \[1, 4\]; got 5", components=5)
    run(DomainError, r"tokens must be different indices in \[0, 1\]; got \[0, 0\]", tokens=[0, 0])
    run(DomainError, r"tokens must be different indices in \[0, 1\]; got \[\]", tokens=[])
    run(BatchError, "NaN or infinity", x=batch * math.nan)
    run(BatchError, "does not run on the given batch: ", x=batch[..., :3])
    run(ModelError, r"shape \(batch, n_out\) or \(batch, n_tokens, n_out\); got \(\). Pass read=", read=torch.sum)
    run(ModelError, "no gradient flows from the output", read=torch.detach)
    run(ModelError, "the outputs hold NaN or infinity", read=lambda out: out / 0)
    run(
        ModelError,
        "2 positions with 15000 components need 30000 reverse passes",
        read=lambda out: out.repeat(1, 1, 3750),
    )
    run(ModelError, "must return a torch.nn.Module; got int", given=lambda seed: seed)
    run(ModelError, "names a group that is none: 'quer'; did you mean 'query'", lr_factors={"quer": 1.0})
    run(ModelError, "no factor for: 'head', ", lr_factors={g: 1.0 for g in groups.values() if not g.startswith("head")})
    run(DomainError, "factor of 'query' must be positive and finite; got -1", lr_factors={"query": -1.0})
    with pytest.raises(DomainError, match=r"two different positive widths; got \[8\]"):
        tangent_slopes(lambda width, seed: Encoder(width), [8], batch, groups=groups)
    with pytest.raises(DomainError, match="at least 2 seeds; got 1"):
        tangent_slopes(lambda width, seed: Encoder(width), [8, 16], batch, groups=groups, seeds=1)


def _fan_in_rule(width: int) -> dict[str, float]:
    fan_in = {"patch_embedding": 4, "mlp_out": 4 * width}
    fan_in |= dict.fromkeys(("query", "key", "value", "output", "mlp_in", "head"), width)
    return {group: 1 / fan_in.get(group, 1) for group in set(groups_of(Encoder(8)).values())}


def _slopes(widths: list[int], seeds: int) -> TangentSlopes:
    def build(width: int, seed: int) -> nn.Module:
        return Encoder(width, seed=seed, n_tokens=3, n_blocks=2).float()

    return tangent_slopes(
        build,
        widths,
        patches(1, 3).float(),
        groups=groups_of(build(8, 0)),
        lr_factors=_fan_in_rule,
        components=2,
        seeds=seeds,
    )


MATRICES = ("query", "key", "value", "output", "mlp_in", "mlp_out", "head")


def test_slopes_of_the_kernel_against_width() -> None:
    """Flat for every group under 1 / fan_in; one rate for all grows the matrices in proportion to the width."""
    found = _slopes([32, 64, 128], 24)
    assert found.vanishing == ("key_bias",)
    for group, (slope, error) in found.slopes.items():
        uniform, _ = found.uniform_slopes[group]
        grows = group in MATRICES
        assert uniform == pytest.approx(slope + grows, abs=1e-9)
        assert abs(slope) < 4.5 * error + 0.1, group  # 1/n at n = 32: a tenth of a logarithm over two octaves
        assert (abs(uniform) < 4.5 * error + 0.1) != grows, group


@pytest.mark.slow
def test_slopes_within_a_twentieth_over_four_octaves() -> None:
    found = _slopes([64, 128, 256, 512], 100)
    for slope, error in found.slopes.values():
        assert abs(slope) < 4.5 * error + 0.05
