"""The README tells the truth: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fxslim.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return every command of the README's shell blocks, split into words."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_to_check() -> None:
    assert blocks("python")
    assert commands()


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    asked = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= asked <= targets


def test_every_fxslim_command_and_option_exists() -> None:
    group = get_command(app)
    for words in (words for words in commands() if words[0] == "fxslim"):
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word for word in words[2:] if word.startswith("-")}
        assert asked <= known, f"{words}: {sorted(asked - known)}"


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
