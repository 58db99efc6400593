"""Sequence models: DeepLIFT/SHAP and PISA against tangermeme, ``python -m benchmarks.sequences``.

PISA attributes every output position (one map per position); ``deep_lift_shap`` one output; both average over
references of each sequence.  tangermeme runs at its own best batch size; rounds are interleaved, and the ratio is the
median of paired rounds.  For PISA at full size tangermeme is timed on 64 of the 1000 positions and scaled.  Without
tangermeme (``pip install 'gradkern[genomics]'``) nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support import oracle

SHOWN = 64  # positions of the full-size profile on which tangermeme is timed
BATCHES = (8, 16, 32, 64, 128)


class Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.conv(x))


class BPNet(nn.Module):
    """The profile head of BPNet's and ChromBPNet's shape (doi:10.1038/s41588-021-00782-6): ``[N, positions]``.

    ``pooled``: the counts head instead, ``[N, 1]``.
    """

    def __init__(self, width: int, layers: int, positions: int, pooled: bool = False) -> None:
        super().__init__()
        stem = nn.Conv1d(4, width, 21, padding=10), nn.ReLU()
        self.trunk = nn.Sequential(*stem, *(Residual(width, 2 ** (i + 1)) for i in range(layers)))
        self.profile, self.counts = nn.Conv1d(width, 1, 75, padding=37), nn.Linear(width, 1)
        self.positions, self.pooled = positions, pooled

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk(x)
        if self.pooled:
            return self.counts(trunk.mean(2))
        profile = self.profile(trunk)[:, 0]
        first = (profile.shape[1] - self.positions) // 2
        return profile[:, first : first + self.positions]


def basset(length: int, outputs: int = 164) -> nn.Module:
    """Basset (doi:10.1101/gr.200535.115)."""
    sizes, layers, before, left = ((300, 19, 3), (200, 11, 4), (200, 7, 4)), [], 4, length
    for width, kernel, pool in sizes:
        layers += [nn.Conv1d(before, width, kernel, padding=kernel // 2), nn.BatchNorm1d(width), nn.ReLU()]
        layers += [nn.MaxPool1d(pool)]
        before, left = width, left // pool
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * left, 1000), nn.ReLU(), nn.Linear(1000, outputs))


class First(nn.Module):
    """The first ``count`` outputs."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, : self.count]


@dataclass(frozen=True)
class Question:
    """A function of tangermeme on ``sequences`` of ``length`` with ``references`` each.

    ``ratio``, ``seconds``: the goal.  ``scale``: of the peer's time, where it does a part of the work.
    """

    title: str
    function: str
    model: Callable[[], nn.Module]
    length: int
    sequences: int
    references: int
    ratio: float = 0.0
    seconds: float = math.inf
    scale: float = 1.0

    def goal(self, seconds: float, ratio: float) -> str:
        """The goal, and whether it is met."""
        if not self.ratio and self.seconds == math.inf:
            return ""
        named = f"{self.ratio:g}×" if self.ratio else f"at most {self.seconds:g} s"
        return f" (goal: {named}, {'met' if ratio >= self.ratio and seconds <= self.seconds else 'missed'})"


QUESTIONS = {
    "pisa": Question(
        "PISA, 200 positions, 5 layers of 32, 2 × 4 references", "pisa", lambda: BPNet(32, 5, 200), 400, 2, 4
    ),
    "pisa-full": Question(
        "PISA, 4×2114 → 1000 positions, 8 layers of 64, per sequence and reference", "pisa",
        lambda: BPNet(64, 8, 1000), 2114, 1, 1, seconds=3.0, scale=1000 / SHOWN,
    ),
    "shap-bpnet": Question(
        "deep_lift_shap, BPNet's counts, 16 × 20 references", "deep_lift_shap",
        lambda: BPNet(32, 5, 200, pooled=True), 400, 16, 20, ratio=6.0,
    ),
    "shap-basset": Question(
        "deep_lift_shap, Basset, 4 × 20 references", "deep_lift_shap", lambda: basset(600), 600, 4, 20, ratio=6.0
    ),
}  # fmt: skip


def sequences(shape: tuple[int, ...], length: int) -> Tensor:
    """Random one-hot sequences ``[*shape, 4, length]``."""
    return nn.functional.one_hot(torch.randint(4, (*shape, length)), 4).transpose(-1, -2).float()


def callers(question: Question) -> Iterator[tuple[str, Callable[[], Tensor], float]]:
    """``(name, call, scale of its time)`` of gradkern and of tangermeme at each batch size."""
    import tangermeme.deep_lift_shap
    import tangermeme.pisa

    from gradkern.integrations import tangermeme as ours

    torch.manual_seed(0)
    model = question.model().eval()
    x = sequences((question.sequences,), question.length)
    refs = sequences((question.sequences, question.references), question.length)
    mine = getattr(ours, question.function)
    theirs = getattr(getattr(tangermeme, question.function), question.function)
    part = First(model, SHOWN) if question.scale > 1 else model
    yield "gradkern", lambda: mine(model, x, references=refs), 1.0
    for batch in BATCHES:

        def call(batch: int = batch) -> Tensor:
            result: Tensor = theirs(part, x, references=refs, batch_size=batch)
            return result

        yield f"tangermeme at {batch}", call, question.scale


def seconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(question: Question, rounds: int) -> str:
    """A row of the table."""
    (_, mine, _), *theirs = callers(question)
    first = mine()  # captures
    screened = [(seconds(call) * scale, name, call, scale) for name, call, scale in theirs]
    _, name, peer, scale = min(screened, key=lambda row: row[0])
    got = peer()
    error = oracle.relative_error(first[:, : got.shape[1]], got)
    pairs = [(seconds(mine), seconds(peer) * scale) for _ in range(rounds)]
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    title = question.title + question.goal(own, ratio)
    return f"| {title} | {other:.3g} s, {name} | {own:.3g} s | {ratio:.1f}× | {error:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, and not PISA at full size (minutes)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("tangermeme") is None:
        print("sequences: left out, since tangermeme is not installed (pip install 'gradkern[genomics]')")
        return
    warnings.simplefilter("ignore")
    named = arguments.questions or [name for name in QUESTIONS if not arguments.quick or name != "pisa-full"]
    print("| question | tangermeme | gradkern | ratio | largest difference |\n|---|---|---|---|---|")
    for name in named:
        print(measure(QUESTIONS[name], 1 if arguments.quick else arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
