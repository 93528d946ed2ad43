"""Narrow a checkpoint by a plan, one tensor at a time."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from typing_extensions import Unpack

from fxslim.asked import Fractions
from fxslim.plan import Plan


def slim_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    plan: Plan | None = None,
    *,
    progress: bool = False,
    force: bool = False,
    **asked: Unpack[Fractions],
) -> Path:
    """Narrow a checkpoint without loading it, and write a folder like that of `fxslim.save_pretrained`.

    Shards are written one after the other into a hidden folder beside ``dst``, which takes its place when everything
    is there and on disk. A run that was killed or failed goes on where it was when it is started again.

    Args:
        src: a local folder with a dense checkpoint of transformers in safetensors files.
        dst: where to; parents are made.
        plan: what to take out; instead of a request. Without edits (see `Plan.edits`) they are found, and verified, on
            one layer of every kind.
        progress: show a progress bar.
        force: replace a checkpoint that is there.
        **asked: what to take out: see `fxslim.asked.Fractions`; the plan is then made by `plan_checkpoint`.

    Returns:
        The folder, which `fxslim.from_pretrained` loads.

    Raises:
        InputError: ``src`` cannot be read, ``dst`` is taken, the disk is full, or somebody else is writing there.
        PlanError: the plan was made for another model, or needs weights that the files do not hold.
        VerifyError: masked and narrowed layers differ.
        UnsupportedModelError: the checkpoint is quantized, or its tensors cannot be mapped onto the model's.
    """
    raise NotImplementedError
