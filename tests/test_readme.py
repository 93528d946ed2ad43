"""The README and MIGRATING.md tell the truth: their Python runs, commands exist, files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import fxslim
from fxslim.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "MIGRATING.md")}


def blocks(language: str, page: str = "README.md") -> list[str]:
    """Return a page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return every command of the README's shell blocks, split into words."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks("python", page)])
def test_every_python_block_runs(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "readme"})


def test_there_are_examples_to_check() -> None:
    assert all(blocks("python", page) for page in PAGES)
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
    links = [link for page in PAGES.values() for link in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_name_that_migrating_imports_or_says_exists() -> None:
    page = PAGES["MIGRATING.md"]
    for names in re.findall(r"`from fxslim\.inc import ([\w, ]+)`", page):
        assert all(hasattr(fxslim.inc, name.strip()) for name in names.split(","))
    old = {name.strip() for names in re.findall(r"`from (?:neural|intel)[\w.]+ import ([\w, ]+)`", page)
           for name in names.split(",")}  # fmt: skip
    assert old and old <= set(fxslim.inc.__all__)
    assert all(hasattr(fxslim, name) for name in re.findall(r"`fxslim\.(\w+)", page))
