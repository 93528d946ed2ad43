"""Write Model Explorer's graph format, so that people can use that viewer: nodes by module, kept ratios as node data.

The format is that of google-ai-edge's ``model-explorer``, ``input_graph.ts``: a collection of graphs, whose nodes have
an id, a label, a namespace (``a/b/c``), attributes, incoming edges, and metadata of outputs. Node data is a second
file, which that viewer loads beside the first: graph id -> results by node id (``NodeDataProviderData``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fxslim.draw.picture import Box, Op, Picture

SITES, OPERATIONS = "sites", "operations"
"""Ids of the graphs."""

GRADIENT = [
    {"stop": 0.0, "bgColor": "#b3430f"},
    {"stop": 0.5, "bgColor": "#f2d6a2"},
    {"stop": 1.0, "bgColor": "#0f7f6a"},
]
"""From what loses most to what loses least."""


def collection(picture: Picture) -> dict[str, Any]:
    """Return the graphs: sites, and operations where there are any."""
    graphs = [{"id": SITES, "nodes": _site_nodes(picture), "groupNodeAttributes": _classes(picture)}]
    if picture.ops:
        nodes = [_op_node(number, op, picture) for number, op in enumerate(picture.ops)]
        graphs.append({"id": OPERATIONS, "nodes": nodes, "groupNodeAttributes": _classes(picture)})
    return {"label": picture.title, "graphs": graphs}


def node_data(picture: Picture) -> dict[str, Any]:
    """Return which part of every site, and of every operation's result, is kept."""
    data = {SITES: _results({box.name: box.ratio for box in picture.sites})}
    if picture.ops:
        data[OPERATIONS] = _results({str(number): op.ratio for number, op in enumerate(picture.ops) if op.groups})
    return data


def _results(ratios: dict[str, float]) -> dict[str, Any]:
    results = {name: {"value": round(ratio, 4)} for name, ratio in ratios.items()}
    return {"name": "kept", "results": results, "gradient": GRADIENT}


def _site_nodes(picture: Picture) -> list[dict[str, Any]]:
    nodes = {box.name: _site_node(box) for box in picture.sites}
    for feed in picture.feeds:
        for end in (feed.source, feed.target):
            nodes.setdefault(end, {"id": end, "label": end, "namespace": "", "incomingEdges": []})
        edges = nodes[feed.target]["incomingEdges"]
        edges.append(_edge(feed.source, len(edges), feed.group))
    return list(nodes.values())


def _site_node(box: Box) -> dict[str, Any]:
    facts = {
        "kind": box.kind,
        "units": f"{box.units} {box.unit}",
        "kept": f"{box.kept} ({box.ratio:.1%})",
        **({"groups": str(box.groups)} if box.groups else {}),
        **{role: ", ".join(weights) for role, weights in box.roles},
        **({"note": box.note} if box.note else {}),
    }
    node = {"id": box.name, "label": box.kind, "namespace": _namespace(box.module), "incomingEdges": []}
    return {**node, "attrs": _pairs(facts.items())}


def _op_node(number: int, op: Op, picture: Picture) -> dict[str, Any]:
    roles = [(f"role in {site}", role) for site, role in op.roles]
    facts = [("node", op.name), *(("tensor", name) for name in op.tensors), *roles]
    facts += [("pinned", reason) for reason in op.pinned] + [("carries", group) for group in op.groups]
    shape = [("shape", op.shape), ("dtype", op.dtype), *([("shape after", op.after)] if op.after else [])]
    edges = [_edge(str(source), place, ", ".join(picture.ops[source].groups)) for place, source in enumerate(op.inputs)]
    return {
        "id": str(number),
        "label": op.op.removeprefix("aten."),
        "namespace": _namespace(op.module),
        "attrs": _pairs(facts),
        "incomingEdges": edges,
        "outputsMetadata": [{"id": "0", "attrs": _pairs(shape)}],
    }


def _edge(source: str, place: int, group: str) -> dict[str, Any]:
    edge = {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
    return {**edge, **({"metadata": {"carries": group}} if group else {})}


def _namespace(module: str) -> str:
    return module.replace("/", "_").replace(".", "/")


def _pairs(facts: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in facts]


def _classes(picture: Picture) -> dict[str, dict[str, str]]:
    return {_namespace(path): {"class": kind} for path, kind in picture.modules if kind}
