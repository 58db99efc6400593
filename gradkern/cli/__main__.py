"""``python -m gradkern.cli``."""

from .main import main

main()
