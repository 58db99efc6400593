"""``gradkern verify``: is a store what was written?"""

from __future__ import annotations

import json
import shlex

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

    Model and source are never loaded because the store names them, only if you do.

    \b
    gradkern verify maps.zarr                                              what is damaged, which samples to do again
    gradkern verify maps.zarr --repair --model net.pt2 --source x.npy      does them again
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
    if not (model and source):
        named = " ".join(f"--{n} {shlex.quote(made_by[n])}" for n in ("model", "weights", "source") if made_by.get(n))
        hint = f" The store says: {named}. Give them if you trust these files." if named else ""
        raise click.UsageError(f"--repair needs the run's --model and --source.{hint}")
    samples = SourceArguments(source, made_by.get("columns"), made_by.get("cast"))
    net = ModelArguments(model, weights, allow_pickle)
    dtype = getattr(torch, samples.cast) if samples.cast in ("float32", "float64") else None
    redo(store, net.load(), samples.open(), input_dtype=dtype)
    after = check(store)
    click.echo(after)
    for note in open_store(store).about.get("notes", []):
        click.echo(f"{store}: not equal to the last bit: {note}")
    if not after.ok:
        context.exit(DAMAGED)


def _made_by(store: str) -> dict[str, str]:
    """The run's own arguments, from the store's copy of its description where that is damaged."""
    from gradkern.data.store import checks, durable

    place = durable.store_at(store, read_only=True)
    content = (checks.read_backup(place) or {}).get("zarr.json") or durable.get(place, "zarr.json") or b"{}"
    try:
        made_by = json.loads(content)["attributes"]["gradkern"]["made_by"]
        return {name: value for name, value in made_by.items() if isinstance(value, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
