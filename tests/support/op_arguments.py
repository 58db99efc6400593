"""Arguments of the compiled ops, right and wrong."""

from __future__ import annotations

import torch

from gradkern.runtime import executor
from gradkern.runtime.parameters import Packed
from tests.support.case_runs import parts


def arguments(name: str = "maxpool1d", n: int = 3, dtype: torch.dtype = torch.float64, group: bool = False):
    """The arguments of `chain_vjp` for a case: one-hot seeds, or with ``group`` dense cotangents."""
    _, inputs, program, params = parts(name, n, dtype)
    p = executor.plan_for(program, program.outputs, dtype)
    chain = p.chain(0, program.outputs, tuple(range(len(inputs))), not group)
    packed = Packed(chain, params, inputs[0])
    targets = None if group else torch.arange(program.outputs)
    cotangents = [torch.randn(n, program.outputs, s, dtype=dtype) for s in chain.output_sizes] if group else []
    return {
        "inputs": list(inputs),
        "packed": packed.weights,
        "tables": packed.tables,
        "forward": packed.forward,
        "backward": packed.backward,
        "sizes": chain.sizes.integers,
        "outputs": [torch.zeros(n, s, dtype=dtype) for s in chain.output_sizes],
        "targets": targets,
        "seed_rows": None if group else packed.seed_rows(targets, program.outputs),
        "cotangents": cotangents,
        "seed_tile": chain.seed_tile,
        "results": [torch.zeros(n, program.outputs, *x.shape[1:], dtype=dtype) for x in inputs],
    }


def forward_arguments(found: dict) -> tuple:
    first = tuple(found[k] for k in ("inputs", "packed", "tables", "forward", "sizes"))
    return (*first, [y.shape[1] for y in found["outputs"]])


def cut(found, key, i=0, **how):
    found[key][i] = found[key][i].to(**how) if how else found[key][i][:-1]


WRONG_CHAIN = {
    "needs at least one input": lambda a: a.update(inputs=[]),
    "must be contiguous, got strides": lambda a: a["inputs"].__setitem__(0, torch.zeros(3, 16, 2).double().mT),
    "bind the model again": lambda a: cut(a, "inputs", dtype=torch.float32),
    "disagree on the batch: 2 and 3": lambda a: a["inputs"].append(a["inputs"][0][:2]),
    "tables int32": lambda a: a.update(tables=a["tables"].long()),
    "records must be a contiguous int64": lambda a: a.update(forward=a["forward"][:, 1:]),
    "are of different versions": lambda a: a.update(forward=a["forward"].int()),
    r"expected \d sizes of scratch memory, got 5": lambda a: a.update(sizes=a["sizes"][:5]),
    "negative size of scratch memory: -1": lambda a: a.update(sizes=[-1, *a["sizes"][1:]]),
}  # fmt: skip


WRONG_SEEDS = {
    "seed_tile must be positive, got 0": lambda a: a.update(seed_tile=0),
    "give targets or cotangents": lambda a: a.update(targets=None, seed_rows=None),
    "targets must be contiguous int64": lambda a: a.update(targets=a["targets"].int()),
    r"expected.* \[S\] or \[3, S\], got Long \[2, 3\]": lambda a: a.update(targets=torch.zeros(2, 3).long()),
    "targets need one output, got 2": lambda a: a["outputs"].append(a["outputs"][0]),
    r"outputs must be contiguous Double \[3, size\], got Float": lambda a: cut(a, "outputs", dtype=torch.float32),
    "target 3 is out of range, expected 0 … 2": lambda a: a.update(targets=torch.tensor([0, 1, 3])),
    "target -1 is out of range": lambda a: a.update(targets=torch.tensor([0, 1, -1])),
    "seed_rows must be contiguous": lambda a: a.update(seed_rows=a["seed_rows"].float()),
    r"\[N, S, K\] beside targets": lambda a: a.update(seed_rows=a["seed_rows"][:2]),
    r"results must be contiguous Double \[3, 3, …\], got Float": lambda a: cut(a, "results", dtype=torch.float32),
    r"results must be .*got Double \[2, 3": lambda a: cut(a, "results"),
}


WRONG_COTANGENTS = {
    "expected 1 cotangents, one per output, got 2": lambda a: a["cotangents"].append(a["cotangents"][0]),
    r"cotangents must be contiguous Double \[3, S, 3\], got Float": lambda a: cut(a, "cotangents", dtype=torch.float32),
    r"cotangents must be .*got Double \[2, 3, 3\]": lambda a: cut(a, "cotangents"),
    "one of them": lambda a: a.update(targets=torch.arange(3)),
    r"results must be contiguous Double \[3, 3": lambda a: a.update(results=[a["results"][0][:, :2].contiguous()]),
}
