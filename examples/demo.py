"""Trains two small networks on real data and explains them: all-class input gradients for the whole data set.

    python examples/demo.py [--out report/index.html] [--quick]

A 1-D CNN on ArrowHead (outlines of arrow heads as series of 251 numbers, 3 classes) and LeNet-5 on scikit-learn's
handwritten digits (enlarged to 28×28, 10 classes).  Both data sets come inside installed packages; nothing is
downloaded.  For each network: gradients of every class for every sample, by gradkern and by the loops that people
write; samples per second, the difference between the two, the most important features, and the maps in a report.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import gradkern
from gradkern.data import Importance
from gradkern.report import Report, Section, datafigures, figures, findings

FLIP = 1e-4  # a difference above this share of the largest gradient is a changed ReLU pattern, not rounding
TOP = 10
PATIENCE = 3.0  # seconds to spend on repeating one measurement
FEW = 50  # samples that the slowest way is timed on
BATCHES = (32, 128, 512)


# ---------------------------------------------------------------------------------------------------------------
# Data and networks


@dataclass(frozen=True)
class Problem:
    """A data set, a network for it, and how to train that."""

    name: str
    about: str
    train_x: Tensor  # [N, *shape]
    train_y: Tensor  # [N]
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    network: nn.Module
    epochs: int
    batch: int

    @property
    def x(self) -> Tensor:
        return torch.cat([self.train_x, self.test_x])

    @property
    def y(self) -> Tensor:
        return torch.cat([self.train_y, self.test_y])

    @property
    def is_image(self) -> bool:
        return self.train_x.ndim == 4


def cnn1d(length: int, classes: int) -> nn.Module:
    """Two convolutions with pooling, two linear layers."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, padding="same"), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(32 * (length // 4), 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, classes),
    )  # fmt: skip


def lenet5() -> nn.Module:
    """LeNet-5 for 28×28 images, with ReLU and max pooling as it is built today."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def arrow_heads() -> Problem:
    """ArrowHead with its own split: 36 series to train on, 175 to test on."""
    from sktime.datasets import load_arrow_head

    def part(split: str) -> tuple[Tensor, Tensor]:
        x, y = load_arrow_head(split=split, return_X_y=True, return_type="numpy3D")  # [N, 1, 251], labels "0" "1" "2"
        return torch.tensor(x, dtype=torch.float32), torch.tensor(y.astype(int))

    train, test = part("train"), part("test")
    about = (
        "Outlines of projectile points, each a series of 251 numbers. The archive calls the classes Avonlea, Clovis "
        "and Mix, without saying which number is which; the network is a small 1-D CNN."
    )
    names = ("class 0", "class 1", "class 2")
    return Problem("ArrowHead", about, *train, *test, names, cnn1d(251, 3), epochs=150, batch=12)


def digits() -> Problem:
    """scikit-learn's digits, 8×8 enlarged to 28×28; a quarter is kept for testing."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)  # [1797, 64], values 0 … 16
    images = torch.tensor(x / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(y)[order]
    cut = len(images) // 4
    about = "Handwritten digits from scikit-learn, enlarged from 8×8 to 28×28 pixels; the network is LeNet-5."
    return Problem(
        "Digits", about, images[cut:], labels[cut:], images[:cut], labels[:cut],
        tuple(map(str, range(10))), lenet5(), epochs=8, batch=64,
    )  # fmt: skip


def train(problem: Problem, epochs: int) -> float:
    """Trains the network in place and leaves it in eval mode; returns the accuracy on the test part."""
    model, x, y = problem.network, problem.train_x, problem.train_y
    steps = epochs * -(-len(x) // problem.batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in progress(range(epochs), "train", "epoch"):
        for chosen in torch.randperm(len(x)).split(problem.batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(problem.test_x).argmax(1) == problem.test_y).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Gradients of every class for every sample, [N, C, *shape], three ways


def by_gradkern(model: nn.Module, x: Tensor) -> Tensor:
    return gradkern.jacobian(model, x)


def by_sample_loop(model: nn.Module, x: Tensor) -> Tensor:
    """What most people write: one sample at a time through torch's own Jacobian."""
    samples = progress(x.split(1), "loop over samples", "sample")
    return torch.cat([torch.autograd.functional.jacobian(model, sample)[0].transpose(0, 1) for sample in samples])


def by_class_loop(model: nn.Module, x: Tensor, batch: int) -> Tensor:
    """The best that is simple: one forward pass per batch, one backward pass per class."""
    parts = []
    for chunk in x.split(batch):
        chunk = chunk.detach().requires_grad_()
        sums = model(chunk).sum(0)  # [C]; samples do not mix, so each keeps its own gradient
        rows = [torch.autograd.grad(s, chunk, retain_graph=True)[0] for s in sums]
        parts.append(torch.stack(rows, 1))
    return torch.cat(parts)


def progress(items: Iterable, label: str, unit: str) -> tqdm:
    """A progress bar in a terminal, nothing elsewhere."""
    return tqdm(items, desc=label, unit=unit, leave=False, disable=None)


def announce(problem: Problem, stage: str) -> None:
    """A line that says what is going on, wherever the output goes."""
    print(f"{problem.name}: {stage}", flush=True)


def timed(function: Callable[[], Tensor], repeats: int, label: str) -> tuple[float, Tensor]:
    """Median seconds of ``repeats`` calls (of fewer on a busy machine), and the last result."""
    seconds = []
    for _ in progress(range(repeats), label, "run") if repeats > 1 else range(1):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > PATIENCE:
            break
    return statistics.median(seconds), result


@dataclass(frozen=True)
class Comparison:
    """Rates in samples per second for all classes, and how far gradkern and the loop over classes differ."""

    gradients: Tensor  # [N, C, *shape], by gradkern
    preparation: float  # seconds, once per network
    rates: dict[str, float]
    difference: float  # largest, on samples whose ReLU pattern agrees, as a share of the largest gradient
    flipped: int  # samples where it does not agree
    flipped_difference: float  # the largest difference on those in float64, where rounding decides nothing

    @property
    def ratios(self) -> list[float]:
        own, *others = self.rates.values()
        return [own / other for other in others]


def compare(problem: Problem, repeats: int) -> Comparison:
    """gradkern and the loop over classes on the whole data set, the loop over samples on a few of it."""
    model, x = problem.network, problem.x
    start = time.perf_counter()
    gradkern.prepare(model, x)
    preparation = time.perf_counter() - start
    by_gradkern(model, x[:64])  # warm
    own, gradients = timed(lambda: by_gradkern(model, x), repeats, "gradkern")
    by_class_loop(model, x[:64], 64)
    loops = {b: timed(lambda b=b: by_class_loop(model, x, b), repeats, f"loop over classes, {b}") for b in BATCHES}
    batch = min(loops, key=lambda b: loops[b][0])
    classes, expected = loops[batch]
    few = x[:FEW]
    samples, _ = timed(lambda: by_sample_loop(model, few), 1, "loop over samples")

    worst = (gradients - expected).abs().flatten(1).amax(1) / expected.abs().max()  # [N]
    agree = worst <= FLIP
    rates = {
        "gradkern.jacobian": len(x) / own,
        f"loop over classes, batches of {batch}": len(x) / classes,
        f"functional.jacobian per sample (timed on {len(few)})": len(few) / samples,
    }
    difference = worst[agree].max().item() if agree.any() else float("nan")
    return Comparison(gradients, preparation, rates, difference, int((~agree).sum()), in_float64(model, x[~agree]))


def in_float64(model: nn.Module, x: Tensor) -> float:
    """The largest difference between gradkern and the class loop in float64, as a share of the largest gradient."""
    if len(x) == 0:
        return 0.0
    model, x = copy.deepcopy(model).double(), x.double()
    expected = by_class_loop(model, x, len(x))
    found = gradkern.jacobian(model, x, engine="kernel")
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------
# Importance


def importance(gradients: Tensor, x: Tensor) -> Tensor:
    """How much each class score moves when a feature moves by its standard deviation: ``[C, *shape]``.

    The mean of |gradient| over the data set, times the feature's own spread.  Without the factor a pixel that is
    never inked would count as much as one that decides.
    """
    return gradients.abs().mean(0) * x.std(0)  # [N, C, *shape], [N, *shape]


def top_features(scores: Tensor, is_image: bool) -> list[list[str]]:
    """Per class, the names of the most important features: time steps, or pixels as (row, column)."""
    rows = []
    for score in scores:  # [*shape]
        where = score.flatten().topk(TOP).indices.tolist()
        width = score.shape[-1]
        rows.append([f"({i // width},{i % width})" if is_image else f"t={i}" for i in where])
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Output


def describe(problem: Problem, accuracy: float, result: Comparison, top: list[list[str]]) -> Iterable[str]:
    shape = "×".join(map(str, problem.train_x.shape[1:]))
    yield f"{problem.name}: {len(problem.x)} samples of {shape}, {len(problem.classes)} classes"
    yield f"  test accuracy {accuracy:.1%}   prepared (captured and verified, once) in {result.preparation:.2f} s"
    slower = [1.0, *result.ratios]
    for (name, rate), ratio in zip(result.rates.items(), slower, strict=True):
        note = "" if ratio == 1.0 else f"   gradkern is {ratio:.1f}× as fast"
        yield f"  {name:<44} {rate:>10,.0f} samples/s{note}"
    yield f"  largest difference to the loop over classes: {result.difference:.1e} of the largest gradient"
    if result.flipped:
        yield f"  (samples set aside: {result.flipped}; {flips(result)})"
    yield f"  the {TOP} most important features per class, mean |gradient| × the feature's standard deviation:"
    for name, features in zip(problem.classes, top, strict=True):
        yield f"    {name:<8} {' '.join(features)}"


def flips(result: Comparison) -> str:
    """What the samples are that `Comparison.flipped` counts."""
    return (
        "float32 rounding decides a ReLU or a max pool there; in float64 these, too, agree "
        f"to {result.flipped_difference:.0e}"
    )


def one_per_class(problem: Problem, count: int) -> list[int]:
    """Indices into the whole set: a test sample of each of the first ``count`` classes."""
    first = len(problem.train_x)
    return [first + int((problem.test_y == c).nonzero()[0]) for c in range(min(count, len(problem.classes)))]


def fill(
    section: Section, problem: Problem, accuracy: float, result: Comparison, top: list[list[str]], found: Importance
) -> None:
    """Writes one network's part of the report."""
    x, y = problem.x, problem.y
    scores = importance(result.gradients, x)
    section.text(problem.about)
    section.facts([
        (f"{accuracy:.1%}", "accuracy on the test part"),
        (f"{len(x):,} × {len(problem.classes)}", "samples × classes explained"),
        (f"{result.ratios[-1]:.1f}×", f"as fast as the loop over samples, timed on {FEW} of them"),
        (f"{result.ratios[0]:.1f}×", "as fast as the loop over classes at its best batch size"),
    ])  # fmt: skip
    for sentence in findings.all_of(found, problem.classes):
        section.text(sentence)
    rates = figures.bars(list(result.rates), list(result.rates.values()), "samples per second, all classes")
    agreement = f"The gradients agree to {result.difference:.1e} of the largest one"
    if result.flipped:
        agreement += f", with {result.flipped} of the samples set aside ({flips(result)})"
    section.picture(
        rates, f"Throughput on this machine, threads: {torch.get_num_threads()}, float32. {agreement}.", vector=True
    )

    chosen = one_per_class(problem, 4)
    with torch.no_grad():
        predicted = problem.network(x[chosen]).argmax(1).numpy()
    classes_of = figures.image_classes if problem.is_image else figures.signal_classes
    samples_of = figures.image_samples if problem.is_image else figures.signal_samples
    flat, maps = x[:, 0].numpy(), result.gradients[chosen][:, :, 0].numpy()  # one channel: drop its axis
    outline = "the outline of the class's mean image" if problem.is_image else "the class's mean signal ± its spread"
    section.picture(
        classes_of(flat, scores[:, 0].numpy(), y.numpy(), problem.classes),
        "Where each class score is sensitive over the whole data set: mean |gradient| times the feature's standard "
        f"deviation, on one scale, with {outline}.",
    )
    section.picture(
        samples_of(flat[chosen], maps, y[chosen].numpy(), predicted, problem.classes),
        "Single test samples, and the gradient of every class. Red raises the score, blue lowers it; each row has one "
        "scale; the heavy frame marks the predicted class.",
    )
    section.picture(
        datafigures.scores(found.scores, problem.classes, found.low, found.high),
        f"Importance of each feature, summed over channels{'' if problem.is_image else ', with its'}"
        f"{'' if problem.is_image else f' {found.level:.0%} bootstrap interval over groups of samples'}.",
    )
    assert found.curve is not None
    section.picture(
        datafigures.curves(found.curve),
        "Deletion: the most important features of each sample's predicted class are replaced by their mean; the faster "
        "the fall, the better. Insertion: they are put into a sample of means.",
        vector=True,
    )
    head = ["class", *(f"{i}." for i in range(1, TOP + 1))]
    caption = f"The {TOP} most important features per class, " + (
        "as (row,column)." if problem.is_image else "as time steps."
    )
    section.table(head, [[name, *row] for name, row in zip(problem.classes, top, strict=True)], caption)
    section.printed(str(gradkern.explain(problem.network, x[:64], show=False)), "What ran where: gradkern.explain")


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report/index.html"), help="where the report goes")
    parser.add_argument("--threads", type=int, help="threads for all ways (default: as many as there are idle cores)")
    parser.add_argument("--quick", action="store_true", help="hardly any training, few samples: to see that it runs")
    args = parser.parse_args(arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or idle_cores())
    try:
        return explain_both(args.out, args.quick)
    finally:
        torch.set_num_threads(before)


def explain_both(out: Path, quick: bool) -> Path:
    torch.manual_seed(0)
    start = time.perf_counter()
    report = Report(
        "What two small networks look at",
        "The gradient of every class score with respect to every input feature, for every sample of two data sets, "
        "computed by gradkern.",
        sources=["Data: ArrowHead from sktime, handwritten digits from scikit-learn. Code: examples/demo.py."],
    )
    for load in (arrow_heads, digits):
        problem = load()
        if quick:
            problem = shortened(problem)
        announce(problem, f"training for {problem.epochs} epochs")
        accuracy = train(problem, problem.epochs)
        announce(problem, f"gradients of {len(problem.classes)} classes for {len(problem.x)} samples, three ways")
        result = compare(problem, repeats=1 if quick else 3)
        top = top_features(importance(result.gradients, problem.x), problem.is_image)
        print(*describe(problem, accuracy, result, top), sep="\n", end="\n\n", flush=True)
        announce(problem, "importance: bootstrap, deletion and insertion")
        found = gradkern.importance(problem.network, problem.x, progress=False)
        announce(problem, "drawing its part of the report")
        fill(report.section(problem.name), problem, accuracy, result, top, found)
    path = report.write(out)
    print(f"All of it took {time.perf_counter() - start:.0f} s. The report: {path}")
    return path


def idle_cores() -> int:
    """A thread without its own core makes all others wait: on a busy machine, two threads can be far slower than
    one."""
    cores = torch.get_num_threads()
    return max(1, min(cores, round(cores - os.getloadavg()[0])))


def shortened(problem: Problem) -> Problem:
    """The same with little data and one epoch."""
    from dataclasses import replace

    keep = torch.cat([(problem.test_y == c).nonzero()[:3, 0] for c in range(len(problem.classes))])
    return replace(
        problem, train_x=problem.train_x[:32], train_y=problem.train_y[:32],
        test_x=problem.test_x[keep], test_y=problem.test_y[keep], epochs=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
