"""Captum's own test-suite on gradkern's classes: ``python tests/attr/captum_suite.py CHECKOUT [pytest arguments]``.

See captum_suite.md.  While a test module of the checkout is imported, the names of Captum's classes stand for ours;
afterwards they are Captum's again, so that Captum's own code goes on using its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: The test modules of the methods that gradkern has.
FILES = (
    *("saliency", "input_x_gradient", "integrated_gradients_basic", "integrated_gradients_classification"),
    *("gradient_shap", "guided_backprop", "deconvolution", "guided_grad_cam", "deeplift_basic"),
    *("deeplift_classification", "lrp", "targets", "hook_removal", "jit", "data_parallel"),
    *("layer/test_grad_cam", "layer/test_internal_influence", "layer/test_layer_conductance"),
    *("layer/test_layer_gradient_x_activation", "layer/test_layer_integrated_gradients"),
    "neuron/test_neuron_gradient",
)


#: Cases that expect what docs/captum.md says is different, by the end of their name.
DIFFERENT = {
    "test_deeplift_basic.py::Test::test_reusable_modules": "DeepLift works on reused activations; Captum raises",
}


class Swap:
    """A pytest plugin: test modules see gradkern's classes under Captum's names.  ``engine`` as in `gradkern.use`."""

    def __init__(self, engine: str | None) -> None:
        import gradkern
        from gradkern.attr import REPLACEMENTS

        self.twins, self.engine, self.use = REPLACEMENTS, engine, gradkern.use

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Iterator[None]:
        with self.swapped():
            yield

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            for name, reason in DIFFERENT.items():
                if item.nodeid.endswith(name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with self.use(self.engine):
            yield

    @contextmanager
    def swapped(self) -> Iterator[None]:
        places = []
        for stock in self.twins:
            for name in ("captum.attr", stock.__module__):
                places.append((importlib.import_module(name), stock))
        try:
            for module, stock in places:
                setattr(module, stock.__name__, self.twins[stock])
            yield
        finally:
            for module, stock in places:
                setattr(module, stock.__name__, stock)


def main(arguments: list[str]) -> int:
    engine = None
    if arguments and arguments[0].startswith("--engine="):
        engine = arguments.pop(0).removeprefix("--engine=")
    if not arguments or not (Path(arguments[0]) / "tests" / "attr").is_dir():
        print(__doc__)
        return 2
    checkout = Path(arguments.pop(0)).resolve()
    sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]
    import captum.attr  # noqa: F401  (the installed one, before the checkout's own directory is on the path)

    files = []
    for name in FILES:
        path = checkout / "tests" / "attr" / (f"{name}.py" if "/" in name else f"test_{name}.py")
        files += [str(path)] if path.exists() else []
    fixed = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={checkout}", "-W", "ignore"]
    return int(pytest.main([*fixed, *files, *arguments], plugins=[Swap(engine)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
