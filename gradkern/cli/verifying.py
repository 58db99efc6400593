"""``gradkern verify``: is a store what was written?"""

from __future__ import annotations

import click

from . import choices
from .choices import ModelArguments, SourceArguments
from .terminal import say

DAMAGED = 5


@click.command()
@click.argument("store")
@click.option(
    "--repair", "repairs", is_flag=True, help="Compute again what is damaged, from the run's model and source."
)
@click.option("--model", help="The run's model, to repair: never loaded only because the store names it.")
@click.option("--weights", help="Its weights.")
@click.option("--source", help="The run's source, to repair.")
@choices.allow_pickle
@click.pass_context
def verify(
    context: click.Context, store: str, repairs: bool, model: str | None, weights: str | None, source: str | None,
    allow_pickle: bool,
) -> None:  # fmt: skip
    """Compare STORE with the checksums of when it was written; exit code 5 if something is damaged.

    \b
    gradkern verify maps.zarr              says what is damaged, and which samples to compute again
    gradkern verify maps.zarr --repair --model net.pt2 --source x.npy     computes them again
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
        words = choices.as_in_the_run({"model": model, "weights": weights, "source": source}, made_by)
        raise click.UsageError(f"--repair needs --model and --source{words and f', in the run {words}'}")
    samples = SourceArguments(source, choices.recorded(made_by, "columns"), choices.recorded(made_by, "cast"))
    rows = samples.open()
    redo(store, ModelArguments(model, weights, allow_pickle).load(), rows, input_dtype=rows.cast)
    after = check(store)
    say(after)
    for note in open_store(store).about.get("notes", []):
        say(f"{store}: not equal to the last bit: {note}")
    if not after.ok:
        context.exit(DAMAGED)


def _made_by(store: str) -> dict[str, object]:
    """The run's own arguments, from the store's copy of its description where that is damaged."""
    import json

    from gradkern.data.store import checks, durable

    files = checks.read_backup(durable.store_at(store, read_only=True)) or {}
    content = files.get("zarr.json") or durable.get(durable.store_at(store, read_only=True), "zarr.json") or b"{}"
    try:
        made_by = json.loads(content)["attributes"]["gradkern"]["made_by"]
    except (ValueError, LookupError, TypeError):
        return {}
    return made_by if isinstance(made_by, dict) else {}
