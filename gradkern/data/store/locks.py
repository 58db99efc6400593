"""Locks on ranges of chunks: one run at a time computes a chunk, and a dead run's lock is free.

These are the system's locks on ranges of a file, where byte i stands for chunk i, and they end with the process that
holds them.  They do not exclude other threads of that process; a table does that.  There are none in object stores and
on systems without such locks, where runs must not overlap.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from zarr.abc.store import Store

from ...util.options import BadValue
from .durable import DurableStore, clear

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE, HOLDERS = "chunks/lock", "chunks/holders"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Busy(BadValue):
    """Another run is computing some of the same chunks."""


class _Held:
    """The locks that this process holds on one store.  The file stays open, as closing it would free all of them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        clear(path)
        self.number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.ranges: list[range] = []


_table: dict[Path, _Held] = {}
_guard = threading.Lock()


def _forget() -> None:
    """A forked process holds none of its parent's locks."""
    global _guard
    _guard = threading.Lock()
    for held in _table.values():
        os.close(held.number)
    _table.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def hold(store: Store, chunks: range) -> Iterator[None]:
    """Hold these (consecutive) chunks.  Raises `Busy`, which names the holder, if another run holds some of them."""
    if fcntl is None or not isinstance(store, DurableStore) or not chunks:
        yield
        return
    root = Path(store.root).resolve()
    _take(root, chunks)
    holder = root / HOLDERS / f"{chunks[0]}-{chunks[-1]}.json"
    try:
        with contextlib.suppress(OSError):  # the file only serves to name the holder
            _name_holder(holder, chunks)
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        _give(root, chunks)


@contextlib.contextmanager
def completing(store: Store, chunks: int) -> Iterator[None]:
    """Wait until no other run completes the store, which has ``chunks`` chunks, then hold the lock for completing."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(store, range(chunks, chunks + 1)))
                break
            except Busy:
                time.sleep(0.05)
        yield


def _take(root: Path, chunks: range) -> None:
    with _guard:
        held = _table.get(root) or _Held(root / FILE)
        try:
            if any(chunks[0] <= r[-1] and r[0] <= chunks[-1] for r in held.ranges):
                raise Busy(_words(root, chunks))
            try:
                fcntl.lockf(held.number, fcntl.LOCK_EX | fcntl.LOCK_NB, len(chunks), chunks[0])
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise Busy(_words(root, chunks)) from None
                if error.errno not in NO_LOCKS:
                    raise
        except BaseException:
            if not held.ranges:
                os.close(held.number)
            raise
        held.ranges.append(chunks)
        _table[root] = held


def _give(root: Path, chunks: range) -> None:
    with _guard:
        held = _table.get(root)
        if held is None or chunks not in held.ranges:  # this is a fork of the process that holds it
            return
        held.ranges.remove(chunks)
        with contextlib.suppress(OSError):
            fcntl.lockf(held.number, fcntl.LOCK_UN, len(chunks), chunks[0])
        if not held.ranges:
            os.close(held.number)
            del _table[root]


# ---------------------------------------------------------------------------------------------------------------
# Names of the holders


def _name_holder(path: Path, chunks: range) -> None:
    path.parent.mkdir(exist_ok=True)
    for other, _ in _holders(path.parent.parent.parent, chunks):  # left by dead processes, as we hold the chunks now
        other.unlink(missing_ok=True)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}))


def _holders(root: Path, chunks: range) -> list[tuple[Path, dict[str, object]]]:
    """The holders of chunks in this range, as they recorded themselves."""
    held = []
    for path in sorted((root / HOLDERS).glob("*-*.json")):
        try:
            first, last = map(int, path.stem.split("-"))
            about = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if first <= chunks[-1] and chunks[0] <= last and isinstance(about, dict):
            held.append((path, about | {"chunks": f"{first} … {last}"}))
    return held


def _alive(about: dict[str, object]) -> bool:
    """False if the holder's process is known to be gone."""
    if about.get("host") != socket.gethostname() or not isinstance(about.get("process"), int):
        return True
    try:
        os.kill(int(str(about["process"])), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _words(root: Path, chunks: range) -> str:
    holders = [
        f"process {about.get('process')} on {about.get('host')} (since {about.get('since')}, chunks {about['chunks']})"
        for _, about in _holders(root, chunks)
        if _alive(about)
    ]
    return (
        f"{root}: {' and '.join(holders) or 'another run'} is computing the chunks {chunks[0]} … {chunks[-1]}, and "
        "nothing was changed. Wait until it has finished, or give each run its own shard (shard=)."
    )
