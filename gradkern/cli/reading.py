"""``gradkern explain | report | info``: the commands that inspect a model or a store."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from ..util.options import BadValue
from . import choices
from .choices import ModelArguments, SourceArguments
from .terminal import as_json_text, line, note, say

if TYPE_CHECKING:
    from torch import nn

    from ..data import Results, Source


@click.command()
@choices.model_and_source
@choices.output
def explain(model: ModelArguments, samples: SourceArguments, output: int | str | None) -> None:
    """Print how every step of MODEL runs, and why it is not faster.

    \b
    gradkern explain net.pt2 x.npy
    """
    import gradkern

    inputs = samples.open().read(0, 1)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        gradkern.explain(model.load(), inputs[0] if len(inputs) == 1 else inputs, output=output)
    say(text.getvalue().rstrip("\n"))


@click.command()
@click.argument("store")
@click.option("--out", type=click.Path(dir_okay=False), help="The HTML file; by default next to the store.")
@click.option("--names", help="Names of the outputs: with commas between, or a .txt file. Default: the store's.")
@click.option("--title", help="Title of the page.")
@click.option("--model", help="The run's model: adds the deletion and insertion curves.")
@click.option("--weights", help="Its weights.")
@click.option("--source", help="The run's source: adds the samples under the maps.")
@choices.allow_pickle
def report(
    store: str, out: str | None, names: str | None, title: str | None, model: str | None, weights: str | None,
    source: str | None, allow_pickle: bool,
) -> None:  # fmt: skip
    """Write one HTML file about STORE, finished or not.

    With the model and the source of its run, the page has the samples under the maps and the deletion curves. They are
    never loaded because the store names them, only if you do.

    \b
    gradkern report maps.zarr --names cat,dog,horse
    gradkern report maps.zarr --model net.pt2 --source x.npy
    """
    from gradkern.data import open_store
    from gradkern.data.runs.verify import as_padded
    from gradkern.report.dataset import report

    if weights and not model:
        raise click.UsageError("--weights belong to a --model, which is not given")
    results = open_store(store)
    made_by = results.about.get("made_by", {})
    rows = as_padded(choices.source_of_the_run(source, made_by).open(), None, None, results) if source else None
    net = ModelArguments(model, weights, allow_pickle).load() if model else None
    _check_same(results, net, rows)
    path = report(
        results, out or _beside(store), model=net, source=rows, title=title,
        names=choices.read_names(names),
    )  # fmt: skip
    say(path)
    missing = choices.as_in_the_run({"model": model, "source": source}, made_by)
    if missing:
        note(f"for samples and curves add {missing}, as in the run, if you trust these files")


def _beside(store: str) -> Path:
    """The page next to a store, in the current folder if the store is not on this machine; never through a link that
    came with the store."""
    from gradkern.util.untrusted import local_path

    place = local_path(store.rstrip("/"))
    path = Path(store.rstrip("/").rpartition("/")[2] if place is None else place).with_suffix(".html")
    if path.is_symlink():
        raise BadValue(f"{path} is a symbolic link, which might lead anywhere. Say where the page shall go with --out.")
    return path


def _check_same(results: Results, net: nn.Module | None, rows: Source | None) -> None:
    """Refuse another model or source: a report must not combine its curves or samples with these maps."""
    from gradkern.data import Mismatch
    from gradkern.data.runs import fingerprint
    from gradkern.data.runs.reading import SpotSamples

    stored = results.about["fingerprint"]
    same = {
        "model": net is None or fingerprint.of_model(net, None)["weights"] == stored["model"]["weights"],
        "source": rows is None or fingerprint.of_source(rows.samples, SpotSamples.of(rows).rows) == stored["source"],
    }
    for what, ok in same.items():
        if not ok:
            raise Mismatch(f"--{what}: it is not the {what} of the run, whose content was another.")


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="All attributes as JSON.")
def info(store: str, as_json: bool) -> None:
    """Show the contents of STORE, and how much of it is finished.

    \b
    gradkern info maps.zarr
    """
    from gradkern.data import open_store

    results = open_store(store)
    about = results.about
    if as_json:
        say(as_json_text({**about, "finished_chunks": results.finished_chunks, "chunks": results.chunks}))
        return
    say(f"{store}: {results.finished_chunks} of {results.chunks} chunks of {results.chunk:,} samples finished")
    for part in cast(list[dict[str, object]], [*about["fingerprint"].values(), about["pinned"]]):
        for key, value in part.items():
            say(f"  {line(key):<14} {line(value)}")
    for name, array in results.group.arrays():
        kind = "text" if array.dtype.kind in "OT" else array.dtype
        say(f"  {line(name):<14} {'×'.join(map(str, array.shape))} {kind}")
    if results.names is not None:
        say(f"  {'outputs':<14} {line(', '.join(results.names))}")
    if results.finished:
        exact = "bit-equal to an uninterrupted run" if results.exact else line("; ".join(results.notes))
        short = len(results.short_files())
        say(f"  damaged: {short} files are missing or have another size" if short else f"  complete, {exact}")
        say(f"  (gradkern verify {store} compares everything with its checksums)")
    for words in results.losses():
        say(f"  {words}")
