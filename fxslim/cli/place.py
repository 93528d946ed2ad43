"""Where results go: checked before the work, not only at its end."""

from __future__ import annotations

import os
from pathlib import Path

from fxslim.errors import InputError
from fxslim.folder import check_free


def check_folder(folder: Path, *, force: bool) -> None:
    """Raise InputError unless a folder can be written here."""
    check_free(folder.resolve(), force=force)
    _check_writable(next(parent for parent in folder.resolve().parents if os.path.lexists(parent)))


def check_file(path: Path, *, force: bool) -> None:
    """Raise InputError unless a file can be written here."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; choose a file to write to.")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists already; choose another file, or replace it with --force.")
    _check_writable(path.resolve().parent)


def _check_writable(folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is no folder that can be written to; choose another place.")
