"""Steps of random networks that copy, join, multiply and normalise values; a part of `random_programs.Grower`."""

from __future__ import annotations

import math

from gradkern.ir.indexing import along, identity
from gradkern.ir.program import Index, LowRank, Product

MOST_COPIED = 800  # numbers in a value that a copy makes


class Forms:
    """Grows copies, products and norms; `pick`, `choose`, `emit`, `shape` and `last` are the grower's."""

    def permute(self, v: int) -> None:
        shape = self.shape(v)
        order = list(range(len(shape)))
        if self.pick(0, 1):
            order = order[1:] + order[:1] if self.pick(0, 1) else order[-1:] + order[:-1]
        else:
            i, j = self.pick(0, len(shape) - 1), self.pick(0, len(shape) - 1)
            order[i], order[j] = order[j], order[i]
        self.emit(Index((identity(shape, order),)), (v,), tuple(shape[a] for a in order))

    def copy(self, v: int) -> None:
        """Any indices along one axis: a slice, a flip, padding, repetition, or all of it at random."""
        shape = self.shape(v)
        axis = self.pick(0, len(shape) - 1)
        n = shape[axis]
        match self.pick(0, 4):
            case 0:
                start = self.pick(0, n - 1)
                wanted = list(range(start, self.pick(start + 1, n), self.pick(1, 2)))
            case 1:
                wanted = list(range(n - 1, -1, -1))
            case 2:
                wanted = [-1] * self.pick(0, 3) + list(range(n)) + [-1] * self.pick(0, 3)
            case 3:
                wanted = [i for i in range(n) for _ in range(self.pick(1, 2))]
            case _:
                wanted = [self.pick(-1, n - 1) for _ in range(self.pick(1, n + 2))]
        out = tuple(len(wanted) if a == axis else m for a, m in enumerate(shape))
        if math.prod(out) <= MOST_COPIED:
            self.emit(Index((along(shape, axis, wanted),)), (v,), out, ties=len(set(wanted)) < len(wanted))

    def join(self, v: int) -> None:
        """A concatenation with values that differ along one axis at most."""
        shape = self.shape(v)
        axis = self.choose([0, self.pick(0, len(shape) - 1)])
        rest = lambda s: s[:axis] + s[axis + 1 :]  # noqa: E731
        fits = [
            u for u in range(self.last + 1) if len(self.shape(u)) == len(shape) and rest(self.shape(u)) == rest(shape)
        ]
        reads = [v, *(self.choose(fits) for _ in range(self.pick(1, 3)))]
        total = sum(self.shape(u)[axis] for u in reads)
        out = (*shape[:axis], total, *shape[axis + 1 :])
        if math.prod(out) > MOST_COPIED:
            return
        parts, first = [], 0
        for u in reads:
            n = self.shape(u)[axis]
            parts.append(along(self.shape(u), axis, [-1] * first + list(range(n)) + [-1] * (total - first - n)))
            first += n
        self.emit(Index(tuple(parts)), tuple(reads), out, ties=len(set(reads)) < len(reads))

    def product(self, v: int) -> None:
        """With a value that stretches to this one's shape, or that this one stretches to."""
        shape = self.shape(v)

        def stretches(s):
            return len(s) == len(shape) and all(n == m or 1 in (n, m) for n, m in zip(s, shape, strict=True))

        u = self.choose([u for u in range(self.last + 1) if stretches(self.shape(u))])
        out = tuple(max(n, m) for n, m in zip(self.shape(u), shape, strict=True))
        if math.prod(out) <= MOST_COPIED:
            self.emit(Product("mul"), (v, u) if self.pick(0, 1) else (u, v), out, ties=out != shape)

    def low_rank(self, v: int) -> None:
        shape = self.shape(v)
        function = self.choose(["softmax", "log_softmax", "normalize"])
        params = (0.1,) if function == "normalize" else ()
        self.emit(LowRank(function, self.pick(0, len(shape) - 1), params), (v,), shape)

    def matmul(self, v: int) -> None:
        """With a value that fits, else with itself: ``v·vᵀ`` or, turned over first, ``vᵀ·v``."""
        shape = self.shape(v)
        like = [u for u in range(self.last + 1) if self.shape(u)[:-1] == (*shape[:-2], shape[-1])]
        if like and self.pick(0, 1):
            other = self.choose(like)
            return self.emit(Product("matmul"), (v, other), (*shape[:-1], self.shape(other)[-1]))
        last = len(shape) - 1
        order = [*range(last - 1), last, last - 1]
        self.emit(Index((identity(shape, order),)), (v,), tuple(shape[a] for a in order))
        pair = (v, self.last) if self.pick(0, 1) else (self.last, v)
        rows, columns = self.shape(pair[0])[-2], self.shape(pair[1])[-1]
        if math.prod(shape[:-2]) * rows * columns <= MOST_COPIED:
            self.emit(Product("matmul"), pair, (*shape[:-2], rows, columns))
