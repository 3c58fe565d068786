"""Moments of every component: worked numbers, identities between places, laws of deep stacks, and their errors.

Worked numbers are those of a refined recursion (A. Kedia et al., arXiv:2403.09635, with exact softmax averages)
computed by independent code. It corrects the averages for finite head width, ``1/nu = 1/d_head + 2/d``, and adds terms
in ``S/d``, which the library's leading order in width has not. ``twin`` below is that recursion, with the corrections
on request: with them it must give the printed numbers, without those in ``S/d`` the library must give what it gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fathometer.attention import AttentionStatistics, Exact, exact_value_path, row_averages
from fathometer.errors import DomainError, NotCoveredError, SpecError
from fathometer.kernels import activation_kernel
from fathometer.observables import backward, weight_gradients
from fathometer.observables.model_moments import moments
from fathometer.observables.moment_laws import exponential_gradients, linear_growth, sharp_scores
from fathometer.prescription import apply_scheme
from fathometer.propagation import Moments, along_depth, propagate
from fathometer.propagation.along_depth import alike_layers, stream_path
from fathometer.spec import Block, Derf, DyT, LayerNorm, RMSNorm, Scales, Sublayer, Transformer, preset, with_field

PRINTED = 2e-5  # relative; numbers that depend on softmax averages


def xavier(n_layers, d_model, n_heads, placement, dropout, attention_dropout) -> Transformer:
    """Return the paper's Xavier weights: query, key and value of one head as their own matrices, ReLU, ratio four."""
    d_head = d_model // n_heads
    narrow = math.sqrt(2 * d_model / (d_model + d_head))
    scales = Scales(
        query=narrow, key=narrow, value=narrow, output=1.0, mlp_in=math.sqrt(2 / 5), mlp_out=math.sqrt(8 / 5)
    )
    return Transformer.uniform(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        norm=LayerNorm(),
        activation="relu",
        scales=scales,
        placement=placement,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )


@dataclass(frozen=True)
class Corrected:
    """Softmax averages for heads of few dimensions, in the approximation of the worked numbers."""

    inverse_nu: float
    name: str = "corrected"

    def statistics(self, n_tokens: Any, variance: Any, correlation: Any, *, entropy: bool = True) -> Any:
        v, r = np.broadcast_arrays(np.asarray(variance, dtype=float), np.asarray(correlation, dtype=float))
        rows = [row_averages(n_tokens, v * factor) for factor in (0.75, 1.0, 1.25)]  # second derivative, step v/4
        y2, score = (
            middle + 16 * (low - 2 * middle + high) * self.inverse_nu
            for low, middle, high in ([getattr(row, name) for row in rows] for name in ("y2", "score"))
        )
        y12 = np.minimum(np.exp(r * v + v**2 * (1 + r**2) * self.inverse_nu / 2) / n_tokens, y2)
        return AttentionStatistics(y2, y12, score, y12, None)

    def value_path(self, n_tokens: int, statistics: AttentionStatistics) -> Any:
        return exact_value_path(n_tokens, statistics)

    def others(self, n_tokens: int) -> int:
        return max(n_tokens - 1, 1)


@dataclass(frozen=True)
class Twin:
    """The recursion of the worked numbers for ReLU, one layer attention and one MLP, on plain numbers."""

    length: int
    averages: Corrected
    score: float  # S
    per_width: float  # S/d
    attention: float  # A
    mlp: float  # F
    dropout: float
    attention_dropout: float
    skip: float = 1.0
    branch: float = 1.0
    post: bool = False

    def _statistics(self, r: float) -> tuple[float, float, float]:
        s = self.averages.statistics(self.length, (1 - r) * self.score, r)
        return s.y2 * self.length, s.y12 * self.length, s.score * self.length

    def forward(self, attends: bool, r: float, gain: float) -> tuple[float, float]:
        if not attends:
            return gain / (1 - self.dropout), gain * float(activation_kernel("relu").overlap(1.0, 1.0, r)) * 2
        e2, e11, _ = self._statistics(r)
        q, n, t = self.attention_dropout / (1 - self.attention_dropout), self.length, (1 - e2 / self.length) ** 2
        own = r + e2 / n * (1 - r + q) + (1 - r) ** 2 * t * self.per_width
        return gain * own / (1 - self.dropout), gain * (r + (1 - r) * e11 / n + r * (1 - r) ** 2 * t * self.per_width)

    def backward(self, attends: bool, r: float, gain: float, own: float, shared: float) -> tuple[float, float]:
        own = own / (1 - self.dropout)
        if not attends:
            return gain * own, gain * shared * 2 * float(activation_kernel("relu").slope_overlap(1.0, 1.0, r))
        value, query, key, rest = self.paths(r, shared / own)
        return gain * own * (value + query + key), gain * own * rest

    def paths(self, r: float, rg: float) -> tuple[float, float, float, float]:
        e2, e11, j2 = self._statistics(r)
        n, s = self.length, self.score
        n1, q, t = (n - 1) / n, self.attention_dropout / (1 - self.attention_dropout), (1 - e2 / n) ** 2
        per_width = self.per_width / s
        value = e2 / (n * (1 - self.attention_dropout)) + rg * n1 * e11
        query = s * (1 - r) * ((1 - r) * t * per_width + j2 / n * (1 - r + q))
        key = s * (j2 / n * (1 - r + q) + rg * r * (1 - r) * e11 * n1)
        plain = e2 / n + rg * n1 * e11
        rest = (1 + rg * (n - 1) - plain) / (n - 1) - key / (n - 1)
        return value, query, key, rest + s * (1 - r) ** 2 * rg * (t * per_width + e11 / n)

    def run(self, n_layers: int, gains: Any, q: float, p: float, rg: float) -> np.ndarray:
        """Return q, p/q, J and K/J after each layer, shape ``(4, n_layers + 1)``; q in front of a post-norm."""
        m2, m11, seen = q, p, []
        recorded = [(q, p)]
        for layer in range(n_layers):
            for attends in (True, False):
                r = min(max(m11 / m2, 0.0), 1.0)
                gain = gains(layer) if attends else self.mlp
                b2, b11 = self.forward(attends, r, gain)
                seen.append((attends, r, gain, m2))
                m2, m11 = (self.skip**2 * m + self.branch**2 * b for m, b in ((m2, b2), (m11, b11)))
                last = (m2, m11)
                if self.post:
                    m2, m11 = 1.0, m11 / m2
            recorded.append(last)
        g2, gc = 1.0, rg
        back = [(g2, gc)]
        norms = [1.0, *((m2 for m2, _ in self._sums(seen)))]
        for i in reversed(range(len(seen))):
            attends, r, gain, m_in = seen[i]
            i2, ic = self.backward(attends, r, gain, self.branch**2 * g2, self.branch**2 * gc)
            if self.post:
                g2, gc = ((self.skip**2 * g + b) / norms[i] for g, b in ((g2, i2), (gc, ic)))
            else:
                g2, gc = (self.skip**2 * g + b / m_in for g, b in ((g2, i2), (gc, ic)))
            if i % 2 == 0:
                back.append((g2, gc))
        (m2s, m11s), (g2s, gcs) = np.array(recorded).T, np.array(back[::-1]).T
        return np.array([m2s, m11s / m2s, g2s, gcs / g2s])

    def _sums(self, seen: Any) -> list[tuple[float, float]]:
        out = []
        for attends, r, gain, m in seen:
            b2, _ = self.forward(attends, r, gain)
            out.append((self.skip**2 * m + self.branch**2 * b2, 0.0))
        return out


PRE = {
    "n_layers": 6,
    "d_model": 192,
    "n_heads": 4,
    "placement": Sublayer.pre_norm,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
PRE_PRINTED = np.array(
    [
        [1, 3.018242, 5.923998, 9.194292],
        [0.225, 0.559788, 0.693334, 0.750265],
        [17.642129, 3.026897, 1.426389, 1],
        [0.273212, 0.255738, 0.232336, 0.2],
    ]
)
POST_PRINTED = np.array(
    [
        [0.1989, 0.593458, 0.737912, 0.793836],
        [0.188030, 0.262322, 0.498930, 1],
        [0.206622, 0.061604, 0.020278, 0],
    ]
)


def pre_twin(per_width: bool) -> Twin:
    score = (2 * 192 / 240) ** 2
    return Twin(96, Corrected(1 / 48 + 2 / 192), score, per_width * score / 192, 1.6, 0.64 / 2, 0.1, 0.1)


def post_twin(per_width: bool) -> Twin:
    beta = math.sqrt(1 / 6)
    averages = Corrected(1 / 64 + 2 / 128)
    return Twin(
        64, averages, 1.0, per_width / 128, 1.0, 0.9, 0.1, 0.1, skip=math.sqrt(1 - beta**2), branch=beta, post=True
    )


def post_plan() -> Any:
    spec = Transformer.uniform(
        n_layers=12,
        d_model=128,
        n_heads=2,
        norm=LayerNorm(),
        activation="relu",
        scales=Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0),
        placement=Sublayer.post_norm,
        dropout=0.1,
        attention_dropout=0.1,
    )
    return apply_scheme(spec, "deepscalelm", r0=0.221, dropout=0.1, reference=True)


def post_gains(plan: Any) -> Any:
    rows = {row.layer: row.scale for row in plan.rows if row.role == "value"}
    return lambda layer: rows[layer] ** 4


def table(found: Any) -> np.ndarray:
    stream = found["stream"]
    return np.array([stream.q, stream.p / stream.q, np.exp(stream.gradient_log), stream.gradient_alignment])


def test_attention_of_the_worked_numbers() -> None:
    twin = Twin(100, Corrected(1 / 48 + 2 / 192), 1.5, 1.5 / 192, 1.0, 1.0, 0.0, 0.1)
    e2, e11, _ = twin._statistics(0.3)
    own, shared = twin.forward(True, 0.3, 1.0)
    found = [e2, e11, own, shared, *twin.paths(0.3, 0.25)[:3]]
    wanted = [2.7084672, 1.3962317, 0.32559224, 0.31086069, 0.37566142, 0.02430009, 0.1383916]
    np.testing.assert_allclose(found, wanted, rtol=PRINTED)


def test_pre_norm_model_of_the_worked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along_depth, "_MOST_TABLES", 0)  # the closure of the worked numbers has a kink
    printed = pre_twin(per_width=True).run(6, lambda layer: 1.6, 1.0, 0.225, 0.2)
    np.testing.assert_allclose(printed[:, ::2], PRE_PRINTED, rtol=PRINTED)
    given = {"n_tokens": 96, "q": 1.0, "p": 0.225, "top_alignment": 0.2}
    stated = moments(xavier(**PRE), closure=Corrected(1 / 48 + 2 / 192), **given)
    np.testing.assert_allclose(
        table(stated), pre_twin(per_width=False).run(6, lambda layer: 1.6, 1.0, 0.225, 0.2), rtol=1e-9
    )
    # Leading order in width: with v = 2 and 48 dimensions a head, v^2/d_head = 8 % of a layer's scores at the input.
    ours = table(moments(xavier(**PRE), **given))[:, ::2]
    np.testing.assert_allclose(ours[0], PRE_PRINTED[0], rtol=8e-3)
    np.testing.assert_allclose(ours[1], PRE_PRINTED[1], atol=2e-3)
    np.testing.assert_allclose(ours[2], PRE_PRINTED[2], rtol=0.10)
    np.testing.assert_allclose(ours[3], PRE_PRINTED[3], atol=0.031)


def test_post_norm_deepscalelm_of_the_worked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along_depth, "_MOST_TABLES", 0)
    plan = post_plan()
    printed = post_twin(per_width=True).run(12, post_gains(plan), 1.0, 0.1989, 0.0)
    np.testing.assert_allclose(printed[1:, ::4], POST_PRINTED, rtol=PRINTED, atol=1e-6)
    given = {"n_tokens": 64, "q": 1.0, "p": 0.1989}
    stated = table(moments(plan.spec, closure=Corrected(1 / 64 + 2 / 128), **given))
    twin = post_twin(per_width=False).run(12, post_gains(plan), 1.0, 0.1989, 0.0)
    np.testing.assert_allclose(stated[1:], twin[1:], rtol=1e-9, atol=1e-12)
    ours = table(moments(plan.spec, **given))[1:, ::4]  # v^2/d_head = 1 % at the input, less after
    np.testing.assert_allclose(ours[0], POST_PRINTED[0], atol=1e-3)
    np.testing.assert_allclose(ours[1], POST_PRINTED[1], rtol=0.01)
    np.testing.assert_allclose(ours[2], POST_PRINTED[2], atol=3e-3)


@pytest.mark.parametrize(
    ("activation", "mean", "variance", "covariance", "slope", "slope_pair"),
    [
        ("relu", 0.5641895835, 0.6816901138, 0.1644343977, 0.5, 0.2984933420),
        ("gelu", 0.4606588660, 0.7098762813, 0.1671066457, 0.4895119378, 0.3074654648),
    ],
)
def test_hidden_units_of_the_worked_numbers(activation, mean, variance, covariance, slope, slope_pair) -> None:
    scales = Scales(query=1.0, key=1.0, value=1.0, output=0.0, mlp_in=math.sqrt(2), mlp_out=1.0)
    spec = Transformer.uniform(n_layers=1, d_model=64, n_heads=1, norm=None, activation=activation, scales=scales)
    found = moments(spec, n_tokens=16, q=1.0, p=0.3, top_alignment=0.4)
    units, inner = found["mlp.activation"], found["mlp.mlp_in"]
    row = [units.mean[0], units.variance[0], units.covariance[0]]
    np.testing.assert_allclose(row, [mean, variance, covariance], rtol=1e-9)
    assert np.exp(inner.gradient_log - units.gradient_log)[0] == pytest.approx(slope, rel=1e-9)
    ratio = inner.gradient_alignment / units.gradient_alignment
    assert ratio[0] * slope == pytest.approx(slope_pair, rel=1e-9)


SPECS = {
    "pre": xavier(**PRE),
    "post": xavier(**PRE | {"placement": Sublayer.post_norm}),
    "sandwich": xavier(**PRE | {"placement": Sublayer.sandwich}),
    "dyt": preset("vit", n_layers=3, d_model=128).map_sublayers(lambda s: replace(s, input_norm=DyT(alpha=0.8))),
    "gated": preset("llama", n_layers=3, d_model=256).bidirectional(),
    "grouped": Transformer.uniform(
        n_layers=2,
        d_model=64,
        n_heads=8,
        n_kv_heads=2,
        norm=RMSNorm(),
        activation="gelu",
        scales=Scales(query=1.4, key=1.2, value=0.9, output=1.1, mlp_in=1.0, mlp_out=0.7),
        skip_scale=0.9,
        branch_scale=0.5,
    ),
    "qk_norm": with_field(preset("vit", n_layers=2, d_model=128), "query", 1.3).map_sublayers(
        lambda s: replace(s, branch=replace(s.branch, qk_norm=True)) if s.is_attention else s
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_borders_are_those_of_the_propagation(name: str) -> None:
    spec, n = SPECS[name], 24
    found = moments(spec, n_tokens=n, q=1.2, p=0.3, top_alignment=0.3)["stream"]
    trajectory = propagate(spec, n_tokens=n, q=1.2, p=0.3, closure=Exact())
    at, gradients = trajectory.borders, backward(trajectory.transfer, alignment=0.3)
    np.testing.assert_allclose(found.q, trajectory.q[at], rtol=1e-10)
    np.testing.assert_allclose(found.p, trajectory.p[at], rtol=1e-10)
    np.testing.assert_allclose(found.gradient_log, gradients.log_norm[at], atol=1e-9)
    np.testing.assert_allclose(found.gradient_alignment, gradients.alignment[at], atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("grouped", "qk_norm")])
def test_places_give_the_weight_gradients(name: str) -> None:
    r"""``|dW|^2 = n (|g|^2 |x|^2 + (n-1) (g.g') (x.x'))`` for inputs x and output gradients g of every matrix."""
    spec, n, d = SPECS[name], 24, SPECS[name].d_model
    given = {"n_tokens": n, "q": 1.2, "p": 0.3}
    found = moments(spec, **given)
    wanted = weight_gradients(spec, **given).logs
    normed = {kind: found[place] for kind, place in inputs(name).items()}
    pairs = {
        "query": (normed["attention"], found["attention.query"], 1.0),
        "key": (normed["attention"], found["attention.key"], 1.0),
        "value": (normed["attention"], found["attention.value"], 1.0),
        "output": (found["attention.mixed"], found["attention.branch"], 1.0),
        "mlp_in": (normed["mlp"], found["mlp.mlp_in"], hidden(spec)),
        "mlp_out": (found["mlp.activation"], found["mlp.branch"], hidden(spec)),
    }
    if "gate" in wanted:
        pairs["gate"] = (normed["mlp"], found["mlp.gate"], hidden(spec))
    assert pairs.keys() == wanted.keys()
    for role, (x, g, width) in pairs.items():
        q, p = (x.q[:-1], x.p[:-1]) if len(x.q) > spec.n_layers else (x.q, x.p)
        square = q + (n - 1) * p * g.gradient_alignment
        logs = g.gradient_log + np.log(square) + np.log(n * d * d * width)
        np.testing.assert_allclose(logs, wanted[role], atol=1e-9, err_msg=role)


def inputs(name: str) -> dict[str, str]:
    """Return what attention and the MLP read."""
    if name == "post":
        return {"attention": "stream", "mlp": "attention.stream_norm"}
    return {"attention": "attention.input_norm", "mlp": "mlp.input_norm"}


def hidden(spec: Transformer) -> float:
    return spec.blocks[0].sublayers[1].branch.ratio


def test_gradients_of_shared_key_heads_and_normalised_scores() -> None:
    """Four query heads read one key head: its gradients add, and it has a quarter of the features."""
    spec = SPECS["grouped"]
    single = spec.map_sublayers(lambda s: replace(s, branch=replace(s.branch, n_kv_heads=8)) if s.is_attention else s)
    few, many = (moments(s, n_tokens=24, q=1.2, p=0.3) for s in (spec, single))
    for name in ("key", "value"):
        at = f"attention.{name}"
        np.testing.assert_allclose(np.exp(few[at].gradient_log - many[at].gradient_log), 4.0, rtol=1e-12)
    found = moments(SPECS["qk_norm"], n_tokens=24, q=1.2, p=0.3)
    query = found["attention.query"].gradient_log + np.log(found["attention.query"].q)
    other = moments(with_field(SPECS["qk_norm"], "query", 2.6), n_tokens=24, q=1.2, p=0.3)["attention.query"]
    np.testing.assert_allclose(other.gradient_log + np.log(other.q), query, atol=1e-12)


@pytest.mark.parametrize("name", ["pre", "post", "gated", "dyt"])
def test_gram_matrices_give_the_same_places(name: str) -> None:
    spec, n = SPECS[name], 12
    equal = moments(spec, n_tokens=n, q=1.2, p=0.3, top_alignment=0.3)
    tokens = 0.3 + 0.9 * np.eye(n)
    gram = moments(spec, gram=np.stack([tokens, tokens]), top_alignment=0.3).components
    assert set(equal.components) - set(gram) == {"attention.scores"}
    for place, found in gram.items():
        for quantity in ("mean", "q", "p", "gradient_log", "gradient_alignment"):
            value, wanted = getattr(found, quantity), getattr(equal[place], quantity)
            known = np.isfinite(value)
            assert known.any() or quantity.startswith("gradient"), (place, quantity)
            np.testing.assert_allclose(value[known], wanted[known], rtol=2e-5, atol=1e-7, err_msg=f"{place} {quantity}")


def test_a_causal_stack_is_averaged_over_positions() -> None:
    spec = preset("llama", n_layers=3, d_model=256)
    found = moments(spec, n_tokens=16, q=1.0, p=0.2)
    weights = found["attention.weights"]
    assert weights.mean[0] == 1 / 16 and weights.q[0] * 16 > 1 / 16  # early rows see few keys
    assert np.all(
        found["attention.mixed"].q > moments(spec.bidirectional(), n_tokens=16, q=1.0, p=0.2)["attention.mixed"].q
    )


def test_pre_norm_growth_is_linear_and_its_gradients_hyperbolic() -> None:
    spec = xavier(400, 1024, 16, Sublayer.pre_norm, 0.1, 0.1)
    law = linear_growth(spec, n_tokens=256)
    assert law.cosine == pytest.approx(0.88, abs=5e-3)
    strong = xavier(1, 1024, 16, Sublayer.pre_norm, 0.2, 0.2)
    # Leading order in the number of tokens gives 0.76; 256 of them add E2/L of attention to q.
    assert linear_growth(strong, n_tokens=256).cosine == pytest.approx(0.76, abs=0.011)
    stream = moments(spec, n_tokens=256, q=1.0, p=0.2, top_alignment=1.0)["stream"]
    # The cosine approaches its limit like a power of depth.
    np.testing.assert_allclose(np.diff(stream.q)[100:], law.velocity, rtol=1e-2)
    assert stream.p[-1] / stream.q[-1] == pytest.approx(law.cosine, abs=1e-2)
    deep = moments(spec.with_depth(20_000), n_tokens=256, q=1.0, p=0.2)["stream"]
    assert deep.q[-1] - deep.q[-2] == pytest.approx(law.velocity, rel=2e-4)
    at = np.arange(4000, 20_001, 1000)
    wanted = [law.gradient_log(deep.q[4000], l - 4000, 16_000) for l in at]
    assert law.exponent == pytest.approx(0.97, abs=0.01)  # near one: what attention adds is passed back
    coherent = moments(spec.with_depth(20_000), n_tokens=256, q=1.0, p=0.2, top_alignment=1.0)["stream"]
    shared = coherent.gradient_log + np.log(coherent.gradient_alignment)
    np.testing.assert_allclose(shared[at], wanted, rtol=8e-3, atol=1e-4)
    with pytest.raises(NotCoveredError, match="not pre-norm"):
        linear_growth(SPECS["post"], n_tokens=256)


def test_post_norm_gradients_vanish_exponentially_under_dropout_only() -> None:
    spec = xavier(200, 1024, 16, Sublayer.post_norm, 0.1, 0.1)
    law = exponential_gradients(spec, n_tokens=256)
    assert (law.cosine, law.alignment, law.slope) == (
        pytest.approx(0.867, abs=1e-3),
        pytest.approx(0.45, abs=6e-3),
        pytest.approx(-0.040, abs=5e-4),
    )
    stream = moments(spec, n_tokens=256, q=1.0, p=0.2, top_alignment=0.0)["stream"]
    np.testing.assert_allclose(-np.diff(stream.gradient_log)[60:140], law.slope, rtol=1e-4)
    plain = exponential_gradients(spec.without_dropout(), n_tokens=256)
    assert abs(plain.slope) < 1e-6 and plain.cosine == pytest.approx(1.0) and plain.alignment == pytest.approx(1.0)
    with pytest.raises(NotCoveredError, match="not post-norm"):
        exponential_gradients(SPECS["pre"], n_tokens=256)


def test_sharp_scores_explode_gradients_before_attention_condenses() -> None:
    """Printed for heads of 64 dimensions and d = 1024, whose corrections raise the gain by up to six percent."""
    found = [sharp_scores(s, n_tokens=512, cosine=0.2) for s in (0.1, 0.5, 1, 2, 4, 8, 16)]
    printed = [1.3, 2.7, 5.7, 18, 86, 370, 1100]
    np.testing.assert_allclose([f.relative_gain for f in found], printed, rtol=0.065)
    np.testing.assert_allclose([found[i].participation for i in (0, 2, 4, 5, 6)], [473, 230, 32, 9, 4], rtol=0.06)
    assert (
        found[0].output_q == pytest.approx(0.2, abs=2e-3) and sharp_scores(400, n_tokens=512, cosine=0.2).output_q > 0.8
    )
    for given, text in (
        ({"score_variance": -1.0, "cosine": 0.2}, "score_variance must be finite and >= 0; got -1.0"),
        ({"score_variance": 1.0, "cosine": 1.2}, "cosine must lie in"),
    ):
        with pytest.raises(DomainError, match=text):
            sharp_scores(n_tokens=512, **given)


@pytest.mark.parametrize(("k", "printed"), [(0.5, 0.51), (1, 0.67), (2, 0.79), (4, 0.83)])
def test_deepscalelm_profiles_depend_on_k_only(k: float, printed: float) -> None:
    spec = Transformer.uniform(
        n_layers=1500,
        d_model=128,
        n_heads=2,
        norm=LayerNorm(),
        activation="relu",
        scales=Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0),
        dropout=0.1,
    )
    plan = apply_scheme(spec, "deepscalelm", r0=0.221, dropout=0.1, k=k, reference=True)
    stream = moments(plan.spec, n_tokens=64, q=1.0, p=0.1989, closure="uniform_large_n")["stream"]
    assert stream.p[-1] / stream.q[-1] == pytest.approx(printed, abs=6e-3)
    np.testing.assert_allclose(stream.q, 1.0, rtol=1e-9)
    assert stream.gradient_log[0] > -k - 1e-9  # falls by no more than e^-k


def test_a_thousand_different_layers_are_those_of_the_recursion() -> None:
    plan = apply_scheme(preset("vit", n_layers=300), "deepscalelm", r0=0.3, n_tokens=64)
    path = stream_path(plan.spec, n_tokens=64, start=Moments(1.0, 0.3), closure=Exact())
    slow = propagate(plan.spec, n_tokens=64, q=1.0, p=0.3, closure=Exact())
    np.testing.assert_allclose(path.q, slow.q, rtol=1e-9)
    np.testing.assert_allclose(path.p, slow.p, rtol=1e-9)
    assert len(alike_layers(plan.spec)) == 2


def test_layers_of_different_architectures_are_kept_apart() -> None:
    first = preset("vit", n_layers=2, d_model=128)
    other = first.map_sublayers(lambda s: replace(s, input_norm=Derf(alpha=0.5)))
    mixed = replace(first, blocks=(*first.blocks, *other.blocks, *first.blocks))
    found = moments(mixed, n_tokens=12, q=1.0, p=0.2)
    np.testing.assert_array_equal(found["attention.branch"].layers, np.arange(6))
    slow = propagate(mixed, n_tokens=12, q=1.0, p=0.2, closure=Exact())
    np.testing.assert_allclose(found["mlp.sum"].q, slow.q[2::2], rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"top_alignment": 1.5}, DomainError, r"top_alignment .* must lie in \[-0.09091, 1\]; got 1.5"),
        ({"p": 2.0}, DomainError, "Did you pass a cosine"),
        ({"n_tokens": 0}, DomainError, "n_tokens must be an integer >= 1"),
        ({"q": np.ones(3)}, DomainError, "single numbers q and p"),
        ({"closure": "exat"}, SpecError, "did you mean 'exact'"),
    ],
)
def test_mistakes_are_named(given, error, text) -> None:
    with pytest.raises(error, match=text):
        moments(preset("vit", n_layers=2), **{"n_tokens": 12, "q": 1.0, "p": 0.2, **given})


def test_arrays_missing_components_and_layers_are_named() -> None:
    with pytest.raises(SpecError, match=r"single numbers; spec.blocks\[0\].* is an array of shape \(2,\)"):
        moments(with_field(preset("vit", n_layers=2), "value", np.ones(2)), n_tokens=12, q=1.0, p=0.2)
    found = moments(preset("vit", n_layers=2), n_tokens=12, q=1.0, p=0.2)
    with pytest.raises(SpecError, match="not both"):
        moments(preset("vit", n_layers=2), n_tokens=2, gram=np.eye(2))
    with pytest.raises(SpecError, match="either gram, or all of n_tokens, q and p"):
        moments(preset("vit", n_layers=2), n_tokens=2)
    with pytest.raises(SpecError, match=r"no component 'attention.quary'; did you mean 'attention.query'"):
        found["attention.quary"]
    with pytest.raises(SpecError, match=r"layer must lie in \[0, 1\]; got 2"):
        found.rows(2)
    with pytest.raises(DomainError, match="the stream overflows at sublayer"):
        bare = preset("vit", n_layers=999).map_sublayers(lambda s: replace(s, input_norm=None))
        moments(with_field(bare, "mlp_out", 50.0), n_tokens=12, q=1.0, p=0.2)


def test_one_token() -> None:
    found = moments(preset("vit", n_layers=2), n_tokens=1, q=1.0, p=0.2)
    assert np.all(np.isfinite(found["stream"].gradient_log)) and found["attention.weights"].q[0] == 1.0


def test_branches_are_named_within_their_block() -> None:
    """An MLP in front of another in one block, and behind attention in the next: one MLP a layer by every name."""
    attention, mlp = preset("bert", n_layers=1).blocks[0].sublayers
    two = Block(sublayers=(mlp, mlp))
    one = Block(sublayers=(attention, mlp))
    for blocks in ((two, one), (one, two)):
        found = moments(replace(preset("bert"), blocks=blocks), n_tokens=6, q=1.0, p=0.3)
        layers = {name: found[f"{name}.branch"].layers.tolist() for name in ("mlp", "mlp_2", "attention")}
        assert layers == {"mlp": [0, 1], "mlp_2": [blocks.index(two)], "attention": [blocks.index(one)]}


def test_slow_stacks_settle_where_their_map_does() -> None:
    spec = with_field(xavier(1, 256, 4, Sublayer.post_norm, 0.0, 0.0), "branch_scale", 0.01)
    settled = exponential_gradients(spec, n_tokens=32)
    assert settled.cosine == pytest.approx(1.0, abs=1e-6) and settled.alignment == pytest.approx(1.0, abs=1e-4)
    dropped = xavier(1, 256, 4, Sublayer.post_norm, 0.1, 0.1)
    deep = stream_path(dropped.with_depth(400), n_tokens=32, start=Moments(1.0, 0.5), closure=Exact())
    assert exponential_gradients(dropped, n_tokens=32).cosine == pytest.approx(deep.p[-1] / deep.q[-1], abs=1e-9)


@pytest.mark.parametrize("alignment", [-0.1, 0.0, 0.3, 1.0])
def test_scores_of_no_variance_gain_nothing_over_even_attention(alignment: float) -> None:
    """``J = Y_2 + (n-1) Y_12 r_g`` with both averages ``1/n``."""
    found = sharp_scores(0.0, n_tokens=7, cosine=0.2, top_alignment=alignment)
    assert found.relative_gain == pytest.approx(1.0, rel=1e-12)
    assert found.gradient_gain == pytest.approx((1 + 6 * alignment) / 7, rel=1e-12)


def test_limits_are_refused_by_name() -> None:
    for cosine, alignment in ((-0.25, 0.0), (0.2, -0.25)):
        with pytest.raises(DomainError, match=r"must lie in \(-0\.25, 1\]"):
            sharp_scores(1.0, n_tokens=5, cosine=cosine, top_alignment=alignment)
    silent = with_field(
        Transformer.uniform(
            n_layers=2,
            d_model=64,
            n_heads=2,
            norm=LayerNorm(),
            scales=Scales.from_std(0.1, d_model=64, d_mlp=256),
            placement=Sublayer.sandwich,
        ),
        "mlp_out",
        0.0,
    )
    with pytest.raises(DomainError, match="puts out nothing"):
        moments(silent, n_tokens=5, q=1.0, p=0.2)
    arrays = with_field(xavier(1, 256, 4, Sublayer.post_norm, 0.1, 0.1), "mlp_out", np.ones(2))
    with pytest.raises(SpecError, match="array"):
        exponential_gradients(arrays, n_tokens=5)
