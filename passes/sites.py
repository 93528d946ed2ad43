"""Turn what labels found into named sites, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import numpy as np
import torch
from torch import fx, nn

from fxslim.match import Match
from fxslim.passes.annotate import Labels
from fxslim.passes.family import Family, Found
from fxslim.passes.name import Naming
from fxslim.plan import Note
from fxslim.program import Program, common_path, has_forward, module_path
from fxslim.site import Kind, Site, Slice, blocks_of


@dataclass(frozen=True)
class Sites:
    """Every site of a model.

    Attributes:
        sites: in the order of execution.
        families: site name -> its labels.
        pinned: consumers whose channels stay, with the reason.
        refused: those among them whose channels come from one linear and go to this one alone: a narrowing refused.
        routers: routers whose experts stay, with the reason.
        feeds: which site's output reaches which site's input without passing another.
        naming: what the patterns said.
    """

    sites: tuple[Site, ...]
    families: Mapping[str, Family]
    pinned: tuple[Note, ...]
    refused: tuple[Note, ...]
    routers: tuple[Note, ...]
    feeds: nx.DiGraph = field(compare=False)
    naming: Naming = field(compare=False)


def name_sites(model: nn.Module, program: Program, labels: Labels, found: Found, naming: Naming) -> Sites:
    """Give every family a name, a kind and roles, and order them."""
    blocks = frozenset(_blocks(model))
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    inside = [i for node, i in place.items() if node.op == "call_function" and _within(module_path(node), blocks)]
    ends = _ends(found.families, labels)
    rows = []
    for family, nodes in zip(found.families, ends, strict=True):
        first = min(place[node] for node in nodes)
        held = any(_within(piece.tensor.rpartition(".")[0], blocks) for piece in family.slices)
        rows.append((first, family, bool(inside) and first > inside[-1] and not held))
    rows.sort(key=lambda row: row[0])
    sites: list[Site] = []
    families: dict[str, Family] = {}
    for _, family, head in rows:
        site = _site(_hooked(model, family), naming, head, taken=families)
        sites.append(site)
        families[site.name] = family
    pinned = tuple(Note(where=r.tensor.removesuffix(".weight"), reason=r.reason) for r in found.refusals)
    refused = tuple(note for note, refusal in zip(pinned, found.refusals, strict=True) if refusal.inner)
    heads = tuple(
        Note(where=site.name, reason=f"{reason}; value= takes value channels")
        for site in sites
        if (reason := _heads_refused(site, families[site.name]))
    )
    pinned, refused = (*pinned, *heads, *_unread(program)), (*refused, *heads)
    routers = tuple(Note(where=r.tensor.removesuffix(".weight"), reason=f"experts: {r.reason}") for r in found.routers)
    pinned = (*pinned, *routers, *_rest(model, program, sites, pinned))
    feeds = _feeds(program, labels, families)
    return Sites(tuple(sites), families, pinned, refused, routers, feeds, naming)


def _heads_refused(site: Site, family: Family) -> str:
    """Say why the units of a site are value channels and not heads, or nothing."""
    stay = site.of_values and not family.across
    return family.heads_refused or ("its heads are not told apart" if stay else "")


def _rest(model: nn.Module, program: Program, sites: Sequence[Site], notes: Sequence[Note]) -> Iterator[Note]:
    """Name the linears that neither a site nor a note speaks of: those of a single channel, and those not followed."""
    said = {piece.tensor for site in sites for piece in site.slices if piece.role == "in"}
    said |= {f"{note.where}.weight" for note in notes}
    traced = set(program.tensor_of.values())
    outside = set(program.untraced)
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = program.aliases.get(f"{path}.weight", f"{path}.weight")
        linear = isinstance(module, LINEARS) or {"nx", "nf"} <= vars(module).keys()
        linear = linear and getattr(module, "groups", 1) == 1
        if not linear or name in said or not isinstance(weight, torch.Tensor) or path in outside:
            continue
        if name not in traced:
            yield Note(where=path, reason="it lies outside of what could be traced")
        elif weight.shape[0 if "nx" in vars(module) else 1] == 1:
            yield Note(where=path, reason="each of its outputs reads a single channel")
        else:
            yield Note(where=path, reason="nothing follows what it reads")


LINEARS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _unread(program: Program) -> tuple[Note, ...]:
    """Name the weight matrices that the results do not depend on."""
    read = {program.tensor_name(node) for node in program.graph.nodes if node.users}
    return tuple(
        Note(where=name.removesuffix(".weight"), reason="nothing that forward returns depends on it")
        for name in dict.fromkeys(program.tensor_of.values())
        if name not in read and isinstance(program.tensors[name], nn.Parameter) and program.tensors[name].ndim > 1
    )


def _hooked(model: nn.Module, family: Family) -> Family:
    """Return a family without the hooks of modules that are never called: those that hold a graph's tensors."""
    slices = tuple(
        piece if piece.hook is None or has_forward(model.get_submodule(piece.hook))
        else piece.model_copy(update={"hook": None}) for piece in family.slices
    )  # fmt: skip
    return replace(family, slices=slices)


def _site(family: Family, naming: Naming, head: bool, *, taken: Mapping[str, Family]) -> Site:
    consumers = [piece.tensor for piece in family.slices if piece.role == "in"]
    match = next((m for m in map(naming.by_consumer, consumers) if m is not None), None)
    kind = _kind(match, family)
    module = common_path(piece.tensor.rpartition(".")[0] for piece in family.slices)
    name = f"{module}:{kind}" if module else kind
    if name in taken:
        first = (consumers or family.routers)[0]
        name = f"{name}@{first.removesuffix('.weight').removeprefix(module).strip('.')}"
    base, number = name, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    roles = dict(match.roles) if match is not None and kind == match.kind else {}
    if match is not None and match.kind == "attention" and not family.scored:
        roles = {role: match.roles[role] for role in ("v", "out")}  # its units are value channels
    if family.routers:
        roles = {"router": family.routers}
    stays = family.stays or family.experts > 1 or (bool(family.routers) and family.groups is not None)
    return Site(name=name, kind=kind, module=module, units=family.units, groups=family.groups, slices=family.slices,
                roles=roles, task_head=head, multiple=family.multiple, groups_stay=stays,
                least=family.least)  # fmt: skip


def _kind(match: Match | None, family: Family) -> Kind:
    """Patterns only name: their kind counts where the labels agree with it."""
    if family.routers:
        return "experts"
    if match is None or (match.kind == "attention") != family.scored:
        return "generic"
    return match.kind if match.kind in ("ffn", "gated_ffn", "attention") else "generic"  # type: ignore[return-value]


def _ends(families: Sequence[Family], labels: Labels) -> list[list[fx.Node]]:
    """Return, for each family, the products at which it is summed over."""
    owners = np.full((len(labels.components.pinned), 2), -1)  # a leaf lies in one family, and in one across it
    for number, family in enumerate(families):
        owners[family.leaves, int(family.across)] = number
    ends: list[list[fx.Node]] = [[] for _ in families]
    uses = [(use.node, use.labels) for use in labels.contracted]
    for node, own in (*uses, *((selection.node, selection.labels) for selection in labels.selections)):
        for number in np.unique(owners[labels.components.of[own.numpy()]]).tolist():
            if number >= 0:
                ends[number].append(node)
    return ends


def _blocks(model: nn.Module) -> list[str]:
    """Return the paths of repeated blocks: members of module lists, and of sequences of alike modules of several.

    A graph holds its tensors in modules that cannot be called; there it is a guess, by numbers for names.
    """
    paths: list[str] = []
    for name, module in model.named_modules():
        holding = [member is not None and bool(member._modules) for member in module._modules.values()]
        if isinstance(module, nn.ModuleList):
            listed = True
        elif isinstance(module, nn.Sequential):
            alike = len({type(member) for member in module._modules.values()}) == 1
            listed = alike and len(holding) > 1 and holding[0]
        else:
            listed = not has_forward(module) and all(holding) and all(key.isdigit() for key in module._modules)
        if listed:
            paths.extend(f"{name}.{key}" if name else key for key in module._modules)
    return paths


def _within(path: str, blocks: frozenset[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[: i + 1]) in blocks for i in range(len(parts)))


def _feeds(program: Program, labels: Labels, families: Mapping[str, Family]) -> nx.DiGraph:
    """Build the site graph by carrying the sites met last along the graph."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(families)
    ends: dict[fx.Node, set[str]] = {}
    starts: dict[fx.Node, set[str]] = {}
    for name, nodes in zip(families, _ends(tuple(families.values()), labels), strict=True):
        for node in nodes:
            ends.setdefault(node, set()).add(name)
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


def same_slices(
    found: tuple[Slice, ...], planned: tuple[Slice, ...], gone: Mapping[tuple[str, int], np.ndarray] | None = None
) -> bool:
    """Tell whether a plan's slices are those that the labels give (hooks may differ between ways of tracing).

    Args:
        found: what the labels give.
        planned: what the plan says.
        gone: rows that other sites take out: a plan that was made without them does not count them.
    """

    def bare(piece: Slice) -> Slice:
        rows = (gone or {}).get((piece.tensor, piece.dim))
        if rows is None or piece.lead is not None or rows.shape != (piece.size,):
            return piece.model_copy(update={"hook": None})
        return piece.model_copy(update={"hook": None, "blocks": blocks_of(np.where(rows, -1, piece.owners()))})

    return {bare(piece) for piece in found} == {bare(piece) for piece in planned}
