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
    scaled = torch.library.custom_op(
        "gradkern_test::up_scaled", lambda x, scale: scale * x / (1 + x.abs()), mutates_args=(),
        schema="(Tensor x, float scale) -> Tensor",
    )  # fmt: skip
    scaled.register_fake(lambda x, scale: torch.empty_like(x))
    scaled.register_autograd(
        lambda ctx, g: (g * ctx.scale / (1 + ctx.saved_tensors[0].abs()) ** 2, None), setup_context=save_both
    )
    tables = FUNCTIONS, LOWERINGS, AXES
    before = [dict(table) for table in tables]
    scope = {"FUNCTIONS": FUNCTIONS, "Function": Function, "lowers": lowers, "elementwise": elementwise}
    try:
        LOWERINGS.pop("aten.glu.default")  # the page registers its own
        for block in PYTHON:
            named = block.replace("made.up.default", "gradkern_test.up.default")
            exec(named.replace("made.up.scaled", "gradkern_test.up_scaled.default"), scope)
        yield torch.ops.gradkern_test
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)


def save_both(ctx, inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


class CallsNewOps(nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.ops, self.first, self.last = ops, nn.Conv1d(2, 8, 3), nn.Linear(4 * 6, 3)

    def forward(self, x):  # [N, 2, 8] -> [N, 3]
        x = nn.functional.glu(self.first(x), 1)
        return self.last(self.ops.up_scaled(self.ops.up(x), 1.5).flatten(1))


def test_layer_of_the_recipes_page_runs_as_the_page_says(made_up):
    torch.manual_seed(0)
    model, x = CallsNewOps(made_up).double().eval(), torch.randn(2, 2, 8, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    capturing.verify(program, model, (x,))
    (got,) = executor.jacobian(program, bind(program, model), (x,))[1]
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) <= 1e-10
    found = executor.plan_for(program, 3, torch.float64)
    assert found.fused_share == 1.0
    assert "the function softsign_squared has no kernel yet" in str(found)


def test_functor_of_the_recipes_page_computes_what_its_python_does(tmp_path):
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


def test_recipe_for_an_instruction_set_quotes_the_source():
    (excerpt,) = (block for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M) if not language)
    file = (ROOT / "csrc" / "cpu" / "isa_avx.cpp").read_text().splitlines()
    for line in excerpt.splitlines():
        assert any(line.partition("  //")[0] == known.partition("  //")[0] for known in file), line


def test_functions_have_one_order_in_python_and_in_the_kernels():
    found = re.search(LIST, (ROOT / "csrc" / "elementwise.h").read_text(), re.S)[0]
    assert re.findall(r"X\((\w{2,})\)", found) == list(support.NATIVE_FUNCTIONS)
