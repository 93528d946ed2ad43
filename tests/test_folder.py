"""Writing a folder: all of it or nothing, and never over something that is not ours."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxslim.folder as folder_module
from fxslim.checkpoint.files import WEIGHTS, read_shard
from fxslim.errors import InputError, StorageError
from fxslim.folder import replacing


def checkpoint(folder: Path, text: str) -> Path:
    """Write a folder that looks like a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / WEIGHTS).touch()
    return folder


def content(folder: Path) -> dict[str, str]:
    """Return every file's text, but that of the weights."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != WEIGHTS)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


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
    with pytest.raises(InputError, match=r"home is not replaced: it holds no config\.json: it is no checkpoint"):
        write(tmp_path / "home", force=True)
    assert content(tmp_path / "home") == {"thesis.txt": "precious"}


def test_force_replaces_what_is_a_models_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    for name in ("1_Pooling", "head", "additional_chat_templates"):
        (folder / name).mkdir()
        (folder / name / "config.json").touch()
    (folder / "modules.json").write_text('[{"path": "head"}]')
    for name in ("README.md", "tokenizer.json", "training_args.bin", ".gitattributes", "vocab.txt", "modeling_own.py"):
        (folder / name).touch()
    write(folder, force=True)
    assert content(folder) == {"deep/file.txt": "new"}


@pytest.mark.parametrize("stranger", [".git", "src", "checkpoint-500"])
def test_force_does_not_delete_what_is_no_part_of_a_checkpoint(stranger: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    (folder / stranger).mkdir()
    (folder / stranger / "file").write_text("precious")
    with pytest.raises(
        InputError, match=rf"out is not replaced: it holds {stranger}, which is no part of a checkpoint"
    ):
        write(folder, force=True)
    assert content(folder) == {"config.json": "old", f"{stranger}/file": "precious"}


@pytest.mark.parametrize("stranger", ["main.py", "thesis.tex", "data.csv", "1_Pooling/notes.txt", "2024_results/a.csv"])
def test_force_does_not_delete_files_of_others(stranger: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "out", "old") / stranger
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(InputError, match=r"out is not replaced: it holds .*, which is no part of a checkpoint"):
        write(tmp_path / "out", force=True)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("content", ["firmware.bin", "pom.xml"])
def test_not_every_binary_is_a_weight(content: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("config.json", content):
        (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(InputError, match="neither weights nor a plan"):
        write(tmp_path / "out", force=True)


def test_a_config_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "main.py").write_text("precious")
    with pytest.raises(InputError, match=r"neither weights nor a plan: it is no checkpoint. Choose another folder"):
        write(tmp_path / "project", force=True)
    assert (tmp_path / "project" / "main.py").read_text() == "precious"


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


def killed_at(moment: int, folder: Path) -> bool:
    """Write a folder in a process that is killed at its n-th moment; tell whether it was.

    Moments are the lines of the writer, and whatever Python's audit sees of calls of the system (files that are opened,
    made, renamed, removed).
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = 0

    def pass_by() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != folder_module.__file__:
            return None
        if event == "line":
            pass_by()
        return trace

    sys.addaudithook(lambda event, args: pass_by() if event.split(".")[0] in ("os", "open", "shutil") else None)
    sys.settrace(trace)
    write(folder, force=True)
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux")
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    seen = []
    for moment in range(1, 10_000):
        was_killed = killed_at(moment, folder)
        found = content(folder)
        assert found in ({"config.json": "old"}, {"deep/file.txt": "new"}), moment
        seen.append("old" if "config.json" in found else "new")
        if not was_killed:
            break
        if seen[-1] == "new":
            shutil.rmtree(folder)
            checkpoint(folder, "old")
    else:
        raise AssertionError("the writer never came to its end")
    assert len(seen) > 100
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen == sorted(seen, reverse=True), "once the new folder is there, it stays"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the last writer tidies up what the killed ones left"


def test_an_old_folder_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    """Where folders cannot change places, a kill between two renames leaves the old one under another name."""
    checkpoint(tmp_path / ".out.0123abcd.old", "old")
    (tmp_path / ".out.notes.old").mkdir()  # somebody else's
    with pytest.raises(RuntimeError), replacing(tmp_path / "out", force=True):
        raise RuntimeError
    assert content(tmp_path / "out") == {"config.json": "old"}
    assert (tmp_path / ".out.notes.old").is_dir()


def test_of_two_writers_the_last_one_wins_whole(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    with replacing(folder, force=True) as one:
        checkpoint(one, "one")
        with replacing(folder, force=True) as other:
            checkpoint(other, "other")
        assert content(folder) == {"config.json": "other"}
    assert content(folder) == {"config.json": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_job_is_done_once_at_a_time_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), replacing(folder, job="0123abcd") as staging:  # noqa: PT012
        (staging / "first").write_text("1")
        with pytest.raises(InputError, match="another process is writing"), replacing(folder, job="0123abcd"):
            pass
        raise RuntimeError
    assert not folder.exists()
    with replacing(folder, job="0123abcd") as staging:
        assert content(staging) == {"first": "1"}
    assert content(folder) == {"first": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        said = r"out cannot be written: File too large\. What was there is as it was"
        with pytest.raises(InputError, match=said), replacing(folder, force=True) as staging:
            (staging / "large").write_bytes(bytes(5000))
        said = r"out cannot be written: .*os error 27"
        with pytest.raises(InputError, match=said), replacing(folder, force=True) as staging:
            save_file({"a": torch.zeros(5000)}, staging / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert content(folder) == {"config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_to_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="out cannot be written: Read-only file system"):
        write(tmp_path / "out")


def test_an_error_of_a_file_that_is_read_does_not_blame_the_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", "old")
    source = tmp_path / "source.json"

    def denied(number: int) -> OSError:
        return OSError(number, os.strerror(number), os.fspath(source))

    for error, said in (
        (denied(errno.EACCES), r"source\.json cannot be read: Permission denied\. .*out is as it was"),
        (denied(errno.EIO), r"source\.json cannot be read: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), "out cannot be written: Input/output error"),
    ):
        with pytest.raises(StorageError, match=said), replacing(folder, force=True):
            raise error
    with pytest.raises(StorageError, match="out cannot be written"), replacing(folder, force=True) as staging:
        raise OSError(errno.EACCES, "Permission denied", os.fspath(staging / "model.safetensors"))
    assert content(folder) == {"config.json": "old"}


def test_weights_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(5)}, tmp_path / WEIGHTS)
    (stored,) = read_shard(tmp_path / WEIGHTS).tensors

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read: Input/output error"):
        stored.read()


def test_a_writer_holds_the_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a writer's making its folder and holding it, another one tidies up, and a third one makes it again."""
    lock, took = folder_module._lock, []

    def slow(folder: Path) -> int | None:
        if len(took) == 0:  # gone before it is opened
            took.append(folder.rmdir())
            return lock(folder)
        held = lock(folder)
        if len(took) == 1:  # gone before it is held, and made again
            took.append(folder.rmdir())
            folder.mkdir()
        return held

    monkeypatch.setattr(folder_module, "_lock", slow)
    with replacing(tmp_path / "out", job="0123abcd") as staging:
        assert len(took) == 2
        assert lock(staging) is None, "somebody else could take what is there"
        (staging / "file").write_text("1")
    assert content(tmp_path / "out") == {"file": "1"}


def test_a_folder_put_aside_is_held_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer that tidies up between the two renames would put the old folder back into the way."""
    folder, rename = checkpoint(tmp_path / "out", "old"), Path.rename

    def watched(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            folder_module._tidy(folder, "partial", "old")
        return rename(self, target)

    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", watched)
    write(folder, force=True)
    assert content(folder) == {"deep/file.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_job_has_noted_is_there_until_everything_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fxslim.folder._sync", interrupted)
        with (  # noqa: PT012
            pytest.raises(KeyboardInterrupt),
            replacing(tmp_path / "out", job="0123abcd", leaves_out="done") as staging,
        ):
            (staging / "first").write_text("1")
            (staging / "done").write_text("first")
    with replacing(tmp_path / "out", job="0123abcd", leaves_out="done") as staging:
        assert content(staging) == {"first": "1", "done": "first"}
    assert content(tmp_path / "out") == {"first": "1"}
