"""Where the time of a chain goes on a GPU: every record's, measured, and as the planner expected it.

    python -m benchmarks.gpu_records [--nets cnn1d lenet5] [--out FOLDER]

The kernel is launched with its first record alone, with the first two, and so on; a record's time is the difference.
What a cut-off chain computes is meaningless, and takes the time that it takes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import gradkern
from benchmarks.gpu import SAMPLES, timed
from gradkern.codegen.machine import Device
from gradkern.codegen.records import Extent, PatternRef, Record
from gradkern.runtime import execution, ops, whole_chain
from tests.cases import CASES

SHOWN = ("H", "W", "C", "O", "run_length", "window_elements", "elements", "rows", "columns", "terms", "algorithm")


@dataclass
class Timed:
    """One record of a chain: milliseconds for all samples."""

    part: str
    kind: str
    shape: str
    expected: float
    measured: float


def shape_of(record: Record) -> str:
    """The numbers of a record that say how large its work is."""
    extent, pattern = getattr(record, "extent", None), getattr(record, "pattern", None)
    sources = (extent, record) if isinstance(extent, Extent) else (record,)
    numbers = {n: getattr(x, n) for x in sources for n in SHOWN if hasattr(x, n)}
    if isinstance(pattern, PatternRef):
        numbers["taps"] = pattern.taps
    return " ".join(f"{name}={int(number)}" for name, number in numbers.items() if number)


def captured(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """What `execution.run_chain` is called with for the network's Jacobian: packed chain, inputs, and the rest."""
    calls: list[tuple[Any, ...]] = []

    def keep(*args: Any) -> list[Tensor]:
        calls.append(args)
        return real(*args)

    gradkern.jacobian(model, x, engine="kernel")  # first results are compared with torch's, by more launches
    real = execution.run_chain
    with mock.patch.object(execution, "run_chain", keep), mock.patch.object(whole_chain, "run_chain", keep):
        gradkern.jacobian(model, x, engine="kernel")
    if len(calls) != 1:
        raise SystemExit(f"benchmarks.gpu_records: expected one chain and one chunk, got {len(calls)} launches")
    return calls[0]


def records(model: nn.Module, x: Tensor, machine: Device, seconds: float = 0.3) -> list[Timed]:
    """Every record of the network's only chain, for all samples of ``x``."""
    packed, inputs, targets, rows, cotangents, results = captured(model, x)
    chain, weights, tables = packed.chain, packed.weights, packed.tables
    timed_records, before, place = [], 0.0, 0
    for part, ops_of in (("forward", chain.forward), ("backward", chain.backward)):
        for k, record in enumerate(ops_of, 1):
            if part == "forward":
                cut: Any = (inputs, weights, tables, packed.forward[:k], chain.sizes, chain.output_sizes)
                now = timed(lambda _, cut=cut: ops.chain_forward(*cut), [x], seconds)
            else:
                first = (inputs, weights, tables, packed.forward, packed.backward[:k], chain.sizes, chain.output_sizes)
                cut = (*first, targets, rows, cotangents, chain.seed_tile, results)
                now = timed(lambda _, cut=cut: ops.chain_vjp(*cut), [x], seconds)
            expected = machine.milliseconds(chain.clocks[place], len(x))
            timed_records.append(Timed(part, type(record).__name__, shape_of(record), expected, now - before))
            before, place = now, place + 1
    return timed_records


def table(net: str, samples: int, rows: list[Timed]) -> list[str]:
    lines = [f"{net}, {samples} samples", f"{'':9}{'record':12}{'expected ms':>12}{'measured ms':>12}  shape"]
    lines += [f"{r.part:9}{r.kind:12}{r.expected:12.3f}{r.measured:12.3f}  {r.shape}" for r in rows]
    totals = sum(r.expected for r in rows), sum(r.measured for r in rows)
    return [*lines, f"{'all':21}{totals[0]:12.3f}{totals[1]:12.3f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(SAMPLES), default=["cnn1d", "lenet5", "mlp"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_records: no GPU is visible to torch.")
    with gradkern.use("kernel"):
        machine = ops.machine(torch.device("cuda", 0))
    if not isinstance(machine, Device):
        raise SystemExit(f"benchmarks.gpu_records: no kernels: {machine}")
    kept = {}
    for net in args.nets:
        model = CASES[net].build().cuda().requires_grad_(False)
        x = torch.randn(SAMPLES[net], *CASES[net].shapes[0], device="cuda")
        rows = records(model, x, machine)
        kept[net] = [asdict(r) for r in rows]
        print("\n".join(table(net, len(x), rows)), flush=True)
        (args.out / "gpu_records.json").write_text(json.dumps(kept, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
