"""Write Graphviz's language, and let Graphviz (as pygraphviz brings it along) make SVG of it: pictures for papers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from fxslim.draw.picture import INPUT, OUTPUT, Box, Op, Picture, around, parents
from fxslim.errors import InputError

COLOURS = {"attention": "#3a6ad4", "ffn": "#0f7f6a", "gated_ffn": "#0f7f6a", "experts": "#8446c4", "generic": "#a85d12"}
STREAM, STAYS, INK, MUTED, LINE = "#7d8aa0", "#a9b3c1", "#17202c", "#5a6778", "#c4ccd8"
FONT = "Helvetica"
BAR = 150
"""Width of the widest bar, in points."""


def dot(picture: Picture, *, site: str | None = None) -> str:
    """Return the site graph, or the operations of one site, as text in Graphviz's language.

    Raises:
        InputError: there is no such site, or the picture holds no operations of it.
    """
    body = _site_graph(picture) if site is None else _op_graph(picture, picture.site(site))
    head = [
        f"digraph {_quoted(picture.title)} {{",
        f'  graph [rankdir=TB, fontname="{FONT}", fontsize=10, fontcolor="{MUTED}", nodesep=0.3, ranksep=0.35];',
        f'  node [shape=box, style="rounded,filled", fillcolor=white, color="{LINE}", fontname="{FONT}", fontsize=10];',
        f'  edge [color="{STAYS}", arrowsize=0.6, penwidth=1.2];',
    ]
    return "\n".join([*head, *body, "}", ""])


def svg(picture: Picture, *, site: str | None = None) -> str:
    """Return the same as SVG.

    Raises:
        InputError: pygraphviz is not there; otherwise as `dot`.
    """
    try:
        import pygraphviz
    except ImportError as error:
        raise InputError("SVG needs pygraphviz (it brings Graphviz along): pip install 'fxslim[draw]'.") from error
    drawn: bytes = pygraphviz.AGraph(string=dot(picture, site=site)).draw(format="svg", prog="dot")
    return drawn.decode("utf-8")


def _site_graph(picture: Picture) -> Iterator[str]:
    modules = [box.module for box in picture.sites]
    labels = [_site_label(box, picture, modules) for box in picture.sites]
    nodes = [
        (box.module, f"{_quoted(box.name)} [label={text}];") for box, text in zip(picture.sites, labels, strict=True)
    ]
    yield from _clusters(nodes)
    ends = {feed.source for feed in picture.feeds} | {feed.target for feed in picture.feeds}
    yield from (f'  {end} [fillcolor="#eaeef4"];' for end in (INPUT, OUTPUT) if end in ends)
    for feed in picture.feeds:
        look = f'color="{STREAM}", penwidth=2, tooltip={_quoted(feed.group)}' if feed.group else "style=dashed"
        yield f"  {_quoted(feed.source)} -> {_quoted(feed.target)} [{look}];"


def _site_label(box: Box, picture: Picture, modules: Sequence[str]) -> str:
    """Return a table: name and kind, how many units are kept, and a bar of which the kept part is filled."""
    outer = around(box.module, parents(modules))
    name = box.module[len(outer) + 1 if outer else 0 :] or box.kind.replace("_", " ")
    count = f"{box.kept:,} of {box.units:,} {box.unit}" if picture.narrowed else f"{box.units:,} {box.unit}"
    width = max(round(BAR * picture.scale(box)), 4)
    kept = min(max(round(width * box.ratio), 1), width)
    cells = f'<TD WIDTH="{kept}" HEIGHT="9" FIXEDSIZE="TRUE" BGCOLOR="{COLOURS[box.kind]}"></TD>'
    if kept < width:
        cells += f'<TD WIDTH="{width - kept}" HEIGHT="9" FIXEDSIZE="TRUE" BGCOLOR="{COLOURS[box.kind]}33"></TD>'
    bar = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>{cells}</TR></TABLE>'
    rows = [f"<B>{_text(name)}</B>", f'<FONT COLOR="{MUTED}" POINT-SIZE="9">{_text(count)}</FONT>', bar]
    table = "".join(f'<TR><TD ALIGN="LEFT">{row}</TD></TR>' for row in rows)
    return f'<<TABLE BORDER="0" CELLSPACING="1" CELLPADDING="1">{table}</TABLE>>'


def _op_graph(picture: Picture, box: Box) -> Iterator[str]:
    if not box.ops:
        raise InputError(
            f"there are no operations of {box.name!r}: a plan or a report by itself has no graph. Draw the model or "
            "an Inspection, with after=plan."
        )
    own = set(box.ops)
    edges = [
        (source, target)
        for target, op in enumerate(picture.ops)
        for source in op.inputs
        if source in own or target in own
    ]
    nodes = [(picture.ops[i].module, f"{i} [label={_op_label(picture.ops[i], box.name)}];") for i in box.ops]
    yield from _clusters(nodes)
    for number in sorted({end for edge in edges for end in edge} - own):
        label = _quoted(picture.ops[number].op.removeprefix("aten."))
        yield f'  {number} [label={label}, style="rounded,dashed", fontcolor="{MUTED}"];'
    for source, target in edges:
        groups = picture.ops[source].groups
        yield f'  {source} -> {target} [color="{_colour(picture, groups)}", tooltip={_quoted(", ".join(groups))}];'


def _op_label(op: Op, site: str) -> str:
    role = next((role for name, role in op.roles if name == site), "")
    head = f"<B>{_text(op.op.removeprefix('aten.'))}</B>"
    head += f'  <FONT COLOR="#6a4cc2">{_text(role)}</FONT>' if role else ""
    shape = f"{op.shape} \N{RIGHTWARDS ARROW} {op.after}" if op.after else op.shape
    lines = [head, f'<FONT COLOR="{MUTED}" POINT-SIZE="9">{_text(f"{shape} {op.dtype}")}</FONT>']
    lines += [f'<FONT COLOR="#b3430f" POINT-SIZE="9">pinned: {_text(reason)}</FONT>' for reason in op.pinned]
    return f"<{'<BR/>'.join(lines)}>"


def _colour(picture: Picture, groups: Sequence[str]) -> str:
    """Return the colour of what flows."""
    kinds = {box.name: box.kind for box in picture.sites}
    for group in groups:
        if group in kinds:
            return COLOURS[kinds[group]]
    streams = {group.id for group in picture.groups if group.kind == "stream"}
    return STREAM if streams & set(groups) else STAYS


def _clusters(nodes: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Put nodes into boxes, one for each module that holds several.

    Args:
        nodes: (module, text) of every node.
    """
    rows = list(nodes)
    nested = parents(module for module, _ in rows)
    inside: dict[str, list[Any]] = {}
    for module, text in rows:
        inside.setdefault(around(module, nested), []).append(text)

    def lines(path: str, indent: str) -> Iterator[str]:
        for inner, outer in nested.items():
            if outer == path:
                yield f"{indent}subgraph {_quoted('cluster ' + inner)} {{"
                label = inner[len(path) + 1 if path else 0 :]
                look = f'color="{LINE}"; style="rounded,filled"; fillcolor="#f5f7fa"'
                yield f"{indent}  label={_quoted(label)}; labeljust=l; {look};"
                yield from lines(inner, indent + "  ")
                yield f"{indent}}}"
        yield from (f"{indent}{text}" for text in inside.get(path, ()))

    yield from lines("", "  ")


def _quoted(text: str) -> str:
    """Return a quoted string; a backslash would begin an escape."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{plain}"'


def _text(text: str) -> str:
    return escape("".join(c if c.isprintable() else " " for c in text))
