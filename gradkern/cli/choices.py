"""Arguments and options that several commands share: the model, the source, the outputs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..util.options import BadValue

if TYPE_CHECKING:
    from torch import nn

    from ..data import Source

Command = Callable[..., None]
INPUT_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class ModelArguments:
    """MODEL and the ways to load it."""

    spec: str
    weights: str | None = None
    allow_pickle: bool = False

    def load(self) -> nn.Module:
        from .models import load_model

        if self.allow_pickle:
            click.echo("gradkern: warning: loading a pickle, which can run any code", err=True)
        return load_model(self.spec, self.weights, allow_pickle=self.allow_pickle)


@dataclass(frozen=True)
class SourceArguments:
    """SOURCE and how samples are read."""

    spec: str
    columns: str | None = None
    input_dtype: str | None = None
    pad: str | None = None

    def open(self) -> Source:
        import torch

        from ..data import open_source

        columns = tuple(self.columns.split(",")) if self.columns else None
        if self.input_dtype not in (None, *INPUT_DTYPES):
            raise BadValue(f"input_dtype: got {self.input_dtype!r}, expected {' or '.join(INPUT_DTYPES)}.")
        dtype = getattr(torch, self.input_dtype) if self.input_dtype else None
        return open_source(self.spec, columns, dtype, read_pad(self.pad))


def read_pad(text: str | None) -> float | tuple[float, int] | None:
    """``0`` or ``0:500``, a number and a length."""
    if text is None:
        return None
    number, _, length = text.partition(":")
    try:
        return (float(number), int(length)) if length else float(number)
    except ValueError:
        raise BadValue(f"--pad: got {text!r}, expected a number, or a number and a length, such as 0:500.") from None


def read_names(text: str | None) -> list[str] | None:
    """Names separated by commas, or those in a ``.txt`` file, one per line."""
    if text is None:
        return None
    if text.endswith(".txt"):
        return _lines("--names", text)
    return text.split(",")


def read_ids(spec: str | None) -> Any:
    """Names of samples from a ``.txt`` file with one per line, an ``.npy``, or a column, ``table.csv:name``."""
    if spec is None:
        return None
    path = Path(spec).expanduser()
    if path.suffix == ".txt":
        return _lines("--ids", spec)
    if path.suffix == ".npy" and path.exists():
        import numpy as np

        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadValue(f"--ids: {spec} cannot be read ({error}). Save text: names.astype(str).") from error
    from ..data.sources.tables import column

    return column(spec)


def _lines(option: str, path: str) -> list[str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        return [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{option}: {path} cannot be read ({type(error).__name__}).") from error


def recorded(made_by: Mapping[str, object], name: str) -> str | None:
    """The argument that a store says its run was given.  It is only ever shown, as the store may come from anyone."""
    value = made_by.get(name)
    return value if isinstance(value, str) and value else None


def source_of_the_run(spec: str, made_by: Mapping[str, object]) -> SourceArguments:
    """The source ``spec``, read with the options that a store says its run was given."""
    dtype = recorded(made_by, "input_dtype") or recorded(made_by, "cast")  # its name in stores of earlier versions
    return SourceArguments(spec, recorded(made_by, "columns"), dtype)


def as_in_the_run(given: Mapping[str, str | None], made_by: Mapping[str, object]) -> str:
    """The options of the run that are not ``given``, as one would type them."""
    missing = {name: recorded(made_by, name) for name, value in given.items() if value is None}
    return " ".join(f"--{name} {shlex.quote(spec)}" for name, spec in missing.items() if spec)


allow_pickle = click.option(
    "--allow-pickle", is_flag=True,
    help="Load a pickled module. WARNING: a pickle can run any code; use it only for files that you trust.",
)  # fmt: skip


def model_and_source(command: Command) -> Command:
    """Add MODEL, SOURCE and their options, which the command takes as ``model`` and ``samples``."""

    @functools.wraps(command)
    def gathered(
        model: str, weights: str | None, allow_pickle: bool, source: str, columns: str | None,
        input_dtype: str | None, pad: str | None, **rest: Any,
    ) -> None:  # fmt: skip
        command(
            model=ModelArguments(model, weights, allow_pickle),
            samples=SourceArguments(source, columns, input_dtype, pad),
            **rest,
        )

    for option in (
        click.option(
            "--input-dtype",
            "--cast",
            "input_dtype",
            type=click.Choice(INPUT_DTYPES),
            help="The dtype to cast inputs to, whether they are floating numbers, integers, bytes or booleans.",
        ),
        click.option("--pad", help="Pad samples of different lengths with this number; 0:500 to the length 500."),
        click.option("--columns", help="Names of the model's inputs in the source, separated by commas."),
        allow_pickle,
        click.option("--weights", help="Weights for a factory: .safetensors, or a state_dict."),
        click.argument("source"),
        click.argument("model"),
    ):
        gathered = option(gathered)
    return gathered


class TargetsType(click.ParamType):
    """``0,2`` or ``top3``."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from .. import TopK

        try:
            return TopK(int(value[3:])) if value.startswith("top") else [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"got {value!r}, expected numbers separated by commas, or top3", param, ctx)


class WindowsType(click.ParamType):
    """``0:500,500:1000``."""

    name = "a:b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[tuple[int, int]]:
        try:
            return [(int(a), int(b)) for a, b in (part.split(":") for part in value.split(","))]
        except ValueError:
            self.fail(f"got {value!r}, expected windows such as 0:500,500:1000", param, ctx)


class ShardType(click.ParamType):
    """``i/n``."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        try:
            i, n = (int(part) for part in value.split("/"))
        except ValueError:
            self.fail(f"got {value!r}, expected i/n, such as 0/4", param, ctx)
        return i, n


class OutputType(click.ParamType):
    """An index, or a name."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return int(value) if value.lstrip("-").isdigit() else str(value)


output = click.option(
    "--output", type=OutputType(), help="Of a model that returns several tensors: the index or name of one."
)

dry_run = click.option("--dry-run", is_flag=True, help="Only print an estimate: samples, bytes, memory, time.")


def of_plan(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `run_options` that matter to a plan."""
    return {name: value for name, value in options.items() if name not in ("progress", "trust_source")}


def run_options(command: Command) -> Command:
    """The options that ``run`` and ``importance`` share; they are passed on to `gradkern.run` unchanged."""
    for option in (
        click.option("--targets", type=TargetsType(), help="Outputs, such as 0,2 or top3; all by default."),
        click.option("--chunk", type=click.IntRange(1), help="Samples per chunk of the store."),
        click.option("--batch", type=click.IntRange(1), help="Samples per call of the engine."),
        click.option(
            "--nonfinite",
            type=click.Choice(["error", "skip", "keep"]),
            help="Samples with NaN or Inf: stop (the default with statistics), leave them out of these, or keep them.",
        ),
        click.option(
            "--trust-source", is_flag=True, help="Do not check whether samples of finished chunks have changed."
        ),
        click.option("--engine", type=click.Choice(["auto", "kernel", "reference", "autograd"])),
        output,
        click.option(
            "--names",
            callback=lambda *given: read_names(given[-1]),
            help="Names of the model's outputs, separated by commas, or a .txt file with one per line.",
        ),
        click.option(
            "--progress/--no-progress", default=None, help="Show a progress bar; by default in a terminal only."
        ),
    ):
        command = option(command)
    return command
