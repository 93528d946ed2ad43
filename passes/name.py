"""Name places in a program: match every pattern at every linear, and remember why the others failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fxslim.match import Match, Miss, Pattern, Scope
from fxslim.passes.patterns import PATTERNS
from fxslim.passes.views import Views
from fxslim.program import Program


@dataclass(frozen=True)
class Naming:
    """What patterns have found.

    Attributes:
        matches: one for every linear that consumes something a pattern knows, in graph order.
        misses: for every other linear, the failure of each pattern.
        aliases: further names of tensors -> their canonical names.
    """

    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def by_consumer(self, weight: str) -> Match | None:
        """Return the match anchored at a linear's weight (the first, if the weight is used several times)."""
        canonical = self.aliases.get(weight, weight)
        return next((match for match in self.matches if match.consumer == canonical), None)

    def why(self, name: str) -> str:
        """Say what was found at a weight or under a module path, and what kept the rest from being found."""
        canonical = self.aliases.get(name, name)
        found = [match for match in self.matches if any(_under(weight, canonical) for weight in _weights([match]))]
        taken = _weights(self.matches)
        missed = [miss for miss in self.misses if _under(miss.anchor, canonical) and miss.anchor not in taken]
        deepest = max((miss.depth for miss in missed), default=0)
        lines = [str(match) for match in found] + [str(miss) for miss in missed if miss.depth == deepest]
        return "\n".join(dict.fromkeys(lines)) or f"no linear in the graph has a weight called or below {name!r}"


def names(program: Program, patterns: Iterable[Pattern] = PATTERNS) -> Naming:
    """Match patterns at every linear of a program; the first that matches names it."""
    views = Views(program)
    scope = Scope(views)
    matches: list[Match] = []
    misses: list[Miss] = []
    ordered = tuple(patterns)
    for consumer in views.linears:
        failed: list[Miss] = []
        for pattern in ordered:
            result = pattern.match(consumer, scope)
            if isinstance(result, Match):
                matches.append(result)
                break
            failed.append(result)
        else:
            misses.extend(failed)
    return Naming(tuple(matches), tuple(misses), program.aliases)


def _weights(matches: Iterable[Match]) -> frozenset[str]:
    return frozenset(weight for match in matches for weights in match.roles.values() for weight in weights)


def _under(weight: str, name: str) -> bool:
    return not name or weight == name or weight.startswith(name + ".")
