"""``output=``: which tensor to explain if a model returns several (in a tuple, dict or dataclass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .integers import as_int
from .options import BadType, BadValue

Output = int | str | Callable[[Any], Tensor] | None
HINT = (
    "Pass output= (an index, a name, or a function of what the model returns). Wrap the model in a module if no part "
)
HINT += "of it is the tensor to explain."


@dataclasses.dataclass(frozen=True)
class Sums:
    """A value for ``output=``: sums over ``windows`` of the last axis, so that groups of positions are the targets.

    The windows are pairs ``(first, stop)``; a model with outputs ``[N, *out]`` then has ``[N, *out[:-1], windows]``.
    ``of``: which tensor is summed if the model returns several, chosen as by ``output=``.
    """

    windows: Sequence[tuple[int, int]]
    of: Output = None

    def __post_init__(self) -> None:
        try:
            windows = tuple((int(a), int(b)) for a, b in self.windows)
        except (TypeError, ValueError):
            windows = ()
        if not windows or any(a < 0 or b <= a for a, b in windows):
            raise BadValue(f"Sums: got {self.windows!r}, expected pairs (first, stop) with 0 <= first < stop.")
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "of", check_output_choice(self.of))

    def __call__(self, result: Any) -> Tensor:
        y = choose_output(result, self.of)
        last = max(stop for _, stop in self.windows)
        if not isinstance(y, Tensor) or y.dim() < 2 or last > y.shape[-1]:
            got = f"a tensor {list(y.shape)}" if isinstance(y, Tensor) else describe_result(y)
            raise BadValue(f"Sums: the model returned {got}, expected [N, …, length] with at least {last} positions.")
        return torch.stack([y[..., a:b].sum(-1) for a, b in self.windows], -1)

    def __str__(self) -> str:
        return f"sums over {', '.join(f'{a}:{b}' for a, b in self.windows)} of {output_name(self.of)}"


def check_output_choice(output: Any) -> Output:
    """``output``, if it is a valid choice; a number as an int."""
    number = as_int(output)
    if number is not None:
        return number
    if not (output is None or isinstance(output, str) or callable(output)):
        raise BadType(
            f"output: got {output!r} ({type(output).__name__}), expected an index (int), a name (str), or a function "
            "of what the model returns."
        )
    return output


def choose_output(result: Any, output: Output) -> Any:
    """The part of a model's ``result`` that ``output`` names; all of it if that is None."""
    if output is None:
        return result
    if not isinstance(output, (int, str)):
        return output(result)
    if isinstance(output, str):
        if isinstance(result, dict) and output in result:
            return result[output]
        if not isinstance(result, (dict, Tensor)) and hasattr(result, output):
            return getattr(result, output)
    elif isinstance(result, (tuple, list)):
        if -len(result) <= output < len(result):
            return result[output]
    elif isinstance(result, dict) and dataclasses.is_dataclass(result) and 0 <= output < len(result):
        return list(result.values())[output]
    raise BadValue(f"output: got {output!r}, but the model returned {describe_result(result)}.")


def describe_result(result: Any) -> str:
    """A description of what a model returned, which shows the choices for ``output=``."""
    if isinstance(result, Tensor):
        return f"one tensor {list(result.shape)}: leave output= out, or pass a function"
    kind = type(result).__name__
    names = list(result) if isinstance(result, dict) else list(getattr(result, "_fields", ()))
    if not names and dataclasses.is_dataclass(result):
        names = [field.name for field in dataclasses.fields(result)]
    if names:
        return f"{kind} with the names {', '.join(map(repr, names))}"
    return f"{kind} of {len(result)}" if isinstance(result, (tuple, list)) else kind


def output_key(output: Output) -> Hashable:
    """A key that is equal for equal choices of an output; functions are compared by their code."""
    output = check_output_choice(output)
    return output if output is None or isinstance(output, (int, str)) else getattr(output, "__code__", output)


def output_name(output: Output) -> int | str | None:
    """A choice of an output as plain data."""
    output = check_output_choice(output)
    if output is None or isinstance(output, (int, str)):
        return output
    if isinstance(output, Sums):
        return str(output)
    return f"{getattr(output, '__module__', '')}:{getattr(output, '__qualname__', type(output).__qualname__)}"


class OneOutput(nn.Module):
    """A module that returns the part ``output`` of a model's result."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model, self.output = model, check_output_choice(output)
        self.training = model.training

    def forward(self, *inputs: Any) -> Any:
        return choose_output(self.model(*inputs), self.output)
