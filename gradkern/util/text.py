"""Text for messages and tables."""

from __future__ import annotations


def shorten(text: str, most: int, *, keep_end: bool = False) -> str:
    """``text``, cut to at most ``most`` characters, the last of them an ellipsis (``keep_end``: the first)."""
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if keep_end else text[: most - 1] + "…"
