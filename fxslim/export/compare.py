"""Compare a written model, in its runtime, with the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fxslim.errors import ExportError
from fxslim.export.exportable import Exportable, named_tensors
from fxslim.export.format import Run
from fxslim.passes.verify import gap
from fxslim.report import Difference

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference allowed, relative to the output's largest absolute value. Another runtime has other kernels; wrong
operations show much more. Models in float64 compute parts in float32."""
HALF = 0.05


def compare(whole: Exportable, load: Callable[[], Run | str]) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """Run the model and what was written of it on the traced inputs, and on others of other sizes.

    Args:
        whole: the model.
        load: returns what runs the file; or the reason why it cannot be run here.

    Returns:
        The worst difference for every set of sizes, and what was not compared.

    Raises:
        ExportError: they differ, or the file does not run.
    """
    try:
        run = load()
    except Exception as error:
        raise ExportError(
            f"the runtime does not take what was written: {_said(error)}; float32 is what all of them know."
        ) from error
    if isinstance(run, str):
        return (), (f"not compared with the model: {run}",)
    differences: list[Difference] = []
    notes: list[str] = []
    for inputs in whole.samples():
        given = named_tensors(inputs)
        sizes = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in given.items())
        try:
            expected = whole.run(inputs)
        except Exception as error:
            if not differences:
                raise
            notes.append(f"not compared at {sizes}, which the model does not take: {type(error).__name__}")
            continue
        try:
            found = run(given)
        except Exception as error:
            raise ExportError(f"what was written does not run on {sizes}: {_said(error)}") from error
        differences.append(max(_differences(sizes, expected, found), key=lambda d: d.max_abs / (d.tolerance or 1e-30)))
    return tuple(differences), tuple(notes)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _differences(
    sizes: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> Iterator[Difference]:
    for name, tensor in expected.items():
        other = found.get(name)
        shape: Any = None if other is None else tuple(other.shape)
        if other is None or shape != tuple(tensor.shape):
            raise ExportError(f"what was written returns {name} as {shape} on {sizes}, not as {tuple(tensor.shape)}.")
        measured = gap(tensor, other)
        relative = TOLERANCE.get(tensor.dtype, HALF) if tensor.is_floating_point() else 0.0
        allowed = relative * max(measured.scale, 1e-30)
        if not measured.max_abs <= allowed:
            raise ExportError(
                f"what was written computes something else: {name} on {sizes} differs by {measured.max_abs:.3g}, "
                f"allowed is {allowed:.3g}. Nothing was kept; try another format, and please report it."
            )
        yield Difference(sizes, measured.max_abs, measured.scale, allowed)
