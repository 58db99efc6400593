"""``gradkern verify``: finds damaged data in a store."""

from __future__ import annotations

import json

import click

from . import choices
from .choices import ModelArguments
from .terminal import line, say

DAMAGED = 5


@click.command()
@click.argument("store")
@click.option("--repair", "repairs", is_flag=True, help="Recompute what is damaged, from the run's model and source.")
@click.option("--model", help="The run's model, for --repair; never loaded only because the store names it.")
@click.option("--weights", help="Weights of the model.")
@click.option("--source", help="The run's source, for --repair.")
@choices.allow_pickle
@click.pass_context
def verify(
    context: click.Context, store: str, repairs: bool, model: str | None, weights: str | None, source: str | None,
    allow_pickle: bool,
) -> None:  # fmt: skip
    """Compare STORE with the checksums from when it was written; exit code 5 if something is damaged.

    Model and source are loaded only if you name them, never because the store does.

    \b
    gradkern verify maps.zarr                                              what is damaged, which samples to recompute
    gradkern verify maps.zarr --repair --model net.pt2 --source x.npy      recomputes them
    """
    from gradkern.data import open_store
    from gradkern.data import repair as redo
    from gradkern.data import verify as check

    verdict = check(store)
    say(verdict)
    if verdict.ok:
        return
    if not repairs:
        context.exit(DAMAGED)
    made_by = _made_by(store)
    if not (model and source):
        named = choices.as_in_the_run({"model": model, "weights": weights, "source": source}, made_by)
        hint = f" The store says: {named}. Give them if you trust these files." if named else ""
        raise click.UsageError(line(f"--repair needs the run's --model and --source.{hint}"))
    rows = choices.source_of_the_run(source, made_by).open()
    redo(store, ModelArguments(model, weights, allow_pickle).load(), rows, input_dtype=rows.cast)
    after = check(store)
    say(after)
    for note in open_store(store).notes:
        say(f"{store}: not equal to the last bit: {note}")
    if not after.ok:
        context.exit(DAMAGED)


def _made_by(store: str) -> dict[str, str]:
    """The run's own arguments, from the store's description, or from its copy if that is damaged."""
    from gradkern.data.store import checks, durable

    place = durable.store_at(store, read_only=True)
    content = (checks.read_backup(place) or {}).get("zarr.json") or durable.get(place, "zarr.json") or b"{}"
    try:
        made_by = json.loads(content)["attributes"]["gradkern"]["made_by"]
        return {name: value for name, value in made_by.items() if isinstance(value, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
