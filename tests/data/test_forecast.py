"""The memory that `gradkern.data.plan` forecasts is what a run then takes, within a factor of two."""

from __future__ import annotations

import sys

import pytest

from gradkern.util.memory import Growth
from tests.support.run_memory import measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


def test_growth_is_that_of_the_peak():
    with Growth() as growth:
        _ = bytearray(b"1") * (100 << 20)
        del _
    assert growth.peak is not None
    assert growth.kept is not None
    assert growth.peak > 90 << 20 > 2 * growth.kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "mode", "engine"),
    [
        ("cnn1d", "both", "kernel"),
        ("wide", "importance", "kernel"),
        ("branched", "statistics", "kernel"),
        ("lstm", "run", "autograd"),
    ],
)
def test_memory_of_runs(net, mode, engine):
    seen, forecast, said = measure(net, mode, engine)
    assert seen > 64 << 20  # below that, what the allocator keeps decides
    assert seen / 2 <= forecast <= 2 * seen, f"{seen >> 20} MiB were seen: {said}"
