"""One model and one tool, in this process: ``python -m benchmarks.peers.cell --case 'TOOL,MODEL'``.

Every finding is printed as soon as it is there, so that a crash takes only what comes after it. Nothing of fxslim is
imported unless it is the tool: rivals run in environments of their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

from torch import nn

from benchmarks.peers import inc, torch_ao, torch_pruning
from benchmarks.peers.masked import difference, gone, masked, narrowed, outputs
from benchmarks.peers.models import BERT_BASE, SUBJECTS, Subject, matrices
from benchmarks.processes import measured

SECONDS = 120
"""How much processor time a cell may take."""


def with_fxslim(subject: Subject, model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Take half of the FFN channels and half of the heads out of a copy, verified."""
    import fxslim

    small: nn.Module = fxslim.slim(model, ffn=0.5, heads=0.5)
    return small


TOOLS: dict[str, Callable[[Subject, nn.Module, Mapping[str, Any]], nn.Module]] = {
    "fxslim": with_fxslim,
    "Torch-Pruning": torch_pruning.prune,
    "torch.ao": torch_ao.prune,
    "INC": inc.prune,
}
IMPORTS = {
    "fxslim": ("fxslim.api", "torch.export", "torch._dynamo"),
    "Torch-Pruning": ("torch_pruning",),
    "torch.ao": ("torch.ao.pruning", "torch.fx"),
    "INC": ("neural_compressor.training", "neural_compressor.compression.pruner"),
}
PACKAGES = {"fxslim": "fxslim", "Torch-Pruning": "torch-pruning", "torch.ao": "torch", "INC": "neural-compressor"}


def run(tool: str, subject: Subject, *, check: bool, emit: Callable[[dict[str, Any]], None]) -> None:
    """Prune a model, say what that took, and say what came of it.

    Args:
        tool: key of `TOOLS`.
        subject: the model.
        check: compare with the dense model; otherwise only widths are told.
        emit: is given the row once the tool and the model are there, and after each of its parts: figures, what
            went, the difference.
    """
    for name in IMPORTS[tool]:
        import_module(name)
    model, made = subject.build(), []
    dense = copy.deepcopy(model) if check else None
    row: dict[str, Any] = {"tool": tool, "version": metadata.version(PACKAGES[tool]), "model": subject.name}
    emit(row)
    before = measured(lambda: None)["peak_gib"]
    figures = measured(lambda: made.append(TOOLS[tool](subject, model, subject.inputs(2, 7))))
    row |= figures | {"grown_gib": round(figures["peak_gib"] - before, 3)}
    small = made[0]
    emit(row)
    if dense is None:
        emit(row | {"widths": {name: [*weight.shape] for name, weight in matrices(small).items()}})
        return
    kept = narrowed(dense, small)
    counted = gone(subject, dense, kept)
    row |= {"channels": counted.channels, "heads": counted.heads, "cut": counted.cut}
    emit(row)
    other = subject.inputs(3, 11, seed=1)
    found = outputs(small, other)
    emit(row | {"runs": True})
    emit(row | {"runs": True, "difference": difference(found, outputs(masked(dense, kept), other))})


def main() -> None:
    """Run one cell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.cell", description=__doc__)
    parser.add_argument("--case", required=True, help="TOOL,MODEL")
    tool, _, name = parser.parse_args().case.partition(",")
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    subject = BERT_BASE if name == BERT_BASE.name else SUBJECTS[name]
    run(tool, subject, check=subject is not BERT_BASE, emit=lambda row: print(json.dumps(row), flush=True))


if __name__ == "__main__":
    main()
