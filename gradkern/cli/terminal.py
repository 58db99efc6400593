"""What the command line prints: text from files is shown, never obeyed, so that no file can steer the terminal."""

from __future__ import annotations

import logging

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


class Formatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
