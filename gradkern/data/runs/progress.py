"""A progress bar with samples per second and time left; silent outside terminals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def progress_bar(about: str, total: int, done: int, shown: bool | None) -> Iterator[Callable[[int], object]]:
    """Yields a function to call with the number of samples just finished; nothing is drawn without tqdm.

    ``shown``: True, False, or None to show it only in a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown) or find_spec("tqdm") is None:
        yield lambda samples: None
        return
    from tqdm import tqdm

    print(about, file=sys.stderr)
    with tqdm(total=total, initial=done, unit="sample", unit_scale=True, file=sys.stderr, smoothing=0.1) as bar:
        yield bar.update
