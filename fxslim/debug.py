"""``FXSLIM_DEBUG=graph,labels,timing``: say on stderr what every pass did."""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass

from fxslim.errors import InputError
from fxslim.passes.annotate import Labels
from fxslim.passes.sites import Sites
from fxslim.pipeline import Facts, Observer, Pass
from fxslim.program import Program
from fxslim.text import label_lines, site_lines
from fxslim.transcript import graph_text

VARIABLE = "FXSLIM_DEBUG"
WORDS = ("graph", "labels", "timing")


def debugging() -> tuple[Observer, ...]:
    """Return the observer that the environment asks for, if any.

    Raises:
        InputError: the variable holds an unknown word.
    """
    asked = frozenset(word.strip() for word in os.environ.get(VARIABLE, "").split(",")) - {""}
    unknown = sorted(asked.difference(WORDS))
    if unknown:
        raise InputError(f"{VARIABLE}: unknown {', '.join(unknown)}; it takes {', '.join(WORDS)}, with commas between.")
    return (Dump(asked),) if asked else ()


@dataclass(frozen=True)
class Dump:
    """An observer that writes to stderr.

    Attributes:
        asked: ``graph`` for what a pass changed in the graph's text, ``labels`` for labels and sites when they are
            found, ``timing`` for seconds.
    """

    asked: frozenset[str]

    def __call__(self, before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        """Write what a pass did."""
        lines = [f"fxslim: {type(step).__name__}" + (f" {seconds:.3f} s" if "timing" in self.asked else "")]
        if "graph" in self.asked:
            old, new = graph_text(before).splitlines(), graph_text(after).splitlines()
            lines += difflib.unified_diff(old, new, "before", "after", lineterm="") if old else new
        if "labels" in self.asked:
            lines += _found(before, after)
        sys.stderr.write("\n".join(lines) + "\n")


def _found(before: Facts, after: Facts) -> list[str]:
    """Return labels and sites that were not there before."""
    labels, sites = after.find(Labels), after.find(Sites)
    lines = []
    if labels is not None and labels is not before.find(Labels):
        lines += label_lines(after.get(Program), labels.starts, labels.components)
    if sites is not None and sites is not before.find(Sites):
        lines += site_lines(sites.sites)
    return lines
