"""What torch's own kernels take for all-class input gradients in three ways, counted and timed on the CPU.

    python -m benchmarks.folded [--nets cnn1d mlp] [--time] [--out FILE]

This is what a GPU runs where gradkern's own kernels have not been validated (docs/performance-cuda.md).  Every call
that reaches torch's kernels is counted as one launch, and the bytes of the tensors that it reads and writes; views and
allocations cost nothing.  ``folded``: gradkern's plan without kernels, with all seeds in the batch.
``is_grads_batched``: one forward, one backward under vmap.  ``vmap(jacrev)``: torch.func's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import NETS
from gradkern.runtime import reference
from tests.support import capturing

FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "alias",
    "_unsafe_view",
)
COUNTED, TIMED, ROUNDS = 4, 64, 7  # samples that are counted, samples that are timed, and how often


@dataclass
class Count:
    """Of one way on one network: launches per chunk of samples, and bytes and milliseconds per sample."""

    net: str
    way: str
    launches: int
    kilobytes: float
    ms: float | None = None


class Counter(TorchDispatchMode):
    """Counts the calls that reach kernels, and the bytes that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliased = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not aliased and func.overloadpacket.__name__ not in FREE:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.launches += 1
            self.bytes += sum(memory.values()) if (memory := {t.data_ptr(): touched(t) for t in tensors}) else 0
        return result


def touched(x: Tensor) -> int:
    """Bytes of the different numbers of a tensor: those of an expanded axis are one."""
    different = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        different *= size if stride else min(size, 1)
    return different * x.element_size()


def ways(model: nn.Module, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """``[N, C, *in]`` for samples ``[N, *in]``, by each way."""
    with torch.no_grad():
        program = capturing.to_program(model, (x,))
        params = capturing.bind(program, model)
        outputs = model(x[:1]).shape[1]

    def folded(x: Tensor) -> Tensor:
        return reference.jacobian(program, params, [x])[1][0]

    def batched(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        seeds = torch.eye(outputs).unsqueeze(1).expand(outputs, len(x), outputs)
        return torch.autograd.grad(y, leaf, seeds, is_grads_batched=True)[0].transpose(0, 1)

    return {
        "folded": folded,
        "is_grads_batched": batched,
        "vmap(jacrev)": vmap(jacrev(lambda one: model(one[None])[0])),
    }


def count(net: str, *, timed: bool) -> list[Count]:
    model = NETS[net].build().eval().requires_grad_(False)
    x = torch.randn(TIMED, *NETS[net].shapes[0])
    runs, counts = ways(model, x[:COUNTED]), []
    for way, run in runs.items():
        run(x[:COUNTED])  # what is made once, such as seeds, is not counted
        with Counter() as counter:
            run(x[:COUNTED])
        counts.append(Count(net, way, counter.launches, counter.bytes / COUNTED / 1e3))
    if timed:
        times: dict[str, list[float]] = {way: [] for way in runs}
        for _ in range(ROUNDS):
            for way, run in runs.items():
                begun = time.perf_counter()
                run(x)
                times[way].append(1e3 * (time.perf_counter() - begun) / TIMED)
        for row in counts:
            row.ms = statistics.median(times[row.way])
    return counts


def table(rows: list[Count]) -> str:
    lines = ["| network | way | launches per chunk | KB per sample | ms per sample, CPU |", "|---|---|---|---|---|"]
    lines += [
        f"| `{r.net}` | {r.way} | {r.launches} | {r.kilobytes:.0f} | {'' if r.ms is None else f'{r.ms:.3f}'} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--time", action="store_true", help="time them, too")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    rows = [row for net in args.nets for row in count(net, timed=args.time)]
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
