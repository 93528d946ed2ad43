"""``fxslim slim-checkpoint``: narrow files that are never loaded."""

from __future__ import annotations

import time
from typing import Annotated

import typer

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import Asked, Force, Json, Output, PlanFile, Quiet, asking, fractions
from fxslim.cli.working import calm, show


@app.command(
    "slim-checkpoint",
    epilog=examples(
        "fxslim slim-checkpoint ./llama-7b --ffn 0.25 --kv-groups 0.25 -o ./llama-5b",
        "fxslim slim-checkpoint ./llama-7b --plan plan.json -o ./llama-5b",
        note="A run that was stopped goes on where it was when it is started again.",
    ),
)
@asking(fractions)
def slim_checkpoint(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Local folder with safetensors.", show_default=False)],
    output: Output,
    asked: Asked,
    plan: PlanFile = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Narrow a checkpoint tensor by tensor, without loading it: for models that memory does not hold."""
    begun = time.perf_counter()
    chosen = None if plan is None else fxslim.Plan.from_file(plan)
    calm(warn=not quiet)
    fxslim.slim_checkpoint(source, output, chosen, progress=not quiet, force=force, **asked)
    seconds = round(time.perf_counter() - begun, 3)
    result = {"source": source, "output": str(output), "seconds": seconds}
    show(result, f"wrote {output} in {seconds:.1f} s", as_json=as_json)
