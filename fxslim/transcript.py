"""An observer that writes down what each pass did: its seconds, and the graph's text before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fxslim.pipeline import Facts, Pass
from fxslim.program import Program
from fxslim.tables import Table
from fxslim.text import program_lines


@dataclass
class Transcript:
    """What passes did, by their names, in order. Give it as ``observer=`` and print it.

    Attributes:
        seconds: pass -> wall time.
        before: pass -> text of the graph that it was given (empty before there is one).
        after: pass -> text of the graph that it left.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    def __call__(self, before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        """Write one pass down."""
        name = type(step).__name__
        self.seconds[name] = seconds
        self.before[name], self.after[name] = graph_text(before), graph_text(after)

    def changed(self) -> tuple[str, ...]:
        """Return the passes that made or changed the graph."""
        return tuple(name for name in self.seconds if self.before[name] != self.after[name])

    def __str__(self) -> str:
        rows = [
            (name, f"{seconds:.3f}", len(self.after[name].splitlines()), "changed" if name in self.changed() else "")
            for name, seconds in self.seconds.items()
        ]
        return str(Table(("pass", "seconds#", "graph lines#", ""), rows))


def graph_text(facts: Facts) -> str:
    """Return the text of the latest graph: the emitted module's code, or the traced program."""
    for fact in facts.known.values():
        module = getattr(fact, "module", None)
        if isinstance(module, fx.GraphModule):
            return str(module.code).strip()
    program = facts.find(Program)
    return "\n".join(program_lines(program)) if program is not None else ""
