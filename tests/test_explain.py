"""`explain` against what a call really does: the shares of operations, by torch's flop counter, and the rows."""

from __future__ import annotations

import math

import pytest
import torch

import gradkern
from gradkern.dispatch.watch import Watch
from gradkern.ir.program import Opaque
from gradkern.runtime import reference
from gradkern.runtime.mac_counter import MacCounter
from tests.cases import CASES, net

N = 4
pytestmark = pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")


def profiled(model, inputs, monkeypatch):
    """Multiply-adds per sample that ATen ran in one call: in all, and in steps that torch differentiates."""
    gradkern.jacobian(model, inputs, engine="kernel")  # the first call also measures the model
    inside = [0]

    def counting(real):
        def call(program, i, *args, **kwargs):
            with MacCounter() as counter:
                result = real(program, i, *args, **kwargs)
            if isinstance(program.steps[i].form, Opaque):
                inside[0] += counter.macs
            return result

        return call

    with monkeypatch.context() as patched:
        for name in ("forward_step", "vjp_step"):
            patched.setattr(reference, name, counting(getattr(reference, name)))
        patched.setattr(Watch, "compare", lambda *args: None)  # runs the live model from time to time
        with MacCounter() as counter:
            gradkern.jacobian(model, inputs, engine="kernel")
    return counter.macs / N, inside[0] / N


@pytest.mark.parametrize("name", ["cnn1d", "mlp", "lenet5", "lstm", "attention", "resnet1d_opaque", "squeeze_excite"])
def test_shares_agree_with_a_profile_of_the_call(name, monkeypatch):
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(N, dtype=torch.float64)
    plan = gradkern.explain(model, inputs, show=False)
    aten, opaque = profiled(model, inputs, monkeypatch)
    total = sum(step.macs for step in plan.steps)
    # The counter knows matrix products and convolutions; elementwise work outside the kernels is the plan's own count.
    rest = sum(s.macs for s in plan.steps if not is_product(s))
    assert 1 - plan.native_share >= 0.85 * aten / total - 0.01
    assert 1 - plan.native_share <= (aten + rest) / total + 0.01
    assert 1 - plan.fused_share <= (opaque + rest) / total + 0.01
    assert (plan.native_share == 1.0) <= (aten == 0)
    assert plan.native_share <= plan.fused_share


def is_product(step):
    """Of a recurrent layer, the counter sees no walk back through time: kernels of our own take it."""
    return step.form.startswith(("Contract(Dense", "Contract(k")) or "matmul" in step.op


def test_opaque_steps_are_never_free():
    case = CASES["lstm"]
    model, (x,) = case.build(), case.inputs(N)
    plan = gradkern.explain(model, x, show=False)
    step = next(s for s in plan.steps if "lstm" in s.op)
    lstm = next(m for m in model.modules() if isinstance(m, torch.nn.LSTM))
    weights = sum(math.prod(p.shape) for n, p in lstm.named_parameters() if n.startswith("weight"))
    steps = max(x.shape[1:])  # at most; the sequence may be either axis
    assert step.why
    assert weights * min(x.shape[1:]) <= step.macs / (2 + plan.seeds) <= weights * steps * 1.1
    assert plan.native_share < 1.0 == plan.fused_share  # all seeds in one walk through time


def test_rows_name_op_module_path_and_reason():
    case = CASES["resnet1d_opaque"]
    model, (x,) = case.build(), case.inputs(N)
    plan = gradkern.explain(model, x, show=False)
    step = next(s for s in plan.steps if "logcumsumexp" in s.op)
    assert step.path.startswith("autograd")
    assert step.module in dict(model.named_modules())
    assert step.why in str(plan)
    for row in plan.steps:
        assert row.form.split("(")[0] in str(plan)
        assert row.path


def test_explain_counts_the_seeds_of_its_targets():
    case = CASES["maxpool1d"]
    model, (x,) = case.build(), case.inputs(N)
    one, every = (gradkern.explain(model, x, targets, show=False) for targets in ([0], None))
    assert (one.seeds, every.seeds) == (1, 3)
    assert sum(s.macs for s in one.steps) < sum(s.macs for s in every.steps)


def test_explain_prints_its_table_unless_show_is_false(capsys):
    model, (x,) = net("maxpool1d")
    plan = gradkern.explain(model, x)
    assert str(plan) in capsys.readouterr().out
    layers = ["Contract", "Scale", "Select", "Contract", "Scale", "View", "Contract"]
    assert [row.form.split("(")[0] for row in plan.steps] == layers
    assert plan.native_share == plan.fused_share == 1.0
    gradkern.explain(model, x, [0], show=False)
    assert capsys.readouterr().out == ""


def test_explain_of_a_model_on_autograd():
    model, (x,) = net()
    model[0].register_full_backward_hook(lambda *a: None)
    plan = gradkern.explain(model, x, show=False)
    assert "hook" in str(plan)
    assert plan.fused_share == plan.native_share == 0.0
    assert len(plan.steps) == 0


def test_the_engine_that_holds_is_explained() -> None:
    model, inputs = net("maxpool1d")
    with gradkern.use("autograd"):
        said = gradkern.explain(model, inputs, show=False)
    assert "the engine is 'autograd'" in str(said)
    assert str(gradkern.explain(model, inputs, engine="autograd", show=False)) == str(said)
    assert gradkern.explain(model, inputs, show=False).native_share > 0


def test_the_inputs_that_are_asked_for_are_explained() -> None:
    model, inputs = net("two_inputs")
    sizes = [x[0].numel() for x in inputs]
    for wrt, tangents in ((0, sizes[0]), (1, sizes[1]), (None, sum(sizes))):  # the direction depends on them
        plan = gradkern.explain(model, inputs, show=False, **({} if wrt is None else {"wrt": wrt}))
        assert plan.direction.tangents == tangents
        assert f" from {tangents} inputs: " in str(plan)
    with pytest.raises(ValueError, match="wrt"):
        gradkern.explain(model, inputs, wrt=2, show=False)
