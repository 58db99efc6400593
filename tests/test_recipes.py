"""`docs/recipes.md` as it is written: a made-up activation needs the places that the page names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from gradkern.codegen import support
from gradkern.frontend.lowerings.activation import elementwise
from gradkern.frontend.lowerings.builder import AXES, LOWERINGS, lowers
from gradkern.ir.functions import FUNCTIONS, Function
from gradkern.runtime import executor
from tests.support import capturing, oracle
from tests.support.capturing import bind

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LIST = r"#define GRADKERN_FUNCTIONS\(X\).*?[^\\]\n"
CPP = re.findall(r"```cpp\n(.*?)```", PAGE, re.S)


def value(x):
    return x * x.abs() / (1 + x.abs())


def slope(x):
    return x.abs() * (2 + x.abs()) / (1 + x.abs()) ** 2


@pytest.fixture
def made_up():
    """The op of the page, and what the page's blocks register; all of it is taken back."""
    op = torch.library.custom_op("gradkern_test::up", value, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_fake(torch.empty_like)
    op.register_autograd(
        lambda ctx, g: g * slope(*ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    name = "gradkern_test.up.default"
    for block in PYTHON:
        if "softsign_squared" in block:
            scope = {"FUNCTIONS": FUNCTIONS, "Function": Function, "lowers": lowers, "elementwise": elementwise}
            exec(block.replace("made.up.default", name), scope)
    yield torch.ops.gradkern_test.up
    FUNCTIONS.pop("softsign_squared", None)
    LOWERINGS.pop(name, None)
    AXES.pop(name, None)


class Net(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op, self.first, self.last = op, nn.Conv1d(2, 4, 3), nn.Linear(4 * 6, 3)

    def forward(self, x):  # [N, 2, 8] -> [N, 3]
        return self.last(self.op(self.first(x)).flatten(1))


def test_two_places_make_it_right(made_up):
    torch.manual_seed(0)
    model, x = Net(made_up).double().eval(), torch.randn(2, 2, 8, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    capturing.verify(program, model, (x,))
    (got,) = executor.jacobian(program, bind(program, model), (x,))[1]
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) <= 1e-10
    found = executor.plan_for(program, 3, torch.float64)
    assert found.fused_share == 1.0
    assert "the function softsign_squared has no kernel yet" in str(found)


def test_third_place_is_the_functor(tmp_path):
    """The page's functor, put where the page says, compiles and computes what the page's Python does."""
    header = (ROOT / "csrc" / "elementwise.h").read_text()
    named = re.search(LIST, header, re.S)[0].rstrip()
    marked = header.replace(named, named + " X(softsign_squared)")
    end = marked.rindex("}  // namespace gradkern")
    (tmp_path / "elementwise.h").write_text(marked[:end] + CPP[0] + marked[end:])
    (tmp_path / "main.cpp").write_text(
        '#include "elementwise.h"\n#include <cstdio>\n#include <initializer_list>\nusing namespace gradkern;\n'
        "int main() { for (double x : {-2.0, -0.3, 0.0, 0.7, 3.0}) {\n"
        "  const auto r = Function<Fn::softsign_squared>::at(x, 0.0, 0.0, 0.0);\n"
        '  std::printf("%.17g %.17g %.17g\\n", x, r.y, r.d); } }\n'
    )
    subprocess.run(["c++", "-std=c++20", "-O1", "-o", "run", "main.cpp"], cwd=tmp_path, check=True)
    lines = subprocess.run(["./run"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    x, y, d = torch.tensor([float(n) for n in lines], dtype=torch.float64).reshape(-1, 3).T
    torch.testing.assert_close(y, value(x))
    torch.testing.assert_close(d, slope(x))


def test_names_stand_in_the_same_order():
    found = re.search(LIST, (ROOT / "csrc" / "elementwise.h").read_text(), re.S)[0]
    assert re.findall(r"X\((\w{2,})\)", found) == list(support.NATIVE_FUNCTIONS)
