"""What was written into a model, as source lines to keep without this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fathometer.application.named import Initialized
from fathometer.application.widths import WidthsApplied
from fathometer.application.writing import Applied, AppliedEncoderDecoder, WeightRow
from fathometer.errors import NotCoveredError, SpecError, nearest
from fathometer.spec import CrossAttention, SelfAttention, Sublayer

Style = Literal["torch", "megatron", "torchtitan"]
STYLES = ("torch", "megatron", "torchtitan")

_TITAN = {
    "query": "attention.wq",
    "key": "attention.wk",
    "value": "attention.wv",
    "output": "attention.wo",
    "gate": "feed_forward.w1",
    "mlp_in": "feed_forward.w3",
    "mlp_out": "feed_forward.w2",
}


def emit(applied: WidthsApplied | Applied | AppliedEncoderDecoder | Initialized, style: Style = "torch") -> str:
    """Return source code with the same effect as a write.

    Weights become initialisation lines, equal layers merged; residual factors become comments that say what the
    block's forward must compute, in place of the factors there.

    Args:
        applied: What :func:`~fathometer.application.write_spec` or :func:`~fathometer.application.initialize` returned.
        style: ``"torch"``: lines for the model that was written. ``"megatron"``: flags, and per-role lines for
            Megatron-Core parameter names. ``"torchtitan"``: an ``init_weights`` method of the block.
    Raises:
        SpecError: for an unknown style, or a width scaling, which is a table of its own.
        NotCoveredError: for the latter two styles, if a block is not one attention and one MLP with these roles, or
            there are two stacks.
    """
    if isinstance(applied, WidthsApplied):
        raise SpecError("a width scaling has no lines of its own; its table says what to do: scaling_table")
    inside, ends = (applied.blocks, applied) if isinstance(applied, Initialized) else (applied, None)
    if style not in STYLES:
        raise SpecError(f"there is no style {style!r}{nearest(str(style), STYLES)}")
    if style != "torch" and isinstance(inside, AppliedEncoderDecoder):
        raise NotCoveredError(f"the style {style!r} is for one stack of blocks; 'torch' writes encoder and decoder")
    stacks = inside.stacks if isinstance(inside, AppliedEncoderDecoder) else (inside,)
    write = {"torch": _torch, "megatron": _megatron, "torchtitan": _torchtitan}[style]
    lines = ["import torch.nn as nn"] if style == "torch" else []
    for stack in stacks:
        lines += [*write(stack), *_residual_comments(stack)]
    outside = [] if ends is None else _ends(ends, code=style == "torch")
    return "\n".join([*lines, *outside]) + "\n"


def _ends(applied: Initialized, *, code: bool) -> list[str]:
    """Return lines for tables and matrices outside the blocks, as code or, for other parameter names, as comments."""
    lines = [""] if applied.ends else []
    for row in applied.ends:
        place = _attribute("model", row.parameter.parameter) + row.parameter.key.removeprefix(row.parameter.parameter)
        what = f"nn.init.normal_({place}, std={_number(row.std)})" if row.std else f"nn.init.zeros_({place})"
        named = f"# {row.parameter.role}"
        lines.append(f"{what}  {named}" if code else f"{named}: std {_number(row.std)}")
        if row.padding is not None and code:
            lines.append(f"nn.init.zeros_({place}[{row.padding}])  # padding")
    for name, factor in applied.head_multipliers:
        lines += ["", f"# logits: {_number(factor)} * {_attribute('model', name) if code else 'the output layer'}(...)"]
    return lines


def _torch(applied: Applied) -> list[str]:
    patterns: dict[str, list[WeightRow]] = {}
    for row in applied.rows:
        place = _attribute("block", row.parameter.removeprefix(f"{applied.blocks[row.layer]}."))
        patterns.setdefault(place + row.key.removeprefix(row.parameter), []).append(row)
    lines = ["", *_loop(applied.blocks)]
    for place, rows in patterns.items():
        everywhere = len(rows) == len(applied.blocks)
        indent = "    " if everywhere else "        "
        if not everywhere:
            lines.append(f"    if layer in {tuple(row.layer for row in rows)}:")
        lines.append(f"{indent}{_filled(place, rows)}  # {rows[0].role}")
    return lines


def _loop(blocks: tuple[str, ...]) -> list[str]:
    """Return the loop header over blocks, short where they are the children of one container."""
    container = blocks[0].rpartition(".")[0]
    if blocks == tuple(f"{container}.{i}" if container else str(i) for i in range(len(blocks))):
        owner = _attribute("model", container) if container else "model"
        return [f"for layer, block in enumerate({owner}):"]
    names = ", ".join(map(repr, blocks))
    return [f"for layer, block in enumerate(model.get_submodule(name) for name in ({names},)):"]


def _attribute(owner: str, path: str) -> str:
    """Return an attribute path as an expression: ``a.0.b`` is ``a[0].b``."""
    return owner + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def _filled(place: str, rows: list[WeightRow]) -> str:
    stds = [row.std for row in rows]
    if not any(stds):
        return f"nn.init.zeros_({place})"
    if len(set(map(_number, stds))) == 1:
        return f"nn.init.normal_({place}, std={_number(stds[0])})"
    table = {row.layer: _number(row.std) for row in rows}
    if list(table) == list(range(len(table))):
        return f"nn.init.normal_({place}, std={_listed(table.values())}[layer])"
    return f"nn.init.normal_({place}, std={{{', '.join(f'{k}: {v}' for k, v in table.items())}}}[layer])"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _listed(values: Iterable[str]) -> str:
    return f"[{', '.join(values)}]"


def _by_role(applied: Applied) -> dict[str, list[str]]:
    """Return the standard deviations of every role, one a layer."""
    stds: dict[str, list[str]] = {}
    for row in applied.rows:
        if not row.role.endswith("_bias"):
            stds.setdefault(row.role, []).append(_number(row.std))
    if any(len(values) != len(applied.blocks) for values in stds.values()) or "query" not in stds:
        raise NotCoveredError("this style is for blocks of one attention and one MLP whose weights are not shared")
    return stds


def _value(values: list[str], index: str) -> str:
    """Return one number, or a list indexed by the layer."""
    return values[0] if len(set(values)) == 1 else f"{_listed(values)}[{index}]"


def _megatron(applied: Applied) -> list[str]:
    stds = _by_role(applied)
    firsts = {value for role, values in stds.items() if role not in ("output", "mlp_out") for value in values}
    lines = []
    if len(firsts) == 1:
        std = firsts.pop()
        lasts = {value for role in ("output", "mlp_out") for value in stds[role]}
        scaled = _number(float(std) / (2 * len(applied.blocks)) ** 0.5)
        lines.append(f"# --init-method-std {std}")
        if all(abs(float(last) / float(scaled) - 1) < 1e-4 if float(scaled) else last == scaled for last in lasts):
            return [*lines, "# output layers: the default of std / sqrt(2 * num_layers) is what is wanted"]
        lines.append(f"# output layers: the flag alone would give {scaled}; use the lines below")
    fused = "gate" in stds
    return [
        *lines,
        "# after the model is built, on every rank; no flag sets these one by one",
        "import torch.nn as nn",
        "",
        "for block in model.decoder.layers:",
        "    layer = block.layer_number - 1",
        "    attention = block.self_attention",
        "    qkv = attention.linear_qkv.weight  # per group of heads: its queries, one key, one value",
        "    qkv = qkv.view(attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head, "
        "qkv.shape[-1])",
        f"    nn.init.normal_(qkv[:, :-2], std={_value(stds['query'], 'layer')})  # query",
        f"    nn.init.normal_(qkv[:, -2], std={_value(stds['key'], 'layer')})  # key",
        f"    nn.init.normal_(qkv[:, -1], std={_value(stds['value'], 'layer')})  # value",
        f"    nn.init.normal_(attention.linear_proj.weight, std={_value(stds['output'], 'layer')})  # output",
        *(
            [
                "    gate, linear = block.mlp.linear_fc1.weight.chunk(2)",
                f"    nn.init.normal_(gate, std={_value(stds['gate'], 'layer')})  # gate",
                f"    nn.init.normal_(linear, std={_value(stds['mlp_in'], 'layer')})  # mlp_in",
            ]
            if fused
            else [f"    nn.init.normal_(block.mlp.linear_fc1.weight, std={_value(stds['mlp_in'], 'layer')})  # mlp_in"]
        ),
        f"    nn.init.normal_(block.mlp.linear_fc2.weight, std={_value(stds['mlp_out'], 'layer')})  # mlp_out",
    ]


def _torchtitan(applied: Applied) -> list[str]:
    stds = _by_role(applied)
    names = _TITAN if "gate" in stds else {**_TITAN, "mlp_in": "feed_forward.w1"}
    return [
        "# a method of TransformerBlock",
        "def init_weights(self):",
        "    for norm in (self.attention_norm, self.ffn_norm):",
        "        norm.reset_parameters()",
        *(
            f"    nn.init.normal_(self.{name}.weight, std={_value(stds[role], 'self.layer_id')})  # {role}"
            for role, name in names.items()
            if role in stds
        ),
    ]


def _residual_comments(applied: Applied) -> list[str]:
    """Return, as comments, the residual step of every sublayer whose factors are not one."""
    layers = list(applied.target.layers())
    lines = []
    for j in range(max(len(block.sublayers) for block in layers)):
        steps = [block.sublayers[j] for block in layers if j < len(block.sublayers)]
        skips, scales = ([_number(float(getattr(s, f))) for s in steps] for f in ("skip_scale", "branch_scale"))
        if set(skips) | set(scales) == {"1"}:
            continue
        first = steps[0]
        branch = f"{_named(first)}({'x' if first.input_norm is None else 'norm(x)'}{_memory(first)})"
        branch = branch if first.output_norm is None else f"norm({branch})"
        total = f"{_value(skips, 'layer')} * x + {_value(scales, 'layer')} * {branch}"
        lines.append(f"#   x = {total if first.stream_norm is None else f'norm({total})'}")
    if lines:
        lines.insert(0, "# in the forward of the block, in place of its own residual factors:")
        lines.insert(0, "")
    return lines


def _named(sublayer: Sublayer) -> str:
    """Return what to call a branch."""
    if isinstance(sublayer.branch, CrossAttention):
        return "cross_attention"
    return "attention" if isinstance(sublayer.branch, SelfAttention) else "mlp"


def _memory(sublayer: Sublayer) -> str:
    return ", memory" if isinstance(sublayer.branch, CrossAttention) else ""
