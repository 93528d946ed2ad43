"""Which dtypes in a graph are the model's own and which are meant: a second trace in another dtype tells."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxslim.errors import FxslimError
from fxslim.program import Program, named_tensors
from fxslim.trace import trace

LIMITS = ("min", "max", "tiny", "eps")
Place = int | str
"""Where an argument stands in a call: its position, or its name."""


@dataclass(frozen=True)
class Following:
    """What follows the model's dtype when a graph is cast.

    Attributes:
        reason: why the graph cannot be cast; "" where it can.
        places: node -> place of an argument -> ``"dtype"``, or the limit of the dtype that stands there.
        meant: names of constants whose dtype stays whatever the model's is.
    """

    reason: str = ""
    places: Mapping[str, Mapping[Place, str]] = field(default_factory=dict)
    meant: frozenset[str] = frozenset()


def follow(model: nn.Module, program: Program) -> tuple[Program, Following]:
    """Find out what follows the model's dtype, by tracing a copy without weights in another dtype.

    A cast to the dtype that a value has already returns the value itself, so that a trace may show a residual stream
    behind a cast that it does not pass in other dtypes. Models name bfloat16 least, so the program that is returned has
    the wiring of that trace.
    """
    if program.regions:
        return program, Following("it is traced in regions")
    constants = [name for name in program.constants if program.tensors[name].is_floating_point()]
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(own) != 1:
        return program, Following(f"its parameters have several dtypes ({', '.join(sorted(map(str, own)))})")
    (mine,) = own
    meant = frozenset(name for name in constants if program.tensors[name].dtype != mine)
    other = torch.float32 if mine == torch.bfloat16 else torch.bfloat16
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            skeleton, example = _skeleton(model, mine, other), _cast(dict(program.call.example), mine, other)
        twin = trace(skeleton, example, open_axes=program.open_axes)
    except FxslimError as error:
        return program, Following(f"a copy in {other} could not be traced ({str(error).splitlines()[0]})", meant=meant)
    made, following = _compare(program, twin, mine, other, constants)
    return made, replace(following, meant=following.meant | meant)


def _skeleton(model: nn.Module, mine: torch.dtype, other: torch.dtype) -> nn.Module:
    """Return a copy in another dtype whose tensors hold no numbers."""
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        made = _cast(tensor.detach(), mine, other)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for name, value in vars(module).items() if name != "_modules"]):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:  # tensors that a module keeps by the way
                memo[id(leaf)] = _cast(leaf.detach(), mine, other)
    return copy.deepcopy(model, memo)


def _cast(tree: Any, mine: torch.dtype, other: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_like(leaf, dtype=other if leaf.dtype == mine else leaf.dtype)

    return pytree.tree_map(cast, tree)


def _compare(
    program: Program, twin: Program, mine: torch.dtype, other: torch.dtype, constants: list[str]
) -> tuple[Program, Following]:
    nodes, others = ([n for n in p.graph.nodes if not _asserts(n)] for p in (program, twin))
    if [_kind(node) for node in nodes] != [_kind(node) for node in others]:
        return program, Following(f"in {other} the model runs other operations than in {mine}")
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    own = dict(zip(others, nodes, strict=True))
    places: dict[str, dict[Place, str]] = {}
    for node, like in zip(nodes, others, strict=True):
        for place, (a, b) in _arguments(node, like).items() if node.op == "call_function" else ():
            what = _what(a, b, mine, other)
            if what is None:
                return program, Following(f"{node.target} takes {a!r} in {mine} and {b!r} in {other}")
            if what:
                places.setdefault(node.name, {})[place] = what
        made[node] = copied = graph.node_copy(node, made.__getitem__)
        copied.meta = dict(node.meta)
        if other == torch.bfloat16:
            _rewire(copied, node, [made[own[n]] for n in _read(like)])
    first, second = ({name: tensor.dtype for name, tensor in p.tensors.items()} for p in (program, twin))
    meant = (name for name in constants if (first[name], second.get(name)) != (mine, other))
    return replace(program, graph=graph), Following("", places, frozenset(meant))


def _rewire(copied: fx.Node, node: fx.Node, read: list[fx.Node]) -> None:
    """Let a copy read these nodes, in the order of the original's arguments."""
    rest = iter(read)
    copied.args = fx.node.map_arg(node.args, lambda _: next(rest))
    copied.kwargs = fx.node.map_arg(node.kwargs, lambda _: next(rest))


def _asserts(node: fx.Node) -> bool:
    """Tell whether a node only checks what was traced; such checks repeat for every cast."""
    return node.op == "call_function" and not node.users and "_assert_" in str(node.target)


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, in the order of its arguments, as often as it names them."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def _kind(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target if node.op == "call_function" else "", len(_read(node))


def _arguments(node: fx.Node, like: fx.Node) -> dict[Place, tuple[Any, Any]]:
    pairs: dict[Place, tuple[Any, Any]] = dict(enumerate(zip(node.args, like.args, strict=False)))
    return pairs | {name: (value, like.kwargs.get(name)) for name, value in node.kwargs.items()}


def _what(a: Any, b: Any, mine: torch.dtype, other: torch.dtype) -> str | None:
    """Return what an argument is: ``""`` what it is, ``"dtype"``, a limit; None where nothing explains it."""
    if isinstance(a, torch.dtype):
        return "" if a == b else "dtype" if (a, b) == (mine, other) else None
    if isinstance(a, float) and isinstance(b, float) and a != b:
        first, second = torch.finfo(mine), torch.finfo(other)
        return next((n for n in LIMITS if (getattr(first, n), getattr(second, n)) == (a, b)), None)
    return None if isinstance(a, bool | int | float | str) and a != b else ""


def limit_of(tensor: torch.Tensor, name: str) -> float:
    """Return a limit of a tensor's dtype, such as its smallest number."""
    found: float = getattr(torch.finfo(tensor.dtype), name)
    return found
