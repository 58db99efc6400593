"""DeepLift's rules, operation by operation: each completes, or is named; what is detached is constant; users' rules."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from captum import attr as stock
from torch import nn

import gradkern
from gradkern import attr as ours
from gradkern.attr.rules import eager, tape
from gradkern.dispatch.targets import Seeds
from gradkern.util.options import BadType, BadValue, GradkernWarning
from tests.support.deeplift_operations import OPERATIONS, UNRULED, Mixed, by_tape, ends, incomplete
from tests.support.rule_networks import build

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = 1e-10


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_completes(name):
    model, (x, r) = build(Mixed, name), ends(1)
    assert incomplete(model, by_tape(model, x, r), x, r) < EXACT


@pytest.mark.parametrize("name", UNRULED)
def test_an_operation_without_a_rule_is_named(name):
    with pytest.raises(tape.NoRule, match=f"aten.{name}"):
        by_tape(UNRULED[name], *ends(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_neither_stops_nor_blinds_the_comparison_of_samples(bad):
    """The fallback compares a sample in its batch with the same sample alone, relative to the largest finite output."""

    class Mixing(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.fc, self.share = nn.Linear(3, 2), share

        def forward(self, x):
            y = self.fc(x)
            return y + self.share * y.nan_to_num(0.0, 0.0).mean(0)

    (x, r), every = torch.randn(2, 3, 3, dtype=torch.float64), lambda n, out: Seeds(out[0], out, None)
    x[1] = bad
    eager.multipliers(build(Mixing, 0.0), (x,), (r,), (), every, EXACT)
    with pytest.raises(tape.NoRule, match="samples depend on each other"):
        eager.multipliers(build(Mixing, 0.5), (x,), (r,), (), every, EXACT)


class Everything(nn.Module):
    """A network whose Program has steps of many kinds, so that one capture tests them all."""

    def __init__(self):
        super().__init__()
        self.first = Mixed(
            "unary:layer_norm", "ternary:attention", "unary:softshrink", "ternary:maximum", "ternary:where",
            "ternary:einsum_3", "unary:std", "unary:adaptive_max_pool1d", "unary:logsumexp", "module:lstm",
            "unary:mask", "unary:rrelu", "unary:max_pool3d", "unary:normalize", "ternary:masked_attention",
        )  # fmt: skip

    def forward(self, x):
        return self.first(x).softmax(-1)


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_a_network_of_many_kinds_completes_and_equals_the_fallback(engine):
    """The Program's rules and those of the fallback, which runs the live operations, give the same numbers."""
    model, (x, r) = build(Everything), ends(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method = ours.DeepLift(model, False, engine=engine)
        got = method.attribute_all(x, baselines=r)
    assert not [w for w in said if "no DeepLift rule" in str(w.message)]
    assert incomplete(model, got, x, r) < EXACT
    torch.testing.assert_close(got, by_tape(model, x, r), rtol=1e-8, atol=1e-12)
    one = ours.DeepLift(model, False, engine=engine).attribute_all(x, baselines=r[:1])
    assert incomplete(model, one, x, r[:1].expand_as(x)) < EXACT


def test_a_step_without_a_rule_is_said_once():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.first(x).sort(-1)[0])

    model, (x, r) = build(Sorted), ends(1)
    with pytest.warns(GradkernWarning, match=r"no DeepLift rule for aten\.sort"):
        ours.DeepLift(model, engine="kernel").attribute(x[:, 0], r[:, 0], target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradkernWarning)
        ours.DeepLift(model, engine="kernel").attribute(x[:, 0], r[:, 0], target=0)


# ---------------------------------------------------------------------------------------------------------------
# What is detached


class Gated(nn.Module):
    """A gate by whatever is detached, in four spellings of one function; or with the gate handed over."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.gate, self.last = how, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def gates(self, x):
        return torch.softmax(self.gate(x), -1)

    def forward(self, x, given=None):
        h = torch.tanh(self.first(x))
        if self.how == "no_grad":
            with torch.no_grad():
                gate = self.gates(x)
        elif self.how == "in_place":
            with torch.no_grad():
                gate = self.gates(x).mul_(1.0)
        else:
            gate = self.gates(x).detach()
        gate = gate if given is None else given
        if self.how == "einsum":
            h = torch.einsum("ni,ni->ni", h, gate)
        elif self.how == "matmul":
            h = (torch.diag_embed(gate) @ h.unsqueeze(-1)).squeeze(-1)
        elif self.how == "div":
            h = h / (1 / gate)
        else:
            h = h * gate
        return self.last(torch.relu(h))


@pytest.mark.parametrize("how", ["mul", "einsum", "matmul", "div", "no_grad", "in_place"])
def test_what_is_detached_is_a_constant(how):
    """As if the gate were handed over, in every spelling, with a Program and without; and it is said."""
    model, (x, r) = build(Gated, how), ends(2, 3)
    x, r = x[:, 0], r[:, 1]
    with torch.no_grad():
        gate = model.gates(x)
    h, base = (torch.tanh(model.first(z)) * gate for z in (x, r))
    secant = torch.where((h - base).abs() < EXACT, (h > 0).double(), (h.relu() - base.relu()) / (h - base))
    inner = (torch.tanh(model.first(x)) - torch.tanh(model.first(r))) / (model.first(x) - model.first(r))
    want = torch.einsum("co,no,oi->nci", model.last.weight, secant * gate * inner, model.first.weight).detach()
    with pytest.warns(GradkernWarning, match="detached"):
        got = ours.DeepLift(model, False, engine="kernel").attribute_all(x, baselines=r)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_tape(model, x, r), want, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------
# Without a Program


class Branches(nn.Module):
    """Its forward looks at a number, so that it has no Program; its ReLUs are functions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = F.relu(self.first(x))
        if float(self.second.weight[0, 0]) > 1e9 or x.sum().item() > 1e9:
            h = -h
        return self.last(F.relu(self.second(h)))


class Functional(Branches):
    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def test_a_model_without_a_program_has_the_same_rules():
    model, twin, (x, r) = build(Branches), build(Functional), ends(3)
    x, r = x[:, 0], r[:, 0]
    got, delta = ours.DeepLift(model, engine="kernel").attribute_all(x, baselines=r, return_convergence_delta=True)
    assert delta.abs().max() < EXACT
    torch.testing.assert_close(got, ours.DeepLift(twin, engine="kernel").attribute_all(x, baselines=r))
    captums = stock.DeepLift(model).attribute(x, r, target=0)
    assert not torch.allclose(got[:, 0], captums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_rules(dtype):
    model, (x, r) = build(lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 3))), ends(3)
    want = by_tape(model, x[:, 0], r[:, 0])
    got = by_tape(model.to(dtype), x[:, 0].to(dtype), r[:, 0].to(dtype))
    assert (got - want).abs().max() < 16 * torch.finfo(dtype).eps * want.abs().max()


def test_captums_hooks_are_named_where_nothing_else_is_left():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.drop, self.last = (
                nn.Linear(6, 6),
                nn.LayerNorm(6),
                nn.Dropout(),
                nn.Linear(6, 3),
            )

        def forward(self, x):
            return self.last(self.drop(self.norm(F.relu(self.first(x)))))

    model, (x, r) = build(Drops).train(), ends(4)
    with pytest.warns(GradkernWarning, match=r"no DeepLift rule for functions such as F\.relu, LayerNorm at norm"):
        ours.DeepLift(model, engine="kernel").attribute(x[:, 0], r[:, 0], target=0)


# ---------------------------------------------------------------------------------------------------------------
# Captum's rules, users' rules, deltas


@pytest.mark.parametrize("name", ["DeepLift", "DeepLiftShap"])
def test_captums_rules_are_captums_numbers(name):
    """Bit for bit, where ours differ too."""
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3), nn.Softmax(-1)))
    x, r = (z[:, 0] for z in ends(5))
    method = getattr(ours, name)(model, rules="captum")
    want = [getattr(stock, name)(model).attribute(x, r, target=c, return_convergence_delta=True) for c in range(3)]
    for c in range(3):
        got = method.attribute(x, r, target=c, return_convergence_delta=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want[c], strict=True))
    got = method.attribute_all(x, baselines=r)
    assert torch.equal(got, torch.stack([w[0] for w in want], 1))
    with pytest.raises(BadValue, match="rules: got 'stock', expected 'complete' or 'captum'"):
        getattr(ours, name)(model, rules="stock")


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


@pytest.fixture
def registered():
    kinds = []

    def register(of, rule):
        kinds.append(of)
        ours.register_rule(of, rule)

    yield register
    for of in kinds:
        ours.register_rule(of, None)


def half(x, x_ref, y, y_ref):
    return torch.full_like(x, 0.5)


@pytest.mark.parametrize("engine", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("of", "act"),
    [(Swish, Swish), (nn.GELU, nn.GELU), (F.softplus, nn.Softplus), ("logsigmoid", nn.LogSigmoid), ("prelu", nn.PReLU)],
)
def test_a_users_rule(of, act, engine, registered):
    """For a module of several steps, a module of one, and functions of one step and of several."""
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), act(), nn.Linear(5, 5), act(), nn.Linear(5, 3)))
    x, r = (z[:, 0] for z in ends(6))
    registered("log_sigmoid" if of == "logsigmoid" else of, half)
    got = ours.DeepLift(model, False, engine=engine).attribute_all(x, baselines=r)
    want = model[4].weight @ model[2].weight @ model[0].weight / 4
    torch.testing.assert_close(got, want.detach().expand_as(got))


def test_a_users_rule_that_does_not_fit(registered):
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), Swish(), nn.Linear(5, 3)))
    x, r = (z[:, 0] for z in ends(6))
    registered(Swish, lambda x, x_ref, y, y_ref: x[:, :2])
    with pytest.raises(BadValue, match=r"Swish at 1 returned a tensor \(3, 2\), expected a tensor \(3, 5\)"):
        ours.DeepLift(model, engine="kernel").attribute_all(x, baselines=r)
    registered(nn.Linear, half)
    with pytest.raises(BadValue, match="a rule for DeepLift needs one shape"):
        ours.DeepLift(model, engine="kernel").attribute_all(x, baselines=r)
    with pytest.raises(BadType, match="of: got 3"):
        ours.register_rule(3, half)
    with pytest.raises(BadValue, match="not an operation of ATen"):
        ours.register_rule("no_such_function", half)
    with pytest.raises(BadType, match="rule: got int"):
        ours.register_rule("gelu", 5)


@pytest.mark.parametrize("references", [1, 2])
def test_a_large_delta_is_said_of_the_first_samples_though_nobody_asks(references, registered):
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, r = (z[:, 0] for z in ends(7))
    start = r if references == 1 else torch.stack([r, r], 1)
    method = ours.DeepLift(model, engine="kernel", multiply_by_inputs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradkernWarning)
        method.attribute_all(x, baselines=start)
    registered("tanh", half)
    gradkern.reset()
    with pytest.warns(GradkernWarning, match="do not add up"):
        method.attribute_all(x, baselines=start)


def test_a_mask_that_moves_between_infinities_is_said():
    class Masked(nn.Module):
        def forward(self, x):
            return (
                x.masked_fill((x[:, :1] > 0) & (torch.arange(6) > 3), -torch.inf).softmax(1) @ torch.ones(6, 2).double()
            )

    x, r = (z[:, 0] for z in ends(7))
    with pytest.warns(GradkernWarning, match="do not add up"):
        ours.DeepLift(Masked(), engine="kernel").attribute_all(x.abs(), baselines=-r.abs())


def test_a_large_delta_is_said_once_and_computed_once_unasked(monkeypatch, registered):
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, r = (z[:, 0] for z in ends(7))
    registered("tanh", half)
    with pytest.warns(GradkernWarning, match="do not add up"):
        ours.DeepLift(model, engine="kernel").attribute(x, r, target=1, return_convergence_delta=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradkernWarning)
        ours.DeepLift(model, engine="kernel").attribute_all(x, baselines=r, return_convergence_delta=True)

    def never(*args, **kwargs):
        raise AssertionError("a delta that nobody asked for")

    gradkern.reset()
    ours.DeepLift(model, engine="kernel").attribute(x, r, target=1)
    monkeypatch.setattr(ours.DeepLift, "_row_delta", never)
    monkeypatch.setattr(ours.DeepLift, "compute_convergence_delta", never)
    ours.DeepLift(model, engine="kernel").attribute_all(x, baselines=r)
    ours.DeepLift(model, engine="kernel").attribute(x, r, target=1)
