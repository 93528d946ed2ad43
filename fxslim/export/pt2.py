"""Archives of ``torch.export``: what ``torch.export.load`` reads, without fxslim and without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fxslim.export.exportable import Exportable
from fxslim.export.format import Format, Run
from fxslim.trace import quiet


def write(whole: Exportable, path: Path) -> None:
    """Write the exported program."""
    with quiet():
        torch.export.save(whole.program, path)


def load(whole: Exportable, path: Path) -> Run:
    """Return what runs the exported program itself: reading an archive back may unpickle, which fxslim never does."""
    module = whole.program.module()

    def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            result: Mapping[str, torch.Tensor] = module(**inputs)
        return result

    return run


PT2 = Format("model.pt2", write, load)
