"""``fxslim inspect``: what can be narrowed in a model."""

from __future__ import annotations

import fxslim
from fxslim.cli.app import app, examples
from fxslim.cli.options import Include, Json, Model, Quiet, Skip
from fxslim.cli.working import show, working


@app.command(epilog=examples("fxslim inspect ./my-bert --include 'bert.encoder.*'"))
def inspect(
    model: Model,
    include: Include = None,
    skip: Skip = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what can be narrowed in a model, and what cannot and why. Reads its config, not its weights."""
    with working(2, quiet=quiet) as stage:
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
    show(result, str(found), as_json=as_json)
