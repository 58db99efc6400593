"""``python -m gradkern``."""

from .cli import main

main()
