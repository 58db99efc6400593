"""A cache of results that can be recomputed: bounded, thread-safe, and dropping the least recently used first."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V")

_ABSENT: Any = object()
_memos: weakref.WeakSet[Memo[Any]] = weakref.WeakSet()
_on_reset: list[Callable[[], None]] = []


class Memo(Generic[V]):
    """At most ``most`` values by key.

    A value is made outside the lock, so that making it may use the same table.  If two threads make the same value,
    the first to finish wins, and both get its value.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.RLock()  # an RLock: a weak reference's callback may come while this thread holds it
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._latest: tuple[Hashable, V] | None = None  # the last in the order, for which no lock is needed
        _memos.add(self)

    def put(self, key: Hashable, value: V) -> None:
        """Keep ``value``, in place of an earlier one."""
        with self._lock:
            self._values[key] = value
            self._used(key, value)

    def get_or_make(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of ``key``; ``make`` is called if there is none."""
        latest = self._latest
        if latest is not None and latest[0] == key:
            return latest[1]
        with self._lock:
            value = self._values.get(key, _ABSENT)
            if value is not _ABSENT:
                self._used(key, value)
                return value
        fresh = make()
        with self._lock:
            value = self._values.setdefault(key, fresh)
            self._used(key, value)
        return value

    def get(self, key: Hashable) -> V | None:
        """The value of ``key``; None if there is none."""
        with self._lock:
            return self._values.get(key)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._latest = None

    def values(self) -> list[V]:
        """All values, the least recently used one first."""
        with self._lock:
            return list(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def _used(self, key: Hashable, value: V) -> None:
        self._values.move_to_end(key)
        self._latest = key, value
        while len(self._values) > self.most:
            self._values.popitem(last=False)


class WeakMemo(Generic[V]):
    """One value per living object, forgotten with the object.

    Objects are compared by identity, so any definition of ``==`` works.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._values: dict[int, tuple[weakref.ref[Any], V]] = {}
        _on_reset.append(self._values.clear)

    def of(self, owner: object) -> V:
        """The owner's value, made at its first use."""
        number = id(owner)
        entry = self._values.get(number)
        if entry is not None and entry[0]() is owner:
            return entry[1]
        with self._lock:
            entry = self._values.get(number)
            if entry is not None and entry[0]() is owner:
                return entry[1]
            value = self._make()
            self._values[number] = (weakref.ref(owner, lambda gone: self._forget(number, gone)), value)
            return value

    def get(self, owner: object) -> V | None:
        """The owner's value; None if there is none."""
        entry = self._values.get(id(owner))
        return entry[1] if entry is not None and entry[0]() is owner else None

    def forget(self, owner: object) -> None:
        with self._lock:
            self._values.pop(id(owner), None)

    def __contains__(self, owner: object) -> bool:
        return self.get(owner) is not None

    def __len__(self) -> int:
        return len(self._values)

    def _forget(self, number: int, gone: weakref.ref[Any]) -> None:
        # No lock: a garbage collection may come while this thread holds it, and popping is atomic.
        entry = self._values.get(number)
        if entry is not None and entry[0] is gone:
            self._values.pop(number, None)


def on_reset(forget: Callable[[], None]) -> Callable[[], None]:
    """Call ``forget`` at every `reset`, for state kept elsewhere than in a `Memo`.  Usable as a decorator."""
    _on_reset.append(forget)
    return forget


def reset() -> None:
    """Forget everything that was learned: Programs, plans, packed weights, measurements, and warnings given.

    Results stay the same; the next call of every model pays for its capture again.
    """
    for memo in list(_memos):
        memo.clear()
    for forget in _on_reset:
        forget()
