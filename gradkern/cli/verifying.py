"""``gradkern verify``: is a store what was written?"""

from __future__ import annotations

import click

from . import choices
from .choices import ModelArguments, SourceArguments

DAMAGED = 5


@click.command()
@click.argument("store")
@click.option(
    "--repair", "repairs", is_flag=True, help="Compute again what is damaged, from the run's model and source."
)
@click.option("--model", help="The run's model, where its file is elsewhere now.")
@click.option("--weights", help="Its weights.")
@click.option("--source", help="The run's source, where its file is elsewhere now.")
@choices.allow_pickle
@click.pass_context
def verify(
    context: click.Context, store: str, repairs: bool, model: str | None, weights: str | None, source: str | None,
    allow_pickle: bool,
) -> None:  # fmt: skip
    """Compare STORE with the checksums of when it was written; exit code 5 if something is damaged.

    \b
    gradkern verify maps.zarr              says what is damaged, and which samples to compute again
    gradkern verify maps.zarr --repair     computes them again
    """
    import torch

    from gradkern.data import open_store
    from gradkern.data import repair as redo
    from gradkern.data import verify as check

    verdict = check(store)
    click.echo(verdict)
    if verdict.ok:
        return
    if not repairs:
        context.exit(DAMAGED)
    made_by = _made_by(store)
    model, source = model or made_by.get("model"), source or made_by.get("source")
    if not (model and source):
        raise click.UsageError("the store does not say what it was made from: give --model and --source")
    samples = SourceArguments(source, made_by.get("columns"), made_by.get("cast"))
    net = ModelArguments(model, weights or made_by.get("weights"), allow_pickle)
    dtype = getattr(torch, samples.cast) if samples.cast else None
    redo(store, net.load(), samples.open(), input_dtype=dtype)
    after = check(store)
    click.echo(after)
    for note in open_store(store).about.get("notes", []):
        click.echo(f"{store}: not equal to the last bit: {note}")
    if not after.ok:
        context.exit(DAMAGED)


def _made_by(store: str) -> dict[str, str | None]:
    """The run's own arguments, from the store's copy of its description where that is damaged."""
    import json

    from gradkern.data.store import checks, durable

    files = checks.read_backup(durable.store_at(store, read_only=True)) or {}
    content = files.get("zarr.json") or durable.get(durable.store_at(store, read_only=True), "zarr.json") or b"{}"
    return json.loads(content).get("attributes", {}).get("gradkern", {}).get("made_by", {})
