"""``fxslim export``: a model for other runtimes."""

from __future__ import annotations

import time
from enum import Enum
from typing import Annotated

import typer

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import Cast, Dtype, Force, Json, Output, Quiet
from fxslim.cli.place import check_folder
from fxslim.cli.working import show, working


class To(str, Enum):
    """Formats (`fxslim.export.FORMATS`)."""

    onnx = "onnx"
    pt2 = "pt2"
    openvino = "openvino"


@app.command(
    epilog=examples(
        "fxslim export ./my-bert-small --to onnx -o ./my-bert-onnx",
        "fxslim export ./my-bert-small --to pt2 -o ./my-bert-pt2",
    )
)
def export(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Model, narrowed or dense: folder or hub name.", show_default=False)
    ],
    output: Output,
    to: Annotated[To, typer.Option(help="Format.", show_default=False)],
    static: Annotated[bool, typer.Option("--static", help="Fix batch and length at those of the example.")] = False,
    dtype: Cast = Dtype.auto,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for ONNX Runtime, torch.export or OpenVINO, run it there, and compare. Caches are no part of it."""
    begun = time.perf_counter()
    check_folder(output, force=force)
    with working(2, quiet=quiet) as stage:
        stage(f"loading {folder}")
        from fxslim.cli.loading import load

        model = load(folder, dtype)
        stage(f"exporting to {to.value} and comparing")
        made = fxslim.export(
            model, output, to=to.value, dynamic=not static, tokenizer_from=folder, force=force
        )  # fmt: skip
    seconds = round(time.perf_counter() - begun, 3)
    text = f"{made}\nwrote {output} ({', '.join(made.files)}) in {seconds:.1f} s"
    show({"model": folder, "class": type(model).__name__, "seconds": seconds, **made.to_dict()}, text, as_json=as_json)
