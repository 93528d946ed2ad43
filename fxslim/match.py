"""Patterns over canonical views: they name what label analysis finds, and say what was missing where they fail.

A pattern is a tree of frozen forms (:mod:`fxslim.forms`), matched backwards from a consumer's linear. What operations
mean is the business of the :class:`~fxslim.flow.View` that is passed in.

A match is names alone; a miss holds the node it failed at, to be put into words only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from torch import fx

from fxslim.flow import Via, View, Walk
from fxslim.program import common_path, module_path


@dataclass(frozen=True)
class Match:
    """A pattern that was found.

    Attributes:
        kind: the pattern's name.
        consumer: weight of the linear that the match is anchored at.
        roles: role -> canonical weight names, in order, without repetition.
        nodes: role -> name of the first node that plays it; also roles without a weight (``act``, ``attend``).
        module: deepest module path that contains all of these nodes.
    """

    kind: str
    consumer: str
    roles: Mapping[str, tuple[str, ...]] = field(hash=False)
    nodes: Mapping[str, str] = field(hash=False)
    module: str

    @property
    def cross(self) -> bool:
        """Tell whether keys come from another value than queries."""
        return self.nodes.get("source") != self.nodes.get("target")

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {' + '.join(weights)}" for role, weights in self.roles.items())
        return f"{self.kind} in {self.module or 'the model itself'}: {roles}"


@dataclass(frozen=True)
class Miss:
    """A pattern that was not found, at the point where most of it had been.

    Attributes:
        kind: the pattern's name.
        anchor: weight of the linear that the pattern was tried at.
        depth: how many of the pattern's forms had been recognised.
        expected: what should have come next.
        found: what came instead.
        mixes: the values that ``found`` brings together, where that is why it was not walked through.
    """

    kind: str
    anchor: str
    depth: int
    expected: str
    found: fx.Node
    mixes: tuple[fx.Node, ...] = ()

    def __str__(self) -> str:
        mixed = f" of {' and '.join(node.name for node in self.mixes)}" if self.mixes else ""
        module = module_path(self.found)
        where = f" in {module}" if module else ""
        found = f"{operation(self.found)} ({self.found.name}){mixed}{where}"
        return f"{self.kind} at {self.anchor.removesuffix('.weight')}: expected {self.expected}, found {found}"


def operation(node: fx.Node) -> str:
    """Return the name of a node's operation without its overload (``aten.layer_norm``)."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(packet) if packet is not node.target else getattr(packet, "__name__", str(packet))


@dataclass(frozen=True, slots=True)
class Binding:
    """A role found at a node, with its weight if it has one."""

    role: str
    node: fx.Node
    weight: str | None = None


Bound = tuple[Binding, ...]


class Scope:
    """The tables that patterns share while they are matched on one graph."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._walks: dict[tuple[Via, bool], Walk] = {}

    def walk(self, allowed: Via, pieces: bool) -> Walk:
        """Return the remembered walk through these steps."""
        key = (allowed, pieces)
        if key not in self._walks:
            self._walks[key] = Walk(self.view, allowed, pieces)
        return self._walks[key]


@dataclass(frozen=True, slots=True)
class Place:
    """A node at which a form is tried, and how the match got there.

    Attributes:
        node: the node.
        kind: name of the pattern.
        anchor: weight of the consumer.
        scope: the tables of this graph.
        depth: how many forms were recognised on the way.
        where: that way's last step in words, for misses.
    """

    node: fx.Node
    kind: str
    anchor: str
    scope: Scope
    depth: int = 0
    where: str = "at the consumer"

    def deeper(self, node: fx.Node, where: str) -> Place:
        """Return the place behind a form that was recognised here."""
        return Place(node, self.kind, self.anchor, self.scope, self.depth + 1, where)

    def at(self, node: fx.Node) -> Place:
        """Return the place that a walk from here leads to."""
        return Place(node, self.kind, self.anchor, self.scope, self.depth, self.where)

    def miss(self, expected: str, walk: Walk | None = None) -> Miss:
        """Return the failure of a form here."""
        mixes = walk.mixes(self.node) if walk else ()
        return Miss(self.kind, self.anchor, self.depth, f"{expected} {self.where}", self.node, mixes)


class Form(Protocol):
    """One part of a pattern."""

    def match(self, at: Place) -> Bound | Miss:
        """Match at a place: the roles found, or the deepest failure."""


@dataclass(frozen=True)
class Pattern:
    """A kind of site: its name and its form, which starts at the consumer's linear."""

    kind: str
    form: Form

    def match(self, node: fx.Node, scope: Scope) -> Match | Miss:
        """Match backwards from a consumer.

        Raises:
            ValueError: the node is no linear.
        """
        consumer = scope.view.linear(node)
        if consumer is None:
            raise ValueError(f"{node.name} is no linear; patterns start at a consumer's linear.")
        bound = self.form.match(Place(node, self.kind, consumer.weight, scope))
        return bound if isinstance(bound, Miss) else _named(self.kind, consumer.weight, bound)


def _named(kind: str, consumer: str, bound: Bound) -> Match:
    roles: dict[str, dict[str, None]] = {}
    nodes: dict[str, str] = {}
    paths = []
    for binding in bound:
        nodes.setdefault(binding.role, binding.node.name)
        if binding.weight is not None:
            roles.setdefault(binding.role, {})[binding.weight] = None
            paths.append(module_path(binding.node))
    frozen = {role: tuple(weights) for role, weights in roles.items()}
    return Match(kind, consumer, MappingProxyType(frozen), MappingProxyType(nodes), common_path(paths))
