"""The components that are put to the test: what theory says of each, published and refined, and how it is simulated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fathometer.observables.components import (
    ActivationMap,
    Attention,
    Chain,
    CrossAttentionMoments,
    Dropout,
    FeedForward,
    GatedUnit,
    GradientState,
    Linear,
    NormMap,
    Residual,
    Softmax,
    TokenState,
    attention_block,
    feed_forward_block,
    head_map,
)
from fathometer.observables.embeddings import stem_state, zipf_overlap
from fathometer.papers.item import Size
from fathometer.papers.moments.component_case import (
    FEW,
    Case,
    Estimates,
    Values,
    component_case,
    scored_attention,
)
from fathometer.spec import MLP, CrossAttention, GatedMLP, Head, LayerNorm, PatchStem, RMSNorm, TokenStem

# Declared biases of the refined theory, relative to each quantity.
SELF = {"*": 0.01, "J": 0.035}
CAUSAL = {"*": 0.012, "J": 0.04}
CROSS = {"*": 0.01, "J": 0.035, "K": 0.035, "J_memory": 0.035}
SMALL_BIAS = {"*": 0.005}


def cases(size: Size) -> list[Case]:
    """Return every component, at half to twice the size's width and half to four times its number of tokens."""
    return [
        *_stems(size),
        *_elementwise(size),
        *_norms(size),
        *_softmaxes(size),
        *_attentions(size),
        *_cross_attentions(size),
        *_blocks(size),
        *_heads(size),
    ]


def _stems(size: Size) -> list[Case]:
    from fathometer.measurement.components import Input, patch_stem, simulate_tokens, token_stem

    out = []
    for name, vocabulary, stem in (
        ("token and position, 1000 words", 1000, TokenStem(token=1.0, position=0.5)),
        (
            "token, position, segment, 1000 words, dropout 0.1",
            1000,
            TokenStem(token=0.6, position=0.6, segment=0.6, dropout=0.1),
        ),
        ("token, 50 words", 50, TokenStem(token=0.8)),
    ):
        frequencies = 1 / np.arange(1.0, vocabulary + 1)
        draw = token_stem(stem, frequencies, sequences=8, n_tokens=size.n_tokens, width=size.d_model)
        theory = [stem_state(stem, token_overlap=zipf_overlap(vocabulary, published=flag)) for flag in (False, True)]
        out.append(_stem(name, theory, partial(simulate_tokens, draw, stream=name)))
    patches = TokenState(q=1.3, p=0.8, mean=0.5)
    vision = PatchStem(patch=0.9, position=0.4, class_token=0.7, dropout=0.1)
    shown = Input(size.n_tokens // 4, 192, 1.3, 0.8, 0.5)
    draw = patch_stem(vision, shown, sequences=8, width=size.d_model)
    theory = [stem_state(vision, patches=patches, n_tokens=size.n_tokens // 4 + 1)]
    out.append(
        _stem("patch, position, class token, dropout 0.1", theory, partial(simulate_tokens, draw, stream="patches"))
    )
    return out


def _elementwise(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    d = size.d_model
    spread = TokenState.from_correlation
    rows = [
        component_case(
            size,
            "linear",
            "mean 0.5, bias 0.3",
            Linear(scale=1.2, bias=0.3),
            sim.linear(1.2, bias=0.3, fan_out=d, fan_in=d),
            x=spread(variance=1.0, correlation=0.3, mean=0.5),
        ),
        component_case(
            size,
            "linear",
            "four times as wide",
            Linear(scale=0.7, ratio=4.0),
            sim.linear(0.7, fan_out=4 * d, fan_in=d),
            x=TokenState(q=1.0, p=0.1),
        ),
    ]
    for rate, mean in ((0.1, 0.0), (0.5, 0.8)):
        x = spread(variance=1.0, correlation=0.4, mean=mean)
        rows.append(
            component_case(size, "dropout", f"rate {rate:g}, mean {mean:g}", Dropout(rate=rate), sim.dropout(rate), x=x)
        )
    for label, name, v, r, mean in (
        ("ReLU", "relu", 2.0, 0.3, 0.0),
        ("ReLU", "relu", 1.0, 0.8, 0.0),
        ("ReLU", "relu", 1.0, 0.4, 0.7),
        ("GELU", "gelu", 2.0, 0.3, 0.0),
        ("GELU", "gelu", 1.0, 0.6, -0.5),
        ("SiLU", "silu", 1.5, 0.5, 0.0),
        ("tanh", "tanh", 1.0, 0.3, 0.4),
    ):
        reference = ActivationMap(activation=name, form="reference") if name == "relu" and mean == 0.0 else None
        rows.append(
            component_case(
                size,
                label,
                f"v {v:g}, r {r:g}, mean {mean:g}",
                ActivationMap(activation=name),
                sim.activation(name),
                x=spread(variance=v, correlation=r, mean=mean),
                reference=reference,
                names=("mean", "q", "p", "J", "K"),
            )
        )
    for name, r, width in (("silu", 0.3, d), ("gelu", 0.6, 2 * d)):
        hidden = 2 * width
        rows.append(
            component_case(
                size,
                "gated unit",
                f"{name}, r {r:g}, d {width}",
                GatedUnit(gate=1.0, mlp_in=1.1, activation=name, ratio=2.0, d_model=width),
                sim.gated_unit(1.0, 1.1, name, width=width, hidden=hidden),
                x=TokenState(q=1.0, p=r),
                width=width,
                allowance=SMALL_BIAS,
            )
        )
    return rows


def _norms(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    out = []
    for norm, width, r, mean in (
        (LayerNorm(), 32, 0.3, 0.0),
        (LayerNorm(gain=1.5), size.d_model, 0.7, 1.0),
        (RMSNorm(), 32, 0.5, 0.0),
    ):
        label = type(norm).__name__
        theory, reference = (NormMap(norm=norm, d_model=width, form=form) for form in ("refined", "reference"))
        x = TokenState.from_correlation(variance=2.0, correlation=r, mean=mean)
        setting = f"d {width}, r {r:g}, mean {mean:g}"
        out.append(
            component_case(
                size,
                label,
                setting,
                theory,
                sim.norm(norm, width),
                x=x,
                width=width,
                reference=reference,
                allowance={"K": 2 / width**2},
            )
        )
    return out


def _softmaxes(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    out = []
    for n, v, r, r_g in (
        (size.n_tokens, 1.0, 0.3, 0.0),
        (2 * size.n_tokens, 6.0, 0.0, 0.0),
        (4 * size.n_tokens, 2.0, 0.5, 0.4),
    ):
        theory, reference = (Softmax(n_keys=n, form=form) for form in ("refined", "reference"))
        setting = f"{n} keys, variance {v:g}, r {r:g}"
        out.append(
            component_case(
                size,
                "softmax",
                setting,
                theory,
                sim.softmax(),
                x=TokenState(q=v, p=r * v),
                n_tokens=n,
                g=(1.0, r_g),
                reference=reference if r_g == 0.0 else None,
                names=("q", "J"),
                sequences=FEW,
            )
        )
    return out


def _attentions(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    out = []
    for label, heads, n, d, s, r, rate, r_g in (
        ("single-head attention", 1, size.n_tokens, size.d_model, 0.1, 0.3, 0.0, 0.2),
        ("single-head attention", 1, size.n_tokens, size.d_model, 1.0, 0.1, 0.0, 0.0),
        ("single-head attention", 1, size.n_tokens // 2, size.d_model // 2, 1.0, 0.5, 0.1, 0.5),
        ("multi-head attention", size.n_heads, size.n_tokens, size.d_model, 1.0, 0.2, 0.1, 0.1),
        ("multi-head attention", size.n_heads, size.n_tokens, size.d_model, 1.0, 0.7, 0.0, 0.4),
        ("multi-head attention", size.n_heads, size.n_tokens, size.d_model, 2.0, 0.3, 0.2, 0.1),
        ("multi-head attention", size.n_heads, 4 * size.n_tokens, size.d_model, 1.5, 0.3, 0.0, 0.2),
        ("multi-head attention", 2 * size.n_heads, size.n_tokens, 2 * size.d_model, 1.0, 0.2, 0.3, 0.0),
        ("causal attention", size.n_heads, size.n_tokens, size.d_model, 0.3, 0.2, 0.0, 0.1),
        ("causal attention", size.n_heads, size.n_tokens, size.d_model, 1.0, 0.2, 0.1, 0.1),
        ("causal attention", 1, 2 * size.n_tokens, size.d_model, 1.0, 0.5, 0.0, 0.0),
    ):
        causal = label.startswith("causal")
        branch = scored_attention(s, heads, value=1.1, attention_dropout=rate, causal=causal)
        theory, reference = (
            Attention(branch=branch, n_tokens=n, d_model=d, projected=False, form=form)
            for form in ("refined", "reference")
        )
        setting = f"n {n}, d {d}, heads {heads}, S {s:g}, r {r:g}" + (f", dropout {rate:g}" if rate else "")
        draw = sim.attention(branch, width=d, projected=False)
        out.append(
            component_case(
                size,
                label,
                setting,
                theory,
                draw,
                x=TokenState(q=1.0, p=r),
                width=d,
                n_tokens=n,
                g=(1.0, r_g),
                reference=reference,
                allowance=CAUSAL if causal else SELF,
                sequences=FEW,
            )
        )
    return out


def _cross_attentions(size: Size) -> list[Case]:
    from fathometer.measurement.components import Input, attention, simulate

    out = []
    for n, m, s, r, r_m, rate, r_g in (
        (size.n_tokens // 2, size.n_tokens, 1.0, 0.3, 0.2, 0.0, 0.2),
        (size.n_tokens, size.n_tokens // 2, 1.0, 0.5, 0.5, 0.1, 0.1),
        (size.n_tokens, 2 * size.n_tokens, 2.0, 0.1, 0.4, 0.0, 0.3),
    ):
        branch = CrossAttention(
            query=s**0.25, key=s**0.25, value=1.1, output=1.0, n_heads=size.n_heads, attention_dropout=rate
        )
        theory = CrossAttentionMoments(
            branch=branch,
            memory=TokenState(q=1.0, p=r_m),
            n_queries=n,
            n_memory=m,
            d_model=size.d_model,
            projected=False,
        )
        x, g = TokenState(q=1.0, p=r), GradientState(J=1.0, K=r_g)
        draw = attention(branch, width=size.d_model, projected=False)
        inputs = [Input(n, size.d_model, 1.0, r), Input(m, size.d_model, 1.0, r_m)]
        setting = f"n {n}, memory {m}, S {s:g}, r {r:g}, memory r {r_m:g}" + (f", dropout {rate:g}" if rate else "")
        out.append(
            Case(
                component="cross-attention",
                setting=setting,
                refined=partial(_cross, theory, x, g),
                simulate=partial(simulate, draw, inputs, J=1.0, K=r_g, sequences=FEW, stream=setting),
                allowance=CROSS,
            )
        )
    return out


def _blocks(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    out = []
    d, n, x = size.d_model, size.n_tokens, TokenState(q=1.0, p=0.3)
    for name, branch in (
        ("ReLU", MLP(mlp_in=1.0, mlp_out=1.3, activation="relu")),
        ("GELU, biases", MLP(mlp_in=1.2, mlp_out=1.0, activation="gelu", in_bias=0.3, out_bias=0.2)),
        ("SwiGLU", GatedMLP(gate=1.0, mlp_in=1.0, mlp_out=1.2)),
    ):
        draw = sim.chain(sim.perceptron(branch, width=d), sim.dropout(0.1))
        out.append(
            component_case(
                size,
                "feed-forward block",
                f"{name}, dropout 0.1",
                feed_forward_block(branch, dropout=0.1, d_model=d),
                draw,
                x=x,
                allowance=SMALL_BIAS,
                sequences=FEW,
            )
        )
    for s, r, rate in ((1.0, 0.2, 0.1), (0.3, 0.6, 0.0)):
        heads = scored_attention(s, size.n_heads, value=0.9, output=1.2, attention_dropout=rate)
        theory, reference = (
            attention_block(heads, n_tokens=n, d_model=d, dropout=0.1, form=form) for form in ("refined", "leading")
        )
        out.append(
            component_case(
                size,
                "attention block",
                f"S {s:g}, r {r:g}, dropout 0.1" + (" on weights too" if rate else ""),
                theory,
                sim.chain(sim.attention(heads, width=d), sim.dropout(0.1)),
                x=TokenState(q=1.0, p=r),
                reference=reference,
                allowance=SELF,
                sequences=FEW,
            )
        )
    heads = scored_attention(0.6, size.n_heads, value=0.9, output=1.1)
    mlp = MLP(mlp_in=1.0, mlp_out=1.2, activation="relu")
    x = TokenState(q=1.5, p=0.6)
    norm = NormMap(norm=LayerNorm(), d_model=d)
    inside = Chain((norm, Attention(branch=heads, n_tokens=n, d_model=d), Dropout(rate=0.1)))
    attend = sim.chain(sim.norm(LayerNorm(), d), sim.attention(heads, width=d), sim.dropout(0.1))
    add = {"skip_scale": 0.8, "branch_scale": 0.6}
    out.append(
        component_case(
            size,
            "residual add",
            "attention, pre-norm",
            Residual(branch=inside, skip_scale=0.8, branch_scale=0.6),
            sim.residual(attend, **add),
            x=x,
            allowance=SELF,
            sequences=FEW,
        )
    )
    out.append(
        component_case(
            size,
            "residual add",
            "ReLU MLP, post-norm",
            Chain((Residual(branch=FeedForward(branch=mlp)), norm)),
            sim.chain(sim.residual(sim.perceptron(mlp, width=d)), sim.norm(LayerNorm(), d)),
            x=x,
            allowance=SMALL_BIAS,
            sequences=FEW,
        )
    )
    return out


def _heads(size: Size) -> list[Case]:
    from fathometer.measurement import components as sim

    out, x = [], TokenState(q=1.5, p=0.6)
    d, n, outputs, stem = size.d_model, size.n_tokens, 2 * size.d_model, TokenStem(token=0.1)
    for name, head in (
        ("every token", Head(scale=1.1)),
        ("tied", Head(tied=True, multiplier=0.4)),
        ("mean over tokens", Head(pooling="mean")),
        ("first token", Head(pooling="first")),
    ):
        pooled = head.pooling != "none"
        out.append(
            component_case(
                size,
                "head",
                name,
                head_map(head, d_model=d, n_outputs=outputs, n_tokens=n, stem=stem),
                sim.head(head, width=d, n_outputs=outputs, token_std=0.1),
                x=x,
                g=(1.0, 1.0) if pooled else (1.0, 0.2),
                names=("q", "J", "K") if pooled else ("q", "p", "J", "K"),
                allowance=SMALL_BIAS,
            )
        )
    return out


def _stem(name: str, theory: list[TokenState], simulate: Callable[..., Estimates]) -> Case:
    refined, *rest = (partial(_forward, state) for state in theory)
    return Case(
        component="stem",
        setting=name,
        refined=refined,
        reference=rest[0] if rest else None,
        simulate=simulate,
        allowance={"*": 0.0},
    )


def _forward(state: TokenState) -> Values:
    return {"q": float(state.q), "p": float(state.p)}


def _cross(theory: CrossAttentionMoments, x: TokenState, g: GradientState) -> Values:
    out, queries, kept = theory.forward(x), theory.backward(g, x), theory.memory_backward(g, x)
    found = {"q": out.q, "p": out.p, "J": queries.J, "K": queries.K, "J_memory": kept.J, "K_memory": kept.K}
    return {name: float(value) for name, value in found.items()}
