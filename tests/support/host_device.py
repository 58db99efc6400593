"""The CUDA kernels on the host: a "GPU" for tests whose threads are host threads (csrc/host).

`HostDevice` builds the shim with g++ (no nvcc, no torch headers) and runs chains on it.  `installed` makes the engine
treat it as the machine of CPU tensors, so that the plan, the packing and the launch order are those of a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import cpp_extension

from gradkern.codegen.limits import PORTS
from gradkern.codegen.machine import Device
from gradkern.runtime import executor, ops
from tests.support import capturing
from tests.support.case import Case

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-pthread", f"-I{CSRC}")
THREADS = 64


class Args(ctypes.Structure):
    """csrc/cuda/kernels.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("forward", "backward", "packed", "tables")),
        *((name, ctypes.c_void_p * PORTS) for name in ("inputs", "outputs", "cotangents", "results")),
        *((name, ctypes.c_void_p) for name in ("targets", "seed_rows")),
        *((name, ctypes.c_int64) for name in ("target_n", "seed_rows_n", "seed_rows_s", "samples")),
        *((name, ctypes.c_int) for name in ("forward_count", "backward_count", "seeds", "seed_tile")),
        *((name, ctypes.c_int) for name in ("workspace", "sample", "bits", "block", "planned")),
    )


def rescale_args(number: type) -> type[ctypes.Structure]:
    """csrc/rescale_rule.h"""

    class RescaleArgs(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in ("z", "ref", "out", "scratch")),
            *((name, ctypes.c_int64) for name in ("ref_rows", "channels", "out_tap")),
            ("pool", ctypes.c_int64 * 12),
            ("relu", ctypes.c_bool),
            ("eps", number),
        )

    return RescaleArgs


RESCALE_ARGS = {torch.float32: rescale_args(ctypes.c_float), torch.float64: rescale_args(ctypes.c_double)}
POISON = -1.7e30  # fills results that may hold NaN, so that a missing write shows


class Gpu(ctypes.Structure):
    """csrc/host/runtime.h: the properties of the stand-in GPU, and what was asked of it."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in (
            *("processors", "shared_bytes", "capturing"),
            *("launches", "blocks", "allowed", "guards", "loaded"),
        )
    )


def built(name: str, source: str, *arguments: str) -> Path:
    """A source of csrc/host as a library; one build per content of the sources and way to compile them."""
    sources = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp") and "cpu" not in p.parts)
    content = [*(p.read_bytes() for p in sources), " ".join(arguments).encode(), torch.__version__.encode()]
    digest = hashlib.sha256(b"\0".join(content)).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"gradkern-{name}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.so"
            command = ["g++", "-O1", "-fPIC", "-shared", str(CSRC / "host" / source), "-o", str(part), *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            beside = target.with_name(f"{target.name}.{os.getpid()}")  # the temporary folder may be another disk
            beside.write_bytes(part.read_bytes())
            beside.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The shim, compiled."""
    shim = ctypes.CDLL(str(built("host", "run.cpp", "-g", *FLAGS)))
    assert shim.gk_args_size() == ctypes.sizeof(Args)
    assert shim.gk_rescale_args_size() == ctypes.sizeof(RESCALE_ARGS[torch.float64])
    assert shim.gk_gpu_size() == ctypes.sizeof(Gpu)
    shim.gk_gpu.restype = ctypes.POINTER(Gpu)
    for name in ("gk_run_f32", "gk_run_f64"):
        getattr(shim, name).restype = ctypes.c_char_p
    return shim


@functools.cache
def launchers() -> ctypes.CDLL:
    """The launchers of csrc/cuda, compiled around the stand-in GPU and loaded.  They register themselves as CUDA's."""
    c = ops.extension()
    assert c is not None and not c.has_cuda(), "they would replace the extension's own"
    include = [f"-I{CSRC}/host", f"-I{CSRC}", *(f"-isystem{p}" for p in cpp_extension.include_paths())]
    link = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch_cpu"]
    shim = built("host", "run.cpp", "-g", *FLAGS)
    path = built("launchers", "launchers.cpp", *FLAGS[:4], "-Wno-unused-parameter", *include, str(shim), *link)
    library()
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * PORTS)(*[t.data_ptr() for t in tensors])


class Recording:
    """A launch as `csrc/host/replay.cpp` reads it."""

    def __init__(self, args: ctypes.Structure, tensors: list[Tensor], numbers: tuple[int, ...]):
        """``numbers``: bytes per number, whether there is a pool, blocks, threads, shared bytes (or windows)."""
        self.results = tensors
        words = (ctypes.c_int64 * (ctypes.sizeof(args) // 8)).from_buffer_copy(args)
        number = {t.data_ptr(): i + 1 for i, t in enumerate(tensors) if t.numel()}
        kind = int(not isinstance(args, Args))
        pointers = (RESCALE_ARGS[torch.float32].ref_rows if kind else Args.target_n).offset
        for i in range(pointers // 8):
            words[i] = number.get(words[i], 0)
        head = (kind, *numbers, ctypes.sizeof(args), len(tensors))
        blobs = b"".join(t.nbytes.to_bytes(8, "little") + bytes_of(t) for t in tensors)
        self.content = b"".join(n.to_bytes(8, "little") for n in head) + bytes(words) + blobs

    def expected(self) -> bytes:
        """What the replay must write, once the launch has run."""
        return b"".join(t.nbytes.to_bytes(8, "little") + bytes_of(t) for t in self.results)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class HostDevice:
    """Chains on the host, with the ops' signatures.  ``blocks`` of a chain run one after the other."""

    def __init__(self, shared_bytes: int = 232448, blocks: int = 2, threads: int = THREADS):
        ops.extension()  # the other ops
        self.library = library()
        self.machine = Device("cuda", 16, shared_bytes=shared_bytes, threads=threads)
        self.blocks = blocks
        self.launches = self.rescales = 0
        self.record: list[Recording] | None = None  # set to a list to keep what was launched

    def chain_forward(self, inputs, packed, tables, forward, sizes, outputs) -> list[Tensor]:
        return self.chain_vjp(inputs, packed, tables, forward, forward[:0], sizes, outputs, None, None, [], 1, [])

    def chain_vjp(
        self,
        inputs,
        packed,
        tables,
        forward,
        backward,
        sizes,
        outputs,
        targets,
        seed_rows,
        cotangents,
        seed_tile,
        results,
    ) -> list[Tensor]:
        n = inputs[0].shape[0]
        values = [torch.full((n, size), float("nan"), dtype=packed.dtype) for size in outputs]
        for r in results:
            r.fill_(float("nan"))  # so that a missing write shows
        if n == 0:
            return values
        seeds = 0 if not len(backward) else targets.shape[-1] if targets is not None else cotangents[0].shape[1]
        assert sizes.bytes <= self.machine.shared_bytes
        args = Args(
            forward.data_ptr(), backward.data_ptr(), packed.data_ptr(), tables.data_ptr(), pointers(inputs),
            pointers(values), pointers(cotangents), pointers(results),
        )  # fmt: skip
        if targets is not None:
            args.targets, args.target_n = targets.data_ptr(), seeds if targets.dim() == 2 else 0
        if seed_rows is not None:
            row = seed_rows.shape[-1]
            args.seed_rows, args.seed_rows_s = seed_rows.data_ptr(), row
            args.seed_rows_n = seeds * row if seed_rows.dim() == 3 else 0
        args.samples, args.forward_count, args.backward_count = n, len(forward), len(backward)
        args.seeds, args.seed_tile = seeds, seed_tile
        args.workspace, args.sample, args.bits = sizes.workspace, sizes.sample, sizes.bits
        args.block, args.planned = min(sizes.block, -(-n // self.blocks)), sizes.block
        if self.record is not None:
            tensors = [forward, backward, packed, tables, *inputs, *values, *cotangents, *results]
            tensors += [t for t in (targets, seed_rows) if t is not None]
            numbers = (packed.element_size(), 0, self.blocks, self.machine.threads, sizes.bytes)
            self.record.append(Recording(args, tensors, numbers))
        run = self.library.gk_run_f32 if packed.dtype == torch.float32 else self.library.gk_run_f64
        error = run(ctypes.byref(args), self.blocks, self.machine.threads, ctypes.c_int64(sizes.bytes))
        assert error is None, error
        self.launches += 1
        return values

    def rescale(self, z, reference, pool, relu, eps) -> Tensor:
        assert z.is_contiguous() and reference.is_contiguous() and z.dtype == reference.dtype
        n, c, h, w = z.shape
        own = tuple(pool) or (1, 1, 1, 1, 0, 0, 1, 1, h, w)
        out = z.new_full((own[0] * own[1], n, c, own[8], own[9]), POISON)
        pointers = (z.data_ptr(), reference.data_ptr(), out.data_ptr(), 0)
        args = RESCALE_ARGS[z.dtype](
            *pointers, reference.shape[0], c, out[0].numel(), (ctypes.c_int64 * 12)(h, w, *own), relu, eps
        )
        if self.record is not None:
            numbers = (z.element_size(), int(bool(pool)), self.blocks, self.machine.threads, out[0].numel())
            self.record.append(Recording(args, [z, reference, out], numbers))
        run = self.library.gk_rescale_f32 if z.dtype == torch.float32 else self.library.gk_rescale_f64
        run(ctypes.byref(args), ctypes.c_int64(out[0].numel()), int(bool(pool)), self.blocks, self.machine.threads)
        self.rescales += 1
        return out

    def patches(self) -> list[contextlib.AbstractContextManager[Any]]:
        """The patches with which the engine works on this device."""
        names = ("chain_forward", "chain_vjp", "rescale")
        return [mock.patch.object(ops, name, getattr(self, name)) for name in names]


class Launchers(HostDevice):
    """`HostDevice` by way of the launchers: only torch's CUDA tensors and the GPU are stand-ins.

    ``shared_bytes``: the shared memory that the plan may use.
    """

    NAMES = ("chain_forward", "chain_vjp", "rescale", "content_hash")

    def __init__(self, processors: int = 2, shared_bytes: int = 232448):
        super().__init__(shared_bytes, processors, 256)
        launchers()
        self.ops = {n: getattr(torch.ops.gradkern, n).default for n in self.NAMES}
        self.gpu: Gpu = self.library.gk_gpu().contents
        self.gpu.processors = processors
        self.gpu.launches = self.gpu.guards = 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def patches(self) -> list[contextlib.AbstractContextManager[Any]]:
        return [
            mock.patch.object(torch.ops.gradkern, name, functools.partial(self.redispatched, name))
            for name in self.NAMES
        ]

    def vjps(self) -> list[dict[str, Any]]:
        """The arguments of every call of ``chain_vjp``, by name."""
        signature = inspect.signature(self.chain_vjp)
        return [signature.bind(*args).arguments for name, args in self.calls if name == "chain_vjp"]

    def redispatched(self, name: str, *args: Any) -> Any:
        """Call what torch would call for CUDA tensors."""
        self.calls.append((name, args))
        self.launches += name.startswith("chain")
        self.rescales += name == "rescale"
        return self.ops[name].redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


@contextlib.contextmanager
def installed(device: HostDevice) -> Iterator[HostDevice]:
    """Inside, the engine works on ``device``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "machine", lambda _device=None: device.machine))
        for patch in device.patches():
            stack.enter_context(patch)
        yield device


def run(case: Case, dtype: torch.dtype, n: int, device: HostDevice, targets: Tensor | None = None):
    """A case run on the device: its model and samples, outputs and Jacobians, and the plan that was used."""
    model = case.build(dtype=dtype)
    inputs = case.inputs(n, dtype=dtype)
    with torch.no_grad():
        program = capturing.to_program(model, inputs)
        params = capturing.bind(program, model)
        with installed(device):
            y, got = executor.jacobian(program, params, inputs, targets)
            used = executor.plan_for(program, got[0].shape[1], dtype)
    return model, inputs, y, got, used
