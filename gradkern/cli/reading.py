"""``gradkern explain | report | info``: the commands that inspect a model or a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from . import choices
from .choices import ModelArguments, SourceArguments

if TYPE_CHECKING:
    from torch import nn

    from ..data import Results, Source

T = TypeVar("T")


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
    gradkern.explain(model.load(), inputs[0] if len(inputs) == 1 else inputs, output=output)


@click.command()
@click.argument("store")
@click.option("--out", type=click.Path(dir_okay=False), help="The HTML file; by default beside the store.")
@click.option("--names", help="Names of the outputs, with commas between.")
@click.option("--title", help="Title of the page.")
@click.option("--model", help="The run's model, where its file is elsewhere now.")
@click.option("--weights", help="Its weights.")
@click.option("--source", help="The run's source, where its file is elsewhere now.")
@choices.allow_pickle
def report(
    store: str, out: str | None, names: str | None, title: str | None, model: str | None, weights: str | None,
    source: str | None, allow_pickle: bool,
) -> None:  # fmt: skip
    """Write one HTML file about STORE, finished or not.

    Uses the model and the source of `gradkern run`, if they still exist, for the samples under the maps and the
    deletion curves.

    \b
    gradkern report maps.zarr --names cat,dog,horse
    """
    from gradkern.data import open_store
    from gradkern.report.dataset import report

    results = open_store(store)
    made_by = results.about.get("made_by", {})
    samples = SourceArguments(source or made_by.get("source"), made_by.get("columns"), made_by.get("cast"))
    chosen = ModelArguments(model or made_by.get("model"), weights or made_by.get("weights"), allow_pickle)
    rows = _again(samples.open, "source", samples.spec, required=source is not None)
    net = _again(chosen.load, "model", chosen.spec, required=model is not None)
    net, rows = _only_of_the_run(results, net, rows, {"model": bool(model or weights), "source": bool(source)})
    path = report(
        results, out or _beside(store), model=net, source=rows, title=title,
        names=names.split(",") if names else None,
    )  # fmt: skip
    click.echo(path)


def _again(load: Callable[[], T], what: str, spec: str | None, *, required: bool) -> T | None:
    """The run's model or source; if it is only recorded and no longer exists, that is not an error."""
    if spec is None:
        return None
    try:
        return load()
    except Exception as error:
        if required:
            raise
        click.echo(f"gradkern: note: the report does without the run's {what}: {error}", err=True)
        return None


def _only_of_the_run(
    results: Results, net: nn.Module | None, rows: Source | None, given: dict[str, bool]
) -> tuple[nn.Module | None, Source | None]:
    """Model and source, if they are the run's: a report must not combine its curves or samples with these maps.

    Refuses one that was ``given`` on the command line; does without one that is only recorded and has changed.
    """
    from gradkern.data import Mismatch
    from gradkern.data.runs import fingerprint
    from gradkern.data.runs.reading import Alone

    stored = results.about["fingerprint"]

    def changed(what: str, same: bool) -> bool:
        if not same and given[what]:
            raise Mismatch(f"--{what}: it is not the {what} of the run, whose content was another.")
        if not same:
            click.echo(f"gradkern: note: the report does without the run's {what}, which has changed since", err=True)
        return not same

    weights = stored["model"]["weights"]
    if net is not None and changed("model", fingerprint.of_model(net, None)["weights"] == weights):
        net = None
    content = stored["source"]
    if rows is not None and changed("source", fingerprint.of_source(rows.samples, Alone.of(rows).rows) == content):
        rows = None
    return net, rows


def _beside(store: str) -> Path:
    """The page beside a store; in the current folder if the store is not on this machine."""
    from gradkern.data.store.durable import local_path

    path = local_path(store.rstrip("/"))
    return Path(store.rstrip("/").rpartition("/")[2] if path is None else path).with_suffix(".html")


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
        click.echo(json.dumps({**about, "finished_chunks": results.done, "chunks": results.chunks}))
        return
    click.echo(f"{store}: {results.done} of {results.chunks} chunks of {results.chunk:,} samples finished")
    for part in (*about["fingerprint"].values(), about["pinned"]):
        for key, value in part.items():
            click.echo(f"  {key:<14} {value}")
    for name, array in results.group.arrays():
        click.echo(f"  {name:<14} {'×'.join(map(str, array.shape))} {array.dtype}")
    if about["finished"]:
        exact = "bit-equal to an uninterrupted run" if about["exact"] else "; ".join(about["notes"])
        short = len(results.short_files())
        click.echo(f"  damaged: {short} files are missing or have another size" if short else f"  complete, {exact}")
        click.echo(f"  (gradkern verify {store} compares everything with its checksums)")
    for words in results.losses():
        click.echo(f"  {words}")
