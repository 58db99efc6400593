"""Callables that are no modules, and wrappers around modules: captured, guarded, and the same numbers as autograd."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.util.callables import FixedArguments, is_same, model_of, modules_behind, name_of, unwrap
from gradkern.util.options import GradkernWarning

pytestmark = [
    pytest.mark.real_export,
    pytest.mark.filterwarnings("error::gradkern.GradkernWarning"),  # nothing stays on autograd unseen
]


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def encode(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.first(x).relu() * scale

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.encode(x, scale))


class Holder:
    """A callable object that takes weak references and is equal to all others."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.factor = model, 2.0

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor

    def half(self, x: Tensor) -> Tensor:
        return self.model(x) / self.factor


def coder() -> tuple[Coder, Tensor]:
    torch.manual_seed(0)
    return Coder().double().eval(), torch.randn(5, 4, dtype=torch.float64)


_model, _ = coder()


def of_global(x: Tensor) -> Tensor:
    return _model(x).tanh()


CALLABLES = {
    "function over a global": lambda m: of_global,
    "lambda over a closure": lambda m: lambda x: m(x)[:, :2] * 2,
    "partial of a module": lambda m: functools.partial(m, scale=3.0),
    "partial of a method": lambda m: functools.partial(m.encode, scale=3.0),
    "method": lambda m: m.encode,
    "forward": lambda m: m.forward,
    "object": Holder,
    "method of an object": lambda m: Holder(m).half,
    "builtin": lambda m: torch.tanh,
    "compiled module": lambda m: torch.compile(m, backend="eager"),
    "compiled method": lambda m: torch.compile(m.encode, backend="eager"),
    "compiled function": lambda m: torch.compile(lambda x: m(x) * 2, backend="eager"),
    "method of a compiled module": lambda m: torch.compile(m, backend="eager").encode,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_every_callable_is_captured(name: str) -> None:
    model, x = coder()
    fn = CALLABLES[name](model)
    want = gradkern.jacobian(fn, x, engine="autograd")
    torch.testing.assert_close(gradkern.jacobian(fn, x, engine="kernel"), want, rtol=1e-10, atol=1e-12)
    assert gradkern.prepare(fn, x).program is not None


def test_a_method_and_a_partial_share_what_is_known_of_their_module() -> None:
    model, x = coder()
    programs = [gradkern.prepare(functools.partial(model, scale=3.0), x).program for _ in range(2)]
    assert programs[0] is programs[1]
    assert gradkern.prepare(model.encode, x).program is gradkern.prepare(model.encode, x).program
    assert gradkern.prepare(model.forward, x).program is gradkern.prepare(model, x).program
    assert gradkern.prepare(nn.DataParallel(model), x).program is gradkern.prepare(model, x).program
    assert gradkern.prepare(model.encode, x).program is not gradkern.prepare(model, x).program
    assert "first" in str(gradkern.prepare(model.encode, x))
    assert "__self__" not in str(gradkern.prepare(functools.partial(model.encode, scale=2.0), x))


def test_what_a_callable_reads_is_guarded() -> None:
    model, x = coder()
    factor = 2.0

    def scaled(x: Tensor) -> Tensor:
        return model(x) * factor

    held = Holder(model)
    first = gradkern.jacobian(scaled, x, engine="kernel")
    for k in range(2, 4):
        factor, held.factor = float(k), float(k)
        with torch.no_grad():
            model.first.weight.mul_(1.5)
        for fn in (scaled, held, held.half, functools.partial(model, scale=float(k))):
            got, want = (gradkern.jacobian(fn, x, engine=e) for e in ("kernel", "autograd"))
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(first, gradkern.jacobian(scaled, x, engine="kernel"))


def test_a_lambda_made_anew_stays_on_autograd_while_a_capture_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradkern.frontend.capture import GraphCache

    captured: list[object] = []
    monkeypatch.setattr(GraphCache, "capture", lambda *a: captured.append(a))
    model, x = coder()
    for _ in range(20):
        gradkern.jacobian(lambda t: model(t), x, engine="auto")
    assert not captured


def test_what_is_known_goes_with_the_callable() -> None:
    model, x = coder()

    def make() -> weakref.ref[object]:
        def fn(t: Tensor) -> Tensor:
            return model(t) * 2

        gradkern.jacobian(fn, x, engine="kernel")
        gradkern.jacobian(fn, x, engine="kernel")
        return weakref.ref(fn)

    gone = make()
    gc.collect()
    assert gone() is None


def test_a_hook_behind_a_function_is_seen() -> None:
    model, x = coder()

    def fn(t: Tensor) -> Tensor:
        return model(t)

    gradkern.jacobian(fn, x, engine="kernel")
    handle = model.first.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    with pytest.warns(GradkernWarning, match="backward"):
        got = gradkern.jacobian(fn, x, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(fn, x, engine="autograd"))
    handle.remove()
    assert gradkern.prepare(fn, x).program is not None  # the refusal was of the model with its hook


def test_a_refusal_of_a_function_is_looked_at_again_when_its_model_changes_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def fn(t: Tensor) -> Tensor:
        return model(t)

    with pytest.warns(GradkernWarning, match="random"):
        assert gradkern.prepare(fn, x).program is None
    model.eval()
    assert gradkern.prepare(fn, x).program is not None


def test_buffers_behind_a_function_are_left_as_they_were_by_a_refused_capture() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    before = model[1].running_mean.clone()
    with pytest.warns(GradkernWarning, match="changes the buffer"):
        assert gradkern.prepare(lambda x: model(x), torch.randn(5, 4, dtype=torch.float64)).program is None
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 0


def test_compiled_and_parallel_wrappers_are_unwrapped() -> None:
    model, _ = coder()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is unwrap(nn.DataParallel(compiled)) is unwrap(compiled.forward) is model
    hooked = nn.DataParallel(model)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    assert unwrap(hooked) is hooked
    compiled_function = torch.compile(of_global, backend="eager")
    assert unwrap(compiled_function) is of_global

    @functools.wraps(compiled_function)
    def doubled(x: Tensor) -> Tensor:
        return compiled_function(x) * 2

    assert unwrap(doubled) is doubled


def test_one_process_of_distributed_training(tmp_path) -> None:  # type: ignore[no-untyped-def]
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, x = coder()
        parallel = nn.parallel.DistributedDataParallel(model)
        assert unwrap(parallel) is model
        got = gradkern.jacobian(parallel, x, engine="kernel")
        torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"), rtol=1e-10, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_behind_a_callable() -> None:
    model, _ = coder()
    fixed = FixedArguments(model, {0: 2, 2: "text"})
    assert model_of(fixed) is model_of(functools.partial(model.encode)) is model
    assert model_of(of_global) is None
    assert modules_behind(of_global) == (_model,)
    assert modules_behind(lambda x: model(x)) == modules_behind(Holder(model)) == (model,)
    assert name_of(fixed) == "Coder"
    assert name_of(of_global) == "of_global"
    assert is_same(fixed, FixedArguments(model, dict(fixed.given)))
    assert not is_same(fixed, FixedArguments(model, {0: 2, 2: "other"}))
    assert is_same(model.encode, model.encode)
    assert FixedArguments(lambda *a: a, {0: "a", 2: "c"})("b", "d") == ("a", "b", "c", "d")
