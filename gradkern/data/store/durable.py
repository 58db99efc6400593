"""A zarr store whose writes survive a kill and a power failure: each is complete and on disk, or absent.

Every key is written to a temporary file next to its destination, forced to disk, and renamed; then the folder is forced
to disk.  A reader, and a run after a kill, see either the old content or the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, cpu
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from ...util.options import BadValue
from ...util.untrusted import local_path

PARTIAL = ".partial"
BLOCK = 4096  # bytes: alignment of direct writes
DIRECT = 1 << 20  # direct writes pay from this many bytes on


class Damaged(BadValue):
    """Some content of the store is not what was written."""


def write_file(path: Path, content: Any) -> None:
    """Write ``content`` (bytes-like) to ``path``: atomically and durably."""
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        number = _open(partial, content)
        try:
            view = memoryview(content).cast("B")
            done = 0
            while done < len(view):
                if len(view) - done < BLOCK and os.name == "posix":
                    _through_cache(number)  # what is left is less than a block, which direct writes do not take
                size = (len(view) - done) // BLOCK * BLOCK or len(view) - done
                done += os.write(number, view[done : done + size])
            os.fsync(number)
        finally:
            os.close(number)
        clear(path)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def clear(path: Path) -> None:
    """Remove an empty folder at the path of a file.  Raises `Damaged` if the folder is not empty."""
    if path.is_dir():
        try:
            path.rmdir()
        except OSError as error:
            raise Damaged(
                f"{path} is a folder with something in it, expected a file of the store. Move it away, then run the "
                "same again."
            ) from error


def _open(path: Path, content: Any) -> int:
    """Open for writing; large content on whole pages goes to the disk without a copy in the page cache.

    That copy costs a third of the engine's own time if maps are written as fast as they are computed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        array = np.frombuffer(content, dtype=np.uint8)
        if array.nbytes >= DIRECT and array.ctypes.data % BLOCK == 0:
            try:
                return os.open(path, flags | direct, 0o666)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                path.unlink(missing_ok=True)  # this file system has no direct writes
    return os.open(path, flags, 0o666)


def _through_cache(number: int) -> None:
    """Return to ordinary writing, for a part that does not fill a block."""
    import fcntl

    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    if flags & direct:
        fcntl.fcntl(number, fcntl.F_SETFL, flags & ~direct)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, if the system can."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class DurableStore(LocalStore):
    """`zarr.storage.LocalStore` with `write_file` for its writes."""

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        if not self._is_open:
            await self._open()
        self._check_writable()
        path = self.root / key
        if exclusive and path.exists():
            raise FileExistsError(path)
        await asyncio.to_thread(write_file, path, value.as_buffer_like())

    def set_sync(self, key: str, value: Buffer) -> None:
        self._ensure_open_sync()
        self._check_writable()
        write_file(self.root / key, value.as_buffer_like())

    def sizes(self, prefix: str) -> dict[str, int]:
        """The sizes in bytes of the files directly under ``prefix``."""
        found = {}
        with contextlib.suppress(OSError), os.scandir(self.root / prefix) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another run may have renamed its half-written file meanwhile
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def remove_partial(self, prefix: str, ours: Callable[[str], bool]) -> None:
        """Remove half-written files under ``prefix`` for which ``ours(name of the final file)`` is true."""
        for path in (self.root / prefix).glob(f"*{PARTIAL}"):
            if ours(path.name.removesuffix(PARTIAL).rpartition(".")[0]):
                path.unlink(missing_ok=True)


def store_at(place: str, *, read_only: bool = False) -> Store:
    """A local folder, or any address that fsspec knows (object stores write whole objects by themselves)."""
    path = local_path(place)
    if path is None:
        return FsspecStore.from_url(place, read_only=read_only)
    return DurableStore(path, read_only=read_only)


# ---------------------------------------------------------------------------------------------------------------
# Single keys, from ordinary code


def put(store: Store, key: str, content: bytes | memoryview) -> None:
    sync(store.set(key, cpu.Buffer.from_array_like(np.frombuffer(content, np.uint8))))


def put_array(store: Store, key: str, array: np.ndarray) -> None:
    """The bytes of a contiguous array, without a copy."""
    flat = array.reshape(-1).view(np.uint8)
    sync(store.set(key, cpu.Buffer.from_array_like(flat)))


def get(store: Store, key: str) -> bytes | None:
    buffer = sync(store.get(key, prototype=cpu.buffer_prototype))
    return None if buffer is None else buffer.to_bytes()


def size(store: Store, key: str) -> int:
    """Bytes of a key; -1 if it is not there."""
    try:
        return sync(store.getsize(key))
    except FileNotFoundError:
        return -1


def delete(store: Store, key: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        sync(store.delete(key))


def exists(store: Store, key: str) -> bool:
    return sync(store.exists(key))


def names(store: Store, prefix: str) -> list[str]:
    """The keys directly under a prefix, without it."""

    async def listed() -> list[str]:
        return [name async for name in store.list_dir(prefix)]

    try:
        return sorted(name for name in sync(listed()) if not name.endswith(PARTIAL))
    except FileNotFoundError:
        return []
