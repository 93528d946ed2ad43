"""Write a folder, or files, so that nobody ever sees half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fxslim.errors import InputError

MARK = "config.json"
"""A folder that holds this file is a checkpoint, which ``force`` may replace. Any other is not ours to delete."""


@contextmanager
def replacing(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into, and put it in the place of ``folder`` when the block ends well.

    The new folder is made beside the old one, synced to disk, and renamed. If the block fails, it is deleted and
    ``folder`` is as it was. Replacing takes two renames: a process killed between them leaves the old content, whole,
    under a hidden name beside it (``.NAME.*.old``).

    Raises:
        InputError: ``folder`` exists and ``force`` is not given, or it does not look like a checkpoint.
    """
    folder = folder.resolve()
    check_free(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = uuid4().hex[:8]
    staging = folder.with_name(f".{folder.name}.{token}.partial")
    staging.mkdir()
    try:
        yield staging
        _sync(staging)
        check_free(folder, force=force)
        _swap(staging, folder, folder.with_name(f".{folder.name}.{token}.old"))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_files(contents: Mapping[Path, str]) -> None:
    """Write text files, each in one step: a reader sees the old file or the new one.

    All are made beside their places first: if one cannot be, none is replaced.

    Raises:
        OSError: a folder does not exist, or cannot be written to.
    """
    drafts = {path: path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial") for path in contents}
    try:
        for path, content in contents.items():
            drafts[path].write_text(content, encoding="utf-8")
            _sync_entry(drafts[path])
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def check_free(folder: Path, *, force: bool) -> None:
    """Raise InputError unless ``folder`` may be written: it does not exist, is empty, or is ours to replace."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder to write to.")
    if not any(folder.iterdir()):
        return
    if not force:
        raise InputError(f"{folder} exists already; choose another folder, or replace it with --force (force=True).")
    if not (folder / MARK).exists():
        raise InputError(f"{folder} holds no {MARK}: it is no checkpoint and is not replaced; choose another folder.")


def _swap(new: Path, folder: Path, aside: Path) -> None:
    """Rename ``new`` to ``folder``; what was there comes back if that fails, and goes for good if not."""
    if not folder.exists():
        new.rename(folder)
        _sync_entry(folder.parent)
        return
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    _sync_entry(folder.parent)
    shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    """Have every file and folder written to disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
