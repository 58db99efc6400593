"""Users' own rules for DeepLift, by module type or function, and the part of a Program that each covers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.program import Program, Scale
from ...util.options import BadType, BadValue

#: Takes ``(x, x_ref, y, y_ref)`` to the multiplier, all of one shape ``[N, *shape]``.
UserRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_modules: dict[type[nn.Module], UserRule] = {}
_functions: dict[str, UserRule] = {}


def register_rule(of: type[nn.Module] | Callable[..., Any] | str, rule: UserRule | None) -> None:
    """Register a DeepLift rule for a module type or a function, in this process; None removes it.

    ``of``: a subclass of `torch.nn.Module` (its subclasses are meant too), or a torch function, such as
    ``torch.nn.functional.gelu``, or its ATen name, such as ``"gelu"``.  ``rule(x, x_ref, y, y_ref)`` gets its input and
    result, at the input and at the reference, and returns the multiplier ``Δy / Δx`` of every number; all are
    ``[N, *shape]``.  So input and result must have one shape.  A multiplier completes if ``multiplier * (x - x_ref)``
    is ``y - y_ref``.

        register_rule(nn.GELU, lambda x, x_ref, y, y_ref: (y - y_ref) / (x - x_ref + 1e-12))

    A module's rule comes before a function's.  Captum's own method (``rules="captum"``) does not know these rules.
    Raises `BadType` for anything else, and `BadValue` for a function that is not an operation of ATen.
    """
    if rule is not None and not callable(rule):
        raise BadType(
            f"rule: got {type(rule).__name__}, expected a function (x, x_ref, y, y_ref) -> multiplier, or None."
        )
    if isinstance(of, type) and issubclass(of, nn.Module):
        _put(_modules, of, rule)
        return
    name = of if isinstance(of, str) else getattr(of, "__name__", None)
    if isinstance(of, torch._ops.OpOverload):
        name = str(of._schema.name).partition("::")[2]
    if name is None or isinstance(of, type) or not (isinstance(of, str) or callable(of)):
        raise BadType(
            f"of: got {of!r}, expected a subclass of torch.nn.Module, a torch function such as torch.tanh, or the name "
            "of one, such as 'tanh'."
        )
    name = name.removeprefix("aten.").partition(".")[0]
    if not hasattr(torch.ops.aten, name):
        raise BadValue(
            f"of: got the function {name!r}, which is not an operation of ATen. Register a rule for the module that "
            "calls it, or for an operation that torch.ops.aten has."
        )
    _put(_functions, name, rule)


def _put(table: dict[Any, UserRule], key: Any, rule: UserRule | None) -> None:
    if rule is None:
        table.pop(key, None)
    else:
        table[key] = rule


@dataclass(frozen=True)
class RuledSteps:
    """The steps of a module or function, from the one value that they read to the value of the last of them."""

    name: str
    entry: int
    steps: tuple[int, ...]
    rule: UserRule

    def multiplier(self, x: Tensor, x_ref: Tensor, y: Tensor, y_ref: Tensor) -> Tensor:
        """The user's multiplier, checked."""
        if x.shape != y.shape:
            raise BadValue(
                f"The rule for {self.name}: its input has the shape {tuple(x.shape)} and its result "
                f"{tuple(y.shape)}; a rule for DeepLift needs one shape."
            )
        multipliers = self.rule(x, x_ref, y, y_ref)
        if not isinstance(multipliers, Tensor) or multipliers.shape != x.shape:
            got = (
                f"a tensor {tuple(multipliers.shape)}"
                if isinstance(multipliers, Tensor)
                else type(multipliers).__name__
            )
            raise BadValue(f"The rule for {self.name} returned {got}, expected a tensor {tuple(x.shape)}.")
        return multipliers.to(x.dtype)


def ruled_steps(program: Program, model: nn.Module | None) -> list[RuledSteps]:
    """The parts of a Program that have a user's rule."""
    if not _modules and not _functions:
        return []
    matched, taken = [], set[int]()
    for name, steps, rule in (*_of_modules(program, model), *_of_functions(program)):
        if taken.isdisjoint(steps):
            taken.update(steps)
            matched.append(_ruled_steps(program, name, steps, rule))
    return matched


def _of_modules(program: Program, model: nn.Module | None) -> Iterator[tuple[str, list[int], UserRule]]:
    for path, module in model.named_modules() if model is not None and _modules else ():
        rule = next((_modules[kind] for kind in type(module).__mro__ if kind in _modules), None)
        if rule is None:
            continue
        inside = [i for i, s in enumerate(program.steps) if not path or f"{s.module}.".startswith(f"{path}.")]
        if inside:
            yield f"{type(module).__name__} at {path or 'the top'}", inside, rule


def _of_functions(program: Program) -> Iterator[tuple[str, list[int], UserRule]]:
    """Consecutive steps of one call: a lowering may write several."""
    i = 0
    while i < len(program.steps) and _functions:
        step, run = program.steps[i], [i]
        name = step.op.removeprefix("aten.").partition(".")[0]
        if name not in _functions and isinstance(step.form, Scale) and step.form.function in _functions:
            name = step.form.function
        elif name in _functions and len(step.inputs) == 1:
            while _continues(program, run, i + len(run)):
                run.append(i + len(run))
        if name in _functions:
            yield name, run, _functions[name]
        i += len(run)


def _continues(program: Program, run: list[int], k: int) -> bool:
    """Whether step ``k`` belongs to the same call as ``run``; of two calls in a row, both begin with the same form."""
    if k >= len(program.steps):
        return False
    step, last = program.steps[k], program.steps[run[-1]]
    return (step.op, step.module) == (last.op, last.module) and step.form != last.form


def _ruled_steps(program: Program, name: str, steps: list[int], rule: UserRule) -> RuledSteps:
    base = len(program.inputs)
    made = {base + i for i in steps}
    entries = {v for i in steps for v in program.steps[i].inputs} - made
    exits = {v for v in made if v == program.output or not made.issuperset(base + k for k in program.consumers[v])}
    if len(entries) != 1 or exits != {base + steps[-1]}:
        raise BadValue(
            f"The rule for {name}: it reads {len(entries)} values and gives {len(exits)}; a rule for DeepLift needs "
            "one of each."
        )
    return RuledSteps(name, entries.pop(), tuple(steps), rule)
