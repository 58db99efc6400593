"""Does in minutes what a pipeline does in a week: many threads, calls and models, interrupts, forks, little memory.

    python -m tests.support.load --minutes 5

Prints its figures as JSON; the exit code is 1 if a result differed, or something did not end as it should.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradkern

THREADS = 8
PAGE = os.sysconf("SC_PAGE_SIZE")


def network(seed: int, width: int = 8, length: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    last = nn.Linear(width * (length // 2), 4)
    return nn.Sequential(nn.Conv1d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), last).eval()


def samples(count: int = 6, length: int = 32) -> Tensor:
    return torch.randn(count, 1, length, generator=torch.Generator().manual_seed(count))


def call(model: nn.Module, x: Tensor) -> Tensor:
    return gradkern.jacobian(model, x, engine="kernel")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


# ---------------------------------------------------------------------------------------------------------------
# What is tried: each gives its figures, and raises AssertionError


def threads(seconds: float, models: int) -> dict[str, Any]:
    """Threads that keep calling the same models; every result must have the bits of a call alone."""
    nets, x = [network(seed) for seed in range(models)], samples()
    wanted = [call(net, x) for net in nets]
    calls, wrong, end = [0] * THREADS, [], time.monotonic() + seconds

    def work(number: int) -> None:
        try:
            while time.monotonic() < end and not wrong:
                which = (number + calls[number]) % models
                if not torch.equal(call(nets[which], x), wanted[which]):
                    wrong.append(f"thread {number}, model {which}")
                calls[number] += 1
        except Exception as error:
            wrong.append(repr(error))

    running = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong, wrong
    return {f"calls of {THREADS} threads on {models} models": sum(calls)}


def memory_of_calls(calls: int) -> dict[str, Any]:
    """The growth of the process over many calls of one model, after a tenth of them to warm up."""
    model, x = network(0), samples()
    for _ in range(max(calls // 10, 50)):
        call(model, x)
    gc.collect()
    before = resident()
    for _ in range(calls):
        call(model, x)
    gc.collect()
    grown = resident() - before
    assert grown < 8 << 20, f"{calls} calls left {grown:,} bytes"
    return {"calls": calls, "KiB left by them": grown >> 10}


def memory_of_models(models: int) -> dict[str, Any]:
    """The growth per model that was made, used and dropped."""
    x = samples()
    for seed in range(max(models // 10, 3)):
        call(network(seed), x)
    gc.collect()
    before = resident()
    for seed in range(models):
        call(network(seed), x)
    gc.collect()
    each = (resident() - before) / models
    assert each < 1 << 20, f"{each:,.0f} bytes are left of every model"
    return {"models": models, "KiB left by each": round(each / 1024, 1)}


def interrupt(after: float = 0.3, again: float = 5.0) -> dict[str, Any]:
    """Ctrl-C in a long call: the time until the exception, and a call afterwards.

    It is sent ``again`` now and then, since Python drops an exception that is raised within a finalizer.
    """
    model, x = network(0), samples()
    wanted, many = call(model, x), samples(60_000)
    begin, returned, sent = time.monotonic(), 0.0, 0

    def stop(*_: Any) -> None:
        nonlocal sent
        sent += 1
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, after, again)
        while True:  # calls, until one of them is interrupted
            call(model, many)
    except KeyboardInterrupt:
        returned = time.monotonic() - begin - after - (sent - 1) * again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(call(model, x), wanted)
    assert returned < 1.0, f"the interrupt took {returned:.2f} s"
    return {"seconds until an interrupt was seen": round(returned, 3)}


def fork() -> dict[str, Any]:
    """A child that was forked after use on two threads computes the same on one (torch promises nothing with more)."""
    model, x = network(0), samples(64)
    torch.set_num_threads(2)
    try:
        wanted = call(model, x)
        pid = os.fork()
    finally:
        torch.set_num_threads(1)
    if pid == 0:
        os._exit(0 if torch.equal(call(model, x), wanted) else 3)
    limit = time.monotonic() + 60
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the forked child ended with {code}"
    return {"forks": 1}


def little_memory() -> dict[str, Any]:
    """Under a limit of the address space (in a process of its own) a result that does not fit is a `MemoryError`."""
    done = subprocess.run([sys.executable, "-m", "tests.support.load", "--under-limit"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {"under a limit": done.stdout.strip()}


def under_limit() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20_000, 32), nn.ReLU(), nn.Linear(32, 500)).eval()
    x = torch.randn(4, 20_000)
    few = gradkern.jacobian(model, x[:1], [0], engine="kernel")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    try:
        gradkern.jacobian(model, x, engine="kernel")
    except MemoryError as error:
        assert "the result needs 0.15 GiB" in str(error), error
    else:
        raise AssertionError("a result of 160 MB fits in 64 MiB")
    assert torch.equal(gradkern.jacobian(model, x[:1], [0], engine="kernel"), few), "not usable afterwards"
    print("MemoryError with the forecast, usable afterwards")


def main(minutes: float) -> int:
    torch.set_num_threads(1)
    seconds, calls = 60 * minutes, max(100, round(2000 * minutes))
    tried: list[Callable[[], dict[str, Any]]] = [
        lambda: threads(seconds / 4, 1), lambda: threads(seconds / 4, 5), lambda: memory_of_calls(calls),
        lambda: memory_of_models(max(4, round(40 * minutes))), interrupt, fork, little_memory,
    ]  # fmt: skip
    figures: dict[str, Any] = {"minutes": minutes}
    failed = []
    for attempt in tried:
        try:
            figures |= attempt()
        except AssertionError as error:
            failed.append(str(error))
    print(json.dumps(figures | {"failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--under-limit", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.under_limit:
        under_limit()
    else:
        sys.exit(main(given.minutes))
