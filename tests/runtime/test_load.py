"""Short forms of `make load`."""

from __future__ import annotations

import pytest

from tests.support import load


@pytest.mark.slow
def test_threads_share_models():
    load.threads(1.0, 1)
    load.threads(1.0, 3)


@pytest.mark.slow
def test_memory_stays_flat():
    load.memory_of_calls(200)
    load.memory_of_models(8)


@pytest.mark.slow
def test_an_interrupt_leaves_everything_usable():
    load.interrupt()


@pytest.mark.slow
def test_a_forked_child_computes_the_same():
    load.fork()


@pytest.mark.slow
def test_out_of_memory_is_an_error_with_a_forecast():
    load.little_memory()
