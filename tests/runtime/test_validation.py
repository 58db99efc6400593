"""Kernels run on a GPU without being asked for only where these very kernels have been validated."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import gradkern
from gradkern.codegen.machine import Device, NoKernels
from gradkern.ir.program import Windows
from gradkern.planner.plan import plan
from gradkern.runtime import call_plan, executor, ops, reference, validation
from gradkern.runtime.parameters import PlanWeights
from gradkern.util import rounding
from tests.cases import CASES
from tests.support import capturing
from tests.support.case_runs import program_of

pytestmark = pytest.mark.usefixtures("fresh")
HOPPER, BLACKWELL = Device("cuda", 16), Device("cuda", 16, capability=100)
TABLE = {"sm_90": {"fingerprint": "abc", "gpu": "NVIDIA H200", "torch": "2.11.0", "date": "2026-11-27"}}


@pytest.mark.parametrize(
    ("device", "fingerprint", "choice", "reason"),
    [
        (HOPPER, "abc", None, None),
        (HOPPER, "abd", None, "have changed since they were validated on sm_90"),
        (BLACKWELL, "abc", None, "have not been validated on sm_100"),
        (BLACKWELL, "abc", True, None),
        (HOPPER, "abc", False, "GRADKERN_CUDA=0"),
    ],
)
def test_refusal_of_a_gpu_by_validation_table_and_choice(
    device: Device, fingerprint: str, choice: bool | None, reason: str | None
) -> None:
    got = validation.refusal(device, fingerprint, TABLE, choice)
    assert got is None if reason is None else reason in got


def test_engine_and_environment_choose_whether_cuda_kernels_run(monkeypatch) -> None:
    monkeypatch.delenv("GRADKERN_CUDA", raising=False)
    monkeypatch.delenv("GRADKERN_ENGINE", raising=False)
    assert validation.chosen() is None
    with gradkern.use("kernel"):
        assert validation.chosen() is True
        monkeypatch.setenv("GRADKERN_CUDA", "0")
        assert validation.chosen() is False
    monkeypatch.setenv("GRADKERN_CUDA", "1")
    assert validation.chosen() is True
    monkeypatch.setenv("GRADKERN_CUDA", "yes")
    with pytest.raises(ValueError, match="GRADKERN_CUDA: got 'yes', expected 1 or 0"):
        validation.chosen()


def test_refusal_of_an_unvalidated_gpu_warns_once(monkeypatch) -> None:
    monkeypatch.delenv("GRADKERN_CUDA", raising=False)
    with mock.patch.object(validation, "table", lambda: {}):
        with pytest.warns(
            gradkern.GradkernWarning, match='validated on sm_100.*engine="kernel" or set GRADKERN_CUDA=1'
        ):
            found = validation.permitted(BLACKWELL, "abc")
        assert not found and "sm_100" in found.reason
        assert not validation.permitted(BLACKWELL, "abc")  # no second warning, which would be an error
        with gradkern.use("kernel"):
            assert validation.permitted(BLACKWELL, "abc") is BLACKWELL


def test_calls_on_a_gpu_that_is_not_validated(monkeypatch) -> None:
    """The engine "auto" plans no kernel there, and `explain` says why; the engine "kernel" does."""
    monkeypatch.delenv("GRADKERN_CUDA", raising=False)
    program = program_of("maxpool1d")
    gpu = torch.device("cuda", 0)
    there = mock.patch.object(ops, "_machine", lambda _: BLACKWELL)
    with there, mock.patch.object(validation, "table", lambda: {}), mock.patch.object(ops, "cuda_fingerprint", str):
        with pytest.warns(gradkern.GradkernWarning, match="folded into the batch"):
            folded = executor.plan_for(program, 3, device=gpu)
        with gradkern.use("kernel"):
            chosen = executor.plan_for(program, 3, device=gpu)
    assert not folded.native and folded.fused_share == 1.0
    assert "aten, seeds folded" in str(folded) and "not been validated on sm_100" in str(folded)
    assert chosen.native


def test_a_gpu_without_machine_code() -> None:
    def describe(number: int) -> list[int]:
        raise RuntimeError("gradkern: the kernels cannot be loaded on GPU 0: no kernel image is available\nmore")

    there = SimpleNamespace(has_cuda=lambda: True, describe_device=describe)
    with mock.patch.object(ops, "extension", lambda: there):
        found = ops._machine.__wrapped__(torch.device("cuda", 0))
    assert found == NoKernels("gradkern: the kernels cannot be loaded on GPU 0: no kernel image is available")


def test_the_committed_table_is_well_formed() -> None:
    for architecture, entry in json.loads(validation.TABLE.read_text()).items():
        assert architecture.startswith("sm_") and {"fingerprint", "gpu", "torch", "date"} <= set(entry)


@pytest.mark.parametrize("name", ["cnn1d", "lenet5", "residual", "attention", "conv2d_uneven"])
def test_a_plan_without_kernels_gives_the_references_numbers(name: str) -> None:
    """What a GPU that is not validated runs, here on the CPU: the same code, bit for bit the reference engine's."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(3)
    program = program_of(name)
    folded = call_plan.CallPlan(plan(program, program.outputs, machine=NoKernels("tested")), (0,))
    with torch.no_grad():
        params = capturing.bind(program, model)
        want_y, want = reference.jacobian(program, params, inputs, wrt=(0,))
        out = [torch.empty_like(w) for w in want]
        y = executor._fill(folded, PlanWeights(folded.plan, params, inputs[0]), inputs, _all(program), out)
    assert torch.equal(y, want_y) and torch.equal(out[0], want[0])


def _all(program) -> torch.Tensor:
    return torch.arange(program.outputs)


def test_parameters_on_another_device_are_hashed_too() -> None:
    """A scalar on the CPU beside weights on a GPU: a change of it packs them anew."""
    ops.extension()  # registers the hash
    real, names = ops.content_hash, ("weight", "scale")
    fake = SimpleNamespace(packed_names=names, live_names=names)
    like = torch.empty(1, device="meta")

    def hashed(tensors):
        assert len({t.device for t in tensors}) == 1
        return 17 if tensors[0].is_meta else real(tensors)

    def content(scale: float) -> int | None:
        given = {"weight": torch.empty(3, device="meta"), "scale": torch.tensor(scale)}
        return PlanWeights(fake, given, like).content

    with mock.patch.object(ops, "content_hash", hashed):
        first = content(2.0)
        assert content(2.0) == first
        assert content(3.0) != first


@pytest.mark.parametrize("name", ["lenet5", "conv2d_uneven", "maxpool2d", "residual"])
def test_convolutions_channels_last(name: str) -> None:
    """As on a GPU's tensor cores: the layout changes no result."""
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(3, dtype=torch.float64)
    program = program_of(name)
    with torch.no_grad():
        params = capturing.bind(program, model)
        want_y, want = reference.jacobian(program, params, inputs)
        seen = []

        def channels_last(w, x) -> bool:
            seen.append(len(w.kernel) == 2 and w.groups == 1)
            return seen[-1]

        with mock.patch.object(reference, "channels_last", channels_last):
            y, got = reference.jacobian(program, params, inputs)
    assert any(seen) == (name != "residual")  # whose convolutions have one axis
    assert rounding.close_samples(y, want_y, 1e-12)
    for g, w in zip(got, want, strict=True):
        assert rounding.close_samples(g, w, 1e-12)


@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, True), (torch.float32, False), (torch.float16, False)])
def test_channels_last_follows_torchs_setting(dtype: torch.dtype, tf32: bool) -> None:
    windows = next(s.form.map for s in program_of("lenet5").steps if isinstance(getattr(s.form, "map", None), Windows))
    there = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    with mock.patch.object(ops, "convolutions_in_tf32", lambda: tf32):
        assert reference.channels_last(windows, there) == (tf32 or dtype == torch.float16)
    assert not reference.channels_last(windows, SimpleNamespace(device=torch.device("cpu"), dtype=dtype))
