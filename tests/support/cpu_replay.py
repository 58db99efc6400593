"""The CPU's kernels and ops under the sanitizers, without torch: calls are recorded, and `csrc/host/replay_cpu.cpp`
repeats them, on its own threads and with tensors of exactly the right size.

The calls come from random Programs in every direction, random rules (also with pools whose windows lie wholly in the
padding), recurrent layers and statistics.  Calls of chains are repeated with random changes of numbers in their
records, tables and sizes: such a call must raise an error or run to its end, without an access out of bounds.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern
from gradkern.runtime import ops
from tests.support import scale

CSRC = Path(__file__).parents[2] / "csrc"
#: All sources of the CPU's ops but the instruction sets, of which each build has one.
SOURCES = (*sorted(f"cpu/{path.name}" for path in CSRC.glob("cpu/*.cpp") if not path.name.startswith("isa_")),
           "checks.cpp", "content_hash.cpp", "host/replay_cpu.cpp")  # fmt: skip
FLAGS = ("-std=c++20", "-O1", "-g1", "-fwrapv", "-fopenmp-simd", "-pthread", "-Wno-unknown-pragmas", "-Wno-psabi",
         f"-I{CSRC / 'host' / 'standin'}", f"-I{CSRC}", f"-I{Path(torch.__file__).parent / 'include'}")  # fmt: skip
TYPES = {torch.float32: 6, torch.float64: 7, torch.float16: 5, torch.int32: 3, torch.int64: 4, torch.bool: 11}


class Recording(TorchDispatchMode):
    """Records the calls of gradkern's ops, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes] = []
        self.expected: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split("::")
        if space != "gradkern":
            return func(*args, **(kwargs or {}))
        schema = [a.type for a in func._schema.arguments]
        body = b"".join(encoded(a, t) for a, t in zip(args, schema, strict=True))
        result = func(*args, **(kwargs or {}))
        name = name.partition(".")[0]
        # Ops without tensors only ask how the extension was built.
        if name != "content_hash" and next(tensors_in(args), None) is not None:
            self.calls.append(struct.pack("<q", len(name)) + name.encode() + struct.pack("<q", len(body)) + body)
            self.expected += [t.clone() for a in (*args, result) for t in tensors_in(a)]
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def encoded(value: Any, kind: Any) -> bytes:
    """An argument as csrc/host/standin reads it; an optional one begins with whether it is given."""
    if str(kind).startswith("Optional"):
        return integers(0) if value is None else integers(1) + encoded(value, kind.getElementType())
    if isinstance(value, Tensor):
        span = (
            1 + sum((s - 1) * abs(t) for s, t in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        )
        flat = value.detach().as_strided((span,), (1,))  # with the gaps
        content = flat.contiguous().view(torch.uint8).numpy().tobytes() if span else b""
        shape = integers(value.dim(), *value.shape, value.dim(), *value.stride())
        return integers(TYPES[value.dtype]) + shape + integers(len(content)) + content
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, (list, tuple)):
        items = [encoded(v, kind.getElementType()) if isinstance(v, Tensor) else integers(v) for v in value]
        return integers(len(items)) + b"".join(items)
    return integers(int(value))


def recorded(networks: int, first: int) -> Recording:
    """The calls of random networks, with seeds from ``first`` on, and of the other ops."""
    ops.extension()
    torch.set_num_threads(1)
    recording = Recording()
    for seed in range(first, first + networks):
        for kind in ("programs", "rules"):
            with recording:
                scale.one(kind, seed)
    with recording, torch.no_grad():
        for cell, gates in enumerate((1, 1, 3, 4)):  # plain layers, a GRU, an LSTM
            n, seeds, steps, hidden, inputs = 3, 5, 7, 6, 4
            numbers = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
            x, y, g = numbers(n, steps, inputs), numbers(n, steps, hidden), numbers(n, seeds, steps, hidden)
            weights = [numbers(gates * hidden, inputs), numbers(gates * hidden, hidden)]
            result = numbers(n, seeds, steps, inputs)
            for reverse in (False, True):
                torch.ops.gradkern.recurrent(x, weights, cell, reverse, y)
                torch.ops.gradkern.recurrent_vjp(g, x, y, weights, cell, reverse, reverse, result)
        for dtype in (torch.float32, torch.float64):
            maps, groups = torch.randn(4, 3, 5, dtype=dtype), torch.tensor([1, 0, 1, 2])
            sums = [torch.zeros(3, 5, dtype=torch.float64) for _ in range(3)]
            largest, by_group = torch.zeros(3, 5), torch.zeros(3, 3, 5, dtype=torch.float64)
            torch.ops.gradkern.accumulate(maps, groups, [*sums, largest, by_group])
    gradkern.reset()
    return recording


def build(program: Path, flags: Sequence[str], isa: str) -> None:
    """Build the program that repeats recordings of one instruction set."""
    chosen = f"-DGRADKERN_ISAS(X)=X({isa})"
    sources = [*SOURCES, f"cpu/isa_{isa}.cpp"]
    objects = [program.with_suffix(f".{Path(s).stem}.o") for s in sources]

    def compile_one(source: str, target: Path) -> None:
        command = ["g++", *FLAGS, *flags, chosen, "-c", str(CSRC / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run(["g++", *flags, "-pthread", *map(str, objects), "-o", str(program)], check=True)


def replay(program: Path, recording: tuple[list[bytes], list[Tensor]], mutations: int, threads: int) -> str:
    """Run the calls and print what was done; returns what was wrong."""
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    calls, expected = recording
    source.write_bytes(b"".join(calls))
    command = [str(program), str(source), str(target), str(mutations), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"exit {done.returncode}\n{done.stderr[:6000]}"
    print(f"{program.name}: {done.stdout.strip()}", flush=True)
    found, at = target.read_bytes(), 0
    for number, want in enumerate(expected):
        size = struct.unpack_from("<q", found, at)[0]
        at += 8 + size
        if want.is_contiguous() and want.is_floating_point() and size:
            got = torch.frombuffer(bytearray(found[at - size : at]), dtype=want.dtype).view(want.shape)
            if not close(got, want):
                return f"tensor {number}, {tuple(want.shape)}, differs from what the extension gave"
    return ""


def close(got: Tensor, want: Tensor) -> bool:
    """Whether they differ by no more than the rounding of two compilers; sums may cancel, so the largest counts too."""
    finite = want[want.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.isclose(got, want, rtol=1e-3, atol=1e-4 + 1e-6 * largest, equal_nan=True).all())


def main(kind: str, flags: Sequence[str], folder: Path, long: bool, chosen: Sequence[str] = ()) -> int:
    """Try the instruction sets one by one.  Weights are packed for one set, so each is recorded in its own process."""
    seed = random.SystemRandom().randrange(1 << 30)
    found = ops.extension().isas()  # the best first
    isas = chosen or (found if long else [found[0] if kind == "address" else "portable"])
    networks, mutations = (400, 500) if long else (40, 60)
    failed = 0
    for isa in isas:
        program = folder / f"{kind}-{isa}"
        words = [str(w) for w in (networks, seed, program.with_suffix(".recorded"))]
        environment = os.environ | {"GRADKERN_ISA": isa, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "tests.support.cpu_replay", *words], check=True, env=environment)
        build(program, flags, isa)
        recording = torch.load(words[-1])
        wrong = replay(program, recording, mutations if kind == "address" else 0, threads=3)
        failed += bool(wrong)
        print(f"{kind}: the CPU's ops on {isa}, networks from seed {seed} on: {wrong or 'clean'}", flush=True)
    return failed


if __name__ == "__main__":
    recording = recorded(int(sys.argv[1]), int(sys.argv[2]))
    torch.save((recording.calls, recording.expected), sys.argv[3])
