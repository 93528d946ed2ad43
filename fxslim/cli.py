"""The command line: ``fxslim inspect``, ``fxslim compile``, ``fxslim demo``.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 fxslim refused or failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

import fxslim
from fxslim.errors import FxslimError


class _Group(TyperGroup):
    """Turn what fxslim raises on purpose into one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxslimError as error:
            typer.echo(f"fxslim: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make trained transformers physically smaller: remove FFN channels and attention heads, and prove that the "
    "narrowed model computes what the masked one does.",
)


class Dtype(str, Enum):
    """What weights are loaded, narrowed and saved as."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder or hub name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings on stderr; errors only.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Glob over module paths: narrow only there. May be repeated.", metavar="GLOB")
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Glob over module paths: leave these alone. May be repeated.", metavar="GLOB")
]


def _fraction(what: str) -> Any:
    return typer.Option(min=0.0, max=1.0, help=f"Fraction of the {what} to remove at every site.", metavar="FRACTION")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fxslim {fxslim.__version__}")
        raise typer.Exit


@app.command(epilog="[bold]Example:[/bold] fxslim inspect ./my-bert --include 'bert.encoder.*'")
def inspect(
    model: Model,
    include: Include = None,
    skip: Skip = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what can be narrowed in a model, and what cannot and why. Reads its config, not its weights."""
    with _working(2, quiet=quiet) as stage:
        stage(f"building {model} without its weights")
        from fxslim import hf

        skeleton = hf.skeleton(model)
        stage("looking for what can be narrowed")
        found = fxslim.inspect(skeleton, include=include, skip=skip)
    sites = [
        {"name": site.name, "kind": site.kind, "module": site.module, "units": site.units, "groups": site.group_count}
        for site in found.sites
    ]
    pinned = [{"where": note.where, "reason": note.reason} for note in found.pinned]
    result = {"model": model, "class": type(skeleton).__name__, "sites": sites, "pinned": pinned}
    _show(result, str(found), as_json=as_json)


@app.command(
    epilog="[bold]Examples:[/bold]\n\n"
    "fxslim compile ./my-bert --ffn 0.5 --heads 0.25 -o ./my-bert-small\n\n"
    "fxslim compile ./my-llama --kv-groups 0.25 --round-to 32 --dtype bfloat16 -o ./my-llama-small --json\n\n"
    "Without a request only what is already zero is taken out."
)
def compile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="OUT", show_default=False)],
    ffn: Annotated[float, _fraction("FFN channels")] = 0.0,
    heads: Annotated[float, _fraction("query heads")] = 0.0,
    kv_groups: Annotated[float, _fraction("key/value groups")] = 0.0,
    experts: Annotated[float, _fraction("experts that routers select from")] = 0.0,
    value: Annotated[float, _fraction("value channels that all heads share, or where heads cannot go")] = 0.0,
    round_to: Annotated[int, typer.Option(min=1, help="Round the number kept up to a multiple.")] = 1,
    include: Include = None,
    skip: Skip = None,
    dtype: Annotated[Dtype, typer.Option(help="Load, narrow and save weights as this.")] = Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a checkpoint already.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Narrow a model and write it: safetensors, config, tokenizer files, plan. Nothing is written if a check fails."""
    begun = time.perf_counter()
    with _working(3, quiet=quiet) as stage:
        stage(f"loading {model}")
        from fxslim import hf
        from fxslim.folder import check_free

        check_free(output.resolve(), force=force)
        dense = hf.load_dense(model, dtype=dtype.value)
        stage("tracing, narrowing and verifying")
        small: Any = fxslim.slim(
            dense,
            ffn=ffn,
            heads=heads,
            kv_groups=kv_groups,
            experts=experts,
            value=value,
            round_to=round_to,
            include=include,
            skip=skip,
        )
        del dense  # what is written next is loaded once more: no room for three
        stage(f"writing {output} and loading it back")
        fxslim.save_pretrained(small, output, tokenizer_from=model, force=force)
    report = small.fxslim.report
    seconds = time.perf_counter() - begun
    result = {"model": model, "output": str(output), "class": type(small).__name__, "seconds": round(seconds, 3)}
    text = f"{report}\nwrote {output} in {seconds:.1f} s; loaded back, every tensor and output the same"
    _show({**result, "report": report.to_dict()}, text, as_json=as_json)


@app.command(epilog="[bold]Example:[/bold] fxslim demo --json")
def demo(as_json: Json = False, quiet: Quiet = False) -> None:
    """Shrink the packaged all-MiniLM-L6-v2 and show what came of it. Needs no network."""
    with _working(5, quiet=quiet) as stage:
        from fxslim import demo as show

        result = show.run(stage=stage)
    _show(result.to_dict(), str(result), as_json=as_json)


@contextmanager
def _working(stages: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr which of ``stages`` stages is running; give a function to call when the next one begins.

    Whatever libraries print meanwhile goes to stderr too: stdout is for results.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    hidden = quiet or not console.is_terminal
    with (
        redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
    ):
        task = progress.add_task("loading libraries", total=stages)
        progress.refresh()
        _calm(warn=not quiet)
        begun = -1

        def stage(text: str) -> None:
            nonlocal begun
            begun += 1
            progress.update(task, completed=begun, description=text)

        yield stage


def _calm(*, warn: bool) -> None:
    """Keep transformers' own progress bars out of ours, and its warnings to those who want them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not warn:
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")


def _show(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text)


def main() -> None:
    """Run the command line."""
    app(prog_name="fxslim")


if __name__ == "__main__":
    main()
