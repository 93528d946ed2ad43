"""Masks beside a checkpoint: tensors as safetensors, the rest as JSON; nothing of it in the model's own state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxslim.errors import FxslimError, InputError
from fxslim.training.config import PruningConfig
from fxslim.training.schedule import Timeline

TENSORS = "fxslim_masks.safetensors"
REST = "fxslim_pruning.json"
VERSION = 1


@dataclass(frozen=True)
class State:
    """Everything that pruning goes on from.

    Attributes:
        step: how many optimizer steps were taken.
        timeline: the steps at which masks grow.
        config: what goes.
        teacher: fingerprint of the teacher, where there is one.
        tensors: masks and scores.
    """

    step: int
    timeline: Timeline
    config: PruningConfig
    teacher: str | None
    tensors: Mapping[str, Tensor]


def write(folder: str | PathLike[str], state: State) -> None:
    """Write a state into a folder: each file whole or not at all, the JSON last."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    rest = {
        "version": VERSION,
        "step": state.step,
        "timeline": dataclasses.asdict(state.timeline),
        "config": state.config.to_dict(),
        "teacher": state.teacher,
    }
    new = place / f"{TENSORS}.new"
    save_file(dict(state.tensors), new, metadata={"step": str(state.step)})
    new.replace(place / TENSORS)
    new = place / f"{REST}.new"
    new.write_text(json.dumps(rest, indent=2), encoding="utf-8")
    new.replace(place / REST)


def holds_masks(folder: str | PathLike[str]) -> bool:
    """Tell whether a folder holds what `write` wrote."""
    return (Path(folder) / REST).is_file()


def read(folder: str | PathLike[str]) -> State:
    """Read what `write` wrote.

    Raises:
        InputError: it is not there, or broken.
    """
    place = Path(folder)
    if not holds_masks(place):
        raise InputError(
            f"{place} holds no {REST}: it is no checkpoint of a model that fxslim pruned while it trained."
        )
    try:
        rest = json.loads((place / REST).read_text(encoding="utf-8"))
        if rest["version"] != VERSION:
            raise InputError(f"{place / REST} has version {rest['version']}, this fxslim reads version {VERSION}.")
        config = PruningConfig.from_dict(rest["config"])
        step, line, teacher = int(rest["step"]), Timeline(**rest["timeline"]), rest["teacher"]
        tensors = load_file(place / TENSORS)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, FxslimError):
            raise
        raise InputError(f"the masks in {place} cannot be read: {error}") from error
    return State(step, line, config, teacher, tensors)
