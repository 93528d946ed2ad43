"""OpenVINO: the exported program as ``.xml`` and ``.bin``, run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxslim.errors import ExportError
from fxslim.export.exportable import Exportable, named_tensors
from fxslim.export.format import Format, Run
from fxslim.export.onnx import reshaping
from fxslim.trace import quiet


def write(whole: Exportable, path: Path) -> None:
    """Convert the exported program and write it, weights as they are.

    Raises:
        ExportError: OpenVINO has no operation for something that the model does.
    """
    import openvino

    try:
        with quiet():
            converted = openvino.convert_model(reshaping(whole.program))
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"this model cannot be written for OpenVINO: {type(error).__name__}: {said}") from error
    for port, name in zip(converted.inputs, named_tensors(whole.example), strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(converted.outputs, whole.outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(converted, path, compress_to_fp16=False)


def load(whole: Exportable, path: Path) -> Run:
    """Return what runs the file on the CPU, in the precision that it has."""
    import openvino

    core: Any = openvino.Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        found = compiled({name: tensor.numpy(force=True) for name, tensor in inputs.items()})
        return {port.get_any_name(): torch.from_numpy(value.copy()) for port, value in found.items()}

    return run


OPENVINO = Format("openvino_model.xml", write, load, packages=("openvino",), extra="openvino")
