"""ONNX, by torch's own exporter, run in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fxslim.errors import ExportError
from fxslim.export.exportable import Exportable
from fxslim.export.format import Format, Run
from fxslim.trace import quiet

INLINE_BYTES = 1 << 30
"""Weights above this lie in a file of their own beside the model: a protobuf holds no more than 2 GiB."""


def write(whole: Exportable, path: Path) -> None:
    """Convert the exported program and write it.

    Raises:
        ExportError: ONNX has no operation for something that the model does.
    """
    names = [*whole.axes]
    try:
        with quiet():
            converted: Any = torch.onnx.export(
                reshaping(whole.program),
                input_names=names,
                output_names=list(whole.outputs),
                dynamic_shapes={name: axes for name, axes in whole.axes.items() if axes} or None,
                verbose=False,
            )
            large = sum(tensor.nbytes for tensor in whole.program.state_dict.values()) > INLINE_BYTES
            converted.save(path, external_data=large)
    except Exception as error:
        said = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(f"this model cannot be written as ONNX: {type(error).__name__}: {said}") from error


def reshaping(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return a program that does not depend on the strides that attention returns.

    Kernels return different ones, and decomposing a program looks at some of them first and at others later: a reshape
    that has become a view fails then. So attention is followed by a copy, and views may copy. Converters drop both.
    """
    copied = copy.copy(program)
    copied._graph_module = copy.deepcopy(program.graph_module)
    for node in copied.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        with copied.graph.inserting_after(node):
            clone = copied.graph.call_function(
                torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
            )
        clone.meta = dict(node.meta)
        node.replace_all_uses_with(clone, delete_user_cb=lambda user, own=clone: user is not own)
    for node in copied.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    copied.graph_module.recompile()
    return copied


def load(whole: Exportable, path: Path) -> Run | str:
    """Return what runs the file in ONNX Runtime."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {item.name for item in session.get_inputs()}
    returned = [item.name for item in session.get_outputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        given = {name: tensor.numpy(force=True) for name, tensor in inputs.items() if name in taken}
        return {
            name: torch.from_numpy(value) for name, value in zip(returned, session.run(returned, given), strict=True)
        }

    return run


ONNX = Format("model.onnx", write, load, packages=("onnx", "onnxscript"), extra="export")
