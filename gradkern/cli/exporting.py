"""``gradkern export``: a store in the files of other programs."""

from __future__ import annotations

from pathlib import Path

import click

from ..util.options import BadValue
from .choices import SourceArguments
from .terminal import say


@click.command()
@click.argument("store")
@click.argument("source")
@click.argument("folder")
@click.option("--columns", help="Names of the model's inputs in the source, separated by commas.")
@click.option(
    "--target", type=click.IntRange(0), default=0, show_default=True, help="The position among the run's targets."
)
@click.option(
    "--names",
    type=click.Path(exists=True, dir_okay=False),
    help="A file with the name of a sample per line; by default the store's --ids.",
)
def export(store: str, source: str, folder: str, columns: str | None, target: int, names: str | None) -> None:
    """Write STORE's hypothetical contributions and SOURCE's one-hot sequences for TF-MoDISco to FOLDER.

    \b
    gradkern run net.pt2 onehot.npy maps.zarr --method deep_lift_shap --baselines dinucleotide-shuffle \\
        --hypothetical --ids regions.txt
    gradkern export maps.zarr onehot.npy modisco
    modisco motifs -s modisco/sequences.npz -a modisco/contributions.npz -n 20000 -o motifs.h5
    """
    from gradkern.data.export import to_modisco

    listed = None if names is None else Path(names).read_text().splitlines()
    try:
        paths = to_modisco(store, SourceArguments(source, columns).open(), folder, target=target, names=listed)
    except OSError as error:
        raise BadValue(f"folder: {folder} cannot be written: {error}") from error
    for path in paths:
        say(str(path))
