"""Small programs written by hand, for tests of the planner and of code generation."""

from __future__ import annotations

from gradkern.codegen.unit_graph import GraphBuilder
from gradkern.codegen.units import UnitGraph
from gradkern.ir.indexing import identity
from gradkern.ir.program import (
    Channels,
    Contract,
    Dense,
    Index,
    Param,
    Program,
    Scale,
    Select,
    Shape,
    Step,
    View,
    Windows,
)


def program(*steps: Step, output: int | None = None, inputs: tuple[Shape, ...] = ((4, 8),)) -> Program:
    """The steps in order; values are numbered from the inputs on.  ``output``: by default that of the last step."""
    return Program(inputs, steps, len(inputs) + len(steps) - 1 if output is None else output)


def windows(kernel: int, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Windows:
    return Windows((kernel,), (stride,), ((padding, padding),), (1,), groups)


def conv(kernel: int = 3, *, stride: int = 1, padding: int = 1, groups: int = 1, name: str = "w") -> Contract:
    form = windows(kernel, stride=stride, padding=padding, groups=groups)
    return Contract(form, Param(f"{name}.weight"), Param(f"{name}.bias"))


def linear(name: str = "f") -> Contract:
    return Contract(Dense(), Param(f"{name}.weight"), Param(f"{name}.bias"))


def norm(axis: int = 0, name: str = "n") -> Contract:
    return Contract(Channels(axis), Param(f"{name}.scale"), Param(f"{name}.shift"))


def pool(size: int, stride: int | None = None) -> Select:
    return Select(windows(size, stride=stride or size))


def transpose(shape: Shape) -> Index:
    """The axes of a matrix exchanged."""
    return Index((identity(shape, (1, 0)),))


RELU, GUIDED, TANH = Scale("relu"), Scale("guided_relu"), Scale("tanh")


def dense(o: int, i: int, source: int, name: str = "w") -> Step:
    return Step(Contract(Dense(), Param(f"{name}{o}x{i}")), (source,), (o,))


def classifier(activation: Scale = RELU, *, channels: int = 1) -> Program:
    """A convolution, an activation, and a linear layer with three outputs."""
    return program(
        Step(conv(), (0,), (4, 8)),
        Step(activation, (1,), (4, 8)),
        Step(View(), (2,), (32,)),
        Step(linear(), (3,), (3,)),
        inputs=((channels, 8),),
    )


def units_of(p: Program) -> UnitGraph:
    """The units and nodes of a whole program, with its output as the only result."""
    return GraphBuilder(p, list(range(len(p.steps))), [p.output]).build()
