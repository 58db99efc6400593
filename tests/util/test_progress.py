"""Progress bars: where one is drawn, and that nothing is drawn in a pipe."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import repeated
from gradkern.util import progress
from gradkern.util.chunks import spans


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(repeated, "SHORT", 0.0)  # calls that are repeated are too short for a bar


@pytest.mark.parametrize(
    ("stream", "choice", "drawn"),
    [(Terminal, None, True), (io.StringIO, None, False), (io.StringIO, True, True), (Terminal, False, False)],
)
@pytest.mark.parametrize("engine", ["autograd", "kernel"])
def test_jacobian_draws_a_bar_on_a_terminal_or_where_asked(net, engine, stream, choice, drawn, monkeypatch) -> None:
    x = torch.randn(5000, 6)
    want = gradkern.jacobian(net, x, engine=engine)
    monkeypatch.setattr(sys, "stderr", stream())
    got = gradkern.jacobian(net, x, engine=engine, progress=choice)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("5.00k/5.00k" in said or "gradkern" in said) == drawn
    assert (" samples/s" in said) == drawn
    torch.testing.assert_close(got, want)
    if engine == "kernel":
        assert torch.equal(got, want)


def test_attribute_all_draws_one_bar(net, monkeypatch) -> None:
    method, x = gradkern.attr.IntegratedGradients(net), torch.randn(40, 6)
    want = method.attribute_all(x)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert torch.equal(method.attribute_all(x, progress=True), want)
    assert " points/s" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    gradkern.attr.Saliency(net).attribute_all(x)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_one_bar_for_loops_inside_loops_and_after_errors(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.showing_progress(True):
        with progress.showing_progress(False):  # a call inside a call: the outer choice holds
            assert progress.is_drawn()
            for _ in spans(0, 10, 5):
                assert not progress.is_drawn()
                assert list(spans(0, 3, 1)) == [(0, 1), (1, 2), (2, 3)]
        with pytest.raises(ZeroDivisionError):
            for _ in spans(0, 10, 5):
                raise ZeroDivisionError
        assert progress.is_drawn()
    assert not progress.is_drawn()


def test_iter_jacobian_draws_one_bar_over_its_pieces(net, monkeypatch) -> None:
    """The caller's own calls between the pieces may draw theirs."""
    x = torch.randn(50, 6)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    pieces = []
    for piece in gradkern.iter_jacobian(net, x, chunk=7, engine="autograd", progress=True):
        assert progress._call.get() is None, "the choice is not the caller's between the pieces"
        pieces.append(piece)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert len(pieces) == 8
    assert "50.0/50.0 samples" in said or " samples/s" in said
    monkeypatch.setattr(sys, "stderr", Terminal())
    torch.testing.assert_close(
        torch.cat(list(gradkern.iter_jacobian(net, x, chunk=7, progress=False))), torch.cat(pieces)
    )
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
