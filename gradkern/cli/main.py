"""The command line: ``gradkern run | importance | explain | report | bench | merge | info``.

Exit codes: 0 done; 1 something failed; 2 the command line does not fit; 3 the store belongs to another run; 4 the
disk is full (what is finished is kept); 130 interrupted (what is finished is kept).
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

try:
    import click
except ImportError:
    raise SystemExit("gradkern: the command line needs the data extra: pip install 'gradkern[data]'") from None

FAILED, MISMATCH, FULL, INTERRUPTED = 1, 3, 4, 130


class Commands(click.Group):
    """Errors in one line with an exit code; a traceback with ``--debug``."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("gradkern: interrupted; what is finished is kept", err=True)
            context.exit(INTERRUPTED)
        except Exception as error:
            if context.params.get("debug"):
                raise
            line = " ".join(str(error).split()) or type(error).__name__
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            click.echo(f"gradkern: {name}{line}", err=True)
            context.exit(_code(error))


def _code(error: Exception) -> int:
    from gradkern.data import DiskFull, Mismatch

    return MISMATCH if isinstance(error, Mismatch) else FULL if isinstance(error, DiskFull) else FAILED


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Tracebacks in place of one line.")
@click.option("--log", type=click.Choice(["quiet", "info"]), default="quiet", help="Structured log lines on stderr.")
@click.option("--threads", type=click.IntRange(1), help="Threads for computing (a store that is there pins its own).")
@click.version_option(package_name="gradkern")
@click.pass_context
def main(context: click.Context, debug: bool, log: str, threads: int | None) -> None:
    """All-class input gradients of PyTorch networks, over whole data sets.

    \b
    A MODEL is  net.pt2                        from torch.export.save, with a free batch axis
            or  package.module:factory         with --weights net.safetensors (or a state_dict)
    A SOURCE is x.npy, x.npz:name, x.pt, x.safetensors:name, x.zarr:name, x.h5:name or x.parquet:column
    """
    if log == "info":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not debug:
        warnings.showwarning = lambda message, *rest, **more: click.echo(f"gradkern: note: {message}", err=True)
    if threads:
        import torch

        torch.set_num_threads(threads)


def model_options(function: Any) -> Any:
    """MODEL and the ways to load it."""
    function = click.option(
        "--allow-pickle", is_flag=True,
        help="Load a pickled module. WARNING: a pickle can run any code; only for files whose origin you trust.",
    )(function)  # fmt: skip
    function = click.option("--weights", help="Weights for a factory: .safetensors, or a state_dict.")(function)
    return click.argument("model")(function)


def source_options(function: Any) -> Any:
    """How samples are read."""
    function = click.option(
        "--cast", type=click.Choice(["float32", "float64"]), help="Cast floating inputs and bytes to this dtype."
    )(function)
    return click.option("--columns", help="Names of the model's inputs in the source, with commas between.")(function)


def run_options(function: Any) -> Any:
    """What `run` and `importance` share."""
    for option in (
        click.option("--targets", help="Outputs, such as 0,2 or top3; all by default."),
        click.option("--chunk", type=click.IntRange(1), help="Samples per chunk of the store."),
        click.option("--batch", type=click.IntRange(1), help="Samples per call of the engine."),
        click.option("--engine", type=click.Choice(["auto", "kernel", "reference", "autograd"])),
        click.option("--progress/--no-progress", default=None, help="A bar; by default in a terminal only."),
    ):
        function = option(function)
    return function


def _load(model: str, weights: str | None, allow_pickle: bool) -> Any:
    from gradkern.data.models import load_model

    if allow_pickle:
        click.echo("gradkern: warning: loading a pickle, which can run any code", err=True)
    return load_model(model, weights, allow_pickle=allow_pickle)


def _source(source: str, columns: str | None, cast: str | None) -> Any:
    import torch

    from gradkern.data import open_source

    return open_source(source, tuple(columns.split(",")) if columns else None, getattr(torch, cast) if cast else None)


def _targets(text: str | None) -> Any:
    from gradkern import TopK

    if text is None:
        return None
    try:
        if text.startswith("top"):
            return TopK(int(text[3:]))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"got {text!r}, expected numbers with commas between, or top3", param_hint="--targets"
        ) from None


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise click.BadParameter(f"got {text!r}, expected i/n, such as 0/4", param_hint="--shard") from None
    return i, n


@main.command("run")
@model_options
@click.argument("source")
@click.argument("out")
@source_options
@run_options
@click.option(
    "--method",
    default="saliency",
    show_default=True,
    help="saliency, jacobian, input_x_gradient, or a class of gradkern.attr.",
)
@click.option(
    "--reduce",
    "reductions",
    help="Statistics: mean_abs, mean, variance, max_abs, ranks, importance; with commas between.",
)
@click.option("--no-maps", is_flag=True, help="Store the statistics only.")
@click.option("--top-features", type=click.IntRange(1), default=None, help="Per sample, the k largest features.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float64", "float16", "bfloat16"]), default="float32", show_default=True
)
@click.option("--compression", default="none", show_default=True, help="none, zstd, blosc; a level: zstd:3.")
@click.option("--shard", help="i/n: only this part of the chunks, for job arrays.")
def run_command(
    model: str, source: str, out: str, weights: str | None, allow_pickle: bool, columns: str | None, cast: str | None,
    targets: str | None, chunk: int | None, batch: int | None, engine: str | None, progress: bool | None, method: str,
    reductions: str | None, no_maps: bool, top_features: int | None, dtype: str, compression: str, shard: str | None,
) -> None:  # fmt: skip
    """Attribute every sample of SOURCE; results go to the zarr store OUT.

    The same command again continues a run that was killed.

    \b
    gradkern run net.pt2 x.npy maps.zarr
    gradkern run net.pt2 x.npy maps.zarr --reduce mean_abs,importance --dtype float16 --compression zstd
    gradkern run nets:build --weights net.safetensors data.h5:test/x stats.zarr --reduce importance --no-maps
    gradkern run net.pt2 x.npy maps.zarr --shard $SLURM_ARRAY_TASK_ID/16
    """
    import gradkern

    begin = time.perf_counter()
    made_by = {"model": model, "weights": weights, "source": source, "columns": columns, "cast": cast}
    results = gradkern.run(
        _load(model, weights, allow_pickle), _source(source, columns, cast), out, method, _targets(targets),
        maps=not no_maps, reductions=tuple(reductions.split(",")) if reductions else (), top_features=top_features or 0,
        dtype=dtype, compression=compression, chunk=chunk, batch=batch, engine=engine, shard=_shard(shard),
        progress=progress, made_by=made_by,
    )  # fmt: skip
    state = "complete" if results.about["finished"] else f"{results.done} of {results.chunks} chunks finished"
    click.echo(f"{out}: {state}, {results.samples:,} samples, {time.perf_counter() - begin:.1f} s")
    for note in results.about.get("notes", []):
        click.echo(f"{out}: equal within {results.about['tolerance']:.0e}, not to the last bit: {note}")


@main.command("importance")
@model_options
@click.argument("source")
@source_options
@run_options
@click.option("--out", help="Keep the run in this store (it then resumes).")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Features per output.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def importance_command(
    model: str, source: str, weights: str | None, allow_pickle: bool, columns: str | None, cast: str | None,
    targets: str | None, chunk: int | None, batch: int | None, engine: str | None, progress: bool | None,
    out: str | None, top: int, as_json: bool,
) -> None:  # fmt: skip
    """Rank the features of SOURCE by what each output depends on; no map is stored.

    \b
    gradkern importance net.pt2 x.npy
    gradkern importance net.pt2 x.npy --top 20 --json > ranking.json
    """
    import gradkern

    found = gradkern.importance(
        _load(model, weights, allow_pickle), _source(source, columns, cast), out, targets=_targets(targets),
        chunk=chunk, batch=batch, engine=engine, progress=progress,
    )  # fmt: skip
    ranked = found.top(top)
    if as_json:
        curve = vars(found.curve) if found.curve is not None else {}
        plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in curve.items()}
        shown = {"top": ranked, "agreement": found.agreement.tolist(), "samples": found.counts.tolist()}
        click.echo(json.dumps(shown | {"curve": plain or None}))
        return
    from gradkern.report.places import place

    shape = found.scores.shape[1:]
    for c, features in enumerate(ranked):
        click.echo(
            f"output {c}: {' '.join(place(f, shape) for f in features)}   (halves agree to {found.agreement[c]:.2f})"
        )
    if found.curve is not None:
        click.echo("deletion {:+.3f}, insertion {:+.3f} against random order".format(*found.curve.gain))


@main.command("explain")
@model_options
@click.argument("source")
@source_options
def explain_command(
    model: str, source: str, weights: str | None, allow_pickle: bool, columns: str | None, cast: str | None
) -> None:
    """Print which way every step of MODEL goes, and why not a faster one.

    \b
    gradkern explain net.pt2 x.npy
    """
    import gradkern

    inputs = _source(source, columns, cast).read(0, 1)
    gradkern.explain(_load(model, weights, allow_pickle), inputs[0] if len(inputs) == 1 else inputs)


@main.command("report")
@click.argument("store")
@click.option("--out", type=click.Path(dir_okay=False), help="The HTML file; by default beside the store.")
@click.option("--names", help="Names of the outputs, with commas between.")
@click.option("--title", help="Title of the page.")
@click.option("--model", help="The run's model, where it has moved.")
@click.option("--weights", help="Its weights.")
@click.option("--source", help="The run's source, where it has moved.")
@click.option("--allow-pickle", is_flag=True, help="Load a pickled module. WARNING: a pickle can run any code.")
def report_command(
    store: str, out: str | None, names: str | None, title: str | None, model: str | None, weights: str | None,
    source: str | None, allow_pickle: bool,
) -> None:  # fmt: skip
    """Write one HTML file about STORE, finished or not.

    Takes up the model and the source that `gradkern run` was given, where they are still there, for the samples
    behind the maps and the deletion curves.

    \b
    gradkern report maps.zarr --names cat,dog,horse
    """
    from gradkern.data import open as open_results
    from gradkern.report.dataset import report

    results = open_results(store)
    made_by = results.about.get("made_by", {})
    rows = _again(lambda: _source(source or made_by["source"], made_by.get("columns"), made_by.get("cast")), "source",
                  source, made_by.get("source"))  # fmt: skip
    net = _again(lambda: _load(model or made_by["model"], weights or made_by.get("weights"), allow_pickle), "model",
                 model, made_by.get("model"))  # fmt: skip
    _check_same(results, net, rows)
    path = report(
        results, out or Path(store.rstrip("/")).with_suffix(".html"), model=net, source=rows, title=title,
        names=names.split(",") if names else None,
    )  # fmt: skip
    click.echo(path)


def _again(load: Any, what: str, given: str | None, recorded: str | None) -> Any:
    """The run's model or source; a recorded one that is gone is no error."""
    if given is None and recorded is None:
        return None
    try:
        return load()
    except Exception as error:
        if given is not None:
            raise
        click.echo(f"gradkern: note: the report does without the run's {what}: {error}", err=True)
        return None


def _check_same(results: Any, model: Any, source: Any) -> None:
    """A report must not put another model's curves, or other samples, beside these maps."""
    from gradkern.data import Mismatch, fingerprint

    stored = results.about["fingerprint"]
    if model is not None and fingerprint.of_model(model, None)["weights"] != stored["model"]["weights"]:
        raise Mismatch("--model: its weights are not those of the run.")
    if source is not None and fingerprint.of_source(source) != stored["source"]:
        raise Mismatch("--source: its samples are not those of the run.")


@main.command("bench")
@model_options
@click.argument("source")
@source_options
@click.option("--samples", type=click.IntRange(2), default=2048, show_default=True, help="At most this many samples.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
def bench_command(
    model: str, source: str, weights: str | None, allow_pickle: bool, columns: str | None, cast: str | None,
    samples: int, repeats: int,
) -> None:  # fmt: skip
    """Measure gradkern on MODEL and SOURCE, beside autograd with one backward pass per output.

    \b
    gradkern bench net.pt2 x.npy --samples 4096
    """
    from gradkern.data.bench import bench

    rows = _source(source, columns, cast)
    for line in bench(_load(model, weights, allow_pickle), rows, samples, repeats):
        click.echo(line)


@main.command("merge")
@click.argument("out")
@click.argument("parts", nargs=-1)
def merge_command(out: str, parts: tuple[str, ...]) -> None:
    """Complete the store OUT of a sharded run, after copying the finished chunks of other stores into it.

    \b
    gradkern merge maps.zarr                          shards that wrote to one store
    gradkern merge part0.zarr part1.zarr part2.zarr   shards that wrote to stores of their own
    """
    from gradkern.data import merge

    results = merge(out, parts)
    click.echo(f"{out}: complete, {results.samples:,} samples")


@main.command("info")
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="All attributes as JSON.")
def info_command(store: str, as_json: bool) -> None:
    """What is in STORE and how far it is.

    \b
    gradkern info maps.zarr
    """
    from gradkern.data import open as open_results

    results = open_results(store)
    if as_json:
        click.echo(json.dumps({**results.about, "finished_chunks": results.done, "chunks": results.chunks}))
        return
    about = results.about
    click.echo(f"{store}: {results.done} of {results.chunks} chunks of {results.chunk:,} samples finished")
    for part in about["fingerprint"].values():
        for key, value in part.items():
            click.echo(f"  {key:<14} {value}")
    for key, value in about["pinned"].items():
        click.echo(f"  {key:<14} {value}")
    for name, array in results.group.arrays():
        click.echo(f"  {name:<14} {'×'.join(map(str, array.shape))} {array.dtype}")
    if about["finished"]:
        click.echo(
            "  complete, " + ("bit-equal to an uninterrupted run" if about["exact"] else "; ".join(about["notes"]))
        )
