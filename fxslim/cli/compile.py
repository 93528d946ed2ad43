"""``fxslim compile``: narrow a model and write it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import (
    HOW,
    Asked,
    Cast,
    Dtype,
    Force,
    Json,
    Model,
    Output,
    PlanFile,
    Quiet,
    Repair,
    asking,
    choosing,
    fractions,
)
from fxslim.cli.place import check_folder
from fxslim.cli.plan import with_text
from fxslim.cli.working import show, working


@app.command(
    epilog=examples(
        "fxslim compile ./my-bert --ffn 0.5 --heads 0.25 -o ./my-bert-small",
        "fxslim compile ./my-bert --target macs=0.5 --calibration sentences.txt -o ./my-bert-small",
        "fxslim compile ./my-llama --kv-groups 0.25 --round-to 32 --dtype bfloat16 -o ./my-llama-small --json",
        note="Without a request only what is already zero is taken out.",
    )
)
@asking(fractions, choosing)
def compile(
    model: Model,
    output: Output,
    asked: Asked,
    plan: PlanFile = None,
    repair: Annotated[
        Repair | None,
        typer.Option(help="What of the rest is fitted to the text.", show_default="refit", rich_help_panel=HOW),
    ] = None,
    dtype: Cast = Dtype.auto,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Narrow a model and write it: safetensors, config, tokenizer files, plan. Nothing is written if a check fails."""
    begun = time.perf_counter()
    check_folder(output, force=force)
    with working(3, quiet=quiet) as stage:
        stage(f"loading {model}")
        from fxslim import hf

        if plan is not None:
            asked["plan"] = fxslim.Plan.from_file(plan)
        if repair is not None:
            asked["repair"] = False if repair is Repair.none else repair.value
        dense = hf.load_dense(model, dtype=dtype.value)
        asked = with_text(model, asked, dense)
        stage("tracing, narrowing and verifying")
        small: Any = fxslim.slim(dense, **asked)
        del dense  # what is written next is loaded once more: no room for three
        stage(f"writing {output} and loading it back")
        fxslim.save_pretrained(small, output, tokenizer_from=model, force=force)
    report = small.fxslim.report
    seconds = time.perf_counter() - begun
    result = {"model": model, "output": str(output), "class": type(small).__name__, "seconds": round(seconds, 3)}
    text = f"{report}\nwrote {output} in {seconds:.1f} s; loaded back, every tensor and output the same"
    show({**result, "report": report.to_dict()}, text, as_json=as_json)
