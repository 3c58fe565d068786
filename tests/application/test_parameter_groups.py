"""Groups for torch optimizers and weights that carry a recipe from a base width to a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fathometer.application import initialize_widths, parameter_groups, remove_multipliers, role_stds, scaling_table
from fathometer.errors import DomainError, ModelError, NotCoveredError, SpecError
from fathometer.models import ModelRoles, read_roles
from fathometer.prescription import ScalingScheme
from tests.models.test_roles import CASES, VOCABULARY, Odd, gpt2_lm, ids

transformers = pytest.importorskip("transformers")

BASE = {"lr": 3e-3, "weight_decay": 0.1}
UNDECAYED = ("bias", "gain", "shape", "scale")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = transformers.utils.logging
    level = logger.get_verbosity()
    logger.set_verbosity_error()
    yield
    logger.set_verbosity(level)


class Net(nn.Module):
    """Tokens, positions, torch's encoder, a hidden map and a head."""

    def __init__(self, width: int, *, heads: int = 4, seed: int = 0, readout: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Parameter(torch.randn(8, width))
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
            self.dense = nn.Linear(width, width)
            self.head = readout(width, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.dense(self.encoder(self.embed(tokens) + self.positions))))
        return out


def _tokens(columns: int = 8) -> Tensor:
    return ids(2, columns)


def _roles(model: nn.Module) -> ModelRoles:
    return read_roles(model, _tokens())


def _rates(groups: list[dict[str, Any]], key: str = "lr") -> dict[int, Any]:
    return {id(parameter): group[key] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", CASES)
def test_at_base_width_every_model_is_trained_as_before(name: str, optimizer: str) -> None:
    model, batch, *_ = CASES[name]()
    roles = read_roles(model, batch)
    groups = parameter_groups(
        model,
        "hybrid",
        roles=roles,
        base_width=roles.d_model,
        optimizer=optimizer,  # type: ignore[arg-type]
        **BASE,
    )
    members = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert len(members) == len(list(model.parameters()))
    for group in groups:
        undecayed = group["role"].endswith(UNDECAYED)
        assert group["lr"] == BASE["lr"] and group["weight_decay"] == (0.0 if undecayed else BASE["weight_decay"])
        assert group.get("eps") == (1e-8 if optimizer == "adamw" else None)
    (torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD)(groups)


@pytest.mark.parametrize("name", CASES)
def test_from_half_the_width(name: str) -> None:
    model, batch, *_ = CASES[name]()
    roles = read_roles(model, batch)
    groups = parameter_groups(model, 0, roles=roles, base_width=roles.d_model // 2, **BASE)
    table = scaling_table(roles, 0, base_width=roles.d_model // 2)
    matrices = ("query", "key", "value", "output", "gate", "mlp_in", "mlp_out", "head_hidden")
    for group in groups:
        parts = group["role"].split("+")
        if parts[0] in matrices:
            assert group["lr"] == pytest.approx(BASE["lr"] / 8**0.5)
        elif parts[0] == "head":
            assert group["lr"] == pytest.approx(BASE["lr"] / 2.0)
        elif parts[0] in ("head_bias", "qk_norm_gain", "norm_shape"):
            assert group["lr"] == pytest.approx(BASE["lr"])
        else:
            assert group["lr"] == pytest.approx(BASE["lr"] / 2**0.5)
        if not group["role"].endswith(UNDECAYED):
            assert group["lr"] * group["weight_decay"] == pytest.approx(BASE["lr"] * BASE["weight_decay"])
        for part in parts:
            row = table.row(part, in_blocks="(blocks)" in group["name"])
            assert group["lr"] == pytest.approx(BASE["lr"] * row.factors.rate)
            assert group["eps"] == pytest.approx(1e-8 * row.factors.epsilon)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
def test_two_steps_of_adamw_are_those_of_the_paper(s: float) -> None:
    """Decay without the factor on the rate, the rest with it: arXiv:2304.02034v1, Eqs. 1.91-1.94."""
    model = Net(64, heads=4).double()
    mine = copy.deepcopy(model)
    lr, decay, eps, beta1, beta2, m = 1e-2, 0.3, 1e-3, 0.9, 0.95, 4
    groups = parameter_groups(
        model, s, batch=_tokens(), base_width=64 // m, fixed="n_heads", lr=lr, weight_decay=decay, eps=eps
    )
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2))

    def powers(name: str) -> tuple[float, float]:
        """Return the powers of m in the rate and in epsilon."""
        if name.startswith("head"):
            return -1.0 if "weight" in name else 0.0, 0.0
        matrix = name.endswith("weight") and "norm" not in name and not name.startswith("embed")
        return -1 - (1 - s) / 2 if matrix or name.endswith("in_proj_weight") else -(1 - s) / 2, -(1 + s) / 2

    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in mine.named_parameters()}
    for step in (1, 2):
        for net in (model, mine):
            net.zero_grad()
            net(_tokens()).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, theta in mine.named_parameters():
                g = theta.grad
                assert g is not None
                v, u = state[name]
                v.mul_(beta1).add_(g, alpha=1 - beta1)
                u.mul_(beta2).add_(g.square(), alpha=1 - beta2)
                rate, size = powers(name)
                weight = ("weight" in name and "norm" not in name) or name == "positions"
                change = (v / (1 - beta1**step)) / ((u / (1 - beta2**step)).sqrt() + eps * m**size)
                theta.copy_((1 - lr * (decay if weight else 0.0)) * theta - m**rate * lr * change)
        for (name, a), (_, b) in zip(model.named_parameters(), mine.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_groups_of_ones_own() -> None:
    model = Net(64)
    roles = _roles(model)
    encoder = list(model.encoder.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    own = [
        {"params": encoder, "lr": 1e-2, "weight_decay": 0.2, "betas": (0.8, 0.9), "name": "trunk"},
        {"params": rest, "initial_lr": 4e-3},
    ]
    scaled = parameter_groups(model, 1.0, roles=roles, base_width=16, groups=own, **BASE)
    assert own[0]["params"] == encoder and own[0]["lr"] == 1e-2
    rates, decays = _rates(scaled), _rates(scaled, "weight_decay")
    query, norm = model.encoder.layers[0].self_attn.in_proj_weight, model.encoder.layers[0].norm1.weight
    assert rates[id(query)] == pytest.approx(1e-2 / 4) and decays[id(query)] == pytest.approx(0.8)
    assert rates[id(norm)] == pytest.approx(1e-2) and decays[id(norm)] == pytest.approx(0.2)  # the group says so
    assert rates[id(model.dense.weight)] == pytest.approx(BASE["lr"] / 4)
    assert decays[id(model.dense.bias)] == 0.0
    by_name = {group["name"]: group for group in scaled}
    assert by_name["trunk: query+key+value (blocks)"]["betas"] == (0.8, 0.9)
    assert by_name["group 1: head_hidden"]["initial_lr"] == pytest.approx(1e-3)
    # an optimizer's groups are read with all their options, and it stays as it is
    optimizer = torch.optim.AdamW(own, lr=5e-3, eps=1e-6)
    scaled = parameter_groups(model, 1.0, roles=roles, base_width=16, groups=optimizer, **BASE)
    assert _rates(scaled, "eps")[id(query)] == pytest.approx(1e-6 / 4)
    assert _rates(scaled)[id(model.dense.weight)] == pytest.approx(5e-3 / 4)
    assert _rates(optimizer.param_groups)[id(query)] == 1e-2
    named = parameter_groups(
        model, 1.0, roles=roles, base_width=16, groups=[{"params": model.named_parameters()}], lr=1
    )
    assert _rates(named)[id(query)] == pytest.approx(1 / 4)
    torch.optim.AdamW(scaled)


def test_groups_that_do_not_fit() -> None:
    model = Net(64)
    options: dict[str, Any] = {"roles": _roles(model), "base_width": 16, **BASE}
    everything = list(model.parameters())
    for groups, message in (
        ([{"params": everything[1:]}], r"'positions' is in none of the 1 given groups"),
        ([{"params": everything}, {"params": model.dense.weight}], r"'dense\.weight' is in two groups, 0 and 1"),
        ([{"params": [*everything, nn.Parameter(torch.zeros(2, 3))]}], r"shape \(2, 3\) that is not of this model"),
        ([everything], "group 0 is no dictionary with 'params'; got list"),
        (parameter_groups(model, 1.0, **options), "group 0 has a role already: its rate has been scaled before"),
    ):
        with pytest.raises(ModelError, match=message):
            parameter_groups(model, 1.0, groups=groups, **options)
    with pytest.raises(ModelError, match=r"know no parameter .* those of another model"):
        parameter_groups(gpt2_lm(), 1.0, **options)


def test_frozen_parameters_are_left_out() -> None:
    model = Net(64)
    model.positions.requires_grad_(False)
    groups = parameter_groups(model, 1.0, batch=_tokens(), base_width=16, **BASE)
    assert id(model.positions) not in _rates(groups)
    before = model.positions.detach().clone()
    applied = initialize_widths(model, 1.0, batch=_tokens(), base_width=16, base_stds="read")
    assert torch.equal(model.positions, before) and "frozen parameters are left as they are: positions" in applied.notes


def test_a_fused_parameter_has_one_rate() -> None:
    model, batch, *_ = CASES["phi3, gate and up fused"]()
    roles = read_roles(model, batch)
    fused = {group["role"] for group in parameter_groups(model, 0, roles=roles, base_width=32, **BASE)}
    assert {"query+key+value", "gate+mlp_in"} <= fused
    # absolute factors count outputs: those of shared keys are fewer
    with pytest.raises(NotCoveredError, match=r"qkv_proj\.weight' is fused: 'query' needs a rate times .* 'key' times"):
        parameter_groups(model, 0, roles=roles, base_width=None, **BASE)
    groups = parameter_groups(
        model, 0, batch=batch, base_width=None, overrides={"*.qkv_proj.weight": "query"}, lr=20.0, scale_eps=False
    )
    by_role = {group["role"]: group for group in groups}
    assert by_role["mlp_out"]["lr"] == pytest.approx(20 / (128 * 64**0.5))
    assert by_role["token_embedding"]["lr"] == pytest.approx(20 / 64**0.5)
    assert by_role["token_embedding"]["eps"] == 1e-8


def test_numbers_out_of_range() -> None:
    model = Net(64)
    options: dict[str, Any] = {"roles": _roles(model), "base_width": 16}
    for wrong in ({"lr": -1.0}, {"lr": math.nan}, {"lr": 1, "weight_decay": -0.1}, {"lr": 1, "eps": math.inf}):
        with pytest.raises(DomainError, match=f"{list(wrong)[-1]} must be finite and not negative"):
            parameter_groups(model, 1.0, **options, **wrong)
    with pytest.raises(DomainError, match=r"s must lie in \[0, 1\]"):
        parameter_groups(model, 1.5, **options, lr=1)
    with pytest.raises(SpecError, match=r"4 heads of d_model 64 become 1\.5"):
        parameter_groups(model, 1.0, roles=options["roles"], base_width=24, lr=1)
    with pytest.raises(SpecError, match="give a batch the model can be called with, or roles"):
        parameter_groups(model, 1.0, base_width=16, lr=1)
    with pytest.raises(SpecError, match="give a batch the model can be called with, or roles"):
        initialize_widths(model, 1.0, base_width=16, base_stds="read")
    assert parameter_groups(model, 1.0, roles=options["roles"], base_width=128, lr=1)[2]["lr"] > 0
    with pytest.raises(SpecError, match=r"base_stds has no number for the role 'position_embedding'"):
        initialize_widths(model, 1.0, **options, base_stds={"query": 1.0})
    with pytest.raises(SpecError, match="base_stds must be 'read' or a mapping"):
        initialize_widths(model, 1.0, **options, base_stds="guess")  # type: ignore[arg-type]
    stds = role_stds(model, options["roles"])
    with pytest.raises(DomainError, match=r"base_stds\['head'\] must be finite and not negative; got -1"):
        initialize_widths(model, 1.0, **options, base_stds=stds | {"head": -1})


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("s", [0.0, 1.0])
def test_weights_at_the_scale_of_the_scheme(s: float) -> None:
    base, model = Net(64), Net(256)
    stds = role_stds(base, _roles(base))
    assert stds["token_embedding"] == pytest.approx(1, rel=0.05) and stds["head"] == pytest.approx(192**-0.5, rel=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    applied = initialize_widths(model, s, batch=_tokens(), base_width=64, base_stds=stds, seed=3, fixed="n_heads")
    for row in applied.rows:
        view = row.parameter.of(dict(model.named_parameters())[row.parameter.parameter])
        role = row.parameter.role
        power = 0 if "embedding" in role else -(1 + s) / 2 if role == "head" else -0.5
        expected = 0.0 if role.endswith("bias") else stds[role] * 4**power
        assert row.std == pytest.approx(expected)
        # a draw of k entries spreads by 1/sqrt(2k)
        assert abs(_rms(view) - expected) <= 4.5 * expected / math.sqrt(2 * view.numel())
    assert torch.equal(model.encoder.norm.weight, before["encoder.norm.weight"])
    assert applied.multipliers == () and "biases were set to zero" in applied.table()
    # the draw depends on the seed and the name, and reading weights starts from what is there
    first = model.dense.weight.detach().clone()
    initialize_widths(model, s, batch=_tokens(), base_width=64, base_stds=stds, seed=3, fixed="n_heads")
    assert torch.equal(first, model.dense.weight)
    initialize_widths(model, s, batch=_tokens(), base_width=64, base_stds="read", seed=4)
    assert _rms(model.dense.weight) == pytest.approx(_rms(first) / 2, rel=0.02)
    assert abs(float((first * model.dense.weight.detach()).mean())) < 4.5 * _rms(first) * _rms(model.dense.weight) / 256


def test_tied_heads_and_deep_branches_get_multipliers() -> None:
    model = gpt2_lm().eval()
    batch = {"input_ids": ids()}
    roles = read_roles(model, batch)
    applied = initialize_widths(model, "complete-p", roles=roles, base_width=16, base_stds="read", base_layers=1)
    places = dict(applied.multipliers)
    assert places.pop("lm_head") == pytest.approx(1 / 4)
    assert len(places) == 4 and set(places.values()) == {0.5}
    with torch.no_grad():
        scaled = model(**batch).logits
        assert len(parameter_groups(model, "complete-p", batch=batch, base_width=16, base_layers=1, lr=1)) == 14
        for _ in range(2):  # a second call replaces multipliers
            applied = initialize_widths(model, 1.0, roles=roles, base_width=16, base_stds=role_stds(model, roles))
        assert applied.multipliers == (("lm_head", pytest.approx(1 / 4)),)
        with_factor = model(**batch).logits
        applied.remove()
        torch.testing.assert_close(with_factor * 4, model(**batch).logits)
    assert scaled.shape == with_factor.shape
    remove_multipliers(model)


class Functional(nn.Module):
    """A tied head without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Odd()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner.encoder(self.inner.embed(tokens)) @ self.inner.embed.weight.T


def test_multipliers_that_no_module_can_carry() -> None:
    model = Functional()
    model.inner.head = nn.Identity()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NotCoveredError, match=r"multiply its logits by 0\.5 in the model's code"):
        initialize_widths(model, 0.0, batch=ids(), base_width=16, base_stds="read")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_roles_of_another_model_are_refused() -> None:
    roles = read_roles(Net(64), _tokens())
    smaller = dataclasses.replace(roles, roles=roles.roles[1:])
    larger = dataclasses.replace(roles, roles=(*roles.roles, dataclasses.replace(roles.roles[0], parameter="more")))
    for wrong, message in ((smaller, "know no parameter"), (larger, "has no parameter 'more'")):
        with pytest.raises(ModelError, match=message):
            initialize_widths(Net(64), 1.0, roles=wrong, base_width=16, base_stds="read")
        with pytest.raises(ModelError, match=message):
            parameter_groups(Net(64), 1.0, roles=wrong, lr=0.1, base_width=16)


def test_padding_rows_stay_zero() -> None:
    model = Net(64)
    model.embed.padding_idx = 5
    initialize_widths(model, 1.0, batch=_tokens(), base_width=16, base_stds="read")
    rows = model.embed.weight.detach().abs().amax(dim=1)
    assert float(rows[5]) == 0.0 and float(rows[4]) > 0


WIDTHS, DRAWS = (32, 64, 128, 256), 32
UNSCALED = {"query": 1, "output": 1, "mlp_in": 1, "mlp_out": 1, "head": 1, "token_embedding": 0, "norm_gain": 0}


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["neural-tangent", "maximal-update"])
def sizes_of_gradients(request: pytest.FixtureRequest) -> tuple[float, dict[str, Any]]:
    """Return s; and sums of squared gradients of an output, with rates and sizes, by role: (widths, draws)."""
    s = request.param
    found: dict[str, Any] = {}
    stds = {role: 1.0 for role in ("token_embedding", "position_embedding")}
    matrices = ("query", "key", "value", "output", "mlp_in", "head_hidden", "head")
    stds |= {role: WIDTHS[0] ** -0.5 for role in matrices} | {"mlp_out": (4 * WIDTHS[0]) ** -0.5}
    for i, width in enumerate(WIDTHS):
        model = Net(width, heads=width // 8)
        roles = _roles(model)
        rows = scaling_table(roles, s, base_width=WIDTHS[0], optimizer="sgd")
        for draw in range(DRAWS):
            initialize_widths(model, s, roles=roles, base_width=WIDTHS[0], base_stds=stds, seed=draw)
            model.zero_grad()
            model(_tokens())[0, 0, draw % 7].backward()
            parameters = dict(model.named_parameters())
            for row in roles.roles:
                gradient = parameters[row.parameter].grad
                assert gradient is not None
                entry = found.setdefault(row.role, {"square": np.zeros((len(WIDTHS), DRAWS)), "rate": {}, "count": {}})
                entry["square"][i, draw] += float(row.of(gradient).double().square().sum())
                entry["rate"][i] = rows.row(row.role, in_blocks=row.layer is not None).factors.rate
                entry["count"][i] = row.of(gradient).numel()
                entry["epsilon"] = rows.row(row.role, in_blocks=row.layer is not None).exponents.epsilon
    return s, found


@pytest.mark.parametrize("role", UNSCALED)
def test_the_kernel_of_a_group_does_not_move_with_width(role: str, sizes_of_gradients: Any) -> None:
    """Sums of squared gradients times rates have no slope in the width, and drift without the rates.

    The slope of the logarithm of the mean over draws, four widths from 32 to 256: standard error by the delta method,
    and 0.1 for corrections of order 1/width and 1/heads.
    """
    s, found = sizes_of_gradients
    square = found[role]["square"]
    rate = np.array([found[role]["rate"][i] for i in range(len(WIDTHS))])
    count = np.array([found[role]["count"][i] for i in range(len(WIDTHS))])
    x = np.log(WIDTHS)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    mean, spread = square.mean(axis=1), square.std(axis=1, ddof=1) / math.sqrt(DRAWS)
    error = float(np.sqrt((weights**2 * (spread / mean) ** 2).sum()))
    slope = float(weights @ np.log(mean * rate))
    bare = float(weights @ np.log(mean))
    allowed = 4.5 * error + 0.1
    assert abs(slope) <= allowed
    assert abs(bare - (UNSCALED[role] if role == "head" else UNSCALED[role] - s)) <= allowed
    # AdamW's epsilon follows the size of a gradient entry
    entry = float(weights @ np.log(np.sqrt(mean / count)))
    assert abs(entry - found[role]["epsilon"]) <= allowed / 2
    assert 4.5 * error < 0.3


def test_the_mup_package_agrees_at_s_1() -> None:
    """Same powers of the width for every parameter, for Adam and SGD; what differs is named here."""
    mup = pytest.importorskip("mup")
    m, lr, decay = 4, 1e-2, 0.1
    model = Net(64 * m, readout=mup.MuReadout)
    mup.set_base_shapes(model, Net(64, readout=mup.MuReadout), delta=Net(128, readout=mup.MuReadout))
    names = {id(p): name for name, p in model.named_parameters()}
    roles = _roles(model)
    for optimizer, theirs, head_power in (("adamw", mup.MuAdamW, 1), ("sgd", mup.MuSGD, 2)):
        mine = parameter_groups(
            model,
            "maximal-update",
            roles=roles,
            base_width=64,
            fixed="n_heads",
            lr=lr,
            weight_decay=decay,
            optimizer=optimizer,  # type: ignore[arg-type]
        )
        other = theirs(model.parameters(), lr=lr, weight_decay=decay).param_groups
        rates, decays = (_rates(mine), _rates(mine, "weight_decay")), (_rates(other), _rates(other, "weight_decay"))
        for key, name in names.items():
            # Their head divides its output by m and keeps its weights: in terms of what multiplies the stream, rates
            # are lower by m under Adam, whose steps do not see the factor, and by m^2 under SGD, whose steps do.
            power = head_power if name == "head.weight" else 0
            assert rates[0][key] == pytest.approx(decays[0][key] / m**power), name
            if rates[1][key] != 0:  # they decay biases and norms too
                assert rates[0][key] * rates[1][key] == pytest.approx(lr * decay), name
                assert decays[0][key] * decays[1][key] == pytest.approx(lr * decay), name
    # Variances: their head's weights over m, against ours.
    effective = _rms(model.head.weight) / m
    stds = role_stds(Net(64), _roles(Net(64)))
    plain = Net(64 * m)
    rows = initialize_widths(plain, 1.0, batch=_tokens(), base_width=64, base_stds=stds, fixed="n_heads").rows
    ours = {row.parameter.role: row.std for row in rows}
    assert effective == pytest.approx(ours["head"], rel=4.5 / math.sqrt(2 * 7 * 64))
    assert _rms(model.dense.weight) == pytest.approx(ours["head_hidden"], rel=4.5 / math.sqrt(2 * 64**2))


def test_depth_factors_reach_the_groups() -> None:
    model = Net(64)
    scheme = ScalingScheme(name="deep", s=0.0, depth_rates=True)
    groups = parameter_groups(model, scheme, roles=_roles(model), base_width=64, base_layers=8, lr=1.0)
    for group in groups:
        assert group["lr"] == pytest.approx(2.0 if "(blocks)" in group["name"] else 1.0)
