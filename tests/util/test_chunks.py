"""Samples per chunk: the memory budget of the device, the caches of a CPU, and even pieces."""

import pytest
import torch

import gradkern
from gradkern.util.chunks import samples_per_chunk, spans, stepwise_bytes, stepwise_samples

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("device", "peak", "cached", "options", "samples"),
    [
        (CPU, 2 * MIB, 0, {}, 256),  # the default budget of 512 MiB
        (CPU, MIB, MIB // 2, {}, 48),  # 24 MiB of caches
        (CPU, MIB, MIB, {}, 32),  # but not a few samples
        (CPU, 32 * MIB, MIB, {}, 16),  # the budget where that is less
        (CPU, 2 * MIB, 12 * MIB, {"least": 7}, 7),
        (CPU, 128 * MIB, 12 * MIB, {"least": 7}, 4),  # memory comes first
        (CPU, 2 * MIB, 0, {"fixed": 484 * MIB}, 14),
        (CPU, 2 * MIB, 0, {"fixed": 600 * MIB}, 1),
        (CPU, 999 * MIB, MIB, {}, 1),
        (CPU, 0, 0, {}, 512 * MIB),  # nothing but the result
        (GPU, 2 * MIB, MIB, {}, 5 << 10),  # 10 of 160 GiB, and no caches
        (GPU, 2 * MIB, 12 * MIB, {"least": 7}, 5 << 10),
    ],
)
def test_samples_per_chunk(monkeypatch, device, peak, cached, options, samples):
    known = type("Properties", (), {"total_memory": 160 << 30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert samples_per_chunk(device, peak, cached, **options) == samples


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_callers_budget_holds_on_every_device(device):
    with gradkern.use(memory_budget=12 * MIB):
        assert samples_per_chunk(device, 3 * MIB, MIB) == 4
        assert stepwise_samples(device, MIB) == 4  # three times the estimate is planned for


def test_memory_of_a_program_that_runs_step_by_step():
    assert stepwise_bytes([(2, 3), (10,)], 5, 4) == 4 * (6 + 10 + 3 * 5 * 10)
    assert stepwise_samples(CPU, MIB // 2) == 48
    assert stepwise_samples(CPU, 48 * MIB) == 3


def test_pieces_of_a_batch_differ_by_at_most_one_sample():
    assert list(spans(0, 10, 4)) == [(0, 3), (3, 6), (6, 10)]
    assert list(spans(5, 10, 4)) == [(5, 7), (7, 10)]
    assert list(spans(3, 3, 4)) == []
