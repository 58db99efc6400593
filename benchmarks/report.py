"""Results for people: the printed table, the JSON and the pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.baselines import PEERS
from benchmarks.machine import one_line

Result = dict[str, Any]

OURS = "gradkern"


def table(results: list[Result]) -> str:
    """One row per network: gradkern against the best peer at its best batch size."""
    rows = [("net", "N", "µs/sample", "GFLOP/s", "best peer @ batch", "µs/sample", "ratio (quartiles)", "floor",
             "max error", "disagree", "fresh result", "first call", "own kernels")]  # fmt: skip
    for r in results:
        best, accuracy = r["best_peer"], r[OURS]["accuracy"]
        rows.append((
            r["net"], str(r["samples"]), f"{r[OURS]['us']:.2f}", f"{r[OURS]['gflops_needed']:.0f}",
            f"{best['title']} @ {best['batch']}", f"{best['us']:.2f}",
            f"{r['ratio']['median']:.2f} ({r['ratio']['low']:.2f}-{r['ratio']['high']:.2f})",
            f"{r['floor']:.1f} {'met' if r['floor_met'] else 'MISSED'}",
            "inf" if accuracy["max_error"] is None else f"{accuracy['max_error']:.1e}",
            f"{accuracy['share_disagreeing']:.1%}", f"{r[OURS]['fresh_result_us']:.2f} µs",
            f"{r[OURS]['first_call_ms']:.0f} ms",
            f"{r[OURS]['native_share']:.0%}" if "native_share" in r[OURS] else "-",
        ))  # fmt: skip
    return "\n".join(align(rows))


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of equal length as lines with aligned columns, a rule under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def peer_table(results: list[Result]) -> str:
    """µs per sample of every peer at its best batch size, from the screening pass."""
    names = [name for name in PEERS if any(name in r["peers_best"] for r in results)]
    rows = [("µs/sample (batch)", *[r["net"] for r in results])]
    for name in names:
        cells = []
        for r in results:
            found = r["peers_best"].get(name)
            cells.append(f"{found['us']:.1f} ({found['batch']})" if found else "-")
        rows.append((PEERS[name].title, *cells))
    rows.append((OURS, *[f"{r[OURS]['us']:.1f} ({r['samples']})" for r in results]))
    return "\n".join(align(rows))


def write_json(path: Path, machine: dict[str, Any], settings: dict[str, Any], results: list[Result]) -> None:
    """The whole run as JSON (``allow_nan`` off, so that any reader takes it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1, allow_nan=False)
    path.write_text(text + "\n")


def picture(path: Path, machine: dict[str, Any], results: list[Result]) -> None:
    """Per network: bars of µs/sample at the best batch size above, µs/sample over the batch size below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {name: f"C{i}" for i, name in enumerate(PEERS)} | {OURS: "black"}
    figure, axes = plt.subplots(2, len(results), figsize=(1.2 + 3.4 * len(results), 7.4), squeeze=False, dpi=120)
    for column, result in enumerate(results):
        bars(axes[0][column], result, colours)
        curves(axes[1][column], result, colours)
    axes[0][0].set_ylabel("µs per sample, all classes (log)")
    axes[1][0].set_ylabel("µs per sample, all classes (log)")
    shown = [n for n in [OURS, *PEERS] if n == OURS or any(n in r["peers_best"] for r in results)]
    handles = [plt.Line2D([], [], color=colours[n], marker="o", label=title(n)) for n in shown]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"All-class input gradients: {one_line(machine)}", fontsize=10)
    figure.tight_layout(rect=(0, 0.08, 1, 0.97))
    figure.savefig(path)
    plt.close(figure)


def title(name: str) -> str:
    return OURS if name == OURS else PEERS[name].title


def bars(axis: Any, result: Result, colours: dict[str, str]) -> None:
    """gradkern and every peer at its best batch size."""
    heights = {OURS: result[OURS]["us"]} | {name: row["us"] for name, row in result["peers_best"].items()}
    for i, (name, us) in enumerate(heights.items()):
        axis.bar(i, us, color=colours[name])
        axis.text(i, us * 1.04, f"{us:,.0f}" if us >= 100 else f"{us:.3g}", ha="center", va="bottom", fontsize=7)
    axis.set_yscale("log")
    axis.set_ylim(min(heights.values()) / 2, max(heights.values()) * 2)
    plain_numbers(axis)
    axis.set_xticks([])
    axis.set_title(f"{result['net']}: {result['ratio']['median']:.2f}× the best peer", fontsize=10)


def curves(axis: Any, result: Result, colours: dict[str, str]) -> None:
    """µs per sample over the batch size, from the screening pass."""
    for name in [OURS, *PEERS]:
        points = sorted((r["batch"], r["us"]) for r in result["screening"] if r["peer"] == name and r["us"])
        if points:
            axis.plot(*zip(*points, strict=True), color=colours[name], marker="o", markersize=3, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yscale("log")
    plain_numbers(axis)
    axis.set_xlabel("batch size")
    axis.grid(alpha=0.3)


def plain_numbers(axis: Any) -> None:
    """10, 20, 50, 100 … on a logarithmic axis, rather than powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
