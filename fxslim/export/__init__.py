"""Write a model for other runtimes: an archive of ``torch.export``, ONNX, OpenVINO.

A written folder holds one model without anything of fxslim in it: inputs and outputs by name, batch and length open. It
is run in its runtime and compared with the model before it appears, on the traced sizes and on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from fxslim.errors import InputError
from fxslim.export import onnx, openvino, pt2
from fxslim.export.compare import compare
from fxslim.export.exportable import exportable
from fxslim.export.format import Format
from fxslim.folder import check_free, replacing
from fxslim.report import Difference

__all__ = ["FORMATS", "Exported", "export"]

FORMATS: Mapping[str, Format] = MappingProxyType({"onnx": onnx.ONNX, "pt2": pt2.PT2, "openvino": openvino.OPENVINO})


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        to: the format.
        files: names of the files.
        inputs: name -> its sizes, a word where any size will do.
        outputs: names.
        differences: how far the file in its runtime is from the model, for every set of sizes.
        notes: what was not compared, and why.
    """

    folder: Path
    to: str
    files: tuple[str, ...]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "folder": fspath(self.folder),
            "to": self.to,
            "files": list(self.files),
            "inputs": {name: list(sizes) for name, sizes in self.inputs.items()},
            "outputs": list(self.outputs),
            "differences": [difference.to_dict() for difference in self.differences],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} [{' x '.join(map(str, sizes))}]" for name, sizes in self.inputs.items())
        lines = [f"{shapes} -> {', '.join(self.outputs)}"]
        lines += [
            f"{d.path}: largest difference {d.max_abs:.1e} (outputs up to {d.scale:.1f}, allowed {d.tolerance:.1e})"
            for d in self.differences
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    to: str,
    example_inputs: Any = None,
    dynamic: bool = True,
    tokenizer_from: str | PathLike[str] | None = None,
    force: bool = False,
) -> Exported:
    """Write a model into a new folder for another runtime, run it there, and compare.

    Key/value caches are no part of it: a language model maps token ids to logits.

    Args:
        model: what `fxslim.slim` or `fxslim.compile` returned, or any other module. It is not changed.
        folder: where to; parents are made. It appears whole or not at all.
        to: ``"onnx"``, ``"pt2"`` (``torch.export.load`` reads it) or ``"openvino"``.
        example_inputs: as in `fxslim.inspect`; not needed for models of transformers and for compiled graphs.
        dynamic: leave batch and length open, where the model does; False fixes them at those of the example.
        tokenizer_from: folder or hub name to copy tokenizer and processor files from.
        force: replace an exported model of transformers that is there.

    Raises:
        InputError: the format is unknown, a package is missing, ``folder`` is taken, or inputs are missing.
        TraceError: the model is not one graph.
        ExportError: the format cannot hold the model, or the file computes something else.
    """
    if to not in FORMATS:
        raise InputError(f"to={to!r} is none of {', '.join(FORMATS)}.")
    place, form = Path(folder), FORMATS[to]
    if place.suffix in (".onnx", ".pt2", ".xml"):
        raise InputError(f"{place} names a file; name a folder, {form.file} is written into it.")
    check_free(place.resolve(), force=force)
    form.require()
    whole = exportable(model, example_inputs, dynamic=dynamic)
    with replacing(place, force=force) as staging:
        form.write(whole, staging / form.file)
        differences, notes = compare(whole, lambda: form.load(whole, staging / form.file))
        files = tuple(sorted(path.name for path in staging.iterdir()))
        _describe(model, staging, tokenizer_from)
    return Exported(place, to, files, whole.sizes, whole.outputs, differences, notes)


def _describe(model: nn.Module, folder: Path, tokenizer_from: str | PathLike[str] | None) -> None:
    """Put the config, the plan and the tokenizer beside the model, where there are any."""
    config, record = getattr(model, "config", None), getattr(model, "fxslim", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
    if record is not None:
        (folder / "fxslim_plan.json").write_text(record.plan.to_json() + "\n", encoding="utf-8")
    if tokenizer_from is not None:
        from fxslim.hf import copy_beside

        copy_beside(tokenizer_from, folder)
