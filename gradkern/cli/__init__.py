"""The command line: ``gradkern``, or ``python -m gradkern``."""

import sys


def main() -> None:
    """Run the command line.  ``gradkern --version`` also works without the libraries of the data extra."""
    if sys.argv[1:] == ["--version"]:
        from .. import __version__

        print(f"gradkern, version {__version__}")
        return
    from .main import main as commands

    commands()


__all__ = ["main"]
