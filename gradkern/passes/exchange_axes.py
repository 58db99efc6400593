"""Exchanges rows and columns: time along rows, ``[C, T, E]`` with windows ``k×1``, becomes time along columns.

The CPU kernels store a value as ``[row][column][channel]``.  The numbers of a window 1×k over few channels are then
neighbours, and those of a window k×1 are rows apart, so that each is loaded and stored by itself.  Networks for EEG are
often written with windows k×1 over one channel.  Exchanging rows and columns of all values around such windows costs
nothing inside the network, and a copy at either end, or none where an axis has been pooled to length one.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir import indexing
from ..ir import program as ir
from ..ir.graph import renumber
from ..util.memo import Memo

FEW_NUMBERS = 8  # neighbouring numbers of a window that do not fill a vector
LONG = 8  # numbers of a window along rows that are worth copies

EXCHANGED = (0, 2, 1)

_exchanged: Memo[ir.Program] = Memo(256)


def exchange_axes(program: ir.Program) -> ir.Program:
    """``program`` with rows and columns exchanged around long windows along rows; unchanged if there are none."""
    if not any(has_long_rows(program, step) for step in program.steps):
        return program
    return _exchanged.get_or_make(program.key, lambda: AxisExchange(program).write())


def has_long_rows(program: ir.Program, step: ir.Step) -> bool:
    """Whether windows whose numbers are rows apart slide along rows, although there would be a vector of neighbours.

    A window over all rows, such as a filter over the electrodes of an EEG, stays: its one row of results takes less
    time than the copies would (an EEGNet 0.83 times, on one thread of an AMD EPYC with AVX2).
    """
    match step.form:
        case ir.Contract(map=ir.Windows(kernel=(rows, 1), groups=groups)):
            channels, _, columns = program.shape(step.inputs[0])
            return rows >= LONG and step.shape[1] > 1 and columns > 1 and channels // groups < FEW_NUMBERS
    return False


def exchanged_form(form: ir.Form, shape: ir.Shape) -> ir.Form | None:
    """A form over values ``[C, H, W]`` as one over ``[C, W, H]``; None if there is none.  ``shape``: of the result."""
    if len(shape) != 3:
        return None
    match form:
        case ir.Contract(map=ir.Windows(kernel=(rows, columns)) as w) if 1 in (rows, columns):
            return replace(form, map=_windows(w))  # the weight [O, C, k, 1] has the same memory as [O, C, 1, k]
        case ir.Contract(map=ir.Positions(axes=(rows, columns))):
            return replace(form, map=ir.Positions((columns, rows)))
        case ir.Select(windows=ir.Windows(kernel=(1, _) | (_, 1)) as w):  # of equal maxima the same one is the first
            return replace(form, windows=_windows(w))
        case ir.Contract(map=ir.Channels(axis=0)) | ir.Scale() | ir.Sum():
            return form
    return None


def _windows(w: ir.Windows) -> ir.Windows:
    return ir.Windows(w.kernel[::-1], w.stride[::-1], w.padding[::-1], w.dilation[::-1], w.groups)


class AxisExchange:
    """Rewrites a program.  ``plain`` and ``exchanged``: the new values of an old one, as it was and exchanged."""

    def __init__(self, program: ir.Program) -> None:
        self.program, self.base = program, len(program.inputs)
        self.steps: list[ir.Step] = []
        self.plain, self.exchanged = {v: v for v in range(self.base)}, dict[int, int]()

    def write(self) -> ir.Program:
        for v, step in enumerate(self.program.steps, start=self.base):
            form = exchanged_form(step.form, step.shape)
            long = has_long_rows(self.program, step)
            if form is not None and (long or any(x not in self.plain for x in step.inputs)):
                reads = tuple(self.get(x, self.plain, self.exchanged, step) for x in step.inputs)
                self.exchanged[v] = self.emit(replace(step, form=form, inputs=reads, shape=_swapped(step.shape)))
            else:
                number = {x: self.as_plain(x, step) for x in step.inputs}
                self.plain[v] = self.emit(renumber(step, number))
        output = self.as_plain(self.program.output, self.program.steps[-1])
        return replace(self.program, steps=tuple(self.steps), output=output)

    def emit(self, step: ir.Step) -> int:
        self.steps.append(step)
        return self.base + len(self.steps) - 1

    def as_plain(self, value: int, like: ir.Step) -> int:
        return self.get(value, self.exchanged, self.plain, like)

    def get(self, value: int, made: dict[int, int], other: dict[int, int], like: ir.Step) -> int:
        """The new value in ``other``, made from that in ``made`` if need be, for a step ``like``."""
        if value not in other:
            shape = self.program.shape(value)
            if made is self.exchanged:
                shape = _swapped(shape)
            # An axis of length one makes the order the same.
            form = ir.View() if 1 in shape[1:] else ir.Index((indexing.identity(shape, EXCHANGED),))
            other[value] = self.emit(ir.Step(form, (made[value],), _swapped(shape), like.op, like.module))
        return other[value]


def _swapped(shape: ir.Shape) -> ir.Shape:
    channels, rows, columns = shape
    return channels, columns, rows
