"""``fxslim demo``: the packaged model, shrunk."""

from __future__ import annotations

from fxslim.cli.app import app, examples
from fxslim.cli.options import Json, Quiet
from fxslim.cli.working import show, working


@app.command(epilog=examples("fxslim demo --json"))
def demo(as_json: Json = False, quiet: Quiet = False) -> None:
    """Shrink the packaged all-MiniLM-L6-v2 and show what came of it. Needs no network."""
    with working(5, quiet=quiet) as stage:
        from fxslim import demo as example

        result = example.run(stage=stage)
    show(result.to_dict(), str(result), as_json=as_json)
