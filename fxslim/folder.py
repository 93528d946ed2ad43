"""Write a folder, or files, so that nobody ever sees half of it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from fxslim.errors import InputError, StorageError
from fxslim.replaceable import foreign

try:
    import fcntl
except ImportError:  # not a POSIX system: two writers at once are told apart by their folders alone
    fcntl = None  # type: ignore[assignment]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of the system that only writing meets."""
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the system that say something about the disk, and nothing about us."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's ``renameat2``: paths are relative to the working directory, and the two change places."""


@contextmanager
def replacing(
    folder: Path, *, force: bool = False, job: str | None = None, leaves_out: str | None = None
) -> Iterator[Path]:
    """Give a folder to write into, and put it in the place of ``folder`` when the block ends well.

    The new folder is made beside the old one, synced to disk, and the two change places in one step. If the block
    fails, it is deleted and ``folder`` is as it was; a process killed at any moment leaves the old folder or the new
    one. Where the system cannot exchange folders, two renames do: a process killed between them leaves the old content,
    whole, under a hidden name (``.NAME.*.old``), and the next writer puts it back.

    Args:
        folder: where to; parents are made.
        force: replace a checkpoint that is there; a folder that holds anything else is not touched (`foreign`).
        job: a name for what is being done, a hexadecimal number. What a block of this name has written before it failed
            or was killed is kept (as ``.NAME.JOB.resume``), and the next block of this name gets it.
        leaves_out: a file of the block's own that goes once everything is on disk, just before the exchange.

    Raises:
        InputError: ``folder`` exists and ``force`` is not given, it does not look like a checkpoint, or somebody else
            is doing the same job.
        StorageError: the disk cannot be written to.
    """
    folder = folder.resolve()
    check_free(folder, force=force)
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder, "partial", "old")
        name = f"{uuid4().hex[:8]}.partial" if job is None else f"{job}.resume"
        staging = folder.with_name(f".{folder.name}.{name}")
        with _locked(staging, folder):
            try:
                yield staging
                _sync(staging)
                check_free(folder, force=force)
                if leaves_out is not None:
                    (staging / leaves_out).unlink(missing_ok=True)
                _put(staging, folder)
            except BaseException:
                if job is None or not (staging.is_dir() and any(staging.iterdir())):
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        if job is not None:
            _tidy(folder, "resume")


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files (text as UTF-8), each in one step: a reader sees the old file or the new one.

    All are made beside their places first: if one cannot be, none is replaced.

    Raises:
        OSError: a folder does not exist, or cannot be written to.
    """
    drafts = {path: path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial") for path in contents}
    try:
        for path, content in contents.items():
            drafts[path].write_bytes(content.encode() if isinstance(content, str) else content)
            _sync_entry(drafts[path])
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def check_free(folder: Path, *, force: bool) -> None:
    """Raise InputError unless ``folder`` may be written: it does not exist, is empty, or holds nothing but a model."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder to write to.")
    if not any(folder.iterdir()):
        return
    if not force:
        raise InputError(f"{folder} exists already; choose another folder, or replace it with --force (force=True).")
    if why := foreign(folder):
        raise InputError(f"{folder} is not replaced: {why}. Choose another folder, or empty this one yourself.")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the system says of the disk into a StorageError; a file elsewhere is one that the block reads."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        if error.errno not in FULL and (other := _elsewhere(error, folder)):
            raise StorageError(f"{other} cannot be read: {error.strerror}. {folder} is as it was.") from error
        raise StorageError(f"{folder} cannot be written: {error.strerror}. What was there is as it was.") from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise StorageError(f"{folder} cannot be written: {error}. What was there is as it was.") from error


def _elsewhere(error: OSError, folder: Path) -> str | None:
    """Return the file that an error is about, if that is neither in a folder, nor in what is written for it."""
    if not isinstance(error.filename, str | bytes):
        return None
    name = os.fsdecode(error.filename)
    path = Path(name).resolve()
    beside = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.(partial|resume|old)")
    within = (path, *path.parents)
    ours = folder in within or any(one.parent == folder.parent and beside.fullmatch(one.name) for one in within)
    return None if ours or path in folder.parents else name


@contextmanager
def _locked(staging: Path, folder: Path) -> Iterator[None]:
    """Make a folder, and hold it for as long as the block runs."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            held = _lock(staging)
        except FileNotFoundError:
            continue  # tidied away by another writer before it was opened
        if held is None:
            raise _busy(folder)
        if _is_at(held, staging):
            break
        os.close(held)  # tidied away before it was held; what is there now, if anything, is somebody else's
    try:
        yield
    finally:
        os.close(held)


def _busy(folder: Path) -> InputError:
    return InputError(f"another process is writing {folder} right now; wait for it, or choose another folder.")


def _is_at(held: int, folder: Path) -> bool:
    """Tell whether what was opened is what stands there now."""
    try:
        return os.path.samestat(os.fstat(held), folder.stat())
    except FileNotFoundError:
        return False


def _lock(folder: Path) -> int | None:
    """Open a folder and lock it for as long as it is open; None where somebody else holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _tidy(folder: Path, *kinds: str) -> None:
    """Take away what killed writers have left beside a folder, and put its old content back where it has none."""
    for kind in kinds if fcntl is not None else ():
        ours = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8,}}\.{kind}")
        for left in [path for path in folder.parent.iterdir() if ours.fullmatch(path.name) and path.is_dir()]:
            try:
                held = _lock(left)
            except FileNotFoundError:
                continue  # somebody else tidies up as well
            if held is None:
                continue
            if not _is_at(held, left):
                pass
            elif kind == "old" and not folder.exists():
                left.rename(folder)
            else:
                shutil.rmtree(left, ignore_errors=True)
            os.close(held)


def _put(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; what was there comes back if that fails, and goes for good if not."""
    if not folder.exists():
        new.rename(folder)
        _sync_entry(folder.parent)
        return
    aside = new
    if not _exchange(new, folder):
        aside = new.with_suffix(".old")
        _change_places(new, folder, aside)
    _sync_entry(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _change_places(new: Path, folder: Path, aside: Path) -> None:
    """Put a folder aside and a new one in its place, by two renames; hold it, or a writer that tidies puts it back."""
    held = _lock(folder)
    if held is None:
        raise _busy(folder)
    try:
        folder.rename(aside)
        try:
            new.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
    finally:
        os.close(held)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if exchange is None:
        return False
    if exchange(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


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
