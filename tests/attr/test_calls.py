"""What every public call of an attribution object has in common, generated over all methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr as stock
from torch import Tensor, nn

import gradkern
from gradkern import attr as ours

N, F, C = 5, 6, 3
pytestmark = [pytest.mark.filterwarnings("ignore")]
NAMES = [kind.__name__ for kind in ours.REPLACEMENTS]
ALL = [name for name in NAMES if hasattr(getattr(ours, name), "attribute_all")]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """One model for the file, so that it is captured once."""
    torch.manual_seed(0)
    return small_network().eval()


class Small(nn.Module):
    """Every method of Captum is defined on it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.out = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(12, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.norm(self.conv(x))).flatten(1))


def small_network() -> nn.Module:
    return Small().double()


@pytest.fixture(autouse=True)
def drawn() -> Iterator[None]:
    torch.manual_seed(1)
    np.random.seed(1)
    yield


def samples(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 3, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options_of(name: str) -> dict[str, Any]:
    """The arguments that a method needs, besides the inputs and the target."""
    options: dict[str, Any] = {}
    if name.endswith("Shap"):
        options["baselines"] = samples(3, 4)
    if "n_steps" in inspect.signature(getattr(ours, name).attribute).parameters:
        options["n_steps"] = 4
    if name == "NoiseTunnel":
        options |= {"nt_samples": 2, "stdevs": 0.1}
    if name.startswith("Neuron"):
        options["neuron_selector"] = (1, 0, 2)
    return options


def target_of(name: str, target: Any) -> dict[str, Any]:
    taken = "target" in inspect.signature(getattr(ours, name).attribute).parameters or name == "NoiseTunnel"
    return {"target": target} if taken else {}


def explainer(name: str, model: nn.Module, package: Any = ours, **options: Any) -> Any:
    kind = getattr(package, name)
    if name == "NoiseTunnel":
        return kind(package.Saliency(model, **options))
    if "layer" in inspect.signature(kind).parameters or "layer" in inspect.signature(getattr(stock, name)).parameters:
        return kind(model, model.conv, **options)
    return kind(model, **options)


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [x for part in tree for x in leaves(part)]


@pytest.mark.parametrize("name", ALL)
def test_attribute_all_takes_what_attribute_takes(name: str) -> None:
    one, every = (inspect.signature(getattr(getattr(ours, name), m)).parameters for m in ("attribute", "attribute_all"))
    by_place = [n for n, p in every.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == [n for n in one if n in ("self", "inputs", "neuron_selector", "baselines")]
    assert {"targets", "out", "wrt", "engine"} <= set(every)
    assert set(one) - {"target"} <= set(every)


@pytest.mark.parametrize("name", ALL)
def test_calls_in_the_old_order_and_misread_arguments(name: str, net: nn.Module) -> None:
    method, x, options = explainer(name, net), samples(), options_of(name)
    places = [options.pop(n) for n in ("neuron_selector", "baselines") if n in options]
    parameters = inspect.signature(method.attribute_all).parameters
    if "baselines" in parameters and len(places) == len(options_of(name).keys() & {"neuron_selector"}):
        places.append(samples(3, 4))
    for wrong in ([2, 0], 1, gradkern.TopK(1)):
        with pytest.raises(TypeError, match=r"by position.*targets="):
            method.attribute_all(x, *places, wrong, **options)
        if "baselines" in parameters and not isinstance(wrong, int):
            with pytest.raises(TypeError, match=r"as baselines.*targets="):
                method.attribute_all(x, **{**options_of(name), "baselines": wrong})
    with pytest.raises(TypeError, match="expected targets="):
        method.attribute_all(x, target=1, **options_of(name))
    with pytest.raises(TypeError, match="nonsense"):
        method.attribute_all(x, nonsense=1, **options_of(name))


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_function_of_the_callers_own_is_refused(name: str, net: nn.Module) -> None:
    method = explainer(name, net)
    getattr(method, "attribution_method", method).gradient_func = lambda *a, **k: None
    with pytest.raises(TypeError, match="one target at a time"):
        method.attribute_all(samples(), **options_of(name))


@pytest.mark.parametrize("engine", ["kernel", "autograd"])
@pytest.mark.parametrize("name", ALL)
def test_out_wrt_and_engine(name: str, engine: str, net: nn.Module, tmp_path: Any) -> None:
    options = options_of(name)

    def found(**more: Any) -> Any:
        torch.manual_seed(1)
        np.random.seed(1)
        return explainer(name, net).attribute_all(samples(), engine=engine, **options, **more)

    want = found()
    torch.testing.assert_close(found(wrt=0), want)
    torch.testing.assert_close(found(wrt=[0])[0], want)
    out = np.memmap(tmp_path / "maps", dtype=np.float32, mode="w+", shape=tuple(want.shape))
    assert found(out=out) is out
    torch.testing.assert_close(torch.from_numpy(np.array(out)), want.float(), rtol=1e-6, atol=1e-6)
    maps, index = found(targets=gradkern.TopK(2), out=(place := torch.empty(N, 2, *want.shape[2:]).double()))
    assert maps is place
    torch.testing.assert_close(maps, want[torch.arange(N)[:, None], index])
    with pytest.raises(ValueError, match="out: got shape"):
        found(out=torch.empty(1).double())
    with pytest.raises(ValueError, match="wrt: got 3"):
        found(wrt=3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "kernel", "autograd"])
@pytest.mark.parametrize("name", NAMES)
def test_results_carry_no_graph(name: str, engine: str, grad: bool, net: nn.Module) -> None:
    method, x = explainer(name, net, **({} if name == "NoiseTunnel" else {"engine": engine})), samples()
    x.requires_grad_(grad)
    calls = [lambda: method.attribute(x, **target_of(name, 1), **options_of(name))]
    if name in ALL:
        calls.append(lambda: method.attribute_all(x, **options_of(name)))
    for call in calls:
        assert not any(part.requires_grad for part in leaves(call()))
    assert x.requires_grad is grad
    assert x.grad is None


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", NAMES)
def test_buffers_of_a_model_in_training_mode_stay(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model = small_network().train()
    before = copy.deepcopy(model.state_dict())
    calls: list[Callable[[Any], Any]] = [lambda m: m.attribute(samples(), **target_of(name, 1), **options_of(name))]
    if name in ALL:
        calls.append(lambda m: m.attribute_all(samples(), **options_of(name)))
    for call in calls:
        for method in (explainer(name, model), gradkern.accelerate(explainer(name, model, stock))):
            with gradkern.use(engine):
                call(method)
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key]), (name, key)


def test_buffers_stay_with_gradients_that_are_not_ours() -> None:
    model = small_network().train()
    before = copy.deepcopy(model.state_dict())
    saliency = ours.Saliency(model)
    saliency.gradient_func = stock.Saliency(model).gradient_func
    for method in (saliency, ours.NoiseTunnel(stock.Saliency(model)), ours.NoiseTunnel(stock.FeatureAblation(model))):
        method.attribute(samples(), target=1)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["kernel", "autograd"])
@pytest.mark.parametrize("name", NAMES)
def test_no_samples_give_no_attributions(name: str, engine: str, net: nn.Module) -> None:
    options = options_of(name)
    extra = {}
    if "return_convergence_delta" in inspect.signature(getattr(ours, name).attribute).parameters:
        extra["return_convergence_delta"] = True
    with gradkern.use(engine):
        method, state = explainer(name, net), torch.get_rng_state()
        some = leaves(method.attribute(samples(), **target_of(name, 1), **options, **extra))
        torch.set_rng_state(state)
        for target in (1, torch.zeros(0, dtype=torch.long), []):
            none = leaves(method.attribute(samples(0), **target_of(name, target), **options, **extra))
            assert [(x.shape, x.dtype) for x in none] == [((0, *y.shape[1:]), y.dtype) for y in some]
        assert torch.equal(torch.get_rng_state(), state)
        if name in ALL:
            every = leaves(method.attribute_all(samples(0), **options, **extra))
            assert [x.shape for x in every] == [(0, C, *y.shape[1:]) for y in some]
            assert method.attribute_all(samples(0), **options, targets=[2]).shape == (0, 1, *some[0].shape[1:])
            best, index = method.attribute_all(samples(0), **options, targets=gradkern.TopK(2))
            assert (best.shape[:2], index.shape) == ((0, 2), (0, 2))
            own = torch.zeros(0, 2, dtype=torch.long)
            assert method.attribute_all(samples(0), **options, targets=own).shape[:2] == (0, 2)


def test_custom_attribution_functions_and_internal_batches(net: nn.Module) -> None:
    x, base = samples(), samples(3, 4)

    def squared(multipliers: Any, inputs: Any, baselines: Any) -> Any:
        return tuple(m**2 * (x - b) for m, x, b in zip(multipliers, inputs, baselines, strict=True))

    for name, start in (("DeepLift", base[:1]), ("DeepLiftShap", base)):
        for engine in ("kernel", "autograd"):
            method = getattr(ours, name)(net, engine=engine)
            every = method.attribute_all(x, start, custom_attribution_func=squared)
            for c in range(C):
                want = method.attribute(x, start, target=c, custom_attribution_func=squared)
                torch.testing.assert_close(every[:, c], want)
    ig = ours.IntegratedGradients(net)
    torch.testing.assert_close(ig.attribute_all(x, internal_batch_size=7), ig.attribute_all(x))
    layer = ours.LayerConductance(net, net.conv)
    torch.testing.assert_close(layer.attribute_all(x, internal_batch_size=7), layer.attribute_all(x))


def test_a_graph_that_is_asked_for(net: nn.Module) -> None:
    """Captum's ``grad_kwargs`` may ask for a graph: the one case in which a result has one."""
    x = samples().requires_grad_()
    method = ours.LayerGradientXActivation(net, net.conv)
    assert method.attribute(x, target=1, grad_kwargs={"create_graph": True}).requires_grad


def test_a_method_keeps_its_engine_after_captum_has_run(net: nn.Module) -> None:
    """Captum sets the gradient of a neuron method at every call."""
    method = ours.NeuronGradient(net, net.conv, engine="kernel")
    gradients = method.gradient_func
    method.attribute(samples(), lambda y: y.flatten(1).sum(1))
    assert method.gradient_func is gradients


class Shaped(nn.Module):
    """Outputs ``[N, *shape]``."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 2, 3), nn.ReLU()
        self.out, self.shape = nn.Linear(8, max(1, int(np.prod(shape)))), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.conv(x)).flatten(1)).view(-1, *self.shape)


SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3)]


def some_target(random: np.random.Generator) -> Any:
    """A target of any form that somebody might pass, right or wrong."""
    index = random.integers(-4, 4, 2).tolist()
    many = random.integers(-1, 3, N).tolist()
    forms = [
        None, 0, 1, index[0], tuple(index), (index[0],), many, [(m,) for m in many], [(m, m) for m in many],
        torch.tensor(index[0]), torch.tensor([index[0]]), torch.tensor(many), torch.tensor(many)[:, None],
        torch.tensor(many).float(), np.int64(index[0]), np.array(many), True, 1.0, "1", [], (), [many], many[:2],
        torch.eye(N, 3, dtype=torch.long), [True] * N, torch.tensor(many).int(), torch.zeros(0, dtype=torch.long),
        {0}, (0, 1, 2), [0.5] * N, torch.tensor(True), np.float32(0.0), range(N),
    ]  # fmt: skip
    return forms[random.integers(len(forms))]


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generated_targets_of_attribute_are_captums(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, random, x = Shaped(shape).double().eval(), np.random.default_rng(0), samples()
    gradkern.prepare(model, x)
    for _ in range(150):
        target, name = (
            some_target(random),
            ["Saliency", "IntegratedGradients", "GuidedBackprop", "DeepLift"][random.integers(4)],
        )
        options = {"n_steps": 2} if name == "IntegratedGradients" else {}
        got, want = (
            outcome(lambda: getattr(package, name)(model).attribute(x, target=target, **options))  # noqa: B023
            for package in (ours, stock)
        )
        if isinstance(want, Tensor):
            torch.testing.assert_close(got, want.detach())
        else:
            assert got is want, (name, target, got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generated_targets_of_attribute_all(shape: tuple[int, ...]) -> None:
    """Either an error that says what to do, or the rows that plain indexing gives."""
    torch.manual_seed(0)
    model, random, x = Shaped(shape).double().eval(), np.random.default_rng(1), samples()
    full = gradkern.jacobian(model, x, engine="autograd").reshape(N, -1, 1, 3, F)
    for _ in range(300):
        targets = some_target(random)
        got = outcome(lambda: ours.Saliency(model).attribute_all(x, targets=targets, abs=False))  # noqa: B023
        if isinstance(got, type):
            assert issubclass(got, gradkern.util.options.InputError), (targets, got)
            continue
        if targets is None:
            want = full.reshape(got.shape)
        elif isinstance(targets, tuple):
            flat = np.ravel_multi_index([t % s for t, s in zip(targets, shape, strict=True)], shape)
            want = full[:, [flat]]
        elif isinstance(targets, (range, list)) and isinstance(targets[0], int):
            want = full[:, list(targets)]
        elif np.ndim(targets) == 2 and len(shape) == 1:
            want = torch.stack([full[n, torch.as_tensor(targets)[n]] for n in range(N)])
        else:
            want = full[:, [int(targets)]]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients", "DeepLift", "LRP", "GuidedBackprop"])
def test_the_engine_is_passed_by_name(net, name) -> None:
    """By position it still works, with a warning that names the caller's line."""
    kind = getattr(ours, name)
    assert inspect.signature(kind).parameters["engine"].kind is inspect.Parameter.KEYWORD_ONLY
    places = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.warns(DeprecationWarning, match="pass engine=, output= by name") as caught:
        method = kind(net, *[p.default for p in places[1:]], "autograd", 0)
    assert caught[0].filename == __file__
    assert method.gradient_func.engine == "autograd"
    with pytest.raises(TypeError, match="positional"), pytest.warns(DeprecationWarning):
        kind(net, *[p.default for p in places[1:]], "autograd", 0, "complete", 1)


@pytest.mark.parametrize("name", ALL)
def test_the_shared_keywords_are_in_the_signature_and_others_are_refused(net, name) -> None:
    parameters = inspect.signature(getattr(ours, name).attribute_all).parameters
    for keyword in ("out", "wrt", "engine", "progress"):
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY, keyword
    assert "shared" not in parameters


def test_an_unknown_keyword_is_refused(net) -> None:
    with pytest.raises(
        TypeError, match=r"IntegratedGradients.attribute_all\(\) got an unexpected keyword argument 'n'"
    ):
        ours.IntegratedGradients(net).attribute_all(torch.randn(2, 1, 4, 4), n=3)
