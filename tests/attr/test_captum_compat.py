"""Captum's private names in one place, and Captum's own classes wherever a user puts gradkern's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern import attr as ours
from gradkern.attr import captum_compat

PACKAGE = Path(gradkern.__file__).parent
COMPAT = PACKAGE / "attr" / "captum_compat.py"
pytestmark = [pytest.mark.filterwarnings("ignore")]


def private_imports(source: str) -> Iterator[str]:
    """Imports from Captum that Captum does not document."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "captum" and (rest[:1] == ["log"] or any(part.startswith("_") for part in rest)):
                yield name


def test_one_file_imports_private_names() -> None:
    files = {path: list(private_imports(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert files.pop(COMPAT)
    assert not {path.name: names for path, names in files.items() if names}


def test_a_planted_import_is_seen() -> None:
    for line in ("from captum._utils import common", "import captum.log", "from captum.attr import _core"):
        assert list(private_imports(line))
    assert not list(private_imports("from captum.attr import Saliency\nfrom captum import attr"))


def loaded() -> ModuleType:
    """The file once more, as a module of its own."""
    spec = importlib.util.spec_from_file_location("captum_compat_again", COMPAT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("captum._utils.common", "_is_tuple"),
        ("captum.log", "log_usage"),
        ("captum.attr.NoiseTunnel", "_expand_partial"),
    ],
)
def test_a_captum_that_lacks_a_name(place: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded().TRIED
    monkeypatch.delattr(f"{place}.{name}")
    with pytest.raises(
        ImportError, match=rf"captum {captum.__version__} lacks one: .*{name}.*pip install 'captum=="
    ) as e:
        loaded()
    assert captum_compat.TRIED[-1] in str(e.value)


class SmallCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.act(self.conv(x))).flatten(1))


def options_of(name: str, x: torch.Tensor) -> dict[str, object]:
    return {
        "IntegratedGradients": {"n_steps": 4},
        "GradientShap": {"baselines": x[:2], "n_samples": 2, "stdevs": 0.1},
        "NoiseTunnel": {"nt_samples": 2, "stdevs": 0.1},
        "DeepLiftShap": {"baselines": x[:2]},
        "InternalInfluence": {"n_steps": 4},
        "LayerConductance": {"n_steps": 4},
        "LayerIntegratedGradients": {"n_steps": 4},
        "LayerDeepLiftShap": {"baselines": x[:2]},
        "LayerGradientShap": {"baselines": x[:2], "n_samples": 2, "stdevs": 0.1},
        "NeuronConductance": {"n_steps": 4},
        "NeuronDeepLiftShap": {"baselines": x[:2]},
        "NeuronGradientShap": {"baselines": x[:2], "n_samples": 2, "stdevs": 0.1},
        "NeuronIntegratedGradients": {"n_steps": 4},
    }.get(name, {}) | ({"neuron_selector": (1, 2, 3)} if name.startswith("Neuron") else {})


def attributed(name: str, x: torch.Tensor, accelerate: bool = False) -> torch.Tensor:
    """What the class of that name in `captum.attr` gives now."""
    torch.manual_seed(0)
    model = SmallCnn().double().eval()
    kind = getattr(captum.attr, name)
    if name == "NoiseTunnel":
        method = kind(captum.attr.IntegratedGradients(model))
    elif name.startswith(("Layer", "Neuron", "Internal")) or name == "GuidedGradCam":
        method = kind(model, model.conv)
    else:
        method = kind(model)
    if accelerate:
        gradkern.accelerate(method, engine="kernel")
    np.random.seed(0)
    target = {} if name.startswith("Neuron") and name != "NeuronConductance" else {"target": 1}
    return method.attribute(x, **target, **options_of(name, x))


NAMES = [kind.__name__ for kind in ours.REPLACEMENTS]


@pytest.mark.slow
@pytest.mark.parametrize("modules", ["captum.attr", "everywhere"])
def test_captums_classes_swapped_for_ours(modules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``captum.attr.X = gradkern.attr.X`` for all X, in the modules that define them too: no method recurses."""
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = {name: attributed(name, x) for name in NAMES}
    for name in NAMES:
        monkeypatch.setattr(captum.attr, name, getattr(ours, name))
        if modules == "everywhere":
            place = getattr(captum_compat.stock, name).__module__
            monkeypatch.setattr(importlib.import_module(place), name, getattr(ours, name))
    for engine in ("kernel", "autograd"):  # on the engine, and handed to Captum's own
        with gradkern.use(engine):
            for name in NAMES:
                assert getattr(captum.attr, name) is getattr(ours, name)
                torch.testing.assert_close(attributed(name, x), want[name], rtol=1e-10, atol=1e-12)
    for name in NAMES:
        torch.testing.assert_close(attributed(name, x, accelerate=True), want[name], rtol=1e-10, atol=1e-12)


def test_replacements_are_exported_under_captums_names() -> None:
    for captums, replacement in ours.REPLACEMENTS.items():
        assert issubclass(replacement, captums)
        assert replacement.__name__ == captums.__name__
        assert replacement.__name__ in ours.__all__
