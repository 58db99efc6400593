"""Output of the command line.  Control characters in text from files are escaped, so no file can steer the terminal."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import click

from ..util.untrusted import plain


def say(text: object, *, err: bool = False) -> None:
    """Print some lines, to stderr with ``err``."""
    click.echo(plain(str(text)), err=err)


def note(text: object) -> None:
    """Print a note of one line to stderr."""
    click.echo(f"gradkern: note: {line(text)}", err=True)


def line(text: object) -> str:
    """The text in one line."""
    return plain(" ".join(str(text).split()), lines=False)


def as_json_text(value: Any) -> str:
    """JSON according to its specification: NaN and Inf become null."""

    def strict(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: strict(inner) for k, inner in v.items()}
        if isinstance(v, (list, tuple)):
            return [strict(inner) for inner in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(strict(value), allow_nan=False)


class Formatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
