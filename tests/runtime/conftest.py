"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import gradkern
from gradkern.passes import direction


@pytest.fixture
def forward_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forward mode wherever it is possible."""
    monkeypatch.setattr(direction, "FORWARD_WORTHWHILE", 0)
    gradkern.reset()
    yield
    gradkern.reset()
