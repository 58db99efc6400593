"""The report of a dataset run: how much is done, what the outputs depend on, and the maps worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from ..data import Curve, Importance, Results, Source, open_store
from ..data.ranking import of_results, position_text
from ..data.statistics import finite_rows
from ..util.outputs import OneOutput
from ..util.renamed import renamed_argument
from ..util.samples import spread_indices
from ..util.text import shorten
from ..util.untrusted import plain
from . import datafigures, figures, findings
from .page import Report, Section

TOP = 10
SHOWN_CLASSES = 6
LONGEST_NAME, LONGEST_VALUE = 60, 90  # characters
MAP_BYTES_READ = 1 << 30  # bytes of maps that are read for the typical and atypical samples


@renamed_argument("results", "store")
def report(
    store: Results | str | Path, path: str | Path, *, model: nn.Module | None = None, source: Source | None = None,
    names: Sequence[str] | None = None, title: str | None = None,
) -> Path:  # fmt: skip
    """Write the report of a run to one self-contained HTML file; returns its absolute path.

    ``model`` and ``source`` (those of the run) add the samples themselves behind their maps, and the deletion and
    insertion curves (of the run's ``output``, if that is an index or a name).  ``names``: of the outputs.  Of an
    unfinished run, the report covers the finished chunks.
    """
    results = open_store(store) if isinstance(store, (str, Path)) else store
    output = results.about["fingerprint"]["method"].get("output")
    if model is not None and output is not None and not isinstance(model, OneOutput):
        model = OneOutput(model, output)
    view = StoreSections(results, model, source, names)
    page = Report(title or f"Attributions: {Path(results.place).name}", view.summary(), sources=view.sources())
    view.coverage(page.section("Coverage"))
    view.importance(page.section("What the outputs depend on"))
    if "attributions" in results:
        view.samples(page.section("Typical and atypical samples"))
    if view.stability is not None and view.stability.curve is not None:
        view.curves(page.section("What the ranking is worth"), view.stability.curve)
    view.settings(page.section("How it was made"))
    return page.write(path)


@dataclass(frozen=True)
class Extremes:
    """Per output, the most and the least typical sample predicted as it, with their cosine to the mean |map|."""

    output: int
    samples: tuple[int, int]
    cosines: tuple[float, float]
    maps: np.ndarray  # [2, *in]


class StoreSections:
    """A store as sections of a report."""

    def __init__(
        self, results: Results, model: nn.Module | None, source: Source | None, names: Sequence[str] | None
    ) -> None:
        self.results, self.model, self.source = results, model, source
        self.about = results.about
        self.nodes = [record for _, record in sorted(results.ledger.records().items())]
        self.finished = results.ledger.finished()
        self.samples_done = sum(n.facts["samples"] for n in self.nodes)
        self.seconds = sum(n.facts["seconds"] for n in self.nodes)
        self.stability = self._stability()
        self.scores, self.scored_by = self._scores()
        self.targets = np.asarray(results.array("targets")[...])
        self.names = [shorten(plain(n, lines=False), LONGEST_NAME) for n in results.row_names(names)]
        rows = self.targets if self.targets.ndim == 1 else range(len(self.names))
        self.named = {int(output): name for output, name in zip(rows, self.names, strict=True)}

    def _stability(self) -> Importance | None:
        results = self.results
        if not results.finished or "importance" not in results.reductions or len(results.inputs) > 1:
            return None
        return of_results(self.results, self.model, self.source)

    def _scores(self) -> tuple[np.ndarray | None, str]:
        """Scores ``[C, *in]`` and their description, from the reductions if possible, else from the stored maps."""
        if self.stability is not None:
            return self.stability.scores, "mean |attribution| times the feature's standard deviation"
        if self.results.finished and "mean_abs" in self.results.reductions:
            return self.results.reduction("mean_abs"), "mean |attribution|"
        if "attributions" in self.results and self.results.array("targets").ndim == 1 and self.finished:
            total, count = np.zeros(()), 0
            for start, stop in self._spans():
                maps = self.results.maps(start, stop).double()
                finite = finite_rows(maps)
                total, count = total + maps[finite].abs().sum(0).numpy(), count + int(finite.sum())
            if count:
                return total / count, f"mean |attribution| over {count:,} samples"
        return None, ""

    def _spans(self) -> list[tuple[int, int]]:
        """Finished chunks, evenly subsampled to `MAP_BYTES_READ` bytes."""
        array = self.results.array("attributions")
        most = max(1, MAP_BYTES_READ // max(array.dtype.itemsize * int(np.prod(array.chunks)), 1))
        chunks = sorted(self.finished)
        return [self.results.span(chunks[i]) for i in spread_indices(len(chunks), most)]

    # ---- sections

    def sources(self) -> list[str]:
        """What the store says it was made of.  The text is not trusted, as the store may come from anyone."""
        made_by = self.about.get("made_by") or {}
        said = [
            f"{k} {shorten(plain(str(made_by[k]), lines=False), LONGEST_VALUE)}"
            for k in ("model", "source")
            if made_by.get(k)
        ]
        return [f"According to the store: {', '.join(said)}."] if said else []

    def summary(self) -> str:
        results = self.results
        state = "complete" if results.finished else f"{results.finished_chunks} of {results.chunks} chunks done"
        return f"{results.method} of {results.samples:,} samples, {state}."

    def coverage(self, section: Section) -> None:
        source = self.about["fingerprint"]["source"]
        shape = " + ".join("×".join(map(str, s)) or "1" for s in source["shapes"])
        section.facts([
            (f"{self.samples_done / self.results.samples:.0%}", "of the samples are finished"),
            (f"{self.samples_done:,}", f"samples of {shape}"),
            (f"{self.samples_done / self.seconds:,.0f}" if self.seconds else "–",
             "samples per second while computing (gradkern bench: the Jacobian alone)"),
            ("yes" if self.results.exact else "no" if self.results.finished else "–",
             "bit-equal to an uninterrupted run"),
        ])  # fmt: skip
        if self.results.finished and not self.results.exact:
            section.text(
                f"Equal within {self.results.tolerance:.0e} of the largest attribution, not to the last bit: "
                + "; ".join(self.results.notes) + "."
            )  # fmt: skip
        for words in self.results.losses():
            section.text(words[0].upper() + words[1:] + ".")
        if not self.results.finished:
            missing = sorted(set(range(self.results.chunks)) - self.finished)
            section.text(f"{len(missing):,} chunks are missing. Run the same call again to continue.")
            section.picture(
                datafigures.coverage(self.finished, self.results.chunks), "Finished chunks, in the order of the data."
            )
        predictions = np.asarray(self.results.array("predictions")[...])
        if predictions.ndim == 2 and predictions.shape[1] > 1 and self.finished:
            rows = np.concatenate([np.arange(*self.results.span(c)) for c in sorted(self.finished)])
            counts = np.bincount(predictions[rows].argmax(1), minlength=predictions.shape[1])
            shown = np.argsort(-counts, kind="stable")[:20]
            labels = [self._name(c) for c in shown]
            figure = figures.bars(labels, counts[shown], "samples", highlight=None)
            section.picture(figure, "How many samples are predicted as what.", vector=True)

    def _name(self, output: int) -> str:
        return self.named.get(int(output), f"output {output}")

    def _sample(self, sample: int) -> str:
        return shorten(plain(self.results.sample_name(sample), lines=False), LONGEST_NAME)

    def importance(self, section: Section) -> None:
        if self.scores is None:
            section.text("Neither reductions nor maps with common targets are stored, so there is nothing to show.")
            return
        shown = list(range(min(len(self.scores), SHOWN_CLASSES)))
        names, shape, stability = [self.names[c] for c in shown], self.scores.shape[1:], self.stability
        low = high = None
        words = f"Per output: {self.scored_by}."
        caption = f"The {TOP} most important features of each output, by position in the sample."
        if stability is not None:
            low, high = stability.low[shown], stability.high[shown]
            words += f" The band is the {stability.level:.0%} bootstrap interval over groups of samples."
            caption += " “Halves agree” is the rank correlation between two halves of the data: 1 is perfect."
            for sentence in findings.all_of(stability, names):
                section.text(sentence)
        section.picture(datafigures.scores(self.scores[shown], names, low, high), words)
        rows = []
        for c, name in zip(shown, names, strict=True):
            order = np.argsort(-np.nan_to_num(self.scores[c].ravel(), nan=-1.0), kind="stable")[:TOP]
            ranked = np.nansum(self.scores[c]) > 0
            cells = [position_text(np.unravel_index(i, shape), shape) for i in order if ranked]
            agreement = [] if stability is None else [f"{stability.agreement[c]:.2f}"]
            rows.append([name, *agreement, *cells, *[""] * (TOP - len(cells))])
        head = ["output", *([] if stability is None else ["halves agree"]), *(f"{i}." for i in range(1, TOP + 1))]
        section.table(head, rows, caption)

    def samples(self, section: Section) -> None:
        extremes = self._extremes()
        if not extremes:
            section.text("No two finished samples are predicted as one of the attributed outputs.")
            return
        inputs = None
        if self.source is not None:
            inputs = np.stack([
                np.stack([_first_floating_sample(self.source.read(n, n + 1)) for n in e.samples]) for e in extremes
            ])  # fmt: skip
        kinds = ("typical", "atypical")
        titles = [
            [f"{kinds[i]}: sample {self._sample(e.samples[i])} (cosine {e.cosines[i]:.2f})" for i in (0, 1)]
            for e in extremes
        ]
        figure = datafigures.extremes(
            np.stack([e.maps for e in extremes]), inputs, titles, [self._name(e.output) for e in extremes]
        )
        section.picture(
            figure,
            "Per output, of the samples predicted as it: the map nearest to the mean |map| (by cosine) and the one "
            "farthest from it, which is where to look for odd data or shortcuts. Red raises the output, blue lowers it "
            "(a magnitude has no sign)."
            + ("" if inputs is None else " The line is the sample itself.")
            + self._searched(),
        )
        if self.results.ids is not None:
            rows = [[self._name(e.output), *map(self._sample, e.samples)] for e in extremes]
            section.table(["output", "typical sample", "atypical sample"], rows, "Their names.")

    def _searched(self) -> str:
        """A note on the samples that were not looked at, if there are any."""
        spans = self._spans()
        if len(spans) == len(self.finished):
            return ""
        return f" Of {len(self.finished):,} finished chunks, {len(spans):,} at equal distances were searched."

    def _extremes(self) -> list[Extremes]:
        """Two passes over the maps: the mean |map| of each predicted output, then every sample's cosine with it."""
        results, predictions = self.results, self.results.array("predictions")
        if self.targets.ndim != 1 or predictions.ndim != 2:
            return []
        column = {int(t): s for s, t in enumerate(self.targets)}
        means: dict[int, Any] = {}
        counts: dict[int, int] = {}
        pieces = []
        for start, stop in self._spans():
            rows = np.asarray(predictions[start:stop]).argmax(1) if predictions.shape[1] > 1 else np.zeros(stop - start)
            pieces.append((start, stop, rows.astype(int)))
            maps = results.maps(start, stop).float().abs()
            for c in sorted({int(r) for r in rows} & set(column)):
                maps_of_class = maps[rows == c, column[c]]
                maps_of_class = maps_of_class[finite_rows(maps_of_class)]
                means[c] = means.get(c, 0) + maps_of_class.sum(0)
                counts[c] = counts.get(c, 0) + len(maps_of_class)
        wanted = sorted((c for c in means if counts[c] > 1), key=lambda c: -counts[c])[:SHOWN_CLASSES]
        best: dict[int, list[tuple[float, int, np.ndarray]]] = {c: [] for c in wanted}
        for start, stop, rows in pieces:
            maps = results.maps(start, stop).float()
            for c in wanted:
                samples = np.flatnonzero(rows == c)
                finite = finite_rows(maps[samples, column[c]])
                samples = samples[finite.numpy()]
                if len(samples) == 0:
                    continue
                maps_of_class = maps[samples, column[c]]
                flat, mean = maps_of_class.abs().reshape(len(maps_of_class), -1), means[c].flatten()
                norm = flat.norm(dim=1) * mean.norm()
                cosines = (flat @ mean / norm.clamp_min(1e-30)).numpy()
                for i in {int(cosines.argmax()), int(cosines.argmin())}:
                    best[c].append((float(cosines[i]), start + int(samples[i]), maps_of_class[i].numpy()))
        extremes = []
        for c in sorted(wanted):
            low, high = min(best[c], key=lambda b: b[:2]), max(best[c], key=lambda b: b[:2])
            pair = np.stack([high[2], low[2]])
            extremes.append(Extremes(c, (high[1], low[1]), (high[0], low[0]), pair))
        return extremes

    def curves(self, section: Section, curve: Curve) -> None:
        deletion, insertion = curve.gain
        section.facts([
            (f"{deletion:+.3f}", "deletion: area between ranking and random order"),
            (f"{insertion:+.3f}", "insertion: the same"),
        ])  # fmt: skip
        section.picture(
            datafigures.curves(curve),
            f"{curve.samples} samples, each by the ranking of its predicted output. Deletion: the most important "
            "features are replaced by their mean; the faster the fall, the better. Insertion: they are put into a "
            "sample of means; the faster the rise, the better. A ranking worth nothing lies on the random order.",
            vector=True,
        )

    def settings(self, section: Section) -> None:
        parts = cast(dict[str, dict[str, Any]], {**self.about["fingerprint"], "pinned": self.about["pinned"]})
        rows = [(f"{part}: {key}", value) for part, values in parts.items() for key, value in values.items()]
        section.table(
            ["", "value"], [(k, shorten(str(v), LONGEST_VALUE)) for k, v in rows], "What identifies this run."
        )
        if self.about["program"]:
            section.printed(self.about["program"], "The network as gradkern sees it")


def _first_floating_sample(inputs: Sequence[Tensor]) -> np.ndarray:
    """The sample ``[*in]`` of the first floating input, to which the maps belong."""
    return next(x for x in inputs if x.is_floating_point())[0].float().numpy()
