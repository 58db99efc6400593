"""A progress bar for long calls.

A public call decides whether there is one (`showing_progress`).  Inside it, the outermost loop over pieces of the work
draws the bar (`with_progress`); the loops inside that loop draw nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TypeVar

T = TypeVar("T")
DELAY = 2.0  # seconds that a call takes before anything is drawn
PARTS = 200  # about how many pieces a call that shows a bar is cut into, so that the bar advances
LEAST_PART = 1024  # samples of a chain in such a part


class showing_progress:
    """Inside, a bar is drawn if ``progress`` is True, and in a terminal if it is None.  The outermost choice holds."""

    def __init__(self, progress: bool | None) -> None:
        self.choice, self.drawn = progress, False  # whether a loop draws the bar already
        self.token: Token[showing_progress | None] | None = None

    def __enter__(self) -> None:
        if _call.get() is None:
            self.token = _call.set(self)

    def __exit__(self, *error: object) -> None:
        if self.token is not None:
            _call.reset(self.token)

    @property
    def open(self) -> bool:
        """Whether a loop that starts now draws the bar."""
        if self.choice is None:
            self.choice = _in_terminal()
        return self.choice and not self.drawn


_call: ContextVar[showing_progress | None] = ContextVar("gradkern_progress", default=None)


def _in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def is_drawn() -> bool:
    """Whether a loop over pieces that starts now draws a bar, and should therefore have pieces."""
    call = _call.get()
    return call is not None and call.open


def limit_for_progress(chunk: int, samples: int) -> int:
    """Shrink the chunk so that a visible bar advances smoothly.  The results must not depend on it."""
    if min(chunk, samples) <= LEAST_PART or not is_drawn():  # asking for a terminal takes longer than a small call
        return chunk
    return min(chunk, max(LEAST_PART, samples // PARTS))


def with_progress(
    pieces: Iterable[T], total: int, unit: str, amount: Callable[[T], int], initial: int = 0
) -> Iterator[T]:
    """The pieces, with a bar of ``total`` units if the public call shows one.

    ``amount``: the units of a piece, which count as done when the next piece is requested.
    """
    call = _call.get()
    return iter(pieces) if call is None or not call.open else _drawn(call, pieces, total, unit, amount, initial)


@contextmanager
def progress_bar(about: str, total: int, done: int, progress: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar over ``total`` samples, ``done`` of which are finished, under the line ``about``.

    Yields a function to call with the number of samples just finished.  ``progress``: True, False, or None for a bar in
    a terminal only.
    """
    if not (_in_terminal() if progress is None else progress):
        yield lambda samples: None
        return
    from tqdm import tqdm

    print(about, file=sys.stderr)
    with tqdm(total=total, initial=done, unit="sample", unit_scale=True, file=sys.stderr, smoothing=0.1) as bar:
        yield bar.update


def _drawn(
    call: showing_progress, pieces: Iterable[T], total: int, unit: str, amount: Callable[[T], int], initial: int
) -> Iterator[T]:
    from tqdm import tqdm  # comes with Captum

    call.drawn = True
    bar = tqdm(
        total=total, initial=initial, unit=f" {unit}", unit_scale=True, delay=DELAY, leave=False, smoothing=0.1,
        file=sys.stderr, desc="gradkern",
    )  # fmt: skip
    try:
        with bar:
            for piece in pieces:
                yield piece
                bar.update(amount(piece))
    finally:
        call.drawn = False
