"""Guided backpropagation, deconvolution, DeepLift, LRP: stock Captum where it is right, else the definitions."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from captum import attr as stock
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule
from torch import nn

import gradkern
from gradkern import attr as ours
from gradkern.attr import points
from gradkern.attr.rules import linear
from gradkern.attr.rules import rule as rules
from gradkern.attr.rules.deeplift import Rescale
from gradkern.attr.rules.lrp import Relevance
from gradkern.runtime import reference
from gradkern.util import chunks
from tests.cases import CASES
from tests.support import capturing, rule_oracle
from tests.support.case import randomise_norm
from tests.support.rule_networks import DEEP, build, chain

N = 4
pytestmark = [pytest.mark.filterwarnings("ignore")]


def same(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class PooledNet(nn.Module):
    """A pool before the ReLU, average pools, modules used once: where Captum's hooks are right."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Dropout()
        self.act1 = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(4 * 3 * 3, 5)
        self.act2 = nn.Tanh()
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(self.act1(self.norm(self.conv(x))))
        return self.fc2(self.act2(self.fc1(x.flatten(1))))


def images(seed=1, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)


def stock_of_each_class(cls, model, x, **options):
    """Stock Captum, once per class."""
    found = [cls(model).attribute(x, target=c, **options) for c in range(3)]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return torch.stack(found, 1)


@pytest.mark.parametrize("engine", ["kernel", "reference"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution", "DeepLift", "DeepLiftShap", "LRP"])
def test_stock_captum_where_it_is_right(name, norm, engine):
    model, x = build(PooledNet, norm), images()
    options = {}
    if name.startswith("DeepLift"):
        options = {"baselines": images(5), "return_convergence_delta": True}
    if name == "LRP":
        options = {"return_convergence_delta": True}
    theirs = getattr(stock, name)
    with gradkern.use(engine):
        for target in (1, -1, torch.tensor([0, 2, 1, 1]), [2, 1, 0, 0], torch.tensor(2)):
            same(getattr(ours, name)(model).attribute(x, target=target, **options),
                 theirs(model).attribute(x, target=target, **options))  # fmt: skip
        same(getattr(ours, name)(model).attribute_all(x, **options), stock_of_each_class(theirs, model, x, **options))
    assert not any(m._backward_hooks or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("baseline", [None, 0.25, 1, "row", "tuple"])
def test_deep_lift_reads_baselines_as_captum(baseline):
    model, x = build(PooledNet), images()
    given = {"row": images(3, 1), "tuple": (images(3),)}.get(baseline, baseline)
    wrapped = (x,) if baseline == "tuple" else x
    same(
        ours.DeepLift(model).attribute(wrapped, given, target=1),
        stock.DeepLift(model).attribute(wrapped, given, target=1),
    )


def test_deep_lift_with_a_custom_attribution_function():
    model, x = build(PooledNet), images()

    def twice(multipliers, inputs, baselines):
        return tuple(2 * m * (i - b) for m, i, b in zip(multipliers, inputs, baselines, strict=True))

    for name, base in (("DeepLift", images(5)), ("DeepLiftShap", images(5))):
        got, want = (
            getattr(package, name)(model).attribute(x, base, target=0, custom_attribution_func=twice)
            for package in (ours, stock)
        )
        same(got, want)
    same(
        ours.DeepLift(model, multiply_by_inputs=False).attribute(x, target=0),
        stock.DeepLift(model, multiply_by_inputs=False).attribute(x, target=0),
    )


@pytest.mark.parametrize("engine", ["kernel", "reference"])
@pytest.mark.parametrize("name", DEEP)
def test_deep_lift_equals_its_definition(name, engine):
    make, shape = DEEP[name]
    model = build(make)
    generator = torch.Generator().manual_seed(2)
    x, base = (torch.randn(N, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    base[1] = x[1]
    base[2, ..., :3] = x[2, ..., :3]  # pools whose input does not move (#1276)
    modules = rule_oracle.flat_modules(model)
    want = torch.stack(
        [
            torch.cat([rule_oracle.deep_lift(modules, x[n : n + 1], base[n : n + 1], c) for n in (0, 2, 3)])
            for c in range(3)
        ],
        1,
    )
    with gradkern.use(engine):
        got, delta = ours.DeepLift(model).attribute_all(x, baselines=base, return_convergence_delta=True)
        one = ours.DeepLift(model).attribute(x, base, target=2)
    same(got[[0, 2, 3]], want)
    same(one, got[:, 2])
    assert delta.abs().max() < 1e-10
    alone = torch.cat([ours.DeepLift(model).attribute_all(x[n : n + 1], baselines=base[n : n + 1]) for n in range(N)])
    same(got, alone)


ANY = ("cnn1d_strided", "residual", "shared_conv", "skips_all", "maxpool2d_mixed", "leaky_relu", "bn_first")


@pytest.mark.parametrize("name", [*ANY, "avgpool1d_pad_exclude", "two_inputs", "sigmoid"])
def test_deep_lift_is_complete_on_any_network(name):
    case = CASES[name]
    model, x, base = (
        case.build(dtype=torch.float64),
        case.inputs(3, dtype=torch.float64),
        case.inputs(3, 7, torch.float64),
    )
    _, delta = ours.DeepLift(model).attribute_all(x, baselines=base, return_convergence_delta=True)
    assert delta.abs().max() < 1e-10
    _, delta = ours.DeepLiftShap(model).attribute_all(x, baselines=base, return_convergence_delta=True)
    assert delta.abs().max() < 1e-10


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_lrp_of_layers_that_captum_lacks(engine):
    torch.manual_seed(0)
    model = chain(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ELU(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2), nn.ReLU(),
                  shape=(1, 12)).double().eval()  # fmt: skip
    model.apply(randomise_norm)
    x = torch.randn(3, 1, 12, dtype=torch.float64)
    modules = rule_oracle.flat_modules(model)
    want = torch.stack(
        [torch.cat([rule_oracle.relevance(modules, x[n : n + 1], c) for n in range(3)]) for c in range(3)], 1
    )
    with gradkern.use(engine):
        same(ours.LRP(model).attribute_all(x), want, 1e-9)
        same(ours.LRP(model).attribute(x, target=1), want[:, 1], 1e-9)


def lrp_rules(model, which):
    if which == "gamma":
        model.conv.rule, model.fc1.rule = GammaRule(0.4), GammaRule(set_bias_to_zero=True)
        model.norm.rule = GammaRule()
    elif which == "alpha_beta":
        model.conv.rule, model.fc1.rule = Alpha1_Beta0_Rule(), Alpha1_Beta0_Rule()
    elif which == "z_plus":
        model.conv.rule, model.fc1.rule = Alpha1_Beta0_Rule(True), Alpha1_Beta0_Rule(True)
    elif which == "epsilon":
        model.conv.rule, model.fc2.rule = EpsilonRule(0.1), EpsilonRule(0.01)
    elif which == "identity":
        model.act1.rule = IdentityRule()
    return model


@pytest.mark.parametrize("which", ["gamma", "alpha_beta", "z_plus", "epsilon", "identity"])
def test_lrp_rules_of_captum(which):
    model, x = build(PooledNet, True), images()
    before = copy.deepcopy(model.state_dict())
    lrp_rules(model, which)
    want = stock.LRP(model).attribute(x, target=1)
    lrp_rules(model, which)
    got = ours.LRP(model).attribute_all(x)
    same(got[:, 1], want)
    same(ours.LRP(model).attribute(x, target=1), want)
    assert not any(hasattr(m, "rule") for m in model.modules())  # one call's, as in Captum
    same(model.state_dict(), before)


def test_lrp_in_two_threads_finds_the_rules() -> None:
    model = build(PooledNet)
    lrp_rules(model, "epsilon")
    want, method, seen = model.fc2.rule, ours.LRP(model), []

    def look() -> None:
        with method._rules() as rules:
            seen.append(rules)

    thread = threading.Thread(target=look)
    with method._rules():  # inside, the modules have no rules
        thread.start()
        thread.join(0.1)
    thread.join()
    assert want in seen[0].values()


def test_a_rule_of_the_users_own_is_captums():
    class Half(EpsilonRule):
        def _manipulate_weights(self, module, inputs, outputs):
            module.weight.data = module.weight.data * 0.5

    model, x = build(PooledNet), images()
    model.fc1.rule = Half()
    want = stock.LRP(model).attribute(x, target=1)
    model.fc1.rule = Half()
    same(ours.LRP(model).attribute_all(x)[:, 1], want)
    same(ours.LRP(model).attribute(x, target=1), want)


class Functional(nn.Module):
    """Functional, in-place and reused activations, which hooks on modules cannot see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(27, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


class Modular(nn.Module):
    def __init__(self, twin):
        super().__init__()
        self.conv, self.fc1, self.fc2, self.fc3 = twin.conv, twin.fc1, twin.fc2, twin.fc3
        self.a, self.b, self.c, self.pool = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.a(self.conv(x))).flatten(1)
        return self.fc3(self.c(self.fc2(self.b(self.fc1(x)))))


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution", "LRP"])
def test_functional_in_place_and_reused_activations(name):
    model = build(Functional)
    twin = build(Modular, model)
    x = images()
    same(getattr(ours, name)(model).attribute_all(x), stock_of_each_class(getattr(stock, name), twin, x))


@pytest.mark.parametrize("name", ["lenet5", "residual", "maxpool1d_overlap_pad", "two_inputs", "resnet1d_opaque"])
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution"])
def test_kernels_rectify_as_the_reference(name, method):
    case = CASES[name]
    model, xs = case.build(dtype=torch.float64), case.inputs(3, dtype=torch.float64)
    fast, plain = (getattr(ours, method)(model, engine=e).attribute_all(xs) for e in ("kernel", "reference"))
    same(fast, plain, 1e-12)


@pytest.mark.parametrize("name", ["lenet5", "residual", "maxpool2d_mixed", "softmax", "skips_all", "two_inputs", "fcn",
                                  "resnet1d_opaque"])  # fmt: skip
def test_the_plain_rule_is_the_gradient(name):
    """The linear Program of the trivial rule gives the Jacobian, on kernels and without."""
    case = CASES[name]
    model, xs = case.build(dtype=torch.float64), case.inputs(3, dtype=torch.float64)
    prepared = gradkern.prepare(model, xs)
    assert prepared.program is not None
    program = prepared.program
    params = capturing.bind(program, model)
    _, want = reference.jacobian(program, params, xs)
    targets, wrt = torch.arange(program.outputs), tuple(range(len(xs)))
    for native in (True, False):
        values = linear.rule_values(program, params, xs, linear.values_needed(program, False))
        with torch.no_grad():
            got = linear.rule_multipliers(rules.Rule(program, params, values), xs, targets, wrt, native=native)
        same(got, want, 1e-12)


def test_per_sample_targets_and_top_k():
    model, x = build(PooledNet), images()
    for cls in (ours.GuidedBackprop, ours.LRP, ours.DeepLift):
        whole = cls(model).attribute_all(x)
        picked = cls(model).attribute_all(x, targets=torch.tensor([[0, 1], [2, 2], [1, 0], [0, 2]]))
        same(picked[1], whole[1, [2, 2]])
        same(cls(model).attribute_all(x, targets=[2, 0]), whole[:, [2, 0]])
        best, index = cls(model).attribute_all(x, targets=gradkern.TopK(1))
        same(best[:, 0], whole[torch.arange(N), index[:, 0]])


def test_the_input_is_left_alone():
    model, x = build(PooledNet), images()
    x.grad = None
    for cls in (ours.GuidedBackprop, ours.DeepLift, ours.LRP):
        cls(model).attribute(x, target=0)
        assert x.grad is None
        assert not x.requires_grad
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    ours.DeepLift(model).attribute(x, target=0)
    assert x.requires_grad
    assert torch.equal(x.grad, torch.ones_like(x))


def test_bad_targets_are_captums_errors():
    model, x = build(PooledNet), images()
    for name in ("GuidedBackprop", "DeepLift", "LRP"):
        for target in (7, None, [0, 1], (0, 1)):
            with pytest.raises(Exception) as want:
                getattr(stock, name)(model).attribute(x, target=target)
            with pytest.raises(type(want.value)) as got:
                getattr(ours, name)(model).attribute(x, target=target)
            assert str(got.value) == str(want.value)
    assert not any(m._backward_hooks or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_a_rule_for_a_function_is_one_line(engine, monkeypatch):
    """DeepLift by the derivative at a tanh, LRP by the derivative there: in both tables, a line for that function."""
    model, x, base = build(PooledNet), images(), images(5)
    secants = ours.DeepLift(model, engine=engine).attribute_all(x, baselines=base)
    monkeypatch.setitem(Rescale.table, "tanh", rules.scale_by_derivative)
    monkeypatch.setitem(Relevance.table, "tanh", rules.scale_by_derivative)
    multipliers = ours.DeepLift(model, False, engine=engine).attribute_all(x, baselines=base)
    assert not torch.allclose(multipliers * (x - base)[:, None], secants)
    z = model.fc1(model.pool(model.act1(model.conv(x))).flatten(1))
    last = torch.einsum("co,no->nco", model.fc2.weight, 1 - z.tanh() ** 2)  # [N, C, 5]
    flat = (last @ model.fc1.weight).view(N, 3, 4, 3, 3)
    up = F.interpolate(flat.flatten(1, 2), scale_factor=2).view(N, 3, 4, 6, 6) / 4
    a, b = model.conv(x), model.conv(base)
    secant = torch.where((a - b).abs() < 1e-10, (a > 0).double(), (a.relu() - b.relu()) / (a - b))
    g = (up * secant[:, None]).flatten(0, 1)
    want = F.conv_transpose2d(g, model.conv.weight).view(N, 3, 1, 8, 8)
    same(multipliers, want.detach())
    relevance = ours.LRP(model, engine=engine).attribute_all(x)
    monkeypatch.undo()
    assert not torch.allclose(ours.LRP(model, engine=engine).attribute_all(x), relevance)


def test_rules_serve_all_pieces_of_a_noise_tunnel(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CACHED_BYTES", 1)
    monkeypatch.setattr(points, "LEAST_BLOCK", 7)
    model, x = build(PooledNet, True), images(n=40)
    options = {"nt_samples": 3, "stdevs": 0.3}
    results = []
    for package in (stock, ours):
        lrp_rules(model, "gamma")
        torch.manual_seed(0)
        results.append(package.NoiseTunnel(package.LRP(model)).attribute(x, target=1, **options))
        assert not hasattr(model.conv, "rule")
    same(results[1], results[0])
    lrp_rules(model, "gamma")
    torch.manual_seed(0)
    same(ours.NoiseTunnel(ours.LRP(model)).attribute_all(x, **options)[:, 1], results[0])
