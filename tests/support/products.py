"""Programs of matrix products of two values."""

from __future__ import annotations

import torch

from gradkern.ir.program import Product, Program, Scale, Step

PRODUCT = Product("matmul")


BOUND = {torch.float32: 3e-6, torch.float64: 1e-13}


#: ``[*heads, M, K] @ [*heads, K, P]``: multiples of four are read four at a time, along the terms or across them.
SHAPES = {
    "one": ((), 1, 1, 1),
    "outer": ((), 6, 1, 5),
    "dot": ((), 1, 9, 1),
    "odd": ((), 5, 7, 3),
    "fours": ((), 8, 12, 16),
    "even": ((), 6, 10, 14),
    "heads": ((3,), 5, 4, 6),
    "heads_of_fours": ((2,), 8, 4, 8),
    "long_terms": ((2,), 4, 36, 20),
    "few_rows": ((3,), 2, 8, 33),
    "many_results": ((2,), 21, 3, 17),
    "fours_of_rows": ((), 12, 5, 7),
}


def product(name: str) -> Program:
    """``sin(a @ b) @ c``: every side has cotangents of all seeds, and the second product's left side is dense."""
    heads, m, k, p = SHAPES[name]
    inner, out = (*heads, m, p), (*heads, m, m)
    steps = (Step(PRODUCT, (0, 1), inner), Step(Scale("sin"), (3,), inner), Step(PRODUCT, (4, 2), out))
    return Program(((*heads, m, k), (*heads, k, p), (*heads, p, m)), steps, 5)
