"""References per sample in a run: the function that draws them, by name, and the draws of a batch.

The number of a sample in the source seeds its draws, so a run that is resumed, sharded or computed in other batches has
the same references.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..attr.references import Draw, drawn, draws_per_sample
from ..util.options import BadValue

N_REFERENCES = 20


def _shuffle(name: str) -> Draw:
    """A shuffle of tangermeme that leaves unknown bases (all zeros) where they are."""
    try:
        from tangermeme import ersatz
    except ImportError as error:
        raise BadValue(
            f"references: {name!r} is tangermeme's, which cannot be imported ({error}). Install it with: "
            "pip install 'gradkern[genomics]'"
        ) from error
    shuffles: dict[str, Draw] = {
        "dinucleotide-shuffle": functools.partial(ersatz.dinucleotide_shuffle, allow_N=True),
        "shuffle": functools.partial(ersatz.shuffle, allow_N=True),
    }
    return shuffles[name]


NAMED = ("dinucleotide-shuffle", "shuffle")


def function_of(spec: str) -> Draw:
    """The function that draws references: one of `NAMED`, or ``module:function``.  Raises `BadValue`."""
    if spec in NAMED:
        return _shuffle(spec)
    module, _, name = spec.partition(":")
    if not module or not name:
        raise BadValue(f"references: got {spec!r}, expected {' or '.join(NAMED)}, or module:function.")
    try:
        attribute: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise BadValue(f"references: got {spec!r}, which cannot be imported: {error}") from error
    if not draws_per_sample(attribute):
        raise BadValue(f"references: got {spec!r}, expected a function (inputs, n, random_state) -> [N, n, *in].")
    function: Draw = attribute
    return function


def draws(arguments: Mapping[str, Any]) -> Draw | None:
    """The function among a method's arguments that draws references; None if there is none."""
    baselines = arguments.get("baselines")
    if isinstance(baselines, str):
        return function_of(baselines)
    return baselines if draws_per_sample(baselines) else None


def with_references(arguments: Mapping[str, Any], inputs: tuple[Tensor, ...], first: int) -> dict[str, Any]:
    """The arguments with references drawn for a batch, whose first sample has the number ``first`` in the source."""
    draw = draws(arguments)
    if draw is None:
        return dict(arguments)
    rest = {k: v for k, v in arguments.items() if k not in ("n_references", "random_state")}
    count, seed = arguments.get("n_references", N_REFERENCES), arguments.get("random_state") or 0
    references = drawn(draw, inputs, count, seed, 0, inputs[0].shape[0], first)
    return rest | {"baselines": references[0] if len(references) == 1 else references}
