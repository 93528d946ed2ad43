"""Let what is left make up for what an update masks: least squares on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.calibration import calibration
from fxslim.errors import UnsupportedModelError
from fxslim.passes.fitting.fit import weighted
from fxslim.passes.fitting.repair import repair
from fxslim.passes.fitting.sequences import rows_of
from fxslim.passes.fitting.subjects import subjects_of
from fxslim.plan import Note
from fxslim.program import Program
from fxslim.report import Inspection
from fxslim.sharing import rebound
from fxslim.site import SitePlan


class Mending:
    """Fits weights and biases around masks to what the model computed before: see `fxslim.passes.fitting.repair`.

    Args:
        model: the model.
        found: its sites.
        data: calibration data; see `fxslim.plan`.

    Raises:
        UnsupportedModelError: the model is traced in parts.
        InputError: the data does not fit.
    """

    def __init__(self, model: nn.Module, found: Inspection, data: Any) -> None:
        assert found.analysis is not None
        self.program = found.analysis.facts.get(Program)
        if self.program.regions:
            raise UnsupportedModelError(
                "this model cannot be traced as a whole, and calibration data flows through the whole graph; leave "
                "calibration= out."
            )
        self.data = calibration(model, data)
        self.notes: tuple[Note, ...] = tuple(subjects_of(self.program, found.sites)[1])

    def tensors(self, model: nn.Module, parts: Sequence[SitePlan]) -> Mapping[str, Tensor]:
        """Return what weights and biases become when units are masked.

        Args:
            model: the model, before they are.
            parts: what is left of the sites of which more is masked now.

        Returns:
            Canonical name -> tensor, in the model's own shapes.
        """
        program = rebound(self.program, model)
        subjects, _ = subjects_of(program, [part.site for part in parts])
        kept = {part.site.name: part for part in parts}
        with torch.random.fork_rng(), torch.no_grad():
            rows = weighted(program, subjects, rows_of(program, self.data.batches), seed=0)
            return repair(program, subjects, rows, kept, {}, _quiet, how="refit", seed=0)[1]


def _quiet(site: str) -> None:
    """Show no progress."""
