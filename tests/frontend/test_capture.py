"""Capturing: backward passes that few samples exercise, state that changes, and models once refused without need.

Most cases here are past bugs.  Generated cases are in `test_python_state.py` (Python state) and `test_regions.py`.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradkern
from gradkern import attr
from gradkern.dispatch import first_use, state
from gradkern.runtime.mac_counter import MacCounter
from tests.support import oracle
from tests.support.modules import Net, Through

pytestmark = [
    pytest.mark.real_export,
    pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(params=["kernel", "auto"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(first_use, "capture_cost", lambda: 0.0)  # "auto" has switched
    return request.param


def expect(model: nn.Module, inputs: Any, engine: str) -> Tensor:
    """The engine gives autograd's Jacobian with respect to the first input, which is returned."""
    got = gradkern.jacobian(model, inputs, engine=engine, wrt=0)
    want = gradkern.jacobian(model, inputs, engine="autograd", wrt=0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    return want.clone()


def network(fn: Callable[..., Tensor], **attributes: object) -> nn.Module:
    return Net(fn, **attributes).double().eval()


# ---------------------------------------------------------------------------------------------------------------
# A backward that the samples compared do not exercise


def blocked(net: nn.Module, x: Tensor) -> Tensor:
    h = net.fc(x)
    with torch.no_grad():
        far = h * 3
    return torch.where(h > 9, far, h)


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h * 3


def switched(net: nn.Module, x: Tensor) -> Tensor:
    h = net.fc(x)
    with torch.set_grad_enabled(False):
        far = F.relu(h - 9)
    return h + far * h


def inference(net: nn.Module, x: Tensor) -> Tensor:
    h = net.fc(x)
    with torch.inference_mode():
        far = F.relu(h - 9)
    return h + far * 2 + far.clone() * h


def hooked(net: nn.Module, x: Tensor) -> Tensor:
    h = net.fc(x)
    far = h.detach() > 9
    h.register_hook(lambda g: torch.where(far, g * 0, g))
    return h * 2


RARE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "straight-through clamp": lambda net, x: Through.apply(net.fc(x), 9.0),
    "no_grad block": blocked,
    "no_grad decorator": lambda net, x: torch.where(net.fc(x) > 9, decorated(net.fc(x)), net.fc(x)),
    "set_grad_enabled": switched,
    "inference_mode": inference,
    "tensor hook": hooked,
}


@pytest.mark.parametrize("name", RARE)
def test_one_sample_of_many_is_different(name: str, engine: str) -> None:
    model, x = network(RARE[name]), torch.rand(2000, 4).double()
    x[1234] = 200 * model.fc.weight.detach()[0].sign()
    assert (model.fc(x) > 9).any(1).sum() == 1
    expect(model, x, engine)
    expect(model, x[1200:1300], engine)


@pytest.mark.parametrize("name", RARE)
def test_the_first_samples_are_dead(name: str) -> None:
    """Zero padding first: nothing that is compared with autograd there may decide for all that follows."""
    model, x = network(lambda net, x: RARE[name](net, x) * x), torch.zeros(40, 4).double()
    expect(model, x, "kernel")
    expect(model, 30 * torch.randn(20, 4).double(), "kernel")


# ---------------------------------------------------------------------------------------------------------------
# State that changes under a Program

SCALE = 1.5
TABLE = {"scale": 1.5}


class Config:
    scale = 1.5

    def __init__(self) -> None:
        self.shift = 0.5


class Looked:
    table: ClassVar[dict[str, float]] = {"scale": 1.5}

    @property
    def scale(self) -> float:
        return self.table["scale"]


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.5


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


class Derived(Base):
    def scale(self) -> float:
        return 1.5


def helper() -> float:
    return 1.5


def with_default(x: Tensor, box: list[float] = [1.5]) -> Tensor:  # noqa: B006
    return x * box[0]


CONFIG, LOOKED, SLOTS, QUEUE, BOX, TENSOR = (
    Config(),
    Looked(),
    Slots(),
    collections.deque([1.5]),
    {"a": 1.5},
    torch.ones(1),
)


def closing(box: dict[str, float]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda net, x: net.fc(x) * box["a"]


Change = Callable[[pytest.MonkeyPatch, nn.Module], object]
STALE: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Change]] = {
    "class attribute": (lambda net, x: net.fc(x) * CONFIG.scale, lambda m, net: m.setattr(Config, "scale", 2.5)),
    "module-level scalar": (lambda net, x: net.fc(x) * SCALE, lambda m, net: m.setitem(globals(), "SCALE", 2.5)),
    "module-level dict": (lambda net, x: net.fc(x) * TABLE["scale"], lambda m, net: m.setitem(TABLE, "scale", 2.5)),
    "closure's dict": (closing(BOX), lambda m, net: m.setitem(BOX, "a", 2.5)),
    "config object": (lambda net, x: net.fc(x) + CONFIG.shift * x, lambda m, net: m.setattr(CONFIG, "shift", 2.5)),
    "property": (lambda net, x: net.fc(x) * LOOKED.scale, lambda m, net: m.setitem(Looked.table, "scale", 2.5)),
    "slots": (lambda net, x: net.fc(x) * SLOTS.scale, lambda m, net: m.setattr(SLOTS, "scale", 2.5)),
    "deque": (lambda net, x: net.fc(x) * QUEUE[0], lambda m, net: QUEUE.appendleft(QUEUE[0] + 1)),
    "item": (lambda net, x: net.fc(x) * TENSOR.item(), lambda m, net: TENSOR.add_(1)),
    "helper": (lambda net, x: net.fc(x) * helper(), lambda m, net: m.setitem(globals(), "helper", lambda: 2.5)),
    "method": (
        lambda net, x: net.fc(x) * net.part.scale(),
        lambda m, net: m.setattr(Derived, "scale", lambda self: 2.5),
    ),
    "base-class forward": (
        lambda net, x: net.part(net.fc(x)),
        lambda m, net: m.setattr(Base, "forward", lambda self, x: x * 2.5),
    ),
    "torch's forward": (
        lambda net, x: net.act(net.fc(x)),
        lambda m, net: m.setattr(nn.Tanhshrink, "forward", lambda self, x: x * 2.5),
    ),
    "forward of one object": (
        lambda net, x: net.part(net.fc(x)),
        lambda m, net: setattr(net.part, "forward", types.MethodType(lambda self, x: x * 2.5, net.part)),
    ),
    "mutable default": (
        lambda net, x: with_default(net.fc(x)),
        lambda m, net: with_default.__defaults__[0].insert(0, with_default.__defaults__[0][0] + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STALE)
def test_changed_state_is_seen(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mutable default" and torch.__version__ < "2.13":
        pytest.xfail("Dynamo of torch 2.11 does not guard mutable default arguments (docs/installing.md)")
    fn, change = STALE[name]
    model, x = network(fn, part=Derived(), act=nn.Tanhshrink()), torch.randn(3, 4).double()
    before = expect(model, x, engine)
    change(monkeypatch, model)
    assert not torch.allclose(expect(model, x, engine), before, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# What was refused, or failed, for nothing


def asserts(net: nn.Module, x: Tensor) -> Tensor:
    assert x.shape[0] < 100_000
    return net.fc(x)


LISTED = [torch.full((4,), 2.0).double()]
SIZES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "len": lambda net, x: net.fc(x).view(len(x), 4),
    "int of a size": lambda net, x: net.fc(x).reshape(int(x.size(0)), 2, 2).flatten(1),
    "assertion": asserts,
    "what always holds": lambda net, x: net.fc(x) * (2 if (3 * x.shape[0] - 1) // x.shape[0] == 2 else 1),
    "tensors in a list": lambda net, x: net.fc(x) * net.listed[0] * LISTED[0],
    "where without gradients": blocked,
}


@pytest.mark.parametrize("name", SIZES)
def test_one_capture_serves_all_batch_sizes(name: str) -> None:
    model = network(SIZES[name], listed=[torch.full((4,), 3.0).double()])
    for n in (3, 1, 60):
        expect(model, torch.randn(n, 4).double(), "kernel")
    assert gradkern.prepare(model, torch.randn(2, 4).double()).program is not None
    (entry,) = state.models.of(model).entries.values()
    assert len(entry.programs) == 1


@pytest.mark.parametrize("n", [3, 64])
def test_a_branch_on_the_number_of_samples_is_right_on_both_sides(n: int) -> None:
    model = network(lambda net, x: net.fc(x) * (2 if x.shape[0] > 4 else 1))
    for samples in (n, 4, 5, 1):
        expect(model, torch.randn(samples, 4).double(), "kernel")


OTHERS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "int": (lambda net, x, k: net.fc(x) * net.places(k).mean(1, keepdim=True), torch.tensor([0, 2, 1, 2])),
    "bool": (lambda net, x, k: net.fc(x).masked_fill(k, 0.0), torch.rand(4, 4) > 0.5),
    "uint8": (lambda net, x, k: net.fc(x) * k.double(), torch.randint(0, 9, (4, 4), dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_arguments_of_whole_numbers(name: str, engine: str) -> None:
    fn, k = OTHERS[name]
    model = network(fn, places=nn.Embedding(3, 4))
    expect(model, (torch.randn(4, 4).double(), k), engine)


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()


INSIDE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "exported": lambda part: torch.export.export(part, (torch.randn(3, 4).double(),)).module(),
}


@pytest.mark.parametrize("name", INSIDE)
def test_other_front_ends_inside(name: str, engine: str) -> None:
    part = INSIDE[name](sequence())
    model = nn.Sequential(nn.Linear(4, 4).double(), part)
    expect(model, torch.randn(3, 4).double(), engine)


@pytest.mark.parametrize("name", ["IntegratedGradients", "DeepLift", "LRP", "GuidedBackprop"])
def test_a_compiled_model_in_captums_methods(name: str) -> None:
    model, x = sequence(), torch.randn(3, 4).double()
    method = getattr(attr, name)
    want = method(model).attribute(x, target=1)
    got = method(torch.compile(model, backend="eager")).attribute(x, target=1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.vmap])
def test_torch_func_in_a_forward(transform: Callable[..., Any], engine: str) -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        if transform is torch.func.vmap:
            return transform(lambda row: net.fc(row).tanh())(x)
        return transform(lambda h: net.fc(h).tanh().sum(0))(x).sum((0, 2)).expand(1, -1) + net.fc(x).tanh() * 0 + x

    model, x = network(run), torch.randn(1, 4).double()
    want = torch.autograd.functional.jacobian(model, x)
    got = gradkern.jacobian(model, x, engine=engine)
    torch.testing.assert_close(got, want[:, :, 0])


# ---------------------------------------------------------------------------------------------------------------
# What a forward keeps


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(norm: Callable[..., nn.Module]) -> None:
    model, x = (
        nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)).double().eval(),
        torch.randn(3, 4).double(),
    )
    for _ in range(3):
        with torch.no_grad():
            model[0].bias.add_(0.1)
            next(p for name, p in model[0].named_parameters() if name.startswith("weight")).mul_(1.5)
        expect(model, x, "kernel")
        assert model[0].weight.shape == (6, 4)
    assert gradkern.prepare(model, x).program is not None


def test_results_that_a_forward_keeps_stay_real() -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        net.last = net.fc(x)
        return net.last.tanh()

    model, x = network(run), torch.randn(3, 4).double()
    for _ in range(2):
        expect(model, x, "kernel")
        assert model.last.shape == (3, 4)
        torch.testing.assert_close(model.last, model.fc(x))


def test_a_slice_of_a_larger_tensor_is_captured() -> None:
    model, x = network(lambda net, x: net.fc(x).tanh()), torch.randn(10, 4).double()
    for k in range(3):
        expect(model, x[k : k + 2], "kernel")
    assert gradkern.prepare(model, x[5:7]).program is not None


@pytest.mark.parametrize("cut", [lambda x: x[:, :4], lambda x: x[:, :4].contiguous()])
def test_one_sample_cut_from_a_wider_tensor_is_captured(cut: Callable[[Tensor], Tensor]) -> None:
    """It is contiguous, with a stride of its own along the samples."""
    model = network(lambda net, x: net.fc(x).tanh())
    expect(model, cut(torch.randn(1, 10).double()), "kernel")
    assert gradkern.prepare(model, torch.randn(2, 4).double()).program is not None
    (entry,) = state.models.of(model).entries.values()
    assert len(entry.programs) == 1


def test_under_a_profiler() -> None:
    """Dynamo does nothing while a dispatch mode is active, and takes it for a change of the inputs."""
    model, x = network(lambda net, x: net.fc(x).tanh()), torch.randn(4, 4).double()
    with MacCounter():
        prepared = gradkern.prepare(model, x)
        assert prepared.program is not None
        assert gradkern.prepare(model, x).program is prepared.program
    expect(model, x, "kernel")
    assert gradkern.prepare(model, x).program is prepared.program


def test_many_models_of_one_class_are_all_captured() -> None:
    """Dynamo's limit of recompilations is one for all calls of a function."""
    x = torch.randn(2, 4).double()
    for k in range(10):
        assert gradkern.prepare(network(lambda net, x: net.fc(x) * net.k, k=float(k)), x).program is not None


class Patches(nn.Module):
    """torch 2.13 gives one sample alone a wrong gradient: its batch norm misreads a transposed cotangent."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(2, 8, 2, 2), nn.BatchNorm2d(8)
        self.tokens, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 8, 8]
        return self.head(torch.tanh(self.tokens(self.norm(self.patches(x)).flatten(2).transpose(1, 2)))).mean(1)


def test_torchs_own_fault_with_one_sample_is_no_refusal() -> None:
    model, x = Patches().double().eval(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    with gradkern.use("kernel"):
        assert gradkern.explain(model, x).native_share == 1
        got, alone = gradkern.jacobian(model, x), gradkern.jacobian(model, x[:1])
    want = oracle.jacobian(model, x)[1][0]
    assert oracle.relative_error(got, want) < 1e-10
    assert oracle.relative_error(alone, want[:1]) < 1e-10
