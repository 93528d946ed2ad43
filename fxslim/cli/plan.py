"""``fxslim plan``: which units go, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import Asked, Cast, Dtype, Json, Model, Quiet, asking, choosing, fractions
from fxslim.cli.place import check_file
from fxslim.cli.working import working
from fxslim.folder import write_files


@app.command(
    epilog=examples(
        "fxslim plan ./my-bert --ffn 0.5 --heads 0.25 -o plan.json",
        "fxslim plan ./my-bert --target macs=0.5 --calibration sentences.txt --max-tokens 16384 -o plan.json",
        "fxslim compile ./my-bert --plan plan.json -o ./my-bert-small",
    )
)
@asking(fractions, choosing)
def plan(
    model: Model,
    asked: Asked,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write the plan to.", metavar="FILE")
    ] = None,
    dtype: Cast = Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose what to take out, and write that down: plain JSON without weights. --json prints the plan itself."""
    if output is not None:
        check_file(output, force=force)
    with working(2, quiet=quiet) as stage:
        stage(f"loading {model}")
        from fxslim import hf

        dense = hf.load_dense(model, dtype=dtype.value)
        asked = with_text(model, asked, dense)
        stage("choosing")
        made = fxslim.plan(dense, **asked)
    if output is not None:
        write_files({output: made.to_json() + "\n"})
    told = [str(made)] if output is None else [str(made), f"wrote {output}"]
    typer.echo(made.to_json() if as_json else "\n".join(told))


def with_text(model: str, asked: Asked, dense: Any) -> Asked:
    """Return what was asked, with tokenized batches in the place of a text file."""
    if "calibration" not in asked:
        return asked
    from fxslim.cli.texts import batches

    return {**asked, "calibration": batches(model, asked["calibration"], dense.config)}
