"""Models that return several tensors: ``output=`` in every call, and errors that say so without it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern import attr

pytestmark = pytest.mark.real_export
N = 4
Pair = namedtuple("Pair", "hidden logits")


@dataclass
class Plain:
    hidden: Tensor
    logits: Tensor


@dataclass
class DictLike(OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict, too, as the outputs of Hugging Face's models are."""

    hidden: Any = None
    logits: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            self[field.name] = getattr(self, field.name)


MAKE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda h, y: (h, y),
    "list": lambda h, y: [h, y],
    "dict": lambda h, y: {"hidden": h, "logits": y},
    "named tuple": Pair,
    "dataclass": Plain,
    "dict-like": DictLike,
}
#: The outputs that choose the logits, by what the model returns.
CHOICES: dict[str, list[Any]] = {
    "tuple": [1, -1, lambda r: r[1]],
    "list": [1, lambda r: r[-1]],
    "dict": ["logits", lambda r: r["logits"]],
    "named tuple": [1, "logits"],
    "dataclass": ["logits", lambda r: r.logits],
    "dict-like": ["logits", 1],
}
WRONG: dict[str, list[Any]] = {
    "tuple": [2, -3, "logits"],
    "list": [2, "logits"],
    "dict": ["nothing", 0],
    "named tuple": ["nothing", 7],
    "dataclass": ["nothing", 0],
    "dict-like": ["nothing", 5],
}


class SeveralOutputs(nn.Module):
    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self.first, self.act, self.last, self.kind = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), kind

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.first(x))
        y = self.last(h)
        return y if self.kind is None else MAKE[self.kind](h, y)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(kind: str | None) -> nn.Module:
    torch.manual_seed(0)
    return SeveralOutputs(kind).double().eval()


def drawn_anew() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["kernel", "autograd"])
@pytest.mark.parametrize("kind", MAKE)
def test_jacobian_of_one_of_several_outputs(kind: str, engine: Any, x: Tensor) -> None:
    model, want = net(kind), gradkern.jacobian(net(None), x, engine="autograd")
    for output in CHOICES[kind]:
        options: dict[str, Any] = {"engine": engine, "output": output}
        same(gradkern.jacobian(model, x, **options), want)
        same(torch.cat(list(gradkern.iter_jacobian(model, x, chunk=3, **options))), want)
        assert gradkern.check(model, x, **options).worst < 1e-10
    if engine == "kernel":
        assert gradkern.prepare(model, x, output=CHOICES[kind][0]).program is not None
        assert gradkern.explain(model, x, output=CHOICES[kind][0], show=False).fused_share == 1.0
        assert gradkern.jacobian(model, x, output=lambda r: MAKE[kind](1, 2) and hidden_of(r)).shape == (N, 5, 6)


def hidden_of(result: Any) -> Tensor:
    if isinstance(result, (tuple, list)):
        return result[0]
    return result["hidden"] if isinstance(result, dict) else result.hidden


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["kernel", "autograd"])
@pytest.mark.parametrize("name", [kind.__name__ for kind in attr.REPLACEMENTS])
def test_every_method(name: str, engine: Any, x: Tensor) -> None:
    found = []
    options: dict[str, Any] = {"baselines": x[:3]} if name.endswith("Shap") else {}
    options |= {"neuron_selector": 1} if name.startswith("Neuron") else {}
    target = {} if name.startswith("Neuron") and name != "NeuronConductance" else {"target": 1}
    for model, choice in ((net("dict"), {"output": "logits"}), (net(None), {})):
        kind = getattr(attr, name)
        layer = [model.act] if name == "GuidedGradCam" or name.startswith(("Layer", "Neuron", "Internal")) else []
        layer = [model.first] if name == "LayerLRP" else layer
        if name == "NoiseTunnel":
            method = kind(attr.Saliency(model, engine=engine, **choice))
        else:
            method = kind(model, *layer, engine=engine, **choice)
        drawn_anew()
        one = method.attribute(x, **target, **options)
        drawn_anew()
        found.append((one, method.attribute_all(x, **options) if hasattr(method, "attribute_all") else None))
    same(found[0], found[1])


@pytest.mark.parametrize("kind", MAKE)
def test_wrong_choice_of_an_output_is_an_error_that_names_the_outputs(kind: str, x: Tensor) -> None:
    model = net(kind)
    without: list[Callable[[], Any]] = [
        lambda: gradkern.jacobian(model, x),
        lambda: gradkern.jacobian(model, x, engine="kernel"),
        lambda: list(gradkern.iter_jacobian(model, x)),
        lambda: gradkern.prepare(model, x),
        lambda: gradkern.explain(model, x, show=False),
        lambda: gradkern.check(model, x),
        lambda: gradkern.jacobian(model, x[:0]),
        lambda: attr.Saliency(model).attribute_all(x),
        lambda: attr.IntegratedGradients(model).attribute_all(x),
        lambda: attr.DeepLift(model).attribute_all(x),
        lambda: attr.LayerGradCam(model, model.first).attribute_all(x),
        lambda: attr.NoiseTunnel(attr.Saliency(model)).attribute_all(x),
        lambda: attr.GuidedGradCam(model, model.first).attribute_all(x),
    ]
    for call in without:
        with pytest.raises(TypeError, match=r"the model returned .*output="):
            call()
    for output in WRONG[kind]:
        with pytest.raises(ValueError, match=r"output: got .*the model returned"):
            gradkern.jacobian(model, x, output=output)
        with pytest.raises(ValueError, match=r"output: got .*the model returned"):
            attr.IntegratedGradients(model, output=output).attribute_all(x)
    for output in (True, 1.5, [0]):
        with pytest.raises(TypeError, match="output: got"):
            gradkern.jacobian(model, x, output=output)
        with pytest.raises(TypeError, match="output: got"):
            attr.Saliency(model, output=output)


def test_a_single_tensor_has_no_parts(x: Tensor) -> None:
    for output in (0, "logits"):
        with pytest.raises(ValueError, match=r"one tensor .*leave output= out"):
            gradkern.jacobian(net(None), x, output=output)
    twice = gradkern.jacobian(net(None), x, output=lambda y: 2 * y)
    same(twice, 2 * gradkern.jacobian(net(None), x))


def test_choices_of_one_model_are_kept_apart(x: Tensor) -> None:
    """Each choice has its own graph; what a function refers to is guarded."""
    model, scale = net("tuple"), 1.0
    want = gradkern.jacobian(net(None), x, engine="autograd")

    def scaled(result: Any) -> Tensor:
        return result[1] * scale

    for _ in range(2):
        same(gradkern.jacobian(model, x, engine="kernel", output=np.int64(1)), want)
        assert gradkern.jacobian(model, x, engine="kernel", output=0).shape == (N, 5, 6)
    for scale in (1.0, 3.0, 1.0):
        same(gradkern.jacobian(model, x, engine="kernel", output=scaled), want * scale)
