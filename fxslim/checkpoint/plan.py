"""Plan from a checkpoint's weights alone, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from typing_extensions import Unpack

from fxslim import hf
from fxslim.asked import Fractions, request_of
from fxslim.checkpoint.files import read_shards
from fxslim.checkpoint.keys import Weights, keys_of, place
from fxslim.errors import InputError
from fxslim.passes import pipelines as lines
from fxslim.plan import Plan
from fxslim.program import Program


def plan_checkpoint(src: str | PathLike[str], *, progress: bool = False, **asked: Unpack[Fractions]) -> Plan:
    """Choose what to take out of a checkpoint by the magnitude of its weights, without loading it.

    The model is traced without its weights; then every tensor that decides anything is read, measured, and forgotten.
    The plan is the one that `fxslim.plan` makes of the loaded model.

    Args:
        src: a local folder with a dense checkpoint of transformers in safetensors files.
        progress: show a progress bar.
        **asked: what to take out: see `fxslim.asked.Fractions`. Without any fraction, only what does nothing goes.

    Raises:
        InputError: there is no such folder, files are missing, cut short or broken, or a weight holds NaN.
        RequestError: a fraction is out of range, or a glob matches nothing.
        UnsupportedModelError: the checkpoint is quantized, or transformers does not know its class.
    """
    request = request_of(asked)
    folder = folder_of(src)
    shards = read_shards(folder)
    skeleton = hf.skeleton(folder)
    place(skeleton)
    keys = keys_of(skeleton, shards)
    with bar(2, unit="step", visible=progress) as step:
        facts = lines.inspecting().run(lines.subject(skeleton, None))
        step(1)
        program = facts.get(Program)
        program = dataclasses.replace(program, tensors=Weights(keys, program.tensors))
        chosen = lines.choosing(request, tuple(facts.known)).run(*facts.adding(program).known.values())
        step(1)
    return chosen.get(Plan)


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
