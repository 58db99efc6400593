"""The command line: ``gradkern``."""

from .main import main

__all__ = ["main"]
