"""Turn what labels found into named sites, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx
from torch import fx, nn

from fxslim.match import Match
from fxslim.passes.annotate import Labels
from fxslim.passes.find import Family, Found
from fxslim.passes.name import Naming
from fxslim.plan import Kind, Note, Site, Slice
from fxslim.program import Program, common_path, module_path


@dataclass(frozen=True)
class Sites:
    """Every site of a model.

    Attributes:
        sites: in the order of execution.
        families: site name -> its labels.
        pinned: consumers whose channels stay, with the reason.
        feeds: which site's output reaches which site's input without passing another.
        naming: what the patterns said.
    """

    sites: tuple[Site, ...]
    families: Mapping[str, Family]
    pinned: tuple[Note, ...]
    feeds: nx.DiGraph = field(compare=False)
    naming: Naming = field(compare=False)


def name_sites(model: nn.Module, program: Program, labels: Labels, found: Found, naming: Naming) -> Sites:
    """Give every family a name, a kind and roles, and order them."""
    last = _last_block_node(model, program)
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    rows = []
    for family in found.families:
        ends = _ends(family, labels)
        first = min(place[node] for node in ends)
        rows.append((first, family, last is not None and first > last and not _in_block(model, family)))
    rows.sort(key=lambda row: row[0])
    sites: list[Site] = []
    families: dict[str, Family] = {}
    for _, family, head in rows:
        site = _site(family, naming, head, taken=families)
        sites.append(site)
        families[site.name] = family
    pinned = tuple(Note(where=r.tensor.removesuffix(".weight"), reason=r.reason) for r in found.refusals)
    return Sites(tuple(sites), families, pinned, _feeds(program, labels, families), naming)


def _site(family: Family, naming: Naming, head: bool, *, taken: Mapping[str, Family]) -> Site:
    consumers = [piece.tensor for piece in family.slices if piece.role == "in"]
    match = next((m for m in map(naming.by_consumer, consumers) if m is not None), None)
    kind = _kind(match, family)
    module = common_path(piece.tensor.rpartition(".")[0] for piece in family.slices)
    name = f"{module}:{kind}" if module else kind
    if name in taken:
        name = f"{name}@{consumers[0].removesuffix('.weight').removeprefix(module).strip('.')}"
    roles = dict(match.roles) if match is not None and kind == match.kind else {}
    return Site(name=name, kind=kind, module=module, units=family.units, groups=family.groups, slices=family.slices,
                roles=roles, task_head=head)  # fmt: skip


def _kind(match: Match | None, family: Family) -> Kind:
    """Patterns only name: their kind counts where the labels agree with it."""
    if match is None or (match.kind == "attention") != family.scored:
        return "generic"
    return match.kind if match.kind in ("ffn", "gated_ffn", "attention") else "generic"  # type: ignore[return-value]


def _ends(family: Family, labels: Labels) -> list[fx.Node]:
    """Return the products at which a family is summed over."""
    mine = set(family.leaves.tolist())
    return [use.node for use in labels.contracted if int(labels.components.of[int(use.labels[0])]) in mine
            or any(int(c) in mine for c in labels.components.of[use.labels.numpy()])]  # fmt: skip


def _blocks(model: nn.Module) -> list[str]:
    """Return the paths of repeated blocks: members of module lists that hold modules of their own."""
    paths = []
    for name, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential)
            and len(module) > 1
            and len({type(child) for child in module}) == 1
            and any(True for _ in module[0].children())
        )
        if listed:
            paths.extend(f"{name}.{index}" if name else str(index) for index in range(len(module)))
    return paths


def _within(path: str, blocks: Iterable[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _in_block(model: nn.Module, family: Family) -> bool:
    blocks = _blocks(model)
    return any(_within(piece.tensor.rpartition(".")[0], blocks) for piece in family.slices)


def _last_block_node(model: nn.Module, program: Program) -> int | None:
    """Return the place of the last operation inside a repeated block."""
    blocks = _blocks(model)
    prefixes = {block for block in blocks}
    last = None
    for place, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            path = module_path(node)
            parts = path.split(".")
            if any(".".join(parts[: i + 1]) in prefixes for i in range(len(parts))):
                last = place
    return last


def _feeds(program: Program, labels: Labels, families: Mapping[str, Family]) -> nx.DiGraph:
    """Build the site graph by carrying the sites met last along the graph."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(families)
    ends: dict[fx.Node, set[str]] = {}
    starts: dict[fx.Node, set[str]] = {}
    of = labels.components.of
    owner = {int(leaf): name for name, family in families.items() for leaf in family.leaves}
    for use in labels.contracted:
        for name in {owner[int(c)] for c in of[use.labels.numpy()] if int(c) in owner}:
            ends.setdefault(use.node, set()).add(name)
    tensors = _produced_tensors(families)
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            tensor = program.tensor_name(argument)
            if tensor in tensors:
                starts.setdefault(node, set()).update(tensors[tensor])
    reach: dict[fx.Node, frozenset[str]] = {}
    above: dict[str, frozenset[str]] = {}
    for node in program.graph.nodes:
        met = frozenset().union(*(reach.get(argument, frozenset()) for argument in node.all_input_nodes))
        met = met - frozenset().union(*(above.get(name, frozenset()) for name in met))
        for name in starts.get(node, ()):
            inside = above.get(name, frozenset())
            graph.add_edges_from((other, name) for other in met if other != name and other not in inside)
            above[name] = inside.union(met - {name}, *(above.get(other, frozenset()) for other in met))
        reach[node] = frozenset(ends[node]) if node in ends else met
    return graph


def _produced_tensors(families: Mapping[str, Family]) -> dict[str, set[str]]:
    tensors: dict[str, set[str]] = {}
    for name, family in families.items():
        for piece in family.slices:
            if piece.role == "out":
                tensors.setdefault(piece.tensor, set()).add(name)
    return tensors


def same_slices(found: tuple[Slice, ...], planned: tuple[Slice, ...]) -> bool:
    """Tell whether a plan's slices are those that the labels give (hooks may differ between ways of tracing)."""
    strip = {"hook": None}
    mine = {piece.model_copy(update=strip) for piece in found}
    return mine == {piece.model_copy(update=strip) for piece in planned}
