"""Pins everything that affects the last bits of a run as its store has it: threads, memory, precision, instructions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...dispatch import ways
from ...runtime import ops
from ...util import options
from ..store.attributes import Pinned
from . import fingerprint
from .probe import Probe
from .settings import Settings


@contextmanager
def pinning(pinned: Pinned | None, settings: Settings) -> Iterator[None]:
    """Inside, the store's threads, memory budget, precision and way hold, or else the caller's."""
    threads, precision = torch.get_num_threads(), ops.precision()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_float32_matmul_precision, precision)
        if pinned:
            stack.enter_context(options.use(memory_budget=pinned["memory_budget"]))
            stack.enter_context(ways.pinned(pinned.get("way")))
            torch.set_float32_matmul_precision(pinned.get("precision", precision))
        torch.set_num_threads(pinned["threads"] if pinned else settings.threads or threads)
        yield


def unlike(pinned: Mapping[str, Any], other: Mapping[str, Any], *, plan: bool = True) -> list[str]:
    """How another store's pinned settings differ; the two results are then equal only within rounding.

    ``plan`` as in `differences`.
    """

    def of(p: Mapping[str, Any], name: str) -> Any:
        unmeasured = name == "way" and p.get("way") is None and p["engine"] == "kernel"
        return "kernels" if unmeasured else p.get(name)

    compared = [k for k in pinned if k not in ("chunk", "batch", "python", "plan")]
    compared += ["plan"] * (plan and pinned["isa"] == other["isa"])
    return [f"{k} {of(other, k)} instead of {of(pinned, k)}" for k in compared if of(other, k) != of(pinned, k)]


def pin_isa(wanted: str | None) -> None:
    """Request the store's instruction set if none has been chosen yet: the choice is made once per process."""
    if wanted in (None, "none") or os.environ.get("GRADKERN_ISA"):
        return
    extension = ops.extension()
    if extension is None or ops.isa_is_chosen():
        return
    os.environ["GRADKERN_ISA"] = wanted
    try:
        ops.machine()
    except RuntimeError:  # this processor does not have it: the difference is noted in the store
        pass
    finally:
        del os.environ["GRADKERN_ISA"]


def differences(pinned: Mapping[str, Any], probe: Probe, *, plan: bool = True) -> list[str]:
    """The pinned settings that differ here; the result is then equal only within rounding.

    ``plan``: also compare the plans' keys, which makes sense only if both have the same version.
    """
    now: dict[str, Any] = {**fingerprint.of_machine()} | {"engine": probe.engine}
    if plan and now["isa"] == pinned["isa"]:
        now["plan"] = probe.plan_key()
    return [f"{k} {now[k]} instead of {pinned[k]}" for k in now if k != "python" and now[k] != pinned[k]]
