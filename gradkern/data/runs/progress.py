"""A progress bar with samples per second and time left; silent outside terminals."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """``shown``: True, False, or None for in a terminal only.  Without tqdm there is none."""

    def __init__(self, about: str, total: int, done: int, shown: bool | None) -> None:
        self.bar: Any = None
        if shown or (shown is None and sys.stderr.isatty()):
            try:
                from tqdm import tqdm
            except ImportError:
                return
            print(about, file=sys.stderr)
            self.bar = tqdm(total=total, initial=done, unit="sample", unit_scale=True, file=sys.stderr, smoothing=0.1)

    def add(self, samples: int) -> None:
        if self.bar is not None:
            self.bar.update(samples)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
