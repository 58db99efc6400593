"""A public call asks for the reasons for autograd once, and checks the guards of captured graphs once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradkern
from gradkern import attr
from gradkern.dispatch import guards
from gradkern.dispatch.autograd_call import output_shape, whole_batch_reason
from gradkern.dispatch.request import Request
from gradkern.dispatch.route import decide, one_call, shared_route
from gradkern.dispatch.solve import solve
from gradkern.dispatch.targets import jacobian_choice
from tests.cases import net

pytestmark = pytest.mark.real_export


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often reasons for autograd are asked for and the guards of graphs are checked, counted from here on."""
    counts = {"call_reason": 0, "matching": 0}

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            counts[name] += 1
            return real(*args)

        return call

    for name in counts:
        monkeypatch.setattr(guards, name, counted(name, getattr(guards, name)))
    return counts


CALLS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "jacobian": lambda model, x: gradkern.jacobian(model, x),
    "jacobian, traced now": lambda model, x: gradkern.jacobian(model, x, engine="kernel"),
    "jacobian, autograd": lambda model, x: gradkern.jacobian(model, x, engine="autograd"),
    "TopK": lambda model, x: gradkern.jacobian(model, x, gradkern.TopK(2)),
    "prepare": lambda model, x: gradkern.prepare(model, x),
    "explain": lambda model, x: gradkern.explain(model, x, show=False),
    "Saliency.attribute": lambda model, x: attr.Saliency(model).attribute(x, target=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_decides_once(name: str, asked: dict[str, int]) -> None:
    model, (x,) = net(n=30)
    with gradkern.use(memory_budget=50_000):  # in several chunks
        CALLS[name](model, x)
        assert asked == {"call_reason": 1, "matching": 0}  # there are no guards before the first capture
        gradkern.prepare(model, x)
        asked.update(call_reason=0, matching=0)
        CALLS[name](model, x)
    repeated = name == "jacobian, traced now"  # the first call has already run on the kernel
    assert asked == {"call_reason": not repeated, "matching": name != "jacobian, autograd"}


PATHS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "IntegratedGradients.attribute": lambda m, x: attr.IntegratedGradients(m).attribute(x, target=1, n_steps=50),
    "IntegratedGradients.attribute_all": lambda m, x: attr.IntegratedGradients(m).attribute_all(x, n_steps=50),
    "GradientShap.attribute_all": lambda m, x: attr.GradientShap(m).attribute_all(x, baselines=x[:3]),
    "NoiseTunnel(Saliency).attribute": lambda m, x: attr.NoiseTunnel(attr.Saliency(m)).attribute(x, target=1),
    "NoiseTunnel(IntegratedGradients).attribute": lambda m, x: attr.NoiseTunnel(attr.IntegratedGradients(m)).attribute(
        x, target=1, n_steps=20
    ),
    "NoiseTunnel(Saliency).attribute_all": lambda m, x: attr.NoiseTunnel(attr.Saliency(m)).attribute_all(x),
    "NoiseTunnel(IntegratedGradients).attribute_all": lambda m, x: attr.NoiseTunnel(
        attr.IntegratedGradients(m)
    ).attribute_all(x, n_steps=20),
    "DeepLiftShap.attribute_all": lambda m, x: attr.DeepLiftShap(m).attribute_all(x, baselines=x[:3]),
}


@pytest.mark.parametrize("engine", ["auto", "kernel"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_of_many_blocks_decides_once(name: str, engine: str, asked: dict[str, int]) -> None:
    model, (x,) = net(n=40, dtype=torch.float32)
    gradkern.prepare(model, x)
    asked.update(call_reason=0, matching=0)
    with gradkern.use(engine, memory_budget=20_000):
        PATHS[name](model, x)
    assert asked == {"call_reason": 1, "matching": 1}


def request_of(model: Callable[..., torch.Tensor], x: torch.Tensor) -> Request:
    return Request(model, (x,), (0,), jacobian_choice(None))


def test_a_route_sees_a_program_that_is_traced_after_it_was_made() -> None:
    model, (x,) = net()
    request = request_of(model, x)
    route = decide(request, "kernel")
    assert route.program is None
    shape = output_shape(request, route)
    want = solve(request, decide(request, "autograd")).shaped
    torch.testing.assert_close(solve(request, route).shaped, want)
    assert route.program is not None
    assert route.program.output_shape == shape
    assert whole_batch_reason(request, route) == ""


def test_parts_of_one_call_share_a_route_where_it_fits() -> None:
    model, (x,) = net()
    other, _ = net()
    request = request_of(model, x)
    assert shared_route(request) is not shared_route(request)  # no call is under route
    with one_call():
        route = shared_route(request, "kernel")
        with one_call():
            assert shared_route(request_of(model, x[:2]), "kernel") is route
        assert shared_route(request, "reference") is not route
        assert shared_route(request_of(other, x), "kernel") is not route
        assert shared_route(request_of(model, x.float()), "kernel") is not route
        model[0].register_full_backward_hook(lambda *args: None)
        assert decide(request, "kernel").eager_reason is not None  # a route of its own looks again
    assert shared_route(request, "kernel").eager_reason is not None


@pytest.mark.slow
def test_pieces_see_a_model_that_changes_between_them() -> None:
    model, (x,) = net(n=4)
    gradkern.prepare(model, x)
    for k, part in enumerate(gradkern.iter_jacobian(model, x, chunk=1, engine="kernel")):
        torch.testing.assert_close(part, gradkern.jacobian(model, x[k : k + 1], engine="autograd"))
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        handle = model[0].register_forward_hook(lambda module, inputs, output: output * 2)
        if k == 1:
            handle.remove()


def test_a_call_is_not_mistaken_for_another_that_is_remembered() -> None:
    model, (x,) = net(n=4)
    gradkern.prepare(model, x)
    whole = gradkern.jacobian(model, x, engine="autograd")
    for _ in range(2):
        for targets in (None, 1, [1], [1, 0], [0, 1], -1, gradkern.TopK(3), torch.tensor([[1]] * 4)):
            got = gradkern.jacobian(model, x, targets)
            if isinstance(targets, gradkern.TopK):
                got, order = got
                index = order
            else:
                index = torch.arange(3) if targets is None else torch.as_tensor(targets).reshape(-1)[: got.shape[1]] % 3
                index = index.expand(4, -1)
            torch.testing.assert_close(got, whole[torch.arange(4)[:, None], index])
        for wrong in (True, 1.0, [1, True], [1.0]):
            with pytest.raises((TypeError, ValueError)):
                gradkern.jacobian(model, x, wrong)
        with torch.no_grad():  # what is remembered holds no weights
            next(model.parameters()).mul_(1.5)
        whole = gradkern.jacobian(model, x, engine="autograd")


def test_a_graph_that_dynamo_has_given_up_is_not_used() -> None:
    model, (x,) = net(n=4)
    gradkern.prepare(model, x)
    torch._dynamo.reset()
    assert decide(request_of(model, x)).program is None
    want = gradkern.jacobian(model, x, engine="autograd")
    torch.testing.assert_close(gradkern.jacobian(model, x, engine="kernel"), want)
    assert decide(request_of(model, x)).program is not None
