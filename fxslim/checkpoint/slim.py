"""Narrow a checkpoint by a plan, one tensor at a time."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from typing_extensions import Unpack

import fxslim
from fxslim import api, hf
from fxslim.asked import Asked, wanted
from fxslim.checkpoint.files import Shard, read_shards
from fxslim.checkpoint.keys import Keys, Weights, keys_of, repaired_keys
from fxslim.checkpoint.layers import alike, check_alike, extended, shortened, without
from fxslim.checkpoint.plan import bar, chosen, folder_of
from fxslim.checkpoint.shards import DONE, Written, targets, write_shards
from fxslim.errors import InputError, PlanError
from fxslim.folder import check_free, replacing
from fxslim.hf.card import CARD, card
from fxslim.hf.classes import reading
from fxslim.lazy import Spilled
from fxslim.outofcore import OutOfCore
from fxslim.passes.narrow import check_fits, replay
from fxslim.passes.pad import padded
from fxslim.passes.planning import check_plan
from fxslim.passes.prepare import fingerprint
from fxslim.plan import Plan
from fxslim.report import Record
from fxslim.sharing import named_once

WITH_A_PLAN = {"calibration", "max_tokens", "repair", "propagate", "swaps", "seed"}
"""What may come with a plan: how to repair what it leaves."""
REPAIRED = ".repaired"
"""Folder beside the shards for what was repaired, until they are written."""


def slim_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    plan: Plan | None = None,
    *,
    progress: bool = False,
    force: bool = False,
    **asked: Unpack[Asked],
) -> Path:
    """Narrow a checkpoint without loading it, and write a folder like that of `fxslim.save_pretrained`.

    Shards are written one after the other into a hidden folder beside ``dst``, which takes its place when everything
    is there and on disk. A run that was killed or failed goes on where it was when it is started again, except with
    ``calibration=``, whose data is read once and for all.

    Args:
        src: a local folder with a dense checkpoint of transformers in safetensors files.
        dst: where to; parents are made.
        plan: what to take out; instead of a request. With ``calibration=`` what is left is repaired. A plan
            without edits (see `Plan`) is tried and verified on one layer of every kind, in float32, with what stands
            around the layers, unless that was done: the plan in a narrowed folder says so. What is tried is in files
            beside ``dst``, and memory holds a few blocks of it.
        progress: show a progress bar.
        force: replace a checkpoint that is there.
        **asked: fractions or a target, and how to choose and repair: see `plan_checkpoint`.

    Returns:
        The folder, which `fxslim.from_pretrained` loads.

    Raises:
        InputError: ``src`` cannot be read, ``dst`` is taken, the disk is full, or somebody else is writing there.
        PlanError: the plan was made for another model, or needs weights that the files do not hold.
        VerifyError: masked and narrowed layers differ.
        UnsupportedModelError: the checkpoint is quantized, or its tensors cannot be mapped onto the model's.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise InputError("plan= takes a fxslim Plan.")
    if plan is not None and asked.keys() - WITH_A_PLAN:
        raise InputError("give a fxslim Plan or a request, not both.")
    want = wanted(asked, planned=plan is not None)
    source, target = folder_of(src), Path(dst).resolve()
    check_free(target, force=force)
    shards = read_shards(source)
    job = _job(shards, plan, asked) if want.data is None else None
    with replacing(target, force=force, job=job, leaves_out=DONE) as staging:
        finished = _earlier(staging)
        if want.data is not None:
            (staging / REPAIRED).mkdir()
        repaired = Spilled(staging / REPAIRED)
        if plan is None or want.data is not None:
            plan = finished or chosen(source, want, plan=plan, repaired=repaired, progress=progress)
        skeleton = hf.skeleton(source)
        check_plan(plan, skeleton)
        check_fits(skeleton, plan)
        keys = keys_of(skeleton, shards)
        whole = finished or _edited(source, skeleton, plan, keys, staging, progress=progress)
        keys = repaired_keys(keys, repaired)
        aliases = named_once(skeleton)[1]
        weights = Weights(keys, named_once(skeleton)[0], kept=1)
        files = targets(shards, keys, whole, aliases)
        _check_space(staging, files)
        replay(skeleton, whole)
        whole = whole.model_copy(update={"weights_changed": bool(repaired)})
        (staging / hf.PLAN_FILE).write_text(whole.to_json() + "\n", encoding="utf-8")
        with bar(sum(shard.bytes for shard in shards), unit="B", visible=progress) as step:
            write_shards(staging, files, weights, {"format": "pt"}, step)
        _describe(source, skeleton, whole, staging)
        shutil.rmtree(staging / REPAIRED, ignore_errors=True)
    return target


def _job(shards: Sequence[Shard], plan: Plan | None, asked: Mapping[str, object]) -> str:
    """Name what is done: another source, plan or version is another job."""
    files = [(str(shard.file.resolve()), shard.file.stat().st_size, shard.file.stat().st_mtime_ns) for shard in shards]
    text = json.dumps([fxslim.__version__, files, plan.to_json() if plan else repr(sorted(asked.items()))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _earlier(staging: Path) -> Plan | None:
    """Return the plan that an earlier run of the same job has found; what it left is cleared where it found none."""
    if (staging / DONE).is_file() and (staging / hf.PLAN_FILE).is_file():
        return Plan.from_file(staging / hf.PLAN_FILE)
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _edited(source: Path, skeleton: Any, plan: Plan, keys: Keys, staging: Path, *, progress: bool) -> Plan:
    """Return the plan with the edits that it needs, found and verified on one layer of every kind.

    Its tensors, and what the trial makes of them, are in files in ``staging``, so that memory does not hold a layer.
    """
    if plan.tried or plan.edits or plan.spread or plan.zeroed or not plan.sites:
        return plan
    plan = padded(plan, {part.site.name: part.site for part in plan.sites})
    left_out = alike(skeleton, plan)
    double = any(piece.stored.dtype == torch.float64 for piece in keys.pieces.values())
    kind = shortened(type(skeleton), left_out)
    config = hf.dense_config(source)

    def tried(folder: Path) -> tuple[Plan, Plan]:
        with OutOfCore(folder):
            with reading(source):
                few = kind.from_pretrained(source, config=config, dtype=torch.float64 if double else torch.float32)
            few.eval()
            part = without(plan, left_out).model_copy(update={"fingerprint": fingerprint(few)})
            small: Any = api.slim(few, plan=part, progress=progress)
        return part, small.fxslim.plan

    with TemporaryDirectory(dir=staging) as trial:
        part, found = tried(Path(trial))
        gc.collect()  # what a trace leaves refers to itself, and files have to be gone before their folder
    if [own.model_copy(update={"folds": ()}) for own in found.sites] != [
        own.model_copy(update={"folds": ()}) for own in part.sites
    ]:
        raise PlanError("the plan's sites are not what this model's graph says they are; make the plan anew.")
    whole = extended(skeleton, plan, found, left_out)
    narrowed = hf.skeleton(source)
    replay(narrowed, whole)
    check_alike(narrowed, left_out)
    return whole.model_copy(update={"tried": True})


def _check_space(staging: Path, files: dict[str, list[Written]]) -> None:
    """Raise InputError where the disk cannot hold what will be written."""
    there = sum(path.stat().st_size for path in staging.iterdir())
    needed = sum(one.target.bytes for tensors in files.values() for one in tensors) - there
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise InputError(f"{needed} bytes are to be written to {staging.parent}, where {free} are free.")


def _describe(source: Path, skeleton: Any, plan: Plan, staging: Path) -> None:
    """Write the narrowed skeleton's config, the generation config, the tokenizer's files and a model card."""
    skeleton.config.fxslim = plan.model_dump(mode="json", exclude_none=True)
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(staging)
    if skeleton.can_generate():
        generation = source / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, staging / generation.name)
        else:
            skeleton.generation_config.save_pretrained(staging)
    hf.copy_beside(source, staging)
    (staging / CARD).write_text(card(skeleton, Record(plan), source=source), encoding="utf-8")
