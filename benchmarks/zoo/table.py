"""The results as text: a line per network, and the page docs/zoo.md."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine

Result = Mapping[str, Any]
SLOWER = 0.95
INTRODUCTION = """\
# Other people's networks

`make zoo` installs packages that define networks, gives the networks random weights, and compares the Jacobian of
four outputs with plain torch: the better of a loop over outputs and `is_grads_batched`. The *error* is the largest
difference from autograd in float64, as a share of the largest gradient. The *ratio* says how many times longer plain
torch takes: the median over interleaved calls of the ratio of CPU times, with its 90 % confidence interval
(bootstrap). The slower peer is timed once only if it takes 1.15 times as long as the other. Below 1, gradkern is
slower. *Fused* is the share of the multiply-adds for which all outputs go back together; *way* is the choice that was
measured before (`dispatch/ways.py`). The first call, which captures and verifies the network, is listed apart, in
seconds of CPU time.
"""


def line(result: Result) -> str:
    """One result for the terminal."""
    where = f"{result['name']}, {result['threads']} threads"
    if "failed" in result:
        return f"{where}: failed: {result['failed']}"
    ratios = ", ".join(f"{t['ratio']:.2f}× at {n}" for n, t in result["times"].items())
    return f"{where}: {ratios}; error {result['error']:.0e}; {result.get('reason') or ways(result)}"


def ways(result: Result) -> str:
    return "/".join(dict.fromkeys(result.get("ways", {}).values()))


def page(machines: Sequence[tuple[Mapping[str, Any], Sequence[Result]]]) -> str:
    """The page, from the description of each machine and all results that it gave."""
    return "\n".join([INTRODUCTION, *(part for about, results in machines for part in section(about, results))])


def section(about: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """One machine's part of the page: what was measured, how, and a table per number of threads."""
    good = [r for r in results if "failed" not in r]
    busy = " The machine had other work at the same time." if about["busy"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    tried = len({r["name"] for r in results})
    listed = about["networks"]
    share = f" Of {listed} networks, {tried} were tried, {about['chosen']}." if tried < listed else ""
    parts = [
        f"## {about['cpu']}, {about['isa']}\n",
        wrapped(f"Measured on {machine.one_line(about)}.{busy}{share}"),
        wrapped(f"{commits(about, results)}."),
        wrapped(f"Packages: {versions}."),
    ]
    for threads in sorted({r["threads"] for r in results}):
        chosen = [r for r in good if r["threads"] == threads]
        parts += [f"### {threads} thread{'s' * (threads != 1)}\n", summary(chosen), networks(chosen)]
    failed = [r for r in results if "failed" in r]
    if failed:
        parts.append("### Not measured\n")
        parts.append("\n".join(f"- {r['name']}, {r['threads']} threads: {r['failed']}" for r in failed) + "\n")
    return parts


def wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def commits(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The commit, or how many of the results are from which one."""
    found = Counter(r.get("commit", about["commit"]) for r in results)
    if len(found) < 2:
        return f"Commit: {next(iter(found), about['commit'])}"
    return "Commits: " + ", ".join(f"{commit} ({count} results)" for commit, count in found.most_common())


def summary(results: Sequence[Result]) -> str:
    """A row per kind of network."""
    rows = ["| kind | networks | median ratio | geometric mean | slower (upper bound below 0.95) | all on autograd |"]
    rows.append("|---|---|---|---|---|---|")
    for kind in (*sorted({r["kind"] for r in results}), "all"):
        chosen = [r for r in results if kind in ("all", r["kind"])]
        times = [t for r in chosen for t in r["times"].values()]
        if not times:
            continue
        ratios = [t["ratio"] for t in times]
        slower = sum(any(t["high"] < SLOWER for t in r["times"].values()) for r in chosen)
        whole = sum("reason" in r for r in chosen)
        rows.append(
            f"| {kind} | {len(chosen)} | {statistics.median(ratios):.2f}× | {statistics.geometric_mean(ratios):.2f}× "
            f"| {slower} | {whole} |"
        )
    return "\n".join(rows) + "\n"


def networks(results: Sequence[Result]) -> str:
    """A row per network."""
    sizes = list(dict.fromkeys(n for r in results for n in r["times"]))
    head = [
        "network",
        *[f"ratio, {n} samples" for n in sizes],
        "error",
        "fused",
        "way",
        "first call, s",
        "why not faster",
    ]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in sorted(results, key=lambda r: r["name"]):
        by_size = [r["times"].get(n) for n in sizes]  # None at a size for which there was no time
        times = [f"{t['ratio']:.2f}× ({t['low']:.2f}–{t['high']:.2f})" if t else "-" for t in by_size]
        why = r.get("reason") or "; ".join(r.get("by_autograd", [])[:2])
        cells = [
            *times,
            f"{r['error']:.0e}",
            f"{r['fused']:.0%}",
            ways(r),
            f"{r['first_call']:.1f}",
            why.replace("|", "\\|"),
        ]
        rows.append("| " + " | ".join([r["name"], *cells]) + " |")
    return "\n".join(rows) + "\n"
