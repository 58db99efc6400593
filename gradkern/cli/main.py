"""The command line: ``gradkern run | importance | explain | report | bench | merge | verify | info |
export``.

Exit codes: 0 success; 1 failure; 2 invalid command line; 3 the store belongs to another run; 4 the disk is full
(finished chunks are kept); 5 the store is damaged; 6 another run is using it; 130 interrupted (finished chunks are
kept).
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

try:
    import click
except ImportError:
    raise SystemExit(
        "gradkern: the command line needs the data extra: pip install 'gradkern[data]', in a checkout "
        "pip install --no-build-isolation '.[data]'"
    ) from None

from . import computing, exporting, reading, terminal, verifying

FAILED, MISMATCH, FULL, DAMAGED, BUSY, INTERRUPTED = 1, 3, 4, verifying.DAMAGED, 6, 130


class Commands(click.Group):
    """Errors in one line with an exit code; a traceback with ``--debug``."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("gradkern: interrupted; finished chunks are kept", err=True)
            context.exit(INTERRUPTED)
        except BrokenPipeError:  # `| head` has seen enough: click ends quietly
            raise
        except Exception as error:
            if context.params.get("debug"):
                raise
            text = terminal.line(error) or type(error).__name__
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            click.echo(f"gradkern: {name}{text}", err=True)
            context.exit(_code(error))


def _code(error: Exception) -> int:
    from gradkern.data import Busy, Damaged, DiskFull, Mismatch

    codes = {Mismatch: MISMATCH, DiskFull: FULL, Damaged: DAMAGED, Busy: BUSY}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks instead of one line.")
@click.option("--log", type=click.Choice(["quiet", "info"]), default="quiet", help="Structured log lines on stderr.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads for computing (an existing store keeps its own number)."
)
@click.version_option(package_name="gradkern")
def main(debug: bool, log: str, threads: int | None) -> None:
    """All-class input gradients of PyTorch networks, over whole data sets.

    \b
    A MODEL is  net.pt2                        from torch.export.save, with a dynamic batch axis
            or  package.module:factory         with --weights net.safetensors (or a state_dict)
    A SOURCE is x.npy, x.npz:name, x.pt, x.safetensors:name, x.zarr:name, x.h5:name, x.parquet:column or x.csv

    \b
    gradkern run net.pt2 x.npy maps.zarr --reductions importance    maps and statistics, continued after a kill
    gradkern report maps.zarr                                   one HTML file
    gradkern importance net.pt2 x.npy                           features, ranked
    gradkern run --help                                         more examples
    """
    if log == "info":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(terminal.Formatter("%(asctime)s %(name)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not debug:
        warnings.showwarning = lambda message, *rest, **more: terminal.note(message)
    if threads:
        import torch

        torch.set_num_threads(threads)


for command in (
    computing.run, computing.importance, reading.explain, reading.report, computing.bench, computing.merge,
    verifying.verify, reading.info, exporting.export,
):  # fmt: skip
    main.add_command(command)
