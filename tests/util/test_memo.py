"""`Memo` and `WeakMemo`: what is kept, what is dropped first, threads, and objects that are gone."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gradkern.util.memo import Memo, WeakMemo, on_reset, reset


class Owner:
    """Any two are equal, so only identity tells them apart."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_value_is_made_once_and_the_least_recently_used_one_is_dropped() -> None:
    memo, made = Memo[str](2), []

    def get(key: str) -> str:
        return memo.get_or_make(key, lambda: made.append(key) or key.upper())

    assert [get(k) for k in "abaca"] == ["A", "B", "A", "C", "A"]  # "c" drops "b"
    assert made == ["a", "b", "c"]
    assert memo.get("b") is None
    assert memo.values() == ["C", "A"]
    assert get("b") == "B"
    assert made == ["a", "b", "c", "b"]
    assert len(memo) == 2


def test_a_new_value_takes_the_place_of_an_earlier_one() -> None:
    memo = Memo[int](2)
    memo.put("a", 1)
    assert memo.get_or_make("a", lambda: 9) == 1
    memo.put("a", 2)
    assert memo.get_or_make("a", lambda: 9) == memo.get("a") == 2
    memo.clear()
    assert memo.get("a") is None
    assert memo.get_or_make("a", lambda: 3) == 3


def test_what_fails_to_be_made_is_not_kept() -> None:
    memo = Memo[int](2)
    with pytest.raises(ZeroDivisionError):
        memo.get_or_make("a", lambda: 1 // 0)
    assert memo.get_or_make("a", lambda: 4) == 4


def test_making_a_value_may_use_the_same_table() -> None:
    memo = Memo[int](2)
    assert memo.get_or_make("a", lambda: 1 + memo.get_or_make("b", lambda: 2)) == 3
    assert memo.values() == [2, 3]


def test_threads_that_make_the_same_value_get_one() -> None:
    memo, both = Memo[object](4), threading.Barrier(2, timeout=60)

    def make() -> object:
        both.wait()  # neither is done before the other has begun
        return object()

    with ThreadPoolExecutor(2) as pool:
        first, second = [work.result() for work in [pool.submit(memo.get_or_make, "a", make) for _ in range(2)]]
    assert first is second is memo.get("a")


def test_a_value_lives_as_long_as_its_owner() -> None:
    memo, one, other = WeakMemo[list](list), Owner(), Owner()
    memo.of(one).append(1)
    assert (memo.of(one), memo.get(other)) == ([1], None)
    assert memo.of(other) == []
    assert one in memo and other in memo
    del one
    gc.collect()
    assert len(memo) == 1
    memo.forget(other)
    assert other not in memo
    assert memo.of(other) == []


def test_an_object_at_the_address_of_one_that_is_gone_has_no_value() -> None:
    memo = WeakMemo[list](list)
    for number in range(100):  # they are likely to share an address
        owner = Owner()
        assert memo.get(owner) is None
        memo.of(owner).append(number)
        del owner


def test_threads_get_one_value_of_an_owner() -> None:
    made, owner = [], Owner()
    memo = WeakMemo[list](lambda: made.append(1) or [])
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: memo.of(owner), range(200)))
    assert all(value is values[0] for value in values)
    assert len(made) == 1


def test_reset_forgets_all() -> None:
    memo, weak, owner, told = Memo[int](2), WeakMemo[list](list), Owner(), []
    on_reset(lambda: told.append(True))
    memo.put("a", 1)
    weak.of(owner).append(1)
    reset()
    assert memo.get("a") is None
    assert memo.get_or_make("a", lambda: 2) == 2
    assert weak.of(owner) == []
    assert told
