"""The table that a plan prints: a row per step, why no faster implementation runs it, and shares of the operations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

WIDEST = 36  # characters of a layer or a form
NAMED = 3  # steps that are named with a reason that they share
PARAMETER = re.compile(r", %[\w.]+")  # the names of weights, which are those of the layer
LEGEND = {
    "kernel": "gradkern's own kernel",
    "folded": "done by the kernel of the step before",
    "view": "no work",
    "walk": "torch's forward pass, and gradkern's own kernel back through time for all outputs",
    "aten": "torch's operation, once for all outputs",
    "autograd": "torch differentiates this operation",
}


def table(plan: Plan) -> str:
    rows = [("value", "layer", "form", "shape", "path", "MMAC")]
    for s in plan.steps:
        shape = "×".join(map(str, s.shape)) or "()"
        layer, form = _shorten(s.module or s.op, end=True), _shorten(PARAMETER.sub("", s.form))
        rows.append((f"v{s.value}", layer, form, shape, s.path, f"{s.macs / 1e6:.3g}"))
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.append(_legend({s.path for s in plan.steps}))
    lines += _refusals(plan)
    if plan.direction is not None:
        lines.append(str(plan.direction))
        parts = zip(("up to", "from"), plan.parts or (), strict=False)
        lines += [f"  {where} there: {part.direction}" for where, part in parts if part.instead]
    if plan.fallback is None:
        lines += _local_seeds(plan)
    if plan.cast_dtype is not None:
        name = str(plan.cast_dtype).removeprefix("torch.")
        lines.append(f"{name} is cast to float32 on the way in, and back on the way out")
    if plan.fallback is not None:
        lines.append(f"with the present tensors, no kernel runs: {plan.fallback}")
    lines.append(summary(plan))
    if plan.timing is not None:
        lines.append(plan.timing.text(*() if plan.native_share else ("planned ATen calls",)))
    return "\n".join(lines)


def summary(plan: Plan) -> str:
    """The last line: seeds, groups, and shares of the operations."""
    work, groups = f"{plan.seeds} seed{'s' * (plan.seeds != 1)}", plan.groups
    if plan.forward_mode is not None:
        work, groups = f"{plan.forward_mode.transposed.tangents} tangents", plan.forward_mode.plan.groups
    return (
        f"{work}, {len(groups)} group{'s' * (len(groups) != 1)}, "
        f"fused {100 * plan.fused_share:.1f} % of the operations, own kernels {100 * plan.native_share:.1f} %"
    )


def _refusals(plan: Plan) -> Iterator[str]:
    """Why no faster implementation runs the steps, a line per reason."""
    refused: dict[str, list[str]] = {}
    for s in plan.steps:
        for reason in s.refusals:
            refused.setdefault(reason, []).append(f"v{s.value} ({s.module or s.op})")
    for reason, steps in refused.items():
        if reason != plan.fallback:
            more = f" and {len(steps) - NAMED} more" if len(steps) > NAMED else ""
            yield f"{', '.join(steps[:NAMED])}{more}: {reason}"


def _local_seeds(plan: Plan) -> Iterator[str]:
    """Where seeds or tangents are local, in the plans that run."""
    for where, part in zip(("up to", "from"), plan.parts or (), strict=False):
        yield from (f"  {where} there: {line}" for line in _local_seeds(part))
    chain, seed, end = plan.local_seeds, "seed", "output"
    if plan.forward_mode is not None:
        seed, end = "tangent", "input"
    if chain is not None:
        yield (
            f"local {seed}s: {100 * chain.local_share:.0f} % of their multiply-adds are left where "
            f"{chain.seed_tile} neighbouring {seed}s reach from the middle of the {end}"
        )


def _shorten(text: str, *, end: bool = False) -> str:
    """``text`` cut to `WIDEST` characters; ``end``: its end is kept, as for a layer's place in the model."""
    if len(text) <= WIDEST:
        return text
    return "…" + text[1 - WIDEST :] if end else text[: WIDEST - 1] + "…"


def _legend(paths: set[str]) -> str:
    """The explanation of the table's last two columns."""
    words = [f"{name}: {LEGEND[name]}" for name in LEGEND if any(p.split(",")[0].split()[0] == name for p in paths)]
    counted = "MMAC: million multiply-adds per sample, forward and backward (counts by mode: backward). "
    return counted + ("Paths: " + "; ".join(words) + "." if words else "")
