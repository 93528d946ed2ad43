"""Live figures: how much is masked, by which scores, and what the model will cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from fxslim.count import macs, parameters
from fxslim.passes.annotate import Labels
from fxslim.passes.planning import Subject, cut_of
from fxslim.passes.rewrite import example_macs_graph
from fxslim.passes.sites import Sites
from fxslim.program import Program
from fxslim.report import Inspection
from fxslim.site import SitePlan, removed_rows

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Figures:
    """What pruning has come to.

    Attributes:
        step: how many optimizer steps were taken.
        sparsity: what of -> the fraction that is masked.
        quantiles: of the scores of what is left: the tenth, the half, nine tenths.
        parameters: how many are left when the masked units are taken out; exact, where all of them can be.
        macs: multiply-accumulates on the traced example: the fraction that is left then.
        final_parameters: how many will be left at the end: if everything that goes went by today's scores.
        final_macs: the fraction that will be left then.
    """

    step: int
    sparsity: dict[str, float]
    quantiles: tuple[float, ...]
    parameters: int
    macs: float
    final_parameters: int
    final_macs: float

    def to_dict(self) -> dict[str, float]:
        """Return them as they are logged."""
        names = [f"score_q{round(100 * q)}" for q in QUANTILES]
        return {
            **{f"{name}_sparsity": value for name, value in self.sparsity.items()},
            **dict(zip(names, self.quantiles, strict=True)),
            "parameters_left": self.parameters,
            "macs_left": self.macs,
            "parameters_final": self.final_parameters,
            "macs_final": self.final_macs,
        }

    def __str__(self) -> str:
        sparsity = ", ".join(f"{name} {value:.1%}" for name, value in self.sparsity.items())
        size = f"{self.parameters / 1e6:.1f}M parameters, {self.macs:.1%} of MACs"
        end = f"{self.final_parameters / 1e6:.1f}M, {self.final_macs:.1%}"
        return f"step {self.step}: {sparsity} masked; {size} left, {end} at the end"


def quantiles(scores: list[np.ndarray]) -> tuple[float, ...]:
    """Return quantiles of scores; NaN where there are none."""
    every = np.concatenate(scores) if scores else np.zeros(0)
    return tuple(float(x) for x in np.quantile(every, QUANTILES)) if len(every) else (math.nan,) * len(QUANTILES)


class Estimate:
    """Counts what a model will cost after site plans; what costs the same is counted once.

    Args:
        found: the model's sites.
    """

    def __init__(self, found: Inspection) -> None:
        assert found.analysis is not None
        facts = found.analysis.facts
        self.program, self.labels, self.sites = facts.get(Program), facts.get(Labels), facts.get(Sites)
        self.dense_parameters = parameters(facts.get(Subject).model)
        self.dense_macs = max(macs(self.program.graph).total, 1)
        self._known: dict[tuple[tuple[str, int], ...], float] = {}

    def of(self, parts: tuple[SitePlan, ...]) -> tuple[int, float]:
        """Return how many parameters and which fraction of multiply-accumulates are left."""
        return self.parameters(parts), self.macs(parts)

    def parameters(self, parts: tuple[SitePlan, ...]) -> int:
        """Return how many parameters are left."""
        gone: dict[str, list[float]] = {}
        for (tensor, _), rows in removed_rows(parts).items():
            gone.setdefault(tensor, []).append(1 - float(rows.mean()))
        tensors = self.program.tensors
        return self.dense_parameters - sum(
            round(tensors[name].numel() * (1 - math.prod(left)))
            for name, left in gone.items()
            if isinstance(tensors[name], nn.Parameter)
        )

    def macs(self, parts: tuple[SitePlan, ...]) -> float:
        """Return the fraction of multiply-accumulates that is left."""
        key = tuple((part.site.name, len(part.keep)) for part in parts)
        if key not in self._known:
            cut = cut_of(self.labels, self.sites, parts)
            latest = dict([*self._known.items()][-3:])  # masks change, what they come to at the end hardly does
            self._known = latest | {key: macs(example_macs_graph(self.program, cut)).total / self.dense_macs}
        return self._known[key]
