"""``fxslim verify``: the masked dense model against a narrowed one from disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import Json, Model, Quiet
from fxslim.cli.working import show, working
from fxslim.errors import PlanError


@app.command(epilog=examples("fxslim verify ./my-bert ./my-bert-small"))
def verify(
    model: Model,
    small: Annotated[str, typer.Argument(metavar="SMALL", help="What fxslim made of it.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a narrowed model with the dense one, masked by its plan, along every path. Exit code 1 if they differ."""
    with working(3, quiet=quiet) as stage:
        stage(f"loading {small}")
        narrowed: Any = fxslim.from_pretrained(small)
        plan = narrowed.fxslim.plan
        if plan.weights_changed:
            raise PlanError(
                f"{small} was repaired: its weights are part of the result and cannot be made again from {model}, so "
                "that there is no masked model to compare with; it was compared before it was written. What can be "
                f"compared is how good both are, on data of the task, and how fast: fxslim bench {small} {model}"
            )
        stage(f"loading {model}")
        from fxslim import hf

        dense = hf.load_dense(model, dtype=str(narrowed.dtype).removeprefix("torch."))
        stage("comparing")
        found = fxslim.verify(dense, narrowed, plan=plan)
    differences = [difference.to_dict() for difference in found.differences]
    show({"model": model, "small": small, "differences": differences}, str(found), as_json=as_json)
