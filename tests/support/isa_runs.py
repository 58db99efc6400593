"""Runs every named network on each of the named instruction sets, in forks, for tests/runtime/test_isa.py.

    python -m tests.support.isa_runs NAME,NAME... ISA ISA...

The instruction set is chosen once per process; tracing and the oracle, which take longest, are the same for all sets.
So the networks are prepared first, and every instruction set is tried in a fork.  Prints as JSON, by instruction set,
what went wrong: an empty text if nothing did.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

from gradkern.runtime import ops
from tests.cases import CASES
from tests.support import oracle
from tests.support.case_runs import EXACT, exact, parts, run

SIZES = (1, 7)
SAMPLES = 16  # samples of the float32 run


def check(isa: str, single: dict[str, tuple[torch.Tensor, ...]], names: list[str]) -> None:
    machine = ops.machine()
    assert machine, "no kernels"
    assert machine.isa == isa, machine.isa
    for name in names:
        for n in SIZES:
            _, inputs, program, params = parts(name, n)
            y, jacobians = run(program, params, inputs)
            error = oracle.largest_error((y, *jacobians), (exact(name, n)[0], *exact(name, n)[1]))
            assert error <= EXACT, (name, n, error)
        if name in single:
            _, inputs, program, params = parts(name, SAMPLES, torch.float32)
            _, jacobians = run(program, params, inputs)
            for got, want in zip(jacobians, single[name], strict=True):
                assert oracle.disagreeing(got, want) <= 0.1, name


def forked(isa: str, single: dict[str, tuple[torch.Tensor, ...]], names: list[str]) -> str:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.environ["GRADKERN_ISA"] = isa
        said = ""
        try:
            check(isa, single, names)
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode()[-3000:])
        os._exit(0 if not said else 1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.wait()
    return said or (f"the process ended with status {status}" if status else "")


def main(names: list[str], isas: list[str]) -> None:
    torch.set_num_threads(1)  # no thread of OpenMP's may be alive when the process forks
    single = {}
    for name in names:
        for n in SIZES:
            parts(name, n), exact(name, n)
        if not CASES[name].opaque:
            inputs = parts(name, SAMPLES, torch.float32)[1]
            single[name] = oracle.jacobian(CASES[name].build(), inputs)[1]
    print(json.dumps({isa: forked(isa, single, names) for isa in isas}))


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
