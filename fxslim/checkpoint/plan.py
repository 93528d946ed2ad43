"""Plan for a checkpoint, by its weights alone or on calibration data, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from typing_extensions import Unpack

from fxslim import hf
from fxslim.api import planned
from fxslim.asked import Asked, Wanted, wanted
from fxslim.checkpoint.files import read_shards
from fxslim.checkpoint.keys import Weights, keys_of, place
from fxslim.errors import InputError
from fxslim.lazy import KEPT
from fxslim.plan import Plan
from fxslim.program import Program


def plan_checkpoint(src: str | PathLike[str], *, progress: bool = False, **asked: Unpack[Asked]) -> Plan:
    """Choose what to take out of a checkpoint without loading it: by magnitude, or by what calibration data shows.

    The model is traced without its weights; then every tensor that decides anything is read, used, and forgotten.
    The plan is the one that `fxslim.plan` makes of the loaded model.

    Args:
        src: a local folder with a dense checkpoint of transformers in safetensors files.
        progress: show a progress bar.
        **asked: fractions or a target, and how to choose: see `fxslim.asked.Asked`. Without any, only what does
            nothing goes.

    Raises:
        InputError: there is no such folder, files are missing, cut short or broken, or a weight holds NaN.
        RequestError: a fraction is out of range, a glob matches nothing, or a target is about time.
        UnsupportedModelError: the checkpoint is quantized, or transformers does not know its class.
    """
    return chosen(folder_of(src), wanted(asked), progress=progress)


def chosen(
    folder: Path,
    want: Wanted,
    *,
    plan: Plan | None = None,
    repaired: MutableMapping[str, torch.Tensor] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose what to take out of a checkpoint, or repair what a plan leaves: see `fxslim.api.planned`."""
    skeleton = hf.skeleton(folder)
    place(skeleton)
    keys = keys_of(skeleton, read_shards(folder))

    def reading(program: Program) -> Weights:
        return Weights(keys, program.tensors, kept=1 if want.recipe is None else KEPT)

    return planned(skeleton, reading, want, plan=plan, repaired=repaired, progress=progress)


def folder_of(src: str | PathLike[str]) -> Path:
    """Return a checkpoint's folder; raise InputError where there is none."""
    folder = Path(src)
    if not folder.is_dir():
        raise InputError(f"there is no folder {src}; download the checkpoint first, files are read where they lie.")
    return folder


@contextmanager
def bar(total: int, *, unit: str, visible: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar over ``total`` units."""
    if not visible:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="fxslim", leave=False, unit=unit, unit_scale=True) as shown:
        yield shown.update
