"""Text for messages and tables."""

from __future__ import annotations


def shorten(text: str, most: int) -> str:
    """``text``, cut to at most ``most`` characters, the last of them an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"
