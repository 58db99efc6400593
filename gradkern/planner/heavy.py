"""Layers that a chain on a CPU would slow down: it reads their weights from memory again for every sample.

A chain takes a layer sample by sample, which is fast where the weights stay in a core's cache, or where a sample has
many positions that share them.  Neither holds for wide layers over few positions (a transformer of 1536 features over
12 tokens), for which torch's matrix product takes all samples and seeds together.  If most of a network's work is in
such layers, they run between chains.
"""

from __future__ import annotations

import math

from ..codegen.caches import HEAVY_POSITIONS, HEAVY_WEIGHTS
from ..codegen.support import RELUS
from ..ir.macs import forward_macs
from ..ir.program import Channels, Contract, Dense, Program, Scale, Select, Step, Sum, View, Windows

MOST_OF_THE_WORK = 0.5  # cutting a network for less costs more than it saves: chains repeat their forward pass


def heavy_layers(program: Program) -> dict[int, str]:
    """Such layers by step, with the reason; none if they are a small part of the network's multiply-adds."""
    macs = [forward_macs(program, i) for i in range(len(program.steps))]
    rectified = _rectified(program)
    found = {}
    for i, step in enumerate(program.steps):
        positions = _positions(step)
        weights = macs[i] // positions if positions else 0
        if 1 < positions <= HEAVY_POSITIONS and weights > HEAVY_WEIGHTS and not rectified[i]:
            found[i] = f"a chain would read its {weights / 1e6:.1f} million weights anew for every sample"
    return found if sum(macs[i] for i in found) > MOST_OF_THE_WORK * sum(macs) else {}


def too_heavy_reason(program: Program, i: int) -> str | None:
    """Why a contraction should not be part of a chain on a GPU, although it might fit one; None if it should.

    A block reads the weight for its own few samples, and reading a mebibyte from L2 takes a multiprocessor about 40,000
    clocks.  The limit has not been measured.
    """
    step = program.steps[i]
    form = step.form
    if not isinstance(form, Contract) or form.weight is None or not isinstance(form.map, (Dense, Windows)):
        return None
    axis = -1 if isinstance(form.map, Dense) else 0
    weights = program.shape(step.inputs[0])[axis] * step.shape[axis]
    if isinstance(form.map, Windows):
        weights = weights // form.map.groups * form.map.taps
    if weights <= HEAVY_WEIGHTS:
        return None
    return f"a chain would read its {weights / 1e6:.1f} million weights anew for every few samples"


def _positions(step: Step) -> int:
    """How often a layer uses each of its weights in one sample; 0 of other steps."""
    match step.form:
        case Contract(map=Dense()):
            return math.prod(step.shape[:-1])
        case Contract(map=Windows()):
            return math.prod(step.shape[1:])
    return 0


def _rectified(program: Program) -> list[bool]:
    """Per step, whether every reader of its result is a ReLU or a max pool, of whose cotangents a chain skips zeros."""
    base, rectified = len(program.inputs), [False] * len(program.steps)
    for i in reversed(range(len(program.steps))):
        readers = program.consumers[base + i]
        rectified[i] = bool(readers) and all(
            _is_pattern(program.steps[j]) or (_passes(program.steps[j]) and rectified[j]) for j in readers
        )
    return rectified


def _is_pattern(step: Step) -> bool:
    return isinstance(step.form, Select) or (isinstance(step.form, Scale) and step.form.function in RELUS)


def _passes(step: Step) -> bool:
    form = step.form
    return isinstance(form, View | Sum) or (isinstance(form, Contract) and isinstance(form.map, Channels))
