"""Change a few weights and see what that does to the model's output, on sequences that nothing is fitted on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxslim.calibration import Batch, Calibration
from fxslim.passes.fitting.observe import Rows, rows_of
from fxslim.passes.fitting.outputs import divergence
from fxslim.passes.fitting.tape import Tape
from fxslim.program import Program, is_symbolic


class Probe:
    """The dense model on the sequences that judge, and what it returns there.

    Args:
        program: the traced model.
        data: calibration data.
        rows: which of it judges.
        work: how often all of its tokens may be run through the whole model...
        times: ...in so many measurements.
    """

    def __init__(self, program: Program, data: Calibration, rows: Rows, *, work: float, times: float) -> None:
        batches = _judging(program, data, rows)
        tokens = sum(batch.tokens for batch in batches)
        part = data.tokens * work / max(times, 1.0)
        chosen = Calibration(tuple(batches), {}).part(int(min(part, tokens)))
        self.rows = rows_of(program, chosen)
        self.tape = Tape(program, [batch.inputs for batch in chosen], program.tensors)
        self.start = self.tape.fork()
        self.dense = [self.tape.outputs(i) for i in range(len(chosen))]

    def damage(self, tensors: Mapping[str, Tensor], tape: Tape | None = None) -> float:
        """Return how far the output is from the dense model's with other tensors.

        Args:
            tensors: every tensor of the model.
            tape: a tape over these sequences that stands where the first change is; the start by default.
        """
        apart = (tape or self.start).fork()
        apart.tensors = tensors
        total = weight = 0.0
        for i, dense in enumerate(self.dense):
            own, of = divergence(dense, apart.outputs(i), self.rows.mask(apart.nodes[-1], i))
            total, weight = total + own, weight + of
        sizes = torch.tensor([total, weight], dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sizes)
        return float(sizes[0] / sizes[1].clamp_min(1e-300))


def _judging(program: Program, data: Calibration, rows: Rows) -> list[Batch]:
    """Return the sequences that judge, as batches of their own; all of them where they cannot be told apart."""
    values = [n.meta.get("val") for n in program.graph.find_nodes(op="placeholder") if n.name in program.inputs]
    shapes = [value.shape for value in values if isinstance(value, Tensor) and value.ndim]
    found = []
    for number, batch in enumerate(data.batches):
        judges = rows.judges(number)
        if judges is None or not all(is_symbolic(shape[0]) for shape in shapes):
            return list(data.batches)
        if not judges.any():
            continue
        inputs = {
            name: value[judges.to(value.device)] if isinstance(value, Tensor) and len(value) == len(judges) else value
            for name, value in batch.inputs.items()
        }
        mask = inputs.get("attention_mask")
        share = batch.tokens * int(judges.sum()) // len(judges)
        tokens = int(mask.count_nonzero()) if isinstance(mask, Tensor) and mask.ndim == 2 else share
        found.append(Batch(inputs, {}, max(tokens, 1)))
    return found or list(data.batches)
