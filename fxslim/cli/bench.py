"""``fxslim bench``: latency, size and work of models from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxslim.cli.app import app, examples
from fxslim.cli.options import Cast, Dtype, Json, Quiet
from fxslim.cli.working import show, working


@app.command(
    epilog=examples(
        "fxslim bench ./my-bert-small ./my-bert",
        "fxslim bench ./my-bert-small ./my-bert --batch 1 --batch 8 --length 16 --length 256 -o bench.md -o bench.png",
        "fxslim bench ./my-llama-small ./my-llama --generate 32 --variant eager --variant bf16",
    )
)
def bench(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Narrowed model.", show_default=False)],
    dense: Annotated[str | None, typer.Argument(metavar="DENSE", help="Dense model.", show_default=False)] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows, 1 by default; can be repeated.")] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in a row: 128 by default, or as many as the model takes; can be repeated."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="eager (the default), inductor, bf16, bf16-inductor, on a GPU cuda-graph; can be repeated."),
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate; 0 for none.")] = 0,
    check: Annotated[bool, typer.Option(help="Refuse models that should compute the same and do not.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; as torch chooses by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure each size in each variant.")] = 30.0,
    dtype: Cast = Dtype.auto,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Write it as .json, .md, .html, .png, .svg or .pdf; can be repeated."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a narrowed model against the dense one: in turns, medians, 95 % intervals. Count parameters and MACs."""
    with working(2, quiet=quiet) as stage:
        stage(f"loading {folder}")
        import torch

        import fxslim
        from fxslim.cli.loading import load
        from fxslim.harness.result import check_ending
        from fxslim.harness.sizes import length_of
        from fxslim.inputs import bind

        for path in output or ():
            check_ending(path)
        if threads is not None:
            torch.set_num_threads(threads)
        named = {name: place for name, place in (("dense", dense), ("narrowed", folder)) if place is not None}
        models = {name: load(place, dtype).eval() for name, place in named.items()}
        tokens = length_of(bind(models["narrowed"], None)[0]) is not None
        most = getattr(models["narrowed"].config, "max_position_embeddings", None) or 128
        stage("timing")
        lengths = length or ([min(128, most)] if tokens else [])
        found = fxslim.benchmark(models, batches=batch or [1], lengths=lengths, variants=variant or "eager",
                                 generate=generate, check=check, max_seconds=seconds)  # fmt: skip
    for path in output or ():
        found.save(path)
    show({"models": named, **found.to_dict()}, str(found), as_json=as_json)
