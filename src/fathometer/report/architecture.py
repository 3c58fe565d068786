"""The architecture table: sizes, and the scales read off the first and last block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fathometer.diagnosis.report import Report
from fathometer.report.numbers import number

_SIZES = {
    "n_layers": "blocks",
    "d_model": "width (d_model)",
    "n_tokens": "tokens per sample",
    "samples": "samples",
    "batch": "batch",
    "blocks": "measured blocks",
    "other_stacks": "other stacks, not measured",
    "weight_draws": "weight draws",
    "cotangents": "random gradients per draw",
    "seed": "seed",
    "closure": "closure of the softmax",
}
_KINDS = {"self_attention": "attention", "mlp": "MLP", "gated_mlp": "gated MLP"}
_NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "dyt": "DyT", "derf": "Derf"}
_SLOTS = {
    "input_norm": "norm on the branch input",
    "output_norm": "norm on the branch output",
    "stream_norm": "norm on the stream",
}


def sizes_table(report: Report) -> list[tuple[str, str]]:
    """Return (label, value) of everything known about sizes, batch and draws."""
    about = {"n_layers": report.measured.n_layers, **report.about}
    rows = []
    for key, label in _SIZES.items():
        value = about.get(key)
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            rows.append((label, str(value)))
    heat = about.get("temperatures")
    if heat:
        for which, at in (("first", 0), ("last", -1)):
            beta, critical = (number(float(heat[key][at])) for key in ("beta", "beta_critical"))
            rows.append((f"inverse temperature of attention, {which} block", f"{beta}; condenses at {critical}"))
    return rows


def scales_table(report: Report) -> list[tuple[str, str, str]]:
    """Return (label, first block, last block) of every scale the theory used; empty where no spec was read."""
    spec = report.about.get("spec")
    blocks = spec.get("blocks") if isinstance(spec, Mapping) else None
    if not blocks:
        return []
    first, last = _block(blocks[0]), _block(blocks[-1])
    labels = list(dict.fromkeys([*first, *last]))
    return [(label, first.get(label, "none"), last.get(label, "none")) for label in labels]


def _block(block: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for sublayer in block["sublayers"]:
        branch = sublayer["branch"]
        kind = _KINDS.get(branch.get("kind"), str(branch.get("kind")))
        for slot, label in _SLOTS.items():
            if sublayer.get(slot) is not None:
                out[f"{kind}: {label}"] = _norm(sublayer[slot])
        for name, value in branch.items():
            if name != "kind" and not (name.endswith("_bias") and value == 0):
                out[f"{kind}: {name}"] = _plain(value)
        for name in ("skip_scale", "branch_scale"):
            if name in sublayer:
                out[f"{kind}: {name}"] = _plain(sublayer[name])
    return out


def _norm(norm: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{name} {_plain(value)}" for name, value in norm.items() if name != "kind")
    name = _NORMS.get(str(norm.get("kind")), str(norm.get("kind")))
    return f"{name} ({fields})" if fields else name


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(float(value), 4)
    return str(value)
