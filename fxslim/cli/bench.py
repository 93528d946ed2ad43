"""``fxslim bench``: latency, size and work of models from disk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from fxslim.cli.app import app, examples
from fxslim.cli.options import Cast, Dtype, Json, Quiet
from fxslim.cli.working import show, working


@app.command(
    epilog=examples(
        "fxslim bench ./my-bert-small ./my-bert", "fxslim bench ./my-bert-small ./my-bert --batch 8 --length 256"
    )
)
def bench(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Narrowed model.", show_default=False)],
    dense: Annotated[str | None, typer.Argument(metavar="DENSE", help="Dense model.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row, of models that read tokens.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; as torch chooses by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure.")] = 30.0,
    dtype: Cast = Dtype.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a narrowed model against the dense one: in turns, medians, 95 % intervals. Count parameters and MACs."""
    with working(3, quiet=quiet) as stage:
        stage(f"loading {folder}")
        import torch

        from fxslim import count, timer
        from fxslim.cli.loading import load

        if threads is not None:
            torch.set_num_threads(threads)
        named = {"dense": dense, "narrowed": folder}
        models = {name: load(place, dtype).eval() for name, place in named.items() if place is not None}
        inputs = {name: _inputs(model, batch, length) for name, model in models.items()}
        stage("counting")
        parameters = {name: count.parameters(model) for name, model in models.items()}
        with torch.inference_mode():
            macs = {name: count.macs_of(model, **inputs[name]) for name, model in models.items()}
            stage("timing")
            calls = {name: partial(model, **inputs[name]) for name, model in models.items()}
            timing = timer.compare(calls, max_seconds=seconds)
    shapes = {name: list(tensor.shape) for name, tensor in inputs["narrowed"].items()}
    lines = [f"{name}: {parameters[name]:,} parameters, {macs[name]:,} MACs" for name in models]
    result = {"models": {k: v for k, v in named.items() if v is not None}, "inputs": shapes, "parameters": parameters,
              "macs": macs, "timing": timing.to_json()}  # fmt: skip
    show(result, "\n".join([*lines, f"inputs: {shapes}", str(timing)]), as_json=as_json)


def _inputs(model: Any, batch: int, length: int) -> Mapping[str, Any]:
    """Return inputs of that size: those that are made from the model's config, repeated."""
    import torch

    from fxslim.inputs import bind

    sized = {}
    for name, tensor in bind(model, None)[0].items():
        rows = tensor[torch.arange(batch) % tensor.shape[0]]
        whole = tensor.ndim == 2 and not tensor.is_floating_point()
        sized[name] = rows[:, torch.arange(length) % tensor.shape[1]] if whole else rows
    return sized
