"""Draw into a file: its suffix says how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxslim.draw import dot, explorer
from fxslim.draw.html import html
from fxslim.draw.picture import Picture
from fxslim.draw.read import picture_of
from fxslim.errors import InputError
from fxslim.folder import write_files

Files = Mapping[str, str]
"""What is appended to the name without its suffix -> content."""


def _html(picture: Picture, site: str | None) -> Files:
    if site is not None:
        raise InputError("site= is for .svg and .dot; an HTML picture holds every site: open it there.")
    return {".html": html(picture)}


def _json(picture: Picture, site: str | None) -> Files:
    if site is not None:
        raise InputError("site= is for .svg and .dot; a .json picture holds every site.")
    graphs, data = explorer.collection(picture), explorer.node_data(picture)
    return {".json": json.dumps(graphs, allow_nan=False), "_node_data.json": json.dumps(data, allow_nan=False)}


WRITERS: Mapping[str, Callable[[Picture, str | None], Files]] = {
    ".html": _html,
    ".svg": lambda picture, site: {".svg": dot.svg(picture, site=site)},
    ".dot": lambda picture, site: {".dot": dot.dot(picture, site=site)},
    ".json": _json,
}


def draw(
    x: Any, path: str | Path, *, after: Any = None, site: str | None = None, example_inputs: Any = None
) -> Picture:
    """Draw a model's sites, what flows between them, and its operations.

    Args:
        x: a model, what `inspect` said of it, a Plan, a Report, a narrowed model, or a compiled graph.
        path: the file; ``.html`` is one interactive page that loads nothing, ``.svg`` and ``.dot`` are for papers
            (SVG needs ``fxslim[draw]``), ``.json`` is Model Explorer's format, with the kept ratios in a second file
            ``…_node_data.json``. A file that is there is replaced, in one step.
        after: what became of the model ``x``: a Plan, a Report or the narrowed model. Then there is a before and an
            after.
        site: draw the operations of this site instead of the sites (``.svg`` and ``.dot``).
        example_inputs: see `inspect`, where ``x`` is a model.

    Returns:
        The picture, as plain data.

    Raises:
        InputError: an unknown suffix, something that cannot be drawn, or arguments that do not go together.
        PlanError: ``after`` is a plan of another model.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"cannot draw into {path.name!r}: the name must end in one of {', '.join(WRITERS)}.")
    picture = picture_of(x, after=after, example_inputs=example_inputs)
    write_files({path.with_name(f"{path.stem}{end}"): text for end, text in writer(picture, site).items()})
    return picture
