"""Writing a folder: all of it or nothing, and never over something that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxslim.folder as folder_module
from fxslim.errors import InputError
from fxslim.folder import replacing


def checkpoint(folder: Path, text: str) -> Path:
    """Write a folder that looks like a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Return every file's text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *, force: bool = False) -> None:
    with replacing(folder, force=force) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "file.txt").write_text("new")


@pytest.mark.parametrize("empty", [False, True])
def test_a_new_folder_appears_whole(tmp_path: Path, empty: bool) -> None:
    folder = tmp_path / "parent" / "out"
    if empty:
        folder.mkdir(parents=True)
    write(folder)
    assert content(folder) == {"deep/file.txt": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_an_old_checkpoint_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    with pytest.raises(InputError, match="out exists already; choose another folder, or replace it with --force"):
        write(folder)
    assert content(folder) == {"config.json": "old"}
    write(folder, force=True)
    assert content(folder) == {"deep/file.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_delete_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"home holds no config\.json: it is no checkpoint"):
        write(tmp_path / "home", force=True)
    assert content(tmp_path / "home") == {"thesis.txt": "precious"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="out is a file"):
        write(tmp_path / "out", force=True)


@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_writing_leaves_the_old_folder_alone(tmp_path: Path, failure: BaseException) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    with pytest.raises(type(failure)), replacing(folder, force=True) as staging:  # noqa: PT012
        (staging / "config.json").write_text("half")
        raise failure
    assert content(folder) == {"config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_moving_into_place_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    rename = Path.rename

    def fail_on_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)  # a system that cannot
    monkeypatch.setattr(Path, "rename", fail_on_partial)
    with pytest.raises(OSError, match="no"):
        write(folder, force=True)
    assert content(folder) == {"config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), replacing(folder) as staging:  # noqa: PT012
        (staging / "config.json").write_text("ours")
        checkpoint(folder, "theirs")
    assert content(folder) == {"config.json": "theirs"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    real = checkpoint(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(real)
    write(tmp_path / "link", force=True)
    assert content(real) == {"deep/file.txt": "new"}
    assert (tmp_path / "link").is_symlink()
