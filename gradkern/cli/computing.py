"""``gradkern run | importance | merge | bench``: the commands that compute."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import click

from . import choices
from .choices import ModelArguments, SourceArguments
from .terminal import as_json_text, say

if TYPE_CHECKING:
    from ..data import Results


@click.command()
@choices.model_and_source
@click.argument("out")
@choices.run_options
@click.option("--method", help="saliency (the default), jacobian, input_x_gradient, or a class of gradkern.attr.")
@click.option(
    "--reductions", "--reduce", "reductions",
    help="Statistics, separated by commas: mean_abs, mean, variance, max_abs, ranks, importance.",
)  # fmt: skip
@click.option("--maps/--no-maps", default=True, help="Store the maps, or the statistics only.")
@click.option("--top-features", type=click.IntRange(1), help="Per sample, the k largest features.")
@click.option("--dtype", type=click.Choice(["float32", "float64", "float16", "bfloat16"]), help="Default: float32.")
@click.option("--compression", help="none (the default), zstd, blosc; a level: zstd:3.")
@click.option(
    "--baselines", "--references", "baselines",
    help="References per sample: dinucleotide-shuffle, shuffle, or module:function (inputs, n, random_state).",
)  # fmt: skip
@click.option("--n-references", type=click.IntRange(1), help="References per sample; 20 by default.")
@click.option("--random-state", type=click.IntRange(0), help="Seed for drawing the references.")
@click.option("--hypothetical", is_flag=True, help="Contributions of every base at every position.")
@click.option("--windows", type=choices.WindowsType(), help="Sums over these positions of the output as targets.")
@click.option("--shard", type=choices.ShardType(), default="0/1", help="Only this part of the chunks, for job arrays.")
@click.option("--threads", type=click.IntRange(1), help="Threads for computing.")
@click.option("--ids", help="Names of the samples: a .txt file with one per line, .npy, or table.csv:column.")
@choices.dry_run
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def run(
    model: ModelArguments, samples: SourceArguments, out: str, reductions: str | None, ids: str | None, dry_run: bool,
    quiet: bool, baselines: str | None, n_references: int | None, random_state: int | None,
    hypothetical: bool, windows: list[tuple[int, int]] | None, **options: Any,
) -> None:  # fmt: skip
    """Attribute every sample of SOURCE; results go to the zarr store OUT.

    To continue a run that was killed, repeat the same command.

    \b
    gradkern run net.pt2 x.npy maps.zarr
    gradkern run net.pt2 x.npy maps.zarr --reductions mean_abs,importance --dtype float16 --compression zstd
    gradkern run nets:build --weights net.safetensors data.h5:test/x stats.zarr --reductions importance --no-maps
    gradkern run net.pt2 x.npy maps.zarr --shard $SLURM_ARRAY_TASK_ID/16
    gradkern run net.pt2 x.npy maps.zarr --dry-run
    gradkern run net.pt2 onehot.npy maps.zarr --method deep_lift_shap --baselines dinucleotide-shuffle --hypothetical
    """
    import gradkern
    from gradkern.data import plan

    begin = time.perf_counter()
    given = {"baselines": baselines, "n_references": n_references, "random_state": random_state}
    given["hypothetical"] = hypothetical or None
    options["arguments"] = {name: value for name, value in given.items() if value is not None}
    if windows:
        options["output"] = gradkern.Sums(windows, options["output"])
    options |= {
        "ids": choices.read_ids(ids),
        "reductions": reductions.split(",") if reductions else (),
    }
    if dry_run:
        say(plan(model.load(), samples.open(), out, **choices.of_plan(options)))
        return
    if quiet:
        warnings.simplefilter("ignore")
        options["progress"] = False
    made_by = {"model": model.spec, "weights": model.weights}
    made_by |= {"source": samples.spec, "columns": samples.columns, "input_dtype": samples.input_dtype}
    made_by["pad"] = samples.pad
    results = gradkern.run(
        model.load(), samples.open(), out, made_by=made_by, **options,
    )  # fmt: skip
    if quiet:
        return
    state = "complete" if results.finished else f"{results.finished_chunks} of {results.chunks} chunks finished"
    say(f"{out}: {state}, {results.samples:,} samples, {time.perf_counter() - begin:.1f} s")
    _say_notes(out, results)


def _say_notes(out: str, results: Results) -> None:
    for note in results.notes:
        say(f"{out}: equal within {results.tolerance:.0e}, not to the last bit: {note}")


@click.command()
@choices.model_and_source
@choices.run_options
@click.option("--out", help="Keep the run in this store, so that it can be resumed.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Features per output.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@choices.dry_run
def importance(
    model: ModelArguments, samples: SourceArguments, top: int, as_json: bool, dry_run: bool, **options: Any
) -> None:
    """Rank the features of SOURCE by their effect on each output, without storing maps.

    \b
    gradkern importance net.pt2 x.npy
    gradkern importance net.pt2 x.npy --names cat,dog,horse
    gradkern importance net.pt2 x.npy --top 20 --json > ranking.json
    gradkern importance net.pt2 x.npy --dry-run
    """
    import gradkern
    from gradkern.data.ranking import plan_importance, position_text

    if dry_run:
        say(plan_importance(model.load(), samples.open(), **choices.of_plan(options)))
        return
    ranking = gradkern.importance(model.load(), samples.open(), **options)
    curve, best = ranking.curve, ranking.top(top)
    if as_json:
        curve_data = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(curve).items()} if curve else None
        shown = {
            "names": ranking.names,
            "top": [[] if ranking.unranked(c) else features for c, features in enumerate(best)],
            "agreement": ranking.agreement.tolist(),
            "samples": ranking.counts.tolist(),
            "nonfinite": ranking.nonfinite,
        }
        say(as_json_text(shown | {"curve": curve_data}))
        return
    shape = ranking.scores.shape[1:]
    for c, features in enumerate(best):
        places = " ".join(position_text(f, shape) for f in features)
        order = f"{places}   (halves agree to {ranking.agreement[c]:.2f})"
        say(f"{ranking.names[c]}: {ranking.unranked(c) or order}")
    if curve is not None:
        say("deletion {:+.3f}, insertion {:+.3f} against random order".format(*curve.gain))


@click.command()
@click.argument("out")
@click.argument("parts", nargs=-1)
def merge(out: str, parts: tuple[str, ...]) -> None:
    """Complete the store OUT of a sharded run, after copying the finished chunks of other stores into it.

    \b
    gradkern merge maps.zarr                          shards that wrote to one store
    gradkern merge part0.zarr part1.zarr part2.zarr   shards that wrote to separate stores
    """
    from gradkern.data import merge

    results = merge(out, parts)
    say(f"{out}: complete, {results.samples:,} samples")
    _say_notes(out, results)


@click.command()
@choices.model_and_source
@click.option(
    "--samples", "most", type=click.IntRange(2), default=2048, show_default=True, help="At most this many samples."
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@choices.output
def bench(model: ModelArguments, samples: SourceArguments, most: int, repeats: int, output: int | str | None) -> None:
    """Compare gradkern on MODEL and SOURCE with autograd, which runs one backward pass per output.

    \b
    gradkern bench net.pt2 x.npy --samples 4096
    """
    from ..util.outputs import OneOutput
    from .bench import bench

    net = model.load()
    for line in bench(net if output is None else OneOutput(net, output), samples.open(), most, repeats):
        say(line)
