"""The tables of measured figures in README.md and docs, written from `benchmarks/results`.

``python -m benchmarks.tables`` rewrites what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; with
``--check`` it changes nothing and fails where a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("docs/benchmarks.md", "docs/captum.md", "docs/performance.md")
GEMM = 334.0  # GFLOP/s of torch's float32 matrix product on 2 threads of the machine that measured


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(r)} |" for r in rows)])


def short(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def networks() -> str:
    """docs/benchmarks.md: what a user asks first."""
    rows = []
    for r in load("networks.json")["networks"]:
        seeds = "all" if r["seeds"] == r["outputs"] else "random"
        peer = f"{short(r['peer_us'])}, {r['best_peer']} at {r['batch']}"
        rows.append((r["net"], f"{r['seeds']} ({seeds})", short(r["us"]), peer, f"**{r['ratio']['median']:.1f}×**",
                     f"{r['float64_error']:.0e}"))  # fmt: skip
    return markdown(("network", "outputs", "gradkern, µs", "best peer, µs", "ratio", "error, float64"), rows)


def operations() -> str:
    """docs/performance.md: the same figures as rates."""
    rows = []
    for r in load("networks.json")["networks"]:
        mflop = 2 * r["macs"] / 1e6
        rate = mflop / r["us"] * 1e3
        shares = f"{100 * r['fused_share']:.0f} / {100 * r['native_share']:.0f}"
        rows.append((r["net"], short(2 * r["peer_macs"] / 1e6), short(mflop), shares, short(r["us"]), short(rate),
                     f"{100 * rate / GEMM:.0f} %"))  # fmt: skip
    head = ("network", "MFLOP, every position and seed", "planned", "fused / own, %", "µs", "GFLOP/s", "of a GEMM")
    return markdown(head, rows)


def captum() -> str:
    """docs/captum.md: each method and stock Captum."""
    rows: dict[str, list[str]] = {}
    found = load("captum-2t.json")["rows"]
    nets = list(dict.fromkeys(r["net"] for r in found))
    for r in found:
        cell = "stock has no rule" if r["all_ratio"] is None else f"{r['all_ratio']:.1f}× ({r['one_ratio']:.1f}×)"
        rows.setdefault(r["method"], []).append(cell)
    return markdown(("method", *(f"`{n}`" for n in nets)), [(f"`{m}`", *cells) for m, cells in rows.items()])


TABLES: dict[str, Callable[[], str]] = {"networks": networks, "operations": operations, "captum": captum}


def filled(text: str) -> str:
    """A page with every table that it has a place for."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if place.search(text):
            content = table()
            text = place.sub(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)
    return text


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    chosen = parser.parse_args(words)
    stale = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = filled(before)
        if after != before:
            stale.append(page)
            if not chosen.check:
                path.write_text(after)
    if stale:
        print(("out of date: " if chosen.check else "written: ") + ", ".join(stale), file=sys.stderr)
    return 1 if stale and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())
