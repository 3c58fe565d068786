"""The width-scaling rule against the paper's tables, its law, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fathometer.errors import DomainError, SpecError
from fathometer.prescription import (
    SCALINGS,
    ScalingScheme,
    scaling_scheme,
    standard_parameters,
    width_rule,
    width_table,
)
from fathometer.prescription.width_scaling import NARROW, SCALED_ROLES, Sizes, is_weight, width_factors

N, PATCH, M, OUT = 768, 588, 4, 1000
STEM = ("token_embedding", "position_embedding", "class_token", "segment_embedding")
SQUARE = ("query", "key", "value", "output")
BIASES = ("query_bias", "value_bias", "output_bias", "mlp_out_bias", "norm_gain", "norm_bias", "patch_embedding_bias")

#: Role -> fans, the paper's SGD and AdamW factors at s = 0 (arXiv:2304.02034v1, Eqs. 1.99-1.116), init variance.
PAPER: dict[str, tuple[tuple[int, int], float, float, float]] = {
    "patch_embedding": ((PATCH, N), 1 / PATCH, 1 / (PATCH * N**0.5), 1 / PATCH),
    **{role: ((1, N), 1.0, 1 / N**0.5, 1.0) for role in (*STEM, *BIASES)},
    **{role: ((N, N), 1 / N, 1 / (N * N**0.5), 1 / N) for role in SQUARE},
    "mlp_in": ((N, M * N), 1 / N, 1 / (N * (M * N) ** 0.5), 1 / N),
    "gate": ((N, M * N), 1 / N, 1 / (N * (M * N) ** 0.5), 1 / N),
    "mlp_out": ((M * N, N), 1 / (M * N), 1 / (M * N * N**0.5), 1 / (M * N)),
    "mlp_in_bias": ((1, M * N), 1.0, 1 / (M * N) ** 0.5, 1.0),
    "head": ((N, OUT), 1 / N, 1 / (N * OUT**0.5), 1 / N),
    "head_bias": ((1, OUT), 1.0, 1 / OUT**0.5, 1.0),
}


@pytest.mark.parametrize("s", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("role", PAPER)
def test_the_papers_tables(role: str, s: float) -> None:
    (fan_in, fan_out), sgd, adamw, variance = PAPER[role]
    last = role in ("head", "head_bias")
    rules = {
        name: width_rule(role, fan_in=fan_in, fan_out=fan_out, d_model=N, s=s, optimizer=name)  # type: ignore[arg-type]
        for name in ("sgd", "adamw")
    }
    assert rules["sgd"].rate == pytest.approx(sgd * (1 if last else N**s), rel=1e-12)
    assert rules["adamw"].rate == pytest.approx(adamw * (1 if last else N ** (s / 2)), rel=1e-12)
    assert rules["sgd"].variance == pytest.approx(variance * (N**-s if role == "head" else 1), rel=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("role", [role for role in SCALED_ROLES if role not in NARROW])
def test_the_kernel_of_every_group_is_of_order_one(role: str, s: float) -> None:
    fan_in, fan_out, n = (1 if not is_weight(role) or role in STEM else 96), 320, 128
    size = {"fan_in": fan_in, "fan_out": fan_out, "d_model": n, "s": s}
    sgd, adamw = (width_rule(role, **size, optimizer=name) for name in ("sgd", "adamw"))  # type: ignore[arg-type]
    entries = fan_in * fan_out
    assert sgd.rate * entries * sgd.gradient**2 == pytest.approx(1.0, rel=1e-12)
    assert adamw.rate * entries * adamw.gradient == pytest.approx(1.0, rel=1e-12)


#: Role -> powers of n of variance, SGD rate, AdamW rate and gradient, at fixed patch, outputs, M and heads' width.
def exponents(role: str, s: float) -> tuple[float, float, float, float]:
    if role in ("head_bias", "norm_shape"):
        return 0, 0, 0, 0 if role == "head_bias" else -s / 2
    if role == "head":
        return -(1 + s), -1, -1, 0
    if role.startswith("qk_norm"):
        return 0, 0, 0, -s / 2
    gradient = -(1 + s) / 2
    if role in (*SQUARE, "mlp_in", "mlp_out", "gate", "stem_hidden", "head_hidden"):
        return -1, -1 + s, -1 - (1 - s) / 2, gradient
    return 0, s, -(1 - s) / 2, gradient


def _sizes(role: str, n: int) -> Sizes:
    fans = {**PAPER, "head_hidden": ((N, N),), "stem_hidden": ((N, N),), "relative_position": ((1, N // 64),)}
    fans |= {"qk_norm_gain": ((1, 64),), "qk_norm_bias": ((1, 64),), "norm_shape": ((1, 1),)}
    return Sizes(role, *fans.get(role, ((1, N),))[0], role in (*SQUARE, "mlp_in", "norm_gain"))


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("role", SCALED_ROLES)
def test_powers_of_the_ratio_of_widths(role: str, s: float) -> None:
    scheme, m = scaling_scheme(s), 4
    variance, sgd, adamw, gradient = exponents(role, s)
    for optimizer, rate in (("sgd", sgd), ("adamw", adamw)):
        found = width_factors(_sizes(role, N), scheme, d_model=N, base_width=N // m, optimizer=optimizer)  # type: ignore[arg-type]
        assert found.std**2 == pytest.approx(m**variance, rel=1e-12)
        assert found.rate == pytest.approx(m**rate, rel=1e-12)
        assert found.decay == pytest.approx(m**-rate if is_weight(role) else 0.0, rel=1e-12)
        assert found.epsilon == pytest.approx(m**gradient, rel=1e-12)


def test_maximal_update_and_neutral_numbers_of_the_paper() -> None:
    """The conversion of arXiv:2304.02034v1 from usual rates to absolute ones: n^(3/2) times leaves hidden rates."""
    loose = ScalingScheme(name="nt", s=0.0, strict_m=False)
    for role in ("query", "mlp_in", "mlp_out"):
        factors = width_factors(_sizes(role, N), loose, d_model=N, base_width=None)
        assert N**1.5 * factors.rate == pytest.approx(1.0, rel=1e-12)
        assert factors.rate * factors.decay == pytest.approx(1.0, rel=1e-12)
    assert width_factors(_sizes("mlp_in_bias", N), loose, d_model=N, base_width=None).rate == pytest.approx(N**-0.5)
    strict = scaling_scheme("neural-tangent")
    assert width_factors(_sizes("mlp_out", N), strict, d_model=N, base_width=None).rate == pytest.approx(N**-1.5 / M)
    # ratios do not know about M
    for scheme in (loose, strict):
        ratio = width_factors(_sizes("mlp_out", N), scheme, d_model=N, base_width=N // 4).rate
        assert ratio == pytest.approx(4**-1.5, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCALINGS)
def test_at_base_width_nothing_changes(name: str, optimizer: str) -> None:
    for vision in (False, True):
        table = width_table(
            standard_parameters(d_model=N, vision=vision),
            name,
            d_model=N,
            base_width=N,
            n_heads=[12],
            optimizer=optimizer,  # type: ignore[arg-type]
            n_layers=12,
            tied=True,
        )
        for row in table.rows:
            assert (row.factors.std, row.factors.rate, row.factors.epsilon) == (1.0, 1.0, 1.0)
            assert row.factors.decay == (1.0 if is_weight(row.role) else 0.0)
        assert (table.output_multiplier, table.residual_multiplier) == (1.0, 1.0)


def test_heads_decide_what_one_head_owns() -> None:
    scheme = scaling_scheme("neural-tangent")
    table, gain = Sizes("relative_position", 1, 12, True), Sizes("qk_norm_gain", 1, 64, True)
    for fixed, expected in (("d_head", (0.5, 1.0)), ("n_heads", (1.0, 0.5))):
        rates = [
            width_factors(parameter, scheme, d_model=N, base_width=N // 4, fixed=fixed).rate  # type: ignore[arg-type]
            for parameter in (table, gain)
        ]
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("exponent", "optimizer", "rate", "gradient"),
    [
        (0.0, "adamw", -0.5, -0.5),
        (0.0, "sgd", 0.0, -0.5),
        (0.5, "adamw", -0.5, -0.5),
        (0.5, "sgd", 0.0, -0.5),
        (1.0, "adamw", 0.0, -1.0),
        (1.0, "sgd", 1.0, -1.0),
    ],
)
def test_depth(exponent: float, optimizer: str, rate: float, gradient: float) -> None:
    scheme = ScalingScheme(name="deep", s=1.0, residual_exponent=exponent, depth_rates=True)
    deep = width_table(
        standard_parameters(d_model=N),
        scheme,
        d_model=N,
        base_width=N,
        n_layers=48,
        base_layers=12,
        optimizer=optimizer,  # type: ignore[arg-type]
    )
    for row in deep.rows:
        powers = (rate, gradient) if row.in_blocks else (0, 0)
        assert row.factors.rate == pytest.approx(4 ** powers[0])
        assert row.factors.epsilon == pytest.approx(4 ** powers[1])
        assert row.factors.std == 1.0
    assert deep.residual_multiplier == pytest.approx(4**-exponent)


def test_complete_p() -> None:
    """AdamW at exponent one: hidden rates 1/m_width, everything else as at the base; branches 1/m_depth."""
    table = width_table(
        standard_parameters(d_model=N), "complete-p", d_model=N, base_width=N // 2, n_layers=24, base_layers=6
    )
    assert table.row("query", in_blocks=True).factors.rate == pytest.approx(1 / 2)
    assert table.row("query", in_blocks=True).factors.epsilon == pytest.approx(1 / (2 * 4))
    assert table.row("norm_gain", in_blocks=True).factors.rate == pytest.approx(1.0)
    assert table.row("token_embedding", in_blocks=False).factors.epsilon == pytest.approx(1 / 2)
    assert table.residual_multiplier == pytest.approx(1 / 4)


def test_the_printed_table() -> None:
    table = width_table(
        standard_parameters(d_model=1024), "hybrid", d_model=1024, base_width=256, n_heads=[16], tied=True
    )
    lines = str(table).splitlines()
    assert lines[0] == "hybrid, adamw: width 256 -> 1024"
    assert lines[2].split()[:7] == ["query", "0.5", "0.1768", "5.657", "0.3536", "-1", "-1.25"]
    assert lines[2].endswith("variance 1 / fan_in; rate n^(s/2) / (fan_in sqrt(fan_out))")
    bias = next(line for line in lines if line.startswith("mlp_in_bias"))
    assert bias.split()[:5] == ["mlp_in_bias", "-", "0.7071", "-", "0.3536"]
    assert "multiply the logits by 0.353553" in lines[-1]
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["factors"]["std"] == 0.5
    with pytest.raises(SpecError, match=r"has no row 'querry'; did you mean 'query'"):
        table.row("querry", in_blocks=True)


def test_parameters_of_one_role_and_other_factors_have_their_own_rows() -> None:
    """Without a base, factors are absolute: two widths of an MLP differ. With one, they scale alike."""
    parameters = [Sizes("mlp_in", 64, 256, True), Sizes("mlp_in", 64, 128, True), Sizes("mlp_in", 64, 256, True)]
    table = width_table(parameters, 0, d_model=64, base_width=None)
    assert [(row.fan_in, row.fan_out) for row in table.rows] == [(64, 256), (64, 128)]
    for fan_out in (256, 128):
        rate = table.row("mlp_in", in_blocks=True, fan_out=fan_out).factors.rate
        assert rate == pytest.approx(1 / (64 * fan_out**0.5))
    assert "mlp_in 64 -> 128  " in str(table) and "is that of the base" not in str(table)
    with pytest.raises(SpecError, match="several rows 'mlp_in'; say which by fan_in and fan_out: 64 -> 256, 64 -> 128"):
        table.row("mlp_in", in_blocks=True)
    based = width_table(parameters, 0, d_model=64, base_width=16)
    assert len(based.rows) == 1 and based.row("mlp_in", in_blocks=True).factors.rate == pytest.approx(1 / 8)
    assert "is that of the base" in str(based)


def test_a_base_wider_than_the_target_is_allowed_and_said() -> None:
    table = width_table(standard_parameters(d_model=256), 1.0, d_model=256, base_width=1024)
    assert table.row("query", in_blocks=True).factors.rate == pytest.approx(4.0)
    assert "the base is wider than the target (1024 > 256)" in table.table()


def test_refusals() -> None:
    for s in (-0.1, 1.1, math.nan):
        with pytest.raises(DomainError, match=r"s must lie in \[0, 1\]"):
            scaling_scheme(s)
    with pytest.raises(SpecError, match=r"no scaling scheme 'maximal'; did you mean 'maximal-update'"):
        scaling_scheme("maximal")
    for exponent in (0.3, -1, 2):
        with pytest.raises(DomainError, match=r"residual_exponent must be 0 or lie in \[1/2, 1\]"):
            ScalingScheme(name="x", s=0, residual_exponent=exponent)
    fans = {"fan_in": 8, "fan_out": 8, "d_model": 8, "s": 0}
    with pytest.raises(SpecError, match=r"no scaling rule for the role 'querry'; did you mean 'query'"):
        width_rule("querry", **fans)
    with pytest.raises(SpecError, match="optimizer must be 'sgd' or 'adamw'; got 'lion'"):
        width_rule("query", **fans, optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(DomainError, match="fan_in must be positive and finite; got 0"):
        width_rule("query", **(fans | {"fan_in": 0}))
    parameters = standard_parameters(d_model=768)
    for bad in (0, 1.5, True):
        with pytest.raises(DomainError, match="base_width must be a positive whole number"):
            width_table(parameters, 0, d_model=768, base_width=bad)  # type: ignore[arg-type]
    with pytest.raises(DomainError, match="base_layers must be a positive whole number; got 0"):
        width_table(parameters, 0, d_model=768, base_width=256, base_layers=0)
    with pytest.raises(SpecError, match="d_model must be a multiple of n_heads; got 768 and 10"):
        width_table(parameters, 0, d_model=768, base_width=256, n_heads=[10])
    with pytest.raises(SpecError, match=r"12 heads of d_model 768 become 1\.5; choose a multiple of 64"):
        width_table(parameters, 0, d_model=768, base_width=96, n_heads=[12])
    with pytest.raises(SpecError, match=r"2 heads of d_model 768 become 0\.5"):
        width_table(parameters, 0, d_model=768, base_width=192, n_heads=[12, 2])
    with pytest.raises(SpecError, match=r"12 heads, a head of width 64 becomes 8\.33333 wide; choose a multiple of 12"):
        width_table(parameters, 0, d_model=768, base_width=100, n_heads=[12], fixed="n_heads")
    width_table(parameters, 0, d_model=768, base_width=96, n_heads=[12], fixed="n_heads")
    with pytest.raises(SpecError, match="fixed must be 'd_head' or 'n_heads'"):
        width_table(parameters, 0, d_model=768, base_width=256, fixed="both")  # type: ignore[arg-type]


def test_the_documented_table_is_what_is_printed() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "learning_rates.md"
    table = width_table(standard_parameters(d_model=1024), "maximal-update", d_model=1024, base_width=256, n_heads=[16])
    assert f"```text\n{table}\n```" in page.read_text(encoding="utf-8")


def test_heads_that_grow_are_noted() -> None:
    rows = standard_parameters(d_model=768)
    for fixed, s, noted in (("n_heads", 1.0, True), ("n_heads", 0.0, False), ("d_head", 1.0, False)):
        table = width_table(rows, s, d_model=768, base_width=192, n_heads=[12], fixed=fixed)  # type: ignore[arg-type]
        assert any("divide them by d_head" in note for note in table.notes) is noted
