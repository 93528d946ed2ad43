"""What importing costs, and which way imports may run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

import fxslim

ROOT = Path(__file__).parents[1]

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"labels", "tables", "record"}),
    frozenset({"site", "edit"}),
    frozenset({"program", "plan", "overlay", "gather", "multihead", "spread"}),
    frozenset(
        {
            "functional",
            "measured",
            "sharing",
            "lazy",
            "mapped",
            "outofcore",
            "offloaded",
            "spelling",
            "trace",
            "dtypes",
            "exporter",
            "calls",
            "regions",
            "outside",
            "unite",
            "inputs",
            "flow",
            "match",
            "forms",
            "pipeline",
            "analysis",
            "text",
            "report",
            "count",
            "timer",
            "targets",
            "batches",
            "calibration",
            "folder",
            "express",
            "bounded",
            "replaceable",
            "transcript",
        }
    ),
    frozenset({"passes"}),
    frozenset({"asked", "api", "debug", "optimize"}),
    frozenset({"training", "draw", "harness"}),
    frozenset({"hf", "export", "checkpoint"}),
    frozenset({"cli", "demo"}),
    frozenset({"inc"}),
)
"""Modules of the package, from the ground up: each may import its own layer and those before it."""

TRANSFORMERS = frozenset({"hf", "cli", "demo", "gather", "express", "exporter", "callback", "trainer", "keys"})
"""Modules whose subject is transformers: nothing else imports it."""


def sources() -> Iterator[tuple[str, Path]]:
    """Yield every module of the package as (dotted name, file)."""
    for folder, package in ((ROOT / "fxslim", "fxslim"), (ROOT / "passes", "fxslim.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module == "fxslim":
                yield from ((node.lineno, f"fxslim.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def layer(module: str) -> int:
    """Return the place of ``fxslim.x.y`` among the layers."""
    top = module.split(".")[1]
    for index, names in enumerate(LAYERS):
        if top in names:
            return index
    raise AssertionError(f"{module} has no place in LAYERS; say which way its imports may run")


def test_importing_is_light() -> None:
    code = "import fxslim, sys; print(sorted({'torch', 'transformers', 'numpy', 'networkx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line_help_is_light() -> None:
    code = "import sys, fxslim.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fxslim.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fxslim, name) is not None


def test_importing_a_submodule_does_not_hide_the_function_of_that_name() -> None:
    code = "import fxslim.plan, fxslim; assert fxslim.plan.__name__ == 'plan' and callable(fxslim.plan), fxslim.plan"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fxslim' has no attribute 'prune'"):
        fxslim.prune  # noqa: B018


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {name}, which stands above it"
        for module, path in sources()
        if module != "fxslim"
        for line, name in imported(path)
        if name.startswith("fxslim.") and layer(name) > layer(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_transformers_is_imported_only_where_it_is_the_subject() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for module, path in sources()
        if not TRANSFORMERS & set(module.split(".")[1:]) or module.startswith("fxslim.passes")
        for line, name in imported(path)
        if name.split(".")[0] == "transformers"
    ]
    assert not wrong, f"transformers imported at {wrong}"


def test_passes_are_imported_as_part_of_the_package() -> None:
    files = [path for folder in ("fxslim", "passes", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    wrong = [f"{path}:{line}" for path in files for line, name in imported(path) if name.split(".")[0] == "passes"]
    assert not wrong, f"say `fxslim.passes`, not `passes`, at {wrong}"


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    places = {path.parent.relative_to(ROOT).parts for _, path in sources()}
    packages = {".".join(place if place[0] == "fxslim" else ("fxslim", *place)) for place in places}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages


def test_every_package_folder_has_an_init() -> None:
    missing = {path.parent for _, path in sources() if not (path.parent / "__init__.py").exists()}
    assert not missing
