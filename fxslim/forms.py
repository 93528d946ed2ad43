"""The forms that patterns are built from; each is tried once at each place, none backtracks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from fxslim.flow import POINTWISE, Region, Source, Via, Walk
from fxslim.match import Binding, Bound, Form, Miss, Place


class Passage(Form, Protocol):
    """A form that walks back to sources before it looks."""

    def accept(self, region: Region, at: Place, walk: Walk) -> Bound | Miss:
        """Match what a walk has found."""


@dataclass(frozen=True)
class Value:
    """Take any value and remember what it was made from, so that two roles can be compared."""

    role: str

    def match(self, at: Place) -> Bound | Miss:
        """Bind the first value behind projections, norms and elementwise steps that has no single source."""
        walk = at.scope.walk(POINTWISE | Via.NORM, False)
        node = walk.region(at.node).sources[0].node
        while (view := at.scope.view.linear(node)) is not None:
            node = walk.region(view.input).sources[0].node
        return (Binding(self.role, node),)


@dataclass(frozen=True)
class Linear:
    """A linear; ``input`` is matched on what it multiplies."""

    role: str
    input: Form | None = None

    def match(self, at: Place) -> Bound | Miss:
        """Bind the weight."""
        view = at.scope.view.linear(at.node)
        if view is None:
            return at.miss("Linear")
        bound: Bound = (Binding(self.role, at.node, view.weight),)
        if self.input is None:
            return bound
        rest = self.input.match(at.deeper(view.input, f"in front of {self.role}"))
        return rest if isinstance(rest, Miss) else bound + rest


@dataclass(frozen=True)
class Through:
    """Walk back through ``allowed`` steps; every source must match ``inner``."""

    allowed: Via
    inner: Form

    def match(self, at: Place) -> Bound | Miss:
        """Match whole values: chunks of one linear are that linear."""
        walk = at.scope.walk(self.allowed, False)
        return self.accept(walk.region(at.node), at, walk)

    def accept(self, region: Region, at: Place, walk: Walk) -> Bound | Miss:
        """Match every source; a walk that was made for others must not have taken other steps."""
        if region.crossed & ~self.allowed:
            only = ", ".join(str(via.name).lower() for via in Via if via & self.allowed)
            return at.at(region.bend or region.sources[0].node).miss(f"only {only}")
        return _every(self.inner, region, at, walk)


@dataclass(frozen=True)
class Activation:
    """Walk back through elementwise steps, at least one of them not linear, to one single value."""

    inner: Form
    role: str = "act"

    def match(self, at: Place) -> Bound | Miss:
        """Match; pieces of one linear are different values, so that a gate is no activation."""
        walk = at.scope.walk(POINTWISE, True)
        return self.accept(walk.region(at.node), at, walk)

    def accept(self, region: Region, at: Place, walk: Walk) -> Bound | Miss:
        """Bind the last operation that is not linear, then match behind the first."""
        source = region.sources[0].node
        inner = _every(self.inner, region, at.deeper(source, "behind the activation"), walk)
        if region.bend is None:
            all_but_the_curve = not isinstance(inner, Miss)
            near = at.deeper(source, at.where) if all_but_the_curve else at.at(source)
            return near.miss("an activation", walk)
        return inner if isinstance(inner, Miss) else (Binding(self.role, region.bend), *inner)


@dataclass(frozen=True)
class Product:
    """A product of different values, in any order; each part takes at least one of them.

    Factors with the same source belong together (``x * sigmoid(x)`` is one value), so a product that has only one
    value in it is no product.
    """

    parts: tuple[Passage, ...]

    def match(self, at: Place) -> Bound | Miss:
        """Give every value to the first part that takes it, then serve the parts that got none."""
        walk = at.scope.walk(POINTWISE, True)
        values = self._values(at.node, walk)
        if len(values) < max(2, len(self.parts)):
            return at.at(values[0].sources[0].node).miss("a product of different values", walk)
        behind = at.deeper(at.node, "behind the product")
        offers = [[part.accept(value, behind, walk) for part in self.parts] for value in values]
        takers: list[int] = []
        for offer in offers:
            taker = next((i for i, result in enumerate(offer) if not isinstance(result, Miss)), None)
            if taker is None:  # the part that asks least comes last
                return _deepest([result for result in reversed(offer) if isinstance(result, Miss)])
            takers.append(taker)
        for part in range(len(self.parts)):
            if part in takers:
                continue
            spare = [i for i, taker in enumerate(takers) if takers.count(taker) > 1]
            able = [i for i in spare if not isinstance(offers[i][part], Miss)]
            if not able:
                return _deepest([result for offer in offers if isinstance(result := offer[part], Miss)])
            takers[able[-1]] = part
        chosen = (offers[i][part] for part in range(len(self.parts)) for i, taker in enumerate(takers) if taker == part)
        return tuple(binding for bound in chosen if not isinstance(bound, Miss) for binding in bound)

    @staticmethod
    def _values(node: fx.Node, walk: Walk) -> list[Region]:
        """Take a product apart, nested products too, and put factors of the same value together."""
        values: dict[tuple[Source, ...], Region] = {}
        pending, opened = [(walk.region(node), node)], set()
        while pending:
            region, product = pending.pop()
            source = region.sources[0].node
            step = walk.step(source)
            if region.bend is None and step is not None and step.via is Via.PRODUCT:
                if source not in opened:  # one that is used twice is opened once
                    pending.extend((walk.through(edge, source), source) for edge in reversed(step.edges))
                opened.add(source)
                continue
            other = values.get(region.sources)
            if other is not None:
                bend = other.bend or region.bend or product
                region = Region(region.sources, other.crossed | region.crossed | Via.PRODUCT, bend)
            values[region.sources] = region
        return list(values.values())


@dataclass(frozen=True)
class Attend:
    """Softmax attention."""

    q: Form
    k: Form
    v: Form

    def match(self, at: Place) -> Bound | Miss:
        """Bind the attention and match what feeds it."""
        view = at.scope.view.attend(at.node)
        if view is None:
            return at.miss("attention")
        bound: Bound = (Binding("attend", at.node),)
        feeds = ((self.q, view.query, "query"), (self.k, view.key, "key"), (self.v, view.value, "value"))
        for form, node, name in feeds:
            result = form.match(at.deeper(node, f"behind the {name}"))
            if isinstance(result, Miss):
                return result
            bound += result
        return bound


def _every(form: Form, region: Region, at: Place, walk: Walk) -> Bound | Miss:
    bound: Bound = ()
    for source in region.sources:
        result = form.match(at.at(source.node))
        if isinstance(result, Miss):
            mixes = walk.mixes(source.node) if result.found is source.node else result.mixes
            return Miss(result.kind, result.anchor, result.depth, result.expected, result.found, mixes)
        bound += result
    return bound


def _deepest(misses: list[Miss]) -> Miss:
    return max(misses, key=lambda miss: miss.depth)
